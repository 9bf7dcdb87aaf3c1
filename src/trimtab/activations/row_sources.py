"""Streams of activations to train on: float32 batches in an order fixed by a seed, seekable by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from trimtab.activations.shards import ShardReader, Split, check_size, read_index
from trimtab.errors import UserError
from trimtab.lm.transfers import to_device


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


class PooledSource:
    """Batches out of blocks of rows: blocks are permuted, gathered into pools, and each pool is shuffled.

    Reading needs one contiguous read per block and memory for one pool; as the blocks of a pool come from all over the
    data, an epoch is well mixed. Subclasses say how a block is read.

    Args:
        block_rows: rows of every block.
        pool_rows: rows shuffled together.
        seed: of the order, which is another one in every epoch.
        d: width of a row.
        split: which documents the rows are of.
    """

    device = torch.device("cpu")
    """Where pools are, and so are batches."""
    reads_ahead: ClassVar[bool] = False
    """Whether `batches` has the next pool read in a thread while the rows of one are given out."""

    def __init__(self, block_rows: Sequence[int], pool_rows: int, seed: int, d: int, split: Split = "train") -> None:
        self.block_rows, self.pool_rows, self.seed, self.d = block_rows, pool_rows, seed, d
        self.rows_total, self.split = int(sum(block_rows)), split

    def described(
        self, kind: str, model: str, site: str, identity: Mapping[str, Any], hashes: list[str], medians: list[float]
    ) -> dict[str, object]:
        """What the rows are of, for run files; of corpora and medians there are as many as harvests."""
        where = {"site": site, "split": self.split, "rows": self.rows_total, "seed": self.seed}
        recipe = {name: identity[name] for name in ("context", "holdout", "outlier_norm", "drop_special")}
        of = {"kind": kind, "model": model, "model_fingerprint": identity["model_fingerprint"]}
        return {**of, **where, "corpus_hash": hashes, "norm_median": medians, **recipe}

    def read_blocks(self, blocks: Sequence[int]) -> BFloat16[Tensor, "n d"]:
        """Rows of some blocks, one block after the other."""
        raise NotImplementedError

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Float[Tensor, "B d"]]:
        """Batches `start_step`, `start_step + 1`, …, without end; the same ones whatever the start."""
        pools = self._read_pools(*divmod(start_step * batch_size, self.rows_total))
        return self._batches(batch_size, _one_ahead(pools) if self.reads_ahead else pools)

    def sample(self, n: int) -> Float[Tensor, "m d"]:
        """At most n random rows in CPU memory, always the same ones; from an epoch that training does not reach."""
        return next(self._batches(min(n, self.rows_total), self._read_pools(2**31, 0))).cpu()

    def _batches(self, batch_size: int, pools: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Float[Tensor, "B d"]]:
        batch, filled = torch.empty(batch_size, self.d, device=self.device), 0
        for rows, order in pools:
            done = 0
            while done < len(order):
                taken = to_device(order[done : done + batch_size - filled], self.device)
                batch[filled : filled + len(taken)].copy_(rows.index_select(0, taken))
                filled, done = filled + len(taken), done + len(taken)
                if filled == batch_size:
                    yield batch
                    batch, filled = torch.empty(batch_size, self.d, device=self.device), 0

    def _read_pools(self, epoch: int, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of pool after pool, from a row of an epoch on, each with the order in which they are given out."""
        while True:
            for number, blocks in enumerate(self._pools(epoch), 1):
                size = sum(self.block_rows[block] for block in blocks)
                skip, offset = min(offset, size), max(0, offset - size)
                if skip == size:
                    continue
                rows = self.read_blocks(blocks)
                order = torch.from_numpy(self._generator(epoch, number).permutation(size)[skip:])
                yield rows, order
            epoch += 1

    def _pools(self, epoch: int) -> Iterator[list[int]]:
        pool, rows = [], 0
        for block in self._generator(epoch, 0).permutation(len(self.block_rows)).tolist():
            if pool and rows + self.block_rows[block] > self.pool_rows:
                yield pool
                pool, rows = [], 0
            pool.append(block)
            rows += self.block_rows[block]
        yield pool

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])


