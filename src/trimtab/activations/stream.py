"""Streams of activations to train on: float32 batches in an order fixed by a seed, seekable by step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from numpy import ndarray
from torch import Tensor

from trimtab.activations.shards import Block, Shard, ShardIndex, ShardReader, Split, check_size, read_index
from trimtab.errors import UserError


class ActivationSource(Protocol):
    """Where training takes activations from. Every row comes once per epoch; batches run on across epochs."""

    @property
    def d(self) -> int:
        """Width of a row."""
        ...

    @property
    def rows_total(self) -> int:
        """Rows of one epoch."""
        ...

    @property
    def description(self) -> dict[str, object]:
        """What the rows are of: model, fingerprint, site, corpus hash, filter. Goes into run files."""
        ...

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Float[Tensor, "B d"]]:
        """Batches `start_step`, `start_step + 1`, …, without end; the same ones whatever the start."""
        ...

    def sample(self, n: int) -> Float[Tensor, "m d"]:
        """At most n random rows, always the same ones; not in the order of `batches`."""
        ...


class RowBatch(NamedTuple):
    """Rows with their origin."""

    x: Float[Tensor, "n d"]
    token: ndarray
    document: ndarray
    """Index of the row's document, counted through all directories of the source."""
    position: ndarray
    """Place of the token in its document."""
    slot: ndarray
    """Place of the token in the sequence that the model read."""


class _Pool(NamedTuple):
    """Blocks that are shuffled together, and where their rows begin in the epoch."""

    blocks: tuple[int, ...]
    start: int
    rows: int


class _PoolPlace(NamedTuple):
    """A pool in the course of a training, and how many of its shuffled rows a start in its middle leaves out."""

    epoch: int
    number: int
    pool: _Pool
    skip: int


class _PoolRows(NamedTuple):
    """The rows of a pool, and the order in which they are given out."""

    rows: Tensor
    order: Tensor


class PooledOrder:
    """The order of rows of every epoch: blocks are permuted, gathered into pools, and each pool is shuffled.

    Reading needs one contiguous read per block and memory for one pool; as the blocks of a pool come from all over the
    data, an epoch is well mixed.
    """

    def __init__(self, block_rows: Sequence[int], pool_rows: int, seed: int) -> None:
        self.block_rows, self.pool_rows, self.seed = block_rows, pool_rows, seed
        self.rows_total = int(sum(block_rows))

    def pools(self, epoch: int) -> list[_Pool]:
        """Pools of an epoch, in order."""
        pools: list[_Pool] = []
        blocks: list[int] = []
        start = rows = 0
        for block in self._generator(epoch, 0).permutation(len(self.block_rows)):
            if blocks and rows + self.block_rows[block] > self.pool_rows:
                pools.append(_Pool(tuple(blocks), start, rows))
                blocks, start, rows = [], start + rows, 0
            blocks.append(int(block))
            rows += self.block_rows[block]
        return [*pools, _Pool(tuple(blocks), start, rows)]

    def shuffle(self, epoch: int, pool: int, rows: int) -> ndarray:
        """Permutation of the rows of a pool."""
        return self._generator(epoch, pool + 1).permutation(rows)

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])


