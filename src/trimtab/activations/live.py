"""Activations straight from the model, without a disk: harvested when the buffer has run empty, not before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from jaxtyping import BFloat16
from torch import Tensor

from trimtab.activations.forwards import Forwards
from trimtab.activations.packing import SequenceBatch, TokenisedCorpus, tokenise
from trimtab.activations.row_selection import candidates, capture_rows, check_finite, norms
from trimtab.activations.row_sources import PooledSource
from trimtab.activations.sequences import HarvestOptions, pack_splits
from trimtab.activations.shards import Split
from trimtab.activations.text import Document
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site
from trimtab.lm.transfers import to_device


class LiveSource(PooledSource):
    """Activations of a site, computed as they are needed; the counterpart of `ShardSource`.

    A pool of `buffer_rows` is harvested when the one before is used up: the model never runs ahead of training and no
    row is dropped. How many rows a sequence gives must be known without running the model, so that any step can be
    sought; hence an outlier (one row in ten thousand) is not left out but replaced by another row of its pool. Pools
    and batches are where the model is, so that a training there moves no row.

    Args:
        model: the model.
        site: the site.
        documents: the text, or its tokens.
        split: `train` or `holdout`.
        buffer_rows: rows harvested and shuffled together; they take `2 · buffer_rows · d` bytes.
        seed: of the order.
        options: as for a harvest; its seed and shard size are not used.

    Raises:
        UserError: the site is unknown, or there is too little text.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: Site | str,
        documents: Iterable[Document] | TokenisedCorpus,
        *,
        split: Split = "train",
        buffer_rows: int = 65_536,
        seed: int = 0,
        options: HarvestOptions | None = None,
    ) -> None:
        self.model, self.site, self.device = model, model.site(site), model.device
        self.options = options = options or HarvestOptions()
        self.corpus = documents if isinstance(documents, TokenisedCorpus) else tokenise(documents, model.tokenizer)
        splits = pack_splits(self.corpus, options)
        forwards = Forwards(model, [self.site], splits, options)
        self.packed, self.special = splits[split], forwards.special
        self.norm_median = forwards.median_norms()[str(self.site)]
        parts = [range(i, min(i + 256, len(self.packed))) for i in range(0, len(self.packed), 256)]
        counts = [candidates(self.packed.batch(part), self.special).keep.sum(1) for part in parts]
        rows = np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
        if not rows.sum():
            raise UserError(f"the {split} text", "it does not fill one sequence", "give more text")
        super().__init__(rows.tolist(), buffer_rows, seed, forwards.widths[str(self.site)], split)
        self.replaced = 0

    @property
    def description(self) -> dict[str, object]:
        """What the rows are of."""
        of = {"model_fingerprint": self.model.fingerprint, **asdict(self.options)}
        return self.described("live", self.model.name, str(self.site), of, [self.corpus.hash], [self.norm_median])

    def read_blocks(self, blocks: Sequence[int]) -> BFloat16[Tensor, "n d"]:
        """Rows of some sequences, one sequence after the other."""
        total = sum(self.block_rows[b] for b in blocks)
        pool, filled = torch.empty(total, self.d, dtype=torch.bfloat16, device=self.device), 0
        lengths = torch.empty(total, device=self.device)
        ran: list[tuple[SequenceBatch, Tensor]] = []
        rest = iter(blocks)
        while chunk := list(islice(rest, self.options.batch_size)):
            batch = self.packed.batch(chunk)
            keep = torch.from_numpy(np.flatnonzero(candidates(batch, self.special).keep))
            x = capture_rows(self.model, batch, [self.site], autocast=self.options.autocast)[self.site]
            rows = x.index_select(0, to_device(keep, x.device))
            place = slice(filled, filled + len(rows))
            pool[place].copy_(rows)
            lengths[place].copy_(norms(rows))
            filled += len(rows)
            ran.append((batch, keep))
        found = lengths.cpu()  # which waits for the device, once
        for (batch, keep), own in zip(ran, found.split([len(keep) for _, keep in ran]), strict=True):
            check_finite(self.model, batch, keep, own, self.site)
        usual = found <= self.options.outlier_norm * self.norm_median
        outliers, others = torch.where(~usual)[0], torch.where(usual)[0]
        if len(outliers) and len(others):
            pool[outliers] = pool[others[torch.arange(len(outliers)) * 7919 % len(others)]]
            self.replaced += len(outliers)
        return pool
