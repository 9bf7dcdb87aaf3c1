"""What is said about a trained SAE: diverged, or short of its L0 and how to fix that."""

from __future__ import annotations

import dataclasses
import math
from io import StringIO
from pathlib import Path

import pytest
from planted_rows import MemorySource, Planted
from rich.console import Console

from trimtab.dictionaries import load_dictionary
from trimtab.distributed import Ranks
from trimtab.runs import Run
from trimtab.training import SiteRows, TrainConfig, TrainedBank, TrainedSAE, expand, train
from trimtab.training.bank import Place, train_members
from trimtab.training.result import TrainResult


def trained(**numbers: object) -> TrainResult:
    others = dict.fromkeys(field.name for field in dataclasses.fields(TrainResult))
    return TrainResult(**{**others, **numbers})  # pyright: ignore[reportArgumentType]


def said(
    l0: float,
    target: float | None = 32.0,
    *,
    weight: float | None = None,
    explained_variance: float = 0.9,
    dead: float = 0.1,
) -> str:
    return trained(
        explained_variance=explained_variance, dead_share=dead, l0=l0, l0_target=target, sparsity_weight=weight
    ).advice


@pytest.mark.parametrize(
    ("explained_variance", "dead", "begin"),
    [
        (-330.0, 1.0, "explained variance -330, 100% of the features dead: "),
        (-2.5e12, 0.2, "explained variance -2.5e+12, 20% of the features dead: "),
        (0.02, 0.99, "explained variance 0.0200, 99% of the features dead: "),
        (math.nan, 1.0, "explained variance –, 100% of the features dead: "),
    ],
)
def test_a_diverged_training_is_told_to_lower_its_learning_rate_and_nothing_else(
    explained_variance: float, dead: float, begin: str
) -> None:
    for target, weight in ((32.0, None), (32.0, 0.5), (None, None), (0.0, 0.0)):
        words = said(0.0, target, weight=weight, explained_variance=explained_variance, dead=dead)
        assert words == begin + "training diverged or nothing is left; lower --lr"
    fixed = said(0.0, None, weight=50.0, explained_variance=explained_variance, dead=dead)
    assert fixed.endswith("; lower --sparsity-weight or --lr")


def test_a_sound_training_is_told_nothing() -> None:
    assert said(32.0) == said(7.0, None) == said(7.0, None, weight=3.0) == said(33.0, explained_variance=0.0) == ""


@pytest.mark.parametrize(
    ("l0", "weight", "hint"),
    [
        (499.0, None, "train on more rows (--rows), or raise --l0"),
        (12.0, None, "train on more rows (--rows), or lower --l0: so many features do not fire"),
        (499.0, 0.25, "train on more rows (--rows), or fix --sparsity-weight above 0.25, where it ended"),
        (499.0, 0.0, "train on more rows (--rows)"),
        (12.0, 0.0, "train on more rows (--rows)"),
        (12.0, 0.25, "train on more rows (--rows), or fix --sparsity-weight below 0.25, where it ended"),
    ],
)
def test_a_missed_l0_is_fixed_in_its_direction(l0: float, weight: float | None, hint: str) -> None:
    assert said(l0, 100, weight=weight) == f"L0 {l0:.2f} was reached, not the 100 asked for; {hint}"


def test_an_explained_variance_stays_narrow() -> None:
    texts = {
        -math.inf: "−∞",
        0.91234: "0.9123",
        -0.5: "-0.5000",
        -9.99: "-9.9900",
        -330.21: "-330",
        -2.51234e12: "-2.51e+12",
    }
    assert {value: trained(explained_variance=value).variance_text for value in texts} == texts


def test_a_training_that_ended_in_finite_garbage_says_so(tmp_path: Path) -> None:
    planted = Planted(12, 8, 2.0)
    source, heldout = MemorySource(planted.rows(640)), MemorySource(planted.rows(200), 1)
    config = TrainConfig(arch="relu", l0=2, n_features=24, rows=1280, batch_size=64, heldout_rows=200, lr=100.0)
    with Run.open(tmp_path / "run", "train", config) as run:
        result = train(config, source, run, heldout=heldout)
    assert result.explained_variance < -10 or result.dead_share == 1
    text = TrainedSAE(result=result, sae=load_dictionary(result.sae), metrics=[], run=tmp_path).render()
    assert "training diverged or nothing is left; lower --lr" in text
    assert "--sparsity-weight" not in text
    bank = expand(
        {"arch": ["relu"], "l0": [2], "n_features": [24], "rows": [1280], "batch_size": [64], "lr": [100.0, 1e-3]}
    )
    site = {bank[0].site: SiteRows(source, heldout)}
    rows = train_members(bank, bank, site, Place(tmp_path / "bank"), Ranks())
    assert rows is not None
    console = Console(width=200, file=StringIO(), record=True)
    console.print(TrainedBank(run=tmp_path, rows=tuple(rows)).render())
    lines = [line for line in console.export_text().splitlines() if "lower --lr" in line]
    assert [line.split(": ")[0] for line in lines] == [rows[0].name]