class PooledSource:
    """Batches out of blocks, in a `PooledOrder`. Subclasses say how a block is read.

    Args:
        order: of the rows.
        d: their width.
        device: where pools are kept and batches made.
    """

    reads_ahead: ClassVar[bool] = False
    """Whether `batches` has the next pool read in a thread while the rows of one are given out."""

    def __init__(self, order: PooledOrder, d: int, device: torch.device | str = "cpu") -> None:
        self.order, self.d, self.device = order, d, torch.device(device)

    @property
    def rows_total(self) -> int:
        return self.order.rows_total

    def read_blocks(self, blocks: Sequence[int]) -> BFloat16[Tensor, "n d"]:
        """Rows of some blocks, one block after the other."""
        raise NotImplementedError

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Float[Tensor, "B d"]]:
        """Batches `start_step`, `start_step + 1`, …, without end; the same ones whatever the start."""
        epoch, offset = divmod(start_step * batch_size, self.rows_total)
        pools = self._pools(epoch, offset)
        yield from self._batches(batch_size, self._read_ahead(pools) if self.reads_ahead else map(self._read, pools))

    def sample(self, n: int) -> Float[Tensor, "m d"]:
        """At most n random rows, always the same ones; from an epoch that training does not reach."""
        return next(self._batches(min(n, self.rows_total), map(self._read, self._pools(2**31, 0))))

    def _batches(self, batch_size: int, pools: Iterator[_PoolRows]) -> Iterator[Float[Tensor, "B d"]]:
        batch, filled = torch.empty(batch_size, self.d, device=self.device), 0
        for rows, order in pools:
            done = 0
            while done < len(order):
                taken = order[done : done + batch_size - filled]
                batch[filled : filled + len(taken)].copy_(rows.index_select(0, taken))
                filled, done = filled + len(taken), done + len(taken)
                if filled == batch_size:
                    yield batch
                    batch, filled = torch.empty(batch_size, self.d, device=self.device), 0

    def _pools(self, epoch: int, offset: int) -> Iterator[_PoolPlace]:
        while True:
            pools = self.order.pools(epoch)
            first = bisect_right([pool.start for pool in pools], offset) - 1
            for number in range(first, len(pools)):
                yield _PoolPlace(epoch, number, pools[number], max(0, offset - pools[number].start))
            epoch, offset = epoch + 1, 0

    def _read(self, place: _PoolPlace) -> _PoolRows:
        rows = self.read_blocks(place.pool.blocks)
        order = torch.from_numpy(self.order.shuffle(place.epoch, place.number, place.pool.rows)[place.skip :])
        return _PoolRows(rows.to(self.device, non_blocking=rows.is_pinned()), order.to(self.device))

    def _read_ahead(self, pools: Iterator[_PoolPlace]) -> Iterator[_PoolRows]:
        with ThreadPoolExecutor(1, thread_name_prefix="trimtab-rows") as thread:
            coming = thread.submit(self._read, next(pools))
            while True:
                rows = coming.result()
                coming = thread.submit(self._read, next(pools))
                yield rows


