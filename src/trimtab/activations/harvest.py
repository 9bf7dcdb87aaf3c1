"""Run a model over text and keep its activations at some sites, as shards on disk.

Sequences are visited in a random order fixed by the seed, so that every shard is a sample of the whole corpus;
held-out documents come first, in shards of their own. After a kill at any moment, the same call goes on behind the last
finished shard and ends with the same files as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from trimtab.activations.packing import PackedText, TokenisedCorpus, tokenise
from trimtab.activations.rows import candidates, capture_rows, norms
from trimtab.activations.shards import (
    INDEX_FILE,
    ShardIndex,
    ShardReader,
    ShardWriter,
    Split,
    StreamPosition,
    read_index,
    write_documents,
    write_index,
)
from trimtab.activations.text import Document
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site
from trimtab.runs import split_ids

SPLITS: tuple[Split, ...] = ("holdout", "train")
_MEDIAN_ROWS = 8_192


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """What decides which rows a harvest gives, beside model, sites and text."""

    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    batch: int = 8
    """Sequences per forward pass."""
    autocast: bool = False
    """Run matrix products in bfloat16, the residual stream staying in the model's dtype: faster on
    processors with bfloat16 matrix units and on accelerators."""
    holdout: float = 0.05
    """Share of the documents kept out of training; a document's id decides."""
    seed: int = 0
    """Of the order of sequences and of the shuffle within shards."""
    shard_rows: int = 65_536
    """Rows of a shard, which is also the block that is shuffled."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm."""
    drop_special: bool = True
    """Leave out special tokens, chat markup among them; position 0 of a sequence is always left out."""

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("context", self.context >= 2, "at least 2"),
            ("batch", self.batch >= 1, "at least 1"),
            ("holdout", 0 <= self.holdout < 1, "a share below 1"),
            ("shard_rows", self.shard_rows >= 1, "at least 1"),
            ("outlier_norm", self.outlier_norm > 1, "above 1"),
        ):
            if not ok:
                raise UserError(
                    f"{name} {getattr(self, name)}", f"it must be {rule}", f"change --{name.replace('_', '-')}"
                )


class HarvestProgress(NamedTuple):
    """How far a harvest is."""

    sequences: int
    total_sequences: int
    rows: int
    tokens_per_second: float
    """Of this call, tokens that were left out included."""


class HarvestResult(NamedTuple):
    """What a harvest left on disk."""

    directory: Path
    train_rows: int
    holdout_rows: int
    dropped: dict[str, int]
    """Tokens left out, by reason: first, special, outlier."""
    norm_median: dict[str, float]
    corpus_hash: str
    seconds: float
    """Of this call; 0 if everything was there."""
    tokens_per_second: float


def split_corpus(corpus: TokenisedCorpus, holdout: float) -> ndarray:
    """Which documents are held out, `[documents]` bool: decided by each document's id alone."""
    held_out = set(split_ids(corpus.ids, {"holdout": holdout, "train": 1 - holdout}, "activations")["holdout"])
    return np.array([name in held_out for name in corpus.ids])


def pack_splits(corpus: TokenisedCorpus, options: HarvestOptions) -> dict[Split, PackedText]:
    """Training and held-out documents, packed apart.

    Raises:
        UserError: the training text does not fill one sequence.
    """
    held_out = split_corpus(corpus, options.holdout)
    packed: dict[Split, PackedText] = {
        "holdout": PackedText(corpus, np.flatnonzero(held_out).astype(np.int32), options.context),
        "train": PackedText(corpus, np.flatnonzero(~held_out).astype(np.int32), options.context),
    }
    if not len(packed["train"]):
        raise UserError(
            f"text of {packed['train'].n_tokens} tokens",
            f"it does not fill one sequence of {options.context}",
            "give more text or a smaller --context",
        )
    return packed


class SiteScale(NamedTuple):
    """What the first batches tell about a site."""

    norm: float
    """Median norm of its rows."""
    width: int


