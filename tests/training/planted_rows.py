"""Activation sources in memory, for tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class MemorySource:
    """Rows in memory, shuffled anew each epoch; batches run on across epochs."""

    def __init__(self, rows: Tensor, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed

    @property
    def d(self) -> int:
        return self.rows.shape[1]

    @property
    def rows_total(self) -> int:
        return len(self.rows)

    @property
    def description(self) -> dict[str, object]:
        facts: dict[str, object] = {"model": "planted", "site": "resid_post.0", "seed": self.seed}
        return facts | {"checksum": float(self.rows.double().sum().nan_to_num()), "rows": len(self.rows)}

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        place = start_step * batch_size
        while True:
            first, last = place // len(self.rows), (place + batch_size - 1) // len(self.rows)
            order = torch.cat([self._order(epoch) for epoch in range(first, last + 1)])
            begin = place - first * len(self.rows)
            yield self.rows[order[begin : begin + batch_size]].clone()
            place += batch_size

    def sample(self, n: int) -> Tensor:
        return self.rows[self._order(-1)[:n]].clone()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000 * self.seed + epoch + 1)
        return torch.randperm(len(self.rows), generator=generator)


class Planted:
    """Rows that are sparse positive sums of known unit directions, more of them than dimensions, plus a mean."""

    def __init__(self, n: int, d: int, active: float, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n, d, generator=self._generator)
        for _ in range(200):  # push neighbours apart, so that directions can be told from each other
            directions /= directions.norm(dim=1, keepdim=True)
            overlap = directions @ directions.T - torch.eye(n)
            directions -= 0.1 * (overlap**3) @ directions * 4
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.mean = torch.randn(d, generator=self._generator)
        self.active = active

    def rows(self, m: int) -> Tensor:
        n = len(self.directions)
        fires = torch.rand(m, n, generator=self._generator) < self.active / n
        size = 1 + torch.rand(m, n, generator=self._generator)
        return 3 * (fires * size) @ self.directions + self.mean
