"""Run a model over text and keep its activations at some sites, as shards on disk.

Sequences are visited in a random order fixed by the seed, so that every shard is a sample of the whole corpus;
held-out documents come first, in shards of their own. After a kill at any moment, the same call goes on behind the last
finished shard and ends with the same files as an uninterrupted one, on any number of ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.activations.forwards import BatchRows, Forwards, Stretch
from trimtab.activations.packing import TokenisedCorpus, tokenise
from trimtab.activations.sequences import SPLITS, HarvestOptions, pack_splits, split_corpus
from trimtab.activations.shard_writer import ShardWriter
from trimtab.activations.shards import (
    INDEX_FILE,
    Shard,
    ShardIndex,
    ShardReader,
    StreamPosition,
    read_index,
    write_documents,
    write_index,
)
from trimtab.activations.text import Document
from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site
from trimtab.runs import Meter

SHARDS_BESIDE_A_CARD = 3
"""Shards that are shuffled, hashed and written at once while a card computes. A model on the CPU needs the cores
itself: there it is one."""


class HarvestProgress(NamedTuple):
    """How far a harvest is."""

    sequences: int
    total_sequences: int


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


def harvest(
    model: LanguageModel,
    sites: Sequence[Site | str],
    documents: Iterable[Document] | TokenisedCorpus,
    out_dir: str | Path,
    options: HarvestOptions | None = None,
    progress: Callable[[HarvestProgress], None] | None = None,
    ranks: Ranks | None = None,
) -> HarvestResult:
    """Write the activations of a model at some sites as shards; go on where an earlier call was cut off.

    With several sites all come from one pass, row for row the same tokens: a token that is an outlier at one site is
    left out at all.

    Args:
        model: the model; every rank has its own.
        sites: what to read.
        documents: the text, or its tokens; the same on every rank.
        out_dir: where to write. Only rank 0 does.
        options: which rows.
        progress: called after every forward batch, on rank 0; by default a bar on stderr.
        ranks: processes that share the forward passes; the files do not depend on how many there are.

    Raises:
        UserError: a site is unknown, there is too little text, the directory holds another harvest, the disk is full,
            or another rank was lost (`RankLostError`).
    """
    with _Bar() as bar:
        harvester = _Harvester(
            model,
            [model.site(s) for s in sites],
            documents if isinstance(documents, TokenisedCorpus) else tokenise(documents, model.tokenizer),
            Path(out_dir),
            options or HarvestOptions(),
            progress or bar.show,
            ranks or Ranks(),
        )
        return harvester.run()


class _Bar(ExitStack):
    """A bar on stderr, whose length is known once the harvest has packed its text."""

    meter: Meter | None = None

    def show(self, state: HarvestProgress) -> None:
        if self.meter is None:
            self.meter = self.enter_context(Meter("harvesting, sequences", state.total_sequences))
        self.meter.advance(state.sequences - self.meter.completed)


class _Harvester:
    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[Site],
        corpus: TokenisedCorpus,
        directory: Path,
        options: HarvestOptions,
        progress: Callable[[HarvestProgress], None],
        ranks: Ranks,
    ) -> None:
        if not sites or len(set(sites)) != len(sites):
            raise UserError(
                f"sites {', '.join(map(str, sites)) or '(none)'}", "each must be named once", "change --site"
            )
        self.model, self.corpus, self.options, self.directory = model, corpus, options, directory
        self.progress, self.ranks = progress, ranks
        self.forwards = Forwards(model, sites, pack_splits(corpus, options), options, ranks)
        self.identity: dict[str, Any] = {
            "model_fingerprint": model.fingerprint,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "sites": [str(s) for s in sites],
            "corpus_hash": corpus.hash,
            **{"batch" if name == "batch_size" else name: value for name, value in asdict(options).items()},
        }
        self.started, self.sequences_done = time.perf_counter(), 0

    def run(self) -> HarvestResult:
        identities = self.ranks.gather(self.identity)
        if identities is None:
            self.forwards.serve(self.ranks.broadcast())
            return self.ranks.broadcast()
        self._check_ranks(identities)
        self.index = self._open_index()
        damaged = self._damaged()
        redo = [self._stretch_of(shard) for shard in damaged]
        rest, go_on = list[Stretch](), self.index.next
        for split in () if self.index.complete else SPLITS[SPLITS.index(go_on.split) :]:
            first = go_on.batch if split == go_on.split else 0
            rest.append(Stretch(split, first, len(self.forwards.order[split])))
        self.ranks.broadcast([*redo, *rest])
        batches = self.forwards.read([*redo, *rest])
        if redo or rest:
            shape = self.index.widths, self.options.shard_rows, self.options.seed
            at_once = SHARDS_BESIDE_A_CARD if self.forwards.staging.overlaps else 1
            with ShardWriter(self.directory, *shape, at_once=at_once) as writer:
                for shard, stretch in zip(damaged, redo, strict=True):
                    self._redo(writer, shard, _take(batches, stretch))
                self._go_on(writer, batches, rest)
        return self.ranks.broadcast(self._result())

    def _redo(self, writer: ShardWriter, shard: Shard, batches: Iterator[BatchRows]) -> None:
        """Write a shard again, in its place in the index."""
        skip, left = shard.start.skip, shard.rows
        for batch in batches:
            chosen, origin, _ = self.forwards.choose(batch, self.index.norm_median)
            part = slice(skip, skip + left)
            writer.append(batch.rows, chosen[part], origin[:, part])
            skip, left = 0, left - len(chosen[part])
            self._report(batch)

        def record(redone: Shard) -> None:
            shards = tuple(redone if s is shard else s for s in self.index.shards)
            self._set_index(replace(self.index, shards=shards))

        writer.write(shard.split, shard.number, shard.start, record)
        writer.flush()

    def _go_on(self, writer: ShardWriter, batches: Iterator[BatchRows], stretches: Sequence[Stretch]) -> None:
        """Write every shard from `index.next` on.

        The counts of tokens left out that go with a shard cover whole batches: of the batch in which it ends, none; it
        is run again on resuming.
        """
        dropped = Counter(self.index.dropped)
        start, number = self.index.next, len(self.index.of(self.index.next.split))

        def write(behind: StreamPosition) -> None:
            counts = dict(dropped)

            def record(shard: Shard) -> None:
                shards = (*self.index.shards, shard)
                self._set_index(replace(self.index, shards=shards, next=behind, dropped=counts))

            writer.write(start.split, number, start, record)

        for stretch in stretches:
            if stretch.split != start.split:
                start, number = StreamPosition(stretch.split, 0, 0), 0
            skip = start.skip
            for batch in _take(batches, stretch):
                chosen, origin, left_out = self.forwards.choose(batch, self.index.norm_median)
                place, skip = skip, 0
                while place < len(chosen):
                    part = slice(place, place + writer.room)
                    writer.append(batch.rows, chosen[part], origin[:, part])
                    place += len(chosen[part])
                    if not writer.room:
                        behind = StreamPosition(batch.split, batch.number, place)
                        write(behind)
                        start, number = behind, number + 1
                dropped.update(left_out)
                self._report(batch)
            if writer.filled:
                write(StreamPosition(stretch.split, stretch.stop, 0))
        writer.flush()
        if stretches:
            self._set_index(replace(self.index, dropped=dict(dropped), complete=True))

    def _stretch_of(self, shard: Shard) -> Stretch:
        """The batches that a finished shard's rows come from."""
        following = [s.start for s in self.index.of(shard.split) if s.number == shard.number + 1]
        following += [self.index.next] if self.index.next.split == shard.split else []
        if not following:
            return Stretch(shard.split, shard.start.batch, len(self.forwards.order[shard.split]))
        return Stretch(shard.split, shard.start.batch, following[0].batch + (following[0].skip > 0))

    def _open_index(self) -> ShardIndex:
        if (self.directory / INDEX_FILE).exists():
            index = read_index(self.directory)
            for name, value in self.identity.items():
                if index.identity.get(name) != value:
                    raise UserError(
                        f"harvest in {self.directory}",
                        f"{name} was {index.identity.get(name)} and is {value}",
                        "use the same settings, or another directory",
                    )
            return index
        medians = self.forwards.median_norms()  # what is refused leaves no directory
        self.directory.mkdir(parents=True, exist_ok=True)
        write_documents(
            self.directory, self.corpus.ids, self.corpus.sources, split_corpus(self.corpus, self.options.holdout)
        )
        index = ShardIndex(
            identity=self.identity,
            model=self.model.name,
            corpus={
                "documents": len(self.corpus.ids),
                "tokens": len(self.corpus.tokens),
                "sequences": {split: len(self.forwards.packed[split]) for split in SPLITS},
            },
            widths=self.forwards.widths,
            norm_median=medians,
            next=StreamPosition(SPLITS[0], 0, 0),
        )
        write_index(self.directory, index)
        return index

    def _set_index(self, index: ShardIndex) -> None:
        write_index(self.directory, index)
        self.index = index

    def _check_ranks(self, identities: Sequence[dict[str, Any]]) -> None:
        for rank, identity in enumerate(identities):
            for name, value in self.identity.items():
                if identity[name] != value:
                    raise UserError(
                        f"rank {rank}",
                        f"its {name} is {identity[name]}, that of rank 0 {value}",
                        "give every rank the same model, text and options",
                    )

    def _damaged(self) -> list[Shard]:
        reader, bad = ShardReader(self.directory), []
        for shard in self.index.shards:
            try:
                for file in shard.files:
                    reader.check(file)
            except UserError:
                bad.append(shard)
        return bad

    def _report(self, batch: BatchRows) -> None:
        self.sequences_done += len(batch.sequences.tokens)
        packed = self.forwards.packed
        before = sum(len(packed[s]) for s in SPLITS[: SPLITS.index(batch.split)])
        done = before + min((batch.number + 1) * self.options.batch_size, len(packed[batch.split]))
        self.progress(HarvestProgress(done, sum(map(len, packed.values()))))

    def _result(self) -> HarvestResult:
        index = self.index
        seconds = time.perf_counter() - self.started if self.sequences_done else 0.0
        return HarvestResult(
            self.directory, index.rows("train"), index.rows("holdout"), index.dropped, index.norm_median,
            self.corpus.hash, seconds, self.sequences_done * self.options.context / seconds if seconds else 0.0,
        )  # fmt: skip


def _take(batches: Iterator[BatchRows], stretch: Stretch) -> Iterator[BatchRows]:
    return islice(batches, stretch.stop - stretch.first)