def median_norms(
    model: LanguageModel, sites: Sequence[Site], packed: PackedText, special_ids: Sequence[int], options: HarvestOptions
) -> dict[str, SiteScale]:
    """Median norm per site over the first batches of some text (about 8,000 rows).

    Raises:
        UserError: none of its tokens may become a row.
    """
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    widths: dict[Site, int] = {}
    total = 0
    for sequences in batch_order(packed, options, "train"):
        batch = packed.batch(sequences)
        rows = capture_rows(model, batch, sites, candidates(batch, special_ids).keep, autocast=options.autocast)
        for site, x in rows.items():
            seen[site].append(norms(x))
            widths[site] = x.shape[1]
        total += len(rows[sites[0]])
        if total >= _MEDIAN_ROWS:
            break
    if not total:
        raise UserError("the text", "every token is first in its sequence or special", "give more text")
    return {str(site): SiteScale(float(torch.cat(x).median()), widths[site]) for site, x in seen.items()}


def batch_order(packed: PackedText, options: HarvestOptions, split: Split) -> list[ndarray]:
    """Indices of the sequences of every forward batch, in the order of a harvest."""
    n, size = len(packed), options.batch
    order = np.random.default_rng([options.seed, SPLITS.index(split)]).permutation(n)
    return [order[i : i + size] for i in range(0, n, size)]


def harvest(
    model: LanguageModel,
    sites: Sequence[Site | str],
    documents: Iterable[Document] | TokenisedCorpus,
    out_dir: str | Path,
    options: HarvestOptions | None = None,
    progress: Callable[[HarvestProgress], None] | None = None,
) -> HarvestResult:
    """Write the activations of a model at some sites as shards; go on where an earlier call was cut off.

    With several sites all come from one pass, row for row the same tokens: a token that is an outlier at one site is
    left out at all.

    Raises:
        UserError: a site is unknown, there is too little text, the directory holds another harvest, the disk is full.
    """
    harvester = _Harvester(
        model, [model.site(s) for s in sites], documents, Path(out_dir), options or HarvestOptions(), progress
    )
    return harvester.run()