class ShardSource(PooledSource):
    """Activations of one site from shards on disk, one directory or several of the same model and site.

    Args:
        directories: of finished harvests.
        site: which site; may be left out where there is only one.
        split: `train` or `holdout`.
        seed: of the order.
        pool_rows: rows shuffled together; a pool takes `2 · pool_rows · d` bytes, and the next one is read meanwhile.
        block_rows: rows read at once.
        allow_partial: use what a harvest that is still running, or was cut off, has written.
        device: where pools are kept and batches made.

    Raises:
        UserError: no harvest there, not finished, of different models, without such a site or split, or a file is
            missing or truncated. Checksums are compared when a file is first read.
    """

    reads_ahead = True

    def __init__(
        self,
        directories: str | Path | Sequence[str | Path],
        *,
        site: str | None = None,
        split: Split = "train",
        seed: int = 0,
        pool_rows: int = 65_536,
        block_rows: int = 4_096,
        allow_partial: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        paths = [directories] if isinstance(directories, str | Path) else list(directories)
        self.directories = [Path(p) for p in paths]
        self.indexes = [read_index(p) for p in self.directories]
        self.split: Split = split
        self.site = self._choose_site(site)
        self._check(allow_partial)
        self._readers = [ShardReader(p) for p in self.directories]
        self._blocks = [
            (which, Block(shard, start, min(start + block_rows, shard.rows)))
            for which, shard in self._shards()
            for start in range(0, shard.rows, block_rows)
        ]
        sizes = [block.stop - block.start for _, block in self._blocks]
        super().__init__(PooledOrder(sizes, pool_rows, seed), self.indexes[0].widths[self.site], device)

    @property
    def description(self) -> dict[str, object]:
        """What the rows are of."""
        first = self.indexes[0]
        return {
            "kind": "shards",
            "model": first.model,
            "model_fingerprint": first.identity["model_fingerprint"],
            "site": self.site,
            "split": self.split,
            "rows": self.rows_total,
            "seed": self.order.seed,
            "corpus_hash": [index.identity["corpus_hash"] for index in self.indexes],
            "norm_median": [index.norm_median[self.site] for index in self.indexes],
            **{k: first.identity[k] for k in ("context", "holdout", "outlier_norm", "drop_special")},
        }

    def read_blocks(self, blocks: Sequence[int]) -> BFloat16[Tensor, "n d"]:
        """Rows of some blocks, one block after the other."""
        chosen = [self._blocks[b] for b in blocks]
        total = sum(block.stop - block.start for _, block in chosen)
        rows = torch.empty(total, self.d, dtype=torch.bfloat16, pin_memory=self.device.type == "cuda")
        into, start = rows.view(torch.int16).numpy(), 0
        for which, block in chosen:  # NumPy copies in this thread alone, and lets others run
            stop = start + block.stop - block.start
            into[start:stop] = self._readers[which].rows(block, self.site).view(torch.int16).numpy()
            start = stop
        return rows

    def rows(self, batch_size: int, limit: int | None = None) -> Iterator[RowBatch]:
        """Every row once, in the order of the files, with its origin; the last batch of a shard may be smaller.

        Args:
            batch_size: rows at once.
            limit: stop after this many rows.
        """
        left = self.rows_total if limit is None else limit
        first_document = np.cumsum([0, *(int(index.corpus["documents"]) for index in self.indexes)])
        for which, shard in self._shards():
            reader = self._readers[which]
            origin = reader.origin(shard)
            for start in range(0, shard.rows, batch_size):
                if left <= 0:
                    return
                stop = min(start + batch_size, shard.rows, start + left)
                left -= stop - start
                part = {name: column[start:stop] for name, column in origin.items()}
                part["document"] = part["document"] + first_document[which]
                yield RowBatch(reader.rows(Block(shard, start, stop), self.site).float(), **part)

    def _shards(self) -> Iterator[tuple[int, Shard]]:
        for which, index in enumerate(self.indexes):
            for shard in index.of(self.split):
                yield which, shard

    def _choose_site(self, site: str | None) -> str:
        present = list(self.indexes[0].widths) if self.indexes else []
        if site is None and len(present) == 1:
            return present[0]
        if site is None or any(site not in index.widths for index in self.indexes):
            raise UserError(
                f"site {site}" if site else "the site", f"the shards hold {', '.join(present) or 'none'}", "choose one"
            )
        return site

    def _check(self, allow_partial: bool) -> None:
        for directory, index in zip(self.directories, self.indexes, strict=True):
            if not index.complete and not allow_partial:
                raise UserError(
                    f"shards {directory}", "the harvest is not finished", "run the same harvest again: it goes on"
                )
            for name in ("model_fingerprint", "context", "drop_special"):
                _check_same(directory, name, index, self.indexes[0])
            for shard in index.of(self.split):
                check_size(directory, shard.sites[self.site])
        if not any(index.rows(self.split) for index in self.indexes):
            raise UserError(
                f"shards {', '.join(map(str, self.directories))}",
                f"there are no {self.split} rows",
                "harvest more text" + (" or raise --holdout" if self.split == "holdout" else ""),
            )


def _check_same(directory: Path, name: str, index: ShardIndex, first: ShardIndex) -> None:
    if index.identity[name] != first.identity[name]:
        raise UserError(
            f"shards {directory}",
            f"{name} is {index.identity[name]}, in the first directory {first.identity[name]}",
            "use shards of one model and one recipe",
        )
