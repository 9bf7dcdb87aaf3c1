"""Rows that are in memory, as a stream to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trimtab.activations.row_sources import PooledSource


class MemorySource(PooledSource):
    """All rows of a tensor, shuffled anew in every epoch.

    Args:
        rows: to train on.
        seed: of the order.
        about: what they are of, such as `model`, `model_fingerprint` and `site`.
    """

    def __init__(self, rows: Float[Tensor, "n d"], *, seed: int = 0, **about: Any) -> None:
        super().__init__([1] * len(rows), len(rows), seed, rows.shape[1])
        self.rows, self._about = rows.detach().float().cpu().contiguous(), about

    @property
    def description(self) -> dict[str, object]:
        """What was said of the rows, and their hash."""
        digest = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        return {"kind": "memory", **self._about, "rows": len(self.rows), "seed": self.seed, "corpus_hash": digest}

    def read_blocks(self, blocks: Sequence[int]) -> Float[Tensor, "n d"]:
        return self.rows[list(blocks)]
