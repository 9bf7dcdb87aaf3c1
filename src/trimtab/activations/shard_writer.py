"""Gathers rows into shards; each is shuffled, written, synced and hashed while the next one fills.

So many shards are under way at a time: whoever fills the next one before the first of them is on disk waits, so that
rows are neither dropped nor piled up in memory. They are recorded in their order.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import BFloat16, Int
from numpy import ndarray
from torch import Tensor

from trimtab.activations.shards import ORIGIN_COLUMNS, Shard, Split, StoredFile, StreamPosition
from trimtab.runs import atomic_path, sha256_file

CHUNK_ROWS = 4_096


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Takes rows in, writes shards in threads of its own. Use it as a context manager.

    An error of a thread is raised by the next call, or by `flush`; no later shard is recorded.

    Args:
        directory: where to write.
        widths: the width of each site's rows.
        shard_rows: rows of a full shard; buffers take `2 · (at_once + 1) · shard_rows · Σ width` bytes.
        seed: of the shuffle.
        at_once: shards that are being written, each in a thread: more where one cannot keep up with the model.
    """

    def __init__(
        self, directory: Path, widths: Mapping[str, int], shard_rows: int, seed: int, *, at_once: int = 1
    ) -> None:
        self.directory, self.seed, self.shard_rows = directory, seed, shard_rows
        self._filling, *spare = (_Buffer(widths, shard_rows) for _ in range(at_once + 1))
        self._spare = deque(spare)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="trimtab-shards")
        self._under_way: deque[tuple[Future[None], _Buffer]] = deque()

    @property
    def filled(self) -> int:
        """Rows of the shard that is being gathered."""
        return self._filling.filled

    @property
    def room(self) -> int:
        """Rows that the shard which is being gathered can still take."""
        return self.shard_rows - self._filling.filled

    def append(
        self, rows: Mapping[str, BFloat16[Tensor, "m width"]], chosen: Int[ndarray, " k"], origin: Int[ndarray, "4 k"]
    ) -> None:
        """Take in the chosen of some rows (per site, in CPU memory) with their `ORIGIN_COLUMNS`, as many as fit in."""
        while self._under_way and self._under_way[0][0].done():
            self._finish_first()
        buffer = self._filling
        place = slice(buffer.filled, buffer.filled + len(chosen))
        assert place.stop <= self.shard_rows
        index = torch.from_numpy(chosen)
        for site, into in buffer.rows.items():
            torch.index_select(rows[site], 0, index, out=into[place])
        buffer.origin[:, place] = origin
        buffer.filled = place.stop

    def write(self, split: Split, number: int, start: StreamPosition, then: Callable[[Shard], None]) -> None:
        """Have what was gathered written under its name, behind the shard before, and gather anew.

        `then` is called in the writer's thread once the shard is on disk, and all before it are recorded. Raises a
        `UserError` if the disk was full for a shard before.
        """
        assert self._filling.filled, "a shard without rows"
        if not self._spare:
            self._finish_first()
        before = self._under_way[-1][0] if self._under_way else None
        buffer, self._filling = self._filling, self._spare.popleft()
        self._under_way.append((self._threads.submit(self._write, buffer, split, number, start, then, before), buffer))

    def flush(self) -> None:
        """Wait until everything handed to `write` is on disk. Raises a `UserError` if the disk is full."""
        while self._under_way:
            self._finish_first()

    def _finish_first(self) -> None:
        """Wait for the first shard under way, whose buffer can be filled again."""
        written, buffer = self._under_way.popleft()
        written.result()
        buffer.filled = 0
        self._spare.append(buffer)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._threads.shutdown(wait=True)
        if error is None:
            self.flush()

    def _write(
        self, buffer: _Buffer, split: Split, number: int, start: StreamPosition, then: Callable[[Shard], None],
        before: Future[None] | None,
    ) -> None:  # fmt: skip
        order = shard_order(self.seed, split, number, buffer.filled)
        stem = self.directory / f"{split}-{number:05d}"
        files = {
            site: store_rows(stem.with_name(f"{stem.name}.{site}.safetensors"), rows, order)
            for site, rows in buffer.rows.items()
        }
        columns = {name: column[order] for name, column in zip(ORIGIN_COLUMNS, buffer.origin, strict=True)}
        table = stem.with_name(f"{stem.name}.parquet")
        with atomic_path(table) as partial:
            pq.write_table(pa.table(columns), partial)
            origin = StoredFile(table.name, partial.stat().st_size, sha256_file(partial))
        shard = Shard(split=split, number=number, rows=buffer.filled, sites=files, origin=origin, start=start)
        if before is not None:
            before.result()
        then(shard)


class _Buffer:
    def __init__(self, widths: Mapping[str, int], shard_rows: int) -> None:
        self.rows = {site: torch.empty(shard_rows, width, dtype=torch.bfloat16) for site, width in widths.items()}
        self.origin = np.empty((len(ORIGIN_COLUMNS), shard_rows), dtype=np.int32)
        self.filled = 0


def shard_order(seed: int, split: Split, number: int, rows: int) -> Int[ndarray, " rows"]:
    """Places, in the order of the harvest, of the rows of a shard."""
    words = np.random.SeedSequence([seed, ("train", "holdout").index(split), number])
    return np.random.default_rng(words).permutation(rows)


def store_rows(path: Path, rows: BFloat16[Tensor, "m width"], order: Int[ndarray, " n"]) -> StoredFile:
    """Write `rows[order]` as the tensor `rows` of a safetensors file, whole, hashing it on the way.

    Rows are put in order a few megabytes at a time, in calls that leave Python to other threads. The bytes are those
    that `safetensors.torch.save_file` writes: length of the header, header in JSON (padded to 8 bytes), rows.

    Raises:
        UserError: the disk is full.
    """
    n, (_, width) = len(order), rows.shape
    entry = {"rows": {"dtype": "BF16", "shape": [n, width], "data_offsets": [0, 2 * n * width]}}
    header = json.dumps(entry, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(start)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(start)
        for chosen in np.split(order, range(CHUNK_ROWS, n, CHUNK_ROWS)):
            part = np.take(rows.view(torch.int16).numpy(), chosen, axis=0).data.cast("B")
            digest.update(part)
            file.write(part)
    return StoredFile(path.name, len(start) + 2 * n * width, digest.hexdigest())
