"""Rows of activations for examples: from a model as it reads text, or from a finished harvest, without the model.

Both give the same rows in the same order: those that `harvest` keeps, in bfloat16, in stretches that are whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import BFloat16
from numpy import ndarray
from torch import Tensor

from trimtab.activations import HarvestOptions, TokenisedCorpus
from trimtab.activations.forwards import Forwards, Stretch
from trimtab.activations.sequences import SPLITS, pack_splits
from trimtab.activations.shard_writer import shard_order
from trimtab.activations.shards import DOCUMENTS_FILE, ORIGIN_COLUMNS, Shard, ShardIndex, ShardReader, read_index
from trimtab.dictionaries.example_collector import Places
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site

BLOCK_ROWS = 2_048
"""Rows of a shard that are encoded at once."""


class Block(NamedTuple):
    """Some rows by site, and where they stand."""

    rows: dict[str, BFloat16[Tensor, "R width"]]
    places: Places


class RowBlocks(Protocol):
    """Blocks of rows in steps; whoever was stopped goes on from any step."""

    total: int
    """Steps."""
    documents: tuple[str, ...]
    """Ids."""
    corpus_hash: str
    sink_filter: str
    """What is left out, in words."""

    def read(self, first: int) -> Iterator[list[Block]]:
        """What each step gives, from one on."""
        ...


class TextBlocks:
    """Rows of a model on text, a forward batch a step.

    Raises:
        UserError: there is too little text, or the model's activations are not finite.
    """

    def __init__(
        self, model: LanguageModel, sites: Sequence[Site], corpus: TokenisedCorpus, options: HarvestOptions
    ) -> None:
        self.forwards = Forwards(model, sites, pack_splits(corpus, options), options)
        self.total = len(self.forwards.order["train"])
        self.documents, self.corpus_hash = corpus.ids, corpus.hash
        self.sink_filter = sink_filter(asdict(options))

    def read(self, first: int) -> Iterator[list[Block]]:
        medians = self.forwards.median_norms()
        for batch in self.forwards.read([Stretch("train", first, self.total)]):
            chosen = self.forwards.choose(batch, medians)
            index = torch.from_numpy(chosen.place)
            yield [Block({site: rows[index] for site, rows in batch.rows.items()}, Places(*chosen.origin))]


class ShardBlocks:
    """Rows of finished harvests, a shard a step.

    Raises:
        UserError: a directory holds no finished harvest of the sites, or a shard is damaged.
    """

    def __init__(self, directories: Sequence[Path], sites: Sequence[str]) -> None:
        self.sites, self.indices = sites, [read_index(directory) for directory in directories]
        self.steps: list[tuple[Path, ShardIndex, Shard, int]] = []
        documents: list[str] = []
        for directory, index in zip(directories, self.indices, strict=True):
            _check_index(directory, index, sites, self.indices[0])
            ordered = [shard for split in SPLITS for shard in sorted(index.of(split), key=lambda one: one.number)]
            self.steps += [(directory, index, shard, len(documents)) for shard in ordered]
            documents += pq.read_table(directory / DOCUMENTS_FILE, columns=["id"]).column("id").to_pylist()
        self.total, self.documents = len(self.steps), tuple(documents)
        self.corpus_hash = " ".join(index.identity["corpus_hash"] for index in self.indices)
        self.sink_filter = sink_filter(self.indices[0].identity)

    def read(self, first: int) -> Iterator[list[Block]]:
        """What each shard gives; a stretch that goes on in the next shard is given with that. Shards before the first
        are read again, but not encoded."""
        rest: Block | None = None
        for step, (directory, index, shard, document) in enumerate(self.steps):
            rows, origin = _in_order(directory, index, shard, self.sites)
            origin[ORIGIN_COLUMNS.index("document")] += document
            if rest is not None:
                rows = {site: torch.cat([rest.rows[site], x]) for site, x in rows.items()}
                origin = np.concatenate([np.stack(rest.places), origin], axis=1)
            cuts = [*np.flatnonzero(np.diff(Places(*origin).stretch, prepend=-1)).tolist(), origin.shape[1]]
            following = self.steps[step + 1] if step + 1 < self.total else None
            goes_on = following is not None and (following[0], following[2].split) == (directory, shard.split)
            rest = _part(rows, origin, cuts[-2], cuts.pop()) if goes_on else None
            ends = cuts[:1]
            for cut in cuts[1:]:
                if cut - ends[-1] >= BLOCK_ROWS or cut == cuts[-1]:
                    ends.append(cut)
            if step >= first:
                yield [_part(rows, origin, *part) for part in pairwise(ends)]


def sink_filter(options: dict[str, Any]) -> str:
    """What rows leave out, in words."""
    said = f"position 0 of each {options['context']}-token sequence; norm > {options['outlier_norm']:g} × median"
    return said + "; special tokens" * bool(options["drop_special"])


def not_finite(site: str, document: str) -> UserError:
    """The error for activations that are NaN or infinite."""
    return UserError(
        f"activations at {site}", f"some in or near document {document!r} are NaN or infinite",
        "load the model in float32, or leave the document out",
    )  # fmt: skip


def _check_index(directory: Path, index: ShardIndex, sites: Sequence[str], first: ShardIndex) -> None:
    if not index.complete:
        raise UserError(f"harvest in {directory}", "it has not finished", "run the same harvest again, which goes on")
    for site in sites:
        if site not in index.widths:
            known = ", ".join(index.widths)
            raise UserError(f"site {site}", f"the harvest in {directory} has {known}", "choose an SAE of one of these")
    if index.identity["model_fingerprint"] != first.identity["model_fingerprint"]:
        raise UserError(
            f"harvest in {directory}", f"it is of {index.model}, the first of {first.model}", "give those of one model"
        )


def _in_order(
    directory: Path, index: ShardIndex, shard: Shard, sites: Sequence[str]
) -> tuple[dict[str, Tensor], ndarray]:
    """Rows of a shard and their origin, in the order of the harvest."""
    reader = ShardReader(directory)
    reader.check(shard.origin)
    table = pq.read_table(directory / shard.origin.name)
    back = np.argsort(shard_order(index.identity["seed"], shard.split, shard.number, shard.rows))
    origin = np.stack([table.column(name).to_numpy()[back] for name in ORIGIN_COLUMNS])
    index_of = torch.from_numpy(back)
    return {site: reader.rows(shard, 0, shard.rows, site)[index_of] for site in sites}, origin


def _part(rows: dict[str, Tensor], origin: ndarray, first: int, last: int) -> Block:
    return Block({site: x[first:last] for site, x in rows.items()}, Places(*origin[:, first:last]))