class _Harvester:
    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[Site],
        documents: Iterable[Document] | TokenisedCorpus,
        directory: Path,
        options: HarvestOptions,
        progress: Callable[[HarvestProgress], None] | None,
    ) -> None:
        if not sites or len(set(sites)) != len(sites):
            raise UserError(
                f"sites {', '.join(map(str, sites)) or '(none)'}", "each must be named once", "change --site"
            )
        self.model, self.sites, self.options, self.directory, self.progress = model, sites, options, directory, progress
        self.corpus = documents if isinstance(documents, TokenisedCorpus) else tokenise(documents, model.tokenizer)
        self.packed = pack_splits(self.corpus, options)
        self.special = sorted(model.tokenizer.all_special_ids) if options.drop_special else []
        self.started, self.sequences_done = time.perf_counter(), 0

    def run(self) -> HarvestResult:
        index = self._open_index()
        writer = ShardWriter(self.directory, index.widths, self.options.shard_rows, self.options.seed)
        for shard in self._damaged(index):
            redone = next(self._shards(writer, shard.start, index, shard.number))[0]
            index = replace(index, shards=tuple(redone if s is shard else s for s in index.shards))
            write_index(self.directory, index)
        if not index.complete:
            number = len(index.of(index.next.split))
            for shard, position, dropped in self._shards(writer, index.next, index, number):
                index = replace(index, shards=(*index.shards, shard), next=position, dropped=dropped)
                write_index(self.directory, index)
            index = replace(index, dropped=self.dropped, complete=True)
            write_index(self.directory, index)
        seconds = time.perf_counter() - self.started if self.sequences_done else 0.0
        return HarvestResult(
            self.directory, index.rows("train"), index.rows("holdout"), index.dropped, index.norm_median,
            self.corpus.hash, seconds, self.sequences_done * self.options.context / seconds if seconds else 0.0,
        )  # fmt: skip

    def _shards(
        self, writer: ShardWriter, start: StreamPosition, index: ShardIndex, number: int
    ) -> Iterator[tuple[Any, StreamPosition, dict[str, int]]]:
        """Shards from a position of the stream on, each with the position behind it and the counts up to there.

        The counts cover whole batches: of the batch in which a shard ends, none; it is run again on resuming.
        """
        self.dropped = dict(index.dropped)
        shard_start = start
        for split in SPLITS[SPLITS.index(start.split) :]:
            batches = batch_order(self.packed[split], self.options, split)
            first = start.batch if split == start.split else 0
            if split != start.split:
                number, shard_start = 0, StreamPosition(split, 0, 0)
            for b in range(first, len(batches)):
                rows, origin, dropped = self._rows(split, batches[b], index.norm_median)
                offset = start.skip if (split, b) == (start.split, start.batch) else 0
                while offset < origin.shape[1]:
                    offset += writer.append({s: x[offset:] for s, x in rows.items()}, origin[:, offset:])
                    if writer.is_full:
                        behind = StreamPosition(split, b, offset)
                        yield writer.write(split, number, shard_start), behind, dict(self.dropped)
                        number, shard_start = number + 1, behind
                for reason, count in dropped.items():
                    self.dropped[reason] = self.dropped.get(reason, 0) + count
                self._report(split, len(batches[b]), b, writer.filled)
            if writer.filled:
                behind = StreamPosition(split, len(batches), 0)
                yield writer.write(split, number, shard_start), behind, dict(self.dropped)

    def _rows(
        self, split: Split, sequences: ndarray, median: dict[str, float]
    ) -> tuple[dict[str, Tensor], ndarray, dict[str, int]]:
        """Kept rows per site, their origin `[4, R]`, and how many tokens were left out."""
        batch = self.packed[split].batch(sequences)
        keep, first, special = candidates(batch, self.special)
        rows = capture_rows(self.model, batch, self.sites, keep, autocast=self.options.autocast)
        slot = np.broadcast_to(np.arange(self.options.context, dtype=np.int32), keep.shape)
        origin = np.stack([a[keep] for a in (batch.tokens, batch.document, batch.position, slot)])
        usual = torch.stack(
            [norms(x) <= self.options.outlier_norm * median.get(str(s), torch.inf) for s, x in rows.items()]
        ).all(0)
        outliers = int((~usual).sum())
        if outliers:
            rows = {s: x[usual] for s, x in rows.items()}
            origin = origin[:, usual.cpu().numpy()]
        return {str(s): x for s, x in rows.items()}, origin, {"first": first, "special": special, "outlier": outliers}

    def _open_index(self) -> ShardIndex:
        identity = {
            "model_fingerprint": self.model.fingerprint,
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "sites": [str(s) for s in self.sites],
            "corpus_hash": self.corpus.hash,
            **asdict(self.options),
        }
        if (self.directory / INDEX_FILE).exists():
            index = read_index(self.directory)
            for name in identity:
                if index.identity.get(name) != identity[name]:
                    raise UserError(
                        f"harvest in {self.directory}",
                        f"{name} was {index.identity.get(name)} and is {identity[name]}",
                        "use the same settings, or another directory",
                    )
            return index
        self.directory.mkdir(parents=True, exist_ok=True)
        scales = median_norms(self.model, self.sites, self.packed["train"], self.special, self.options)
        write_documents(
            self.directory, self.corpus.ids, self.corpus.sources, split_corpus(self.corpus, self.options.holdout)
        )
        index = ShardIndex(
            identity=identity,
            model=self.model.name,
            corpus={
                "documents": len(self.corpus.ids),
                "tokens": len(self.corpus.tokens),
                "sequences": {split: len(self.packed[split]) for split in SPLITS},
            },
            widths={site: scale.width for site, scale in scales.items()},
            norm_median={site: scale.norm for site, scale in scales.items()},
            next=StreamPosition(SPLITS[0], 0, 0),
        )
        write_index(self.directory, index)
        return index

    def _damaged(self, index: ShardIndex) -> list[Any]:
        reader, bad = ShardReader(self.directory), []
        for shard in index.shards:
            try:
                for file in shard.files:
                    reader.check(file)
            except UserError:
                bad.append(shard)
        return bad

    def _report(self, split: Split, sequences: int, batch: int, filled: int) -> None:
        self.sequences_done += sequences
        if self.progress is None:
            return
        before = sum(len(self.packed[s]) for s in SPLITS[: SPLITS.index(split)])
        rate = self.sequences_done * self.options.context / (time.perf_counter() - self.started)
        done = before + min((batch + 1) * self.options.batch, len(self.packed[split]))
        self.progress(HarvestProgress(done, sum(map(len, self.packed.values())), filled, rate))
