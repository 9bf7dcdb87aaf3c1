"""Forward passes of a harvest, one batch after the other, shared among the ranks of a job.

Every rank reads its share of the batches and hands the rows to rank 0, which gets all batches in their order whatever
the number of ranks. What a batch gives depends on the batch alone, so the files are the same, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int
from numpy import ndarray
from torch import Tensor

from trimtab.activations.packing import PackedText, SequenceBatch, check_rows
from trimtab.activations.row_selection import candidates, capture_rows, check_finite, norms
from trimtab.activations.sequences import HarvestOptions, batch_order
from trimtab.activations.shards import Split
from trimtab.activations.staging import Staging
from trimtab.distributed import Ranks, Transfer
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site, site_width

_MEDIAN_ROWS = 8_192


class Stretch(NamedTuple):
    """Consecutive forward batches of a split, from `first` up to and without `stop`."""

    split: Split
    first: int
    stop: int


class BatchRows(NamedTuple):
    """A forward batch: what it gave by site, in CPU memory, of all B·T tokens, sequence after sequence."""

    split: Split
    number: int
    """Within the split."""
    sequences: SequenceBatch
    rows: dict[str, BFloat16[Tensor, "BT width"]]
    norms: dict[str, Float[Tensor, " BT"]]
    """In float32, of the rows before they were rounded."""


class ChosenRows(NamedTuple):
    """Rows of a batch that a harvest keeps."""

    place: Int[ndarray, " R"]
    """Among the batch's tokens."""
    origin: Int[ndarray, "4 R"]
    """Token, document, position, slot."""
    left_out: dict[str, int]
    """Tokens that do not become rows, by reason."""


