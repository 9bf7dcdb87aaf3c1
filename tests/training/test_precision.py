"""Trainings whose products are in bfloat16 end where those in float32 do, within the spread of seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_rows import MemorySource, Planted
from torch import Tensor

from trimtab.dictionaries import active, encoding, topk_like
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.precision import Precision
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.errors import UserError
from trimtab.runs import Run, read_record
from trimtab.training import TrainConfig, train
from trimtab.training.checkpoint import Checkpoint
from trimtab.training.trainer import _begun_in

SEEDS = range(1, 4)  # 0 draws the planted directions themselves


def explained(arch: str, precision: Precision, path: Path) -> Tensor:
    """What trainings of each seed explain in the end."""
    rows, found = Planted(64, 24, 3.0).rows(6_000), []
    for seed in SEEDS:
        config = TrainConfig(
            arch=arch, n_features=96, l0=4, rows=50 * 256, batch_size=256, heldout_rows=2_000, lr=5e-3, seed=seed,
            dead_after=2_000, precision=precision, log_every=1_000, checkpoint_every=1_000,
        )  # fmt: skip
        with Run.open(path / f"{precision}-{seed}", "train", config) as run:
            found.append(train(config, MemorySource(rows), run).explained_variance)
    return torch.tensor(found)


def assert_within_the_spread(arch: str, path: Path) -> None:
    exact, low = (explained(arch, precision, path) for precision in ("fp32", "bf16"))
    assert exact.min() > 0.2
    spread = (exact.max() - exact.min()).clamp_min(0.02)  # three seeds may be alike by chance
    assert (low.mean() - exact.mean()).abs() < spread
    assert exact.min() - spread < low.min()
    assert low.max() < exact.max() + spread


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("arch", TRAINABLE)
def test_bfloat16_ends_within_the_spread_of_seeds(
    arch: str, execution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainableSAE, "execution", execution)
    assert_within_the_spread(arch, tmp_path)


@pytest.mark.parametrize("arch", ["topk", "gated"])
def test_products_that_are_too_coarse_do_not(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: operands of one bit and a sign behind the exponent."""

    def coarse(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        if precision == "bf16":
            a, b = (torch.ldexp((2 * m).round() / 2, e) for m, e in map(torch.frexp, (a.float(), b.float())))
        return a @ b

    for module in (active, encoding, topk_like):
        monkeypatch.setattr(module, "product", coarse)
    monkeypatch.setattr(TrainableSAE, "execution", "dense")
    with pytest.raises(AssertionError):
        assert_within_the_spread(arch, tmp_path)


def test_tf32_on_a_cpu_is_refused_and_the_run_says_its_precision(tmp_path: Path) -> None:
    source = MemorySource(Planted(12, 8, 2.0).rows(200))
    settings = {"n_features": 16, "l0": 2, "rows": 256, "batch_size": 64, "heldout_rows": 64}
    with Run.open(tmp_path / "a", "train", {}) as run, pytest.raises(UserError, match="precision tf32: device cpu has"):
        train(TrainConfig(**settings, precision="tf32"), source, run)  # pyright: ignore[reportArgumentType]
    with Run.open(tmp_path / "b", "train", {}) as run:
        train(TrainConfig(**settings), source, run)  # pyright: ignore[reportArgumentType]
    assert read_record(tmp_path / "b")["precision"] == "fp32"


def test_a_training_that_has_begun_keeps_its_precision_on_a_card() -> None:
    assert _begun_in(None, "cuda") is None
    assert _begun_in(Checkpoint(5, {}, {"precision": "tf32"}), "cuda") == "tf32"
    assert _begun_in(Checkpoint(5, {}, {}), "cuda") == "fp32"
    assert _begun_in(Checkpoint(5, {}, {"precision": "tf32"}), "cpu") is None
