"""The rows that every library trains on: real activations, or synthetic ones whose features are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trimtab.activations import ActivationSource, ShardSource
from trimtab.activations.synthetic import SyntheticConfig, SyntheticSource

READ_ROWS = 8192


def write_rows(folder: Path, *, d: int, count: int, heldout: int, shards: Path | None) -> Path:
    """Write `train.pt` and `heldout.pt`: float32 rows, scaled by one number so that the mean norm is √d.

    Real rows that are narrower than d get zeros after them, turned by a random rotation, so that no coordinate is idle.

    Args:
        folder: where.
        d: width of a row.
        count: training rows.
        heldout: rows that nothing is trained on.
        shards: a harvest's directory; synthetic rows without it.
    """
    train_source, heldout_source = _sources(d, count, shards)
    train, held = (take(s, n) for s, n in ((train_source, count), (heldout_source, heldout)))
    if train.shape[1] > d:
        raise SystemExit(f"the rows in {shards} have width {train.shape[1]}, more than d = {d}")
    if train.shape[1] < d:
        generator = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[: train.shape[1]]
        train, held = train @ rotation, held @ rotation
    scale = math.sqrt(d) / float(train[:65_536].norm(dim=1).mean())
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(train * scale, folder / "train.pt")
    torch.save(held * scale, folder / "heldout.pt")
    return folder


def _sources(d: int, count: int, shards: Path | None) -> tuple[ActivationSource, ActivationSource]:
    if shards is not None:
        return ShardSource([shards]), ShardSource([shards], split="holdout")
    config = planted(d)
    return SyntheticSource(config, rows_total=count), SyntheticSource(config, split="holdout")


def planted(d: int) -> SyntheticConfig:
    """Which features synthetic rows of width d are made of."""
    return SyntheticConfig(d=d, n_true=8 * d, true_l0=min(32.0, d / 8), n_parents=d // 8)


def take(source: ActivationSource, count: int) -> Tensor:
    """The first rows of a source `[count, d]`, float32."""
    batches: Iterator[Tensor] = source.batches(min(READ_ROWS, count))
    rows: list[Tensor] = []
    while sum(map(len, rows)) < count:
        rows.append(next(batches))
    return torch.cat(rows)[:count].float()