class Forwards:
    """Runs forward batches of the packed text of each split, reading all sites in one pass."""

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[Site],
        packed: Mapping[Split, PackedText],
        options: HarvestOptions,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.sites, self.packed, self.options, self.ranks = model, sites, packed, options, ranks or Ranks()
        for text in packed.values():
            check_rows(text.corpus, model)
        self.order = {split: batch_order(text, options, split) for split, text in packed.items()}
        self.special = sorted(model.tokenizer.all_special_ids) if options.drop_special else []
        self.widths = {str(site): site_width(model, site) for site in sites}
        self.staging = Staging(model.device)
        self._kept: dict[tuple[Split, int], _Buffer] = {}

    def median_norms(self) -> dict[str, float]:
        """Median norm per site over the first training batches (about 8,000 rows), which are kept for `read`.

        Raises:
            UserError: none of their tokens may become a row, or an activation is not finite.
        """
        seen: dict[str, list[Tensor]] = {site: [] for site in self.widths}
        total = 0
        for number in range(len(self.order["train"])):
            batch = self._sequences("train", number)
            keep = torch.from_numpy(candidates(batch, self.special).keep.ravel())
            buffer = self._run(batch)
            buffer.wait()
            self._check_finite(batch, buffer.norms, keep)
            for site, found in buffer.norms.items():
                seen[site].append(found[keep])
            self._kept["train", number] = buffer
            total += int(keep.sum())
            if total >= _MEDIAN_ROWS:
                break
        if not total:
            raise UserError("the text", "every token is first in its sequence or special", "give more text")
        return {site: float(torch.cat(found).median()) for site, found in seen.items()}

    def choose(self, batch: BatchRows, norm_median: Mapping[str, float]) -> ChosenRows:
        """Which tokens of a batch become rows: candidates whose norms are usual at every site.

        Raises:
            UserError: an activation of a candidate is not finite.
        """
        tokens = batch.sequences
        keep, first, special = candidates(tokens, self.special)
        self._check_finite(tokens, batch.norms, torch.from_numpy(keep.ravel()))
        limit = {site: self.options.outlier_norm * median for site, median in norm_median.items()}
        usual = torch.stack([norms <= limit[site] for site, norms in batch.norms.items()]).all(0).numpy()
        chosen = np.flatnonzero(keep.ravel() & usual)
        slot = np.broadcast_to(np.arange(self.options.context, dtype=np.int32), keep.shape)
        origin = np.stack([a.ravel()[chosen] for a in (tokens.tokens, tokens.document, tokens.position, slot)])
        left_out = {"first": first, "special": special, "outlier": int(keep.sum()) - len(chosen)}
        return ChosenRows(chosen, origin, left_out)

    def _check_finite(self, batch: SequenceBatch, norms: Mapping[str, Tensor], keep: Tensor) -> None:
        place = keep.nonzero()[:, 0]
        for site, found in norms.items():
            check_finite(self.model, batch, place, found[place], site)

    def read(self, stretches: Sequence[Stretch]) -> Iterator[BatchRows]:
        """On rank 0: the batches of all stretches, in order, whichever rank ran them.

        Its own passes run while the others' rows come in and, on a card, while the rows of the batch before leave it,
        so that each rank has two batches on their way at most.

        Raises:
            RankLostError: another rank is gone.
        """
        waiting: deque[tuple[Split, int, SequenceBatch, _Buffer]] = deque()
        ahead = self.ranks.size if self.ranks.size > 1 or self.staging.overlaps else 0
        for turn, (split, number) in enumerate(_each(stretches)):
            batch = self._sequences(split, number)
            owner = turn % self.ranks.size
            if owner == 0:
                buffer = self._kept.pop((split, number), None) or self._run(batch)
            else:
                buffer = self._buffer(batch)
                buffer.transfer = self.ranks.receive(buffer.bytes, owner)
            waiting.append((split, number, batch, buffer))
            if len(waiting) > ahead:
                yield _arrived(*waiting.popleft())
        while waiting:
            yield _arrived(*waiting.popleft())

    def serve(self, stretches: Sequence[Stretch]) -> None:
        """On every other rank: run this rank's batches and send their rows.

        Raises:
            RankLostError: rank 0 is gone.
        """
        done: deque[_Buffer] = deque()
        sent: deque[_Buffer] = deque()

        def send(buffer: _Buffer) -> None:
            buffer.wait()
            if sent:  # one message on its way: a rank runs no further ahead of rank 0
                sent.popleft().wait()
            buffer.transfer = self.ranks.send(buffer.bytes, 0)
            sent.append(buffer)

        for turn, (split, number) in enumerate(_each(stretches)):
            if turn % self.ranks.size == self.ranks.rank:
                done.append(self._run(self._sequences(split, number)))
                if len(done) > self.staging.overlaps:  # rows leave the device while it works on the next batch
                    send(done.popleft())
        for buffer in done:
            send(buffer)
        for buffer in sent:
            buffer.wait()

    def _sequences(self, split: Split, number: int) -> SequenceBatch:
        return self.packed[split].batch(self.order[split][number])

    def _buffer(self, batch: SequenceBatch) -> _Buffer:
        return _Buffer(self.widths, batch.tokens.size, self.staging)

    def _run(self, batch: SequenceBatch) -> _Buffer:
        buffer, pairs = self._buffer(batch), list[tuple[Tensor, Tensor]]()
        for site, x in capture_rows(self.model, batch, self.sites, autocast=self.options.autocast).items():
            rounded = x.bfloat16() if self.staging.overlaps else x  # half the bytes to move
            pairs += [(rounded, buffer.rows[str(site)]), (norms(x), buffer.norms[str(site)])]
        buffer.copied = self.staging.copy(pairs)
        return buffer


class _Buffer:
    """Room for what a batch gives, in one piece, so that it travels as one message."""

    def __init__(self, widths: Mapping[str, int], tokens: int, staging: Staging) -> None:
        size = tokens * sum(4 + 2 * width for width in widths.values())
        self.bytes = staging.room(size)
        self.rows: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.transfer: Transfer | None = None
        self.copied: Callable[[], None] | None = None
        norms_start, rows_start = 0, 4 * tokens * len(widths)  # norms first: float32 must be aligned
        for site, width in widths.items():
            norms_stop, rows_stop = norms_start + 4 * tokens, rows_start + 2 * tokens * width
            self.rows[site] = self.bytes[rows_start:rows_stop].view(torch.bfloat16).view(tokens, width)
            self.norms[site] = self.bytes[norms_start:norms_stop].view(torch.float32)
            norms_start, rows_start = norms_stop, rows_stop

    def wait(self) -> None:
        if self.copied is not None:
            self.copied()
        if self.transfer is not None:
            self.transfer.wait()


def _arrived(split: Split, number: int, batch: SequenceBatch, buffer: _Buffer) -> BatchRows:
    buffer.wait()
    return BatchRows(split, number, batch, buffer.rows, buffer.norms)


def _each(stretches: Sequence[Stretch]) -> Iterator[tuple[Split, int]]:
    for stretch in stretches:
        for number in range(stretch.first, stretch.stop):
            yield stretch.split, number
