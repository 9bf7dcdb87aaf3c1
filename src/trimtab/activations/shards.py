"""Activations on disk: shuffled shards in bfloat16, each with its checksum and the origin of every row.

A directory holds

    shards.json                         what was harvested from what, every finished shard, where to go on
    documents.parquet                   document index → id, source, split
    train-00000.resid_post.15.safetensors   tensor `rows [n, width]`, bfloat16, one file per site
    train-00000.parquet                 token, document, position, slot of each of these rows

Rows are shuffled within a shard when it is written, so that readers need contiguous reads only. With several sites, row
i of a shard is the same token at each of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import BFloat16
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import UserError
from trimtab.runs import read_typed, sha256_file, write_json, write_table

INDEX_FILE, DOCUMENTS_FILE = "shards.json", "documents.parquet"
FORMAT = 1
ORIGIN_COLUMNS = ("token", "document", "position", "slot")
Split = Literal["train", "holdout"]


@dataclass(frozen=True)
class StreamPosition:
    """Where in a harvest the next shard begins."""

    split: Split
    batch: int
    """Forward batch, counted within the split."""
    skip: int
    """Kept rows of that batch which an earlier shard already holds."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a shard."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard."""

    split: Split
    number: int
    rows: int
    sites: dict[str, StoredFile]
    origin: StoredFile
    start: StreamPosition

    @property
    def files(self) -> tuple[StoredFile, ...]:
        return (*self.sites.values(), self.origin)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of `shards.json`."""

    identity: dict[str, Any]
    """What decides every row: model fingerprint, sites, corpus hash, options. A harvest only resumes its own."""
    model: str
    corpus: dict[str, Any]
    """Documents, tokens, sequences per split."""
    widths: dict[str, int]
    norm_median: dict[str, float]
    """Median norm per site over the first batches, which the outlier filter is relative to."""
    shards: tuple[Shard, ...] = ()
    next: StreamPosition
    dropped: dict[str, int] = field(default_factory=dict)
    """Tokens left out so far, by reason: first, special, outlier."""
    complete: bool = False

    def rows(self, split: Split) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    def of(self, split: Split) -> list[Shard]:
        return [s for s in self.shards if s.split == split]


def write_index(directory: Path, index: ShardIndex) -> None:
    """Replace `shards.json` in one step."""
    write_json(directory / INDEX_FILE, {"format": FORMAT, **asdict(index)})


def read_index(directory: Path) -> ShardIndex:
    """Read `shards.json`. Raises a `UserError` if there is none, it is damaged, or a newer version wrote it."""
    path = directory / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"shards {directory}", f"{path.name} cannot be read", "give a directory of a harvest"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"shards {path}", f"it is not JSON ({error})", "harvest again into a new directory") from error
    if content.pop("format", None) != FORMAT:
        raise UserError(f"shards {path}", f"it is not in format {FORMAT}", "harvest again with this version")
    try:
        return read_typed(ShardIndex, content)
    except UserError as error:
        raise UserError(f"shards {path}", f"it is damaged ({error})", "harvest again into a new directory") from error


class ShardReader:
    """Reads rows of shards, checking each file's checksum when it is first touched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checked: set[str] = set()

    def rows(self, shard: Shard, start: int, stop: int, site: str) -> BFloat16[Tensor, "n width"]:
        """Some rows of a shard at a site. Raises a `UserError` if the file is missing or damaged."""
        stored = shard.sites[site]
        self.check(stored)
        try:
            with safe_open(self.directory / stored.name, framework="pt") as file:
                return file.get_slice("rows")[start:stop]
        except (SafetensorError, OSError) as error:
            raise damaged(self.directory / stored.name, f"it cannot be read ({error})") from error

    def check(self, stored: StoredFile) -> None:
        """Check size and checksum, once. Raises a `UserError` if the file is missing, truncated or corrupted."""
        if stored.name not in self._checked:
            check_size(self.directory, stored)
            if sha256_file(self.directory / stored.name) != stored.sha256:
                raise damaged(self.directory / stored.name, "its checksum is not the recorded one: it is corrupted")
            self._checked.add(stored.name)


def check_size(directory: Path, stored: StoredFile) -> None:
    """Raise a `UserError` if a file is missing or not as long as it was written."""
    path = directory / stored.name
    if not path.exists():
        raise damaged(path, "it is missing")
    if path.stat().st_size != stored.bytes:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {stored.bytes}: it is truncated")


def damaged(path: Path, why: str) -> UserError:
    """The error for a shard that cannot be used."""
    return UserError(f"shard {path}", why, "run the same harvest again: it redoes damaged shards and keeps the others")


def write_documents(directory: Path, ids: tuple[str, ...], sources: tuple[str, ...], held_out: ndarray) -> None:
    """Write `documents.parquet`."""
    split = np.where(held_out, "holdout", "train")
    table = pa.table({"document": np.arange(len(ids), dtype=np.int32), "id": ids, "source": sources, "split": split})
    write_table(directory / DOCUMENTS_FILE, table)