def _one_ahead(pools: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    with ThreadPoolExecutor(1, thread_name_prefix="trimtab-rows") as thread:
        coming = thread.submit(next, pools)
        while True:
            pool = coming.result()
            coming = thread.submit(next, pools)
            yield pool


class ShardSource(PooledSource):
    """Activations of one site from shards on disk, one directory or several of the same model and site.

    Args:
        directories: of finished harvests.
        site: which site; may be left out where there is only one.
        split: `train` or `holdout`.
        seed: of the order.
        pool_rows: rows shuffled together; a pool takes `2 · pool_rows · d` bytes, and the next one is read meanwhile.
        block_rows: rows read at once.

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
    ) -> None:
        paths = [directories] if isinstance(directories, str | Path) else list(directories)
        self.directories = [Path(p) for p in paths]
        self.indexes = [read_index(p) for p in self.directories]
        self.split: Split = split
        self.site = self._choose_site(site)
        self._check()
        readers = map(ShardReader, self.directories)
        self._blocks = [
            (reader, shard, start, min(start + block_rows, shard.rows))
            for reader, index in zip(readers, self.indexes, strict=True)
            for shard in index.of(split)
            for start in range(0, shard.rows, block_rows)
        ]
        sizes = [stop - start for _, _, start, stop in self._blocks]
        super().__init__(sizes, pool_rows, seed, self.indexes[0].widths[self.site], split)

    @property
    def description(self) -> dict[str, object]:
        """What the rows are of."""
        hashes = [index.identity["corpus_hash"] for index in self.indexes]
        medians = [index.norm_median[self.site] for index in self.indexes]
        first = self.indexes[0]
        return self.described("shards", first.model, self.site, first.identity, hashes, medians)

    def read_blocks(self, blocks: Sequence[int]) -> BFloat16[Tensor, "n d"]:
        """Rows of some blocks, one block after the other."""
        rows = torch.empty(sum(self.block_rows[b] for b in blocks), self.d, dtype=torch.bfloat16)
        into, filled = rows.view(torch.int16).numpy(), 0
        for reader, shard, start, stop in map(self._blocks.__getitem__, blocks):
            part = reader.rows(shard, start, stop, self.site)  # NumPy copies in this thread alone, and lets others run
            into[filled : filled + stop - start] = part.view(torch.int16).numpy()
            filled += stop - start
        return rows

    def _choose_site(self, site: str | None) -> str:
        present = list(self.indexes[0].widths) if self.indexes else []
        if site is None and len(present) == 1:
            return present[0]
        if site is None or any(site not in index.widths for index in self.indexes):
            raise UserError(
                f"site {site}" if site else "the site", f"the shards hold {', '.join(present) or 'none'}", "choose one"
            )
        return site

    def _check(self) -> None:
        first = self.indexes[0].identity
        for directory, index in zip(self.directories, self.indexes, strict=True):
            if not index.complete:
                raise UserError(
                    f"shards {directory}", "the harvest is not finished", "run the same harvest again: it goes on"
                )
            for name in ("model_fingerprint", "context", "drop_special"):
                if index.identity[name] != first[name]:
                    raise UserError(
                        f"shards {directory}",
                        f"{name} is {index.identity[name]}, in the first directory {first[name]}",
                        "use shards of one model and one recipe",
                    )
            for shard in index.of(self.split):
                check_size(directory, shard.sites[self.site])
        if not any(index.rows(self.split) for index in self.indexes):
            raise UserError(
                f"shards {', '.join(map(str, self.directories))}",
                f"there are no {self.split} rows",
                "harvest more text" + (" or raise --holdout" if self.split == "holdout" else ""),
            )
