"""Trainings whose device is looked at only now and then, as an accelerator is: the same ends, the same errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted_rows import MemorySource, Planted
from torch import Tensor
from training_saes import mutate

from trimtab.dictionaries import topk_like
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.errors import UserError
from trimtab.runs import Run, read_metrics
from trimtab.training import TrainConfig, late, train, trainer
from trimtab.training.checkpoint import checkpoint_files
from trimtab.training.late import FirstFault, Sums
from trimtab.training.optimiser import Adam
from trimtab.training.rows import Batch, SiteRows
from trimtab.training.trainer import Trainer


def small(**settings: object) -> TrainConfig:
    base = {"n_features": 16, "l0": 2, "rows": 1024, "batch_size": 64, "heldout_rows": 64, "scaling": "none"}
    return TrainConfig(**(base | settings))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let trainings here look as late as on an accelerator; the steps at which they do."""
    found: list[int] = []
    for module in (topk_like, late, trainer):
        monkeypatch.setattr(module, "looks_late", lambda _device: True)
    look = Trainer._look

    def noted(self: Trainer) -> None:
        found.append(self.step)
        look(self)

    monkeypatch.setattr(Trainer, "_look", noted)
    return found


@pytest.mark.parametrize(("batch", "hint"), [(64, "--batch-size 32"), (1, "fewer --n-features")])
def test_a_step_that_does_not_fit_is_refused(
    batch: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an earlier checkpoint stays."""
    real = Trainer._step

    def step(self: Trainer, batch: Batch) -> object:
        if self.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_step", step)
    config = small(batch_size=batch, rows=8 * batch, checkpoint_every=1)
    with Run.open(tmp_path / "run", "train", config) as run:
        what = f"a training step of {batch} rows for 16 features: cpu has no room for it; begin anew with {hint} in"
        with pytest.raises(UserError, match=what):
            train(config, Spoilt(), run)
        assert [path.name for path in checkpoint_files(run.file("checkpoints"))]


class Spoilt(MemorySource):
    """Rows of which those of some steps make the loss overflow, or hold one that is not a number."""

    def __init__(self, spikes: tuple[int, ...] = (), nan: int | None = None) -> None:
        super().__init__(Planted(12, 8, 2.0).rows(64 * 16))
        self.spikes, self.nan = spikes, nan

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        for step, batch in enumerate(super().batches(batch_size, start_step), start_step):
            if step == self.nan:
                batch[7, 3] = math.nan
            yield batch * (1e30 if step in self.spikes else 1.0)


@pytest.mark.parametrize("arch", TRAINABLE)
def test_a_training_that_looks_late_ends_with_the_same_bits(
    arch: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = {"groups": (0.25, 0.75)} if arch == "matryoshka" else {}
    config, ended = small(arch=arch, log_every=5, checkpoint_every=8, **own), []
    for name in ("at once", "late"):
        looked = request.getfixturevalue("looks") if name == "late" else []
        with Run.open(tmp_path / name, "train", config) as run:
            result = train(config, Spoilt(), run)
        lines = [{k: v for k, v in line.items() if k != "rows_per_second"} for line in read_metrics(tmp_path / name)]
        ended.append((result.fingerprint, lines))
    assert looked == [5, 8, 10, 15, 16]
    assert ended[0] == ended[1]


SPOILT = [
    ({"spikes": (12,)}, 12, [5, 10]),
    ({"spikes": (11, 12, 13)}, 11, [5, 10]),
    ({"spikes": (10,)}, 10, [5]),
    ({"spikes": (5,)}, 5, []),
    ({"spikes": (14,), "nan": 3}, 3, []),
    ({"spikes": (3,), "nan": 4}, 3, []),
]


def stopped(path: Path, spoilt: dict[str, object], **settings: object) -> tuple[str, list[str]]:
    """What a training said, and the checkpoints that it kept."""
    config = small(checkpoint_every=5, **settings)
    with Run.open(path, "train", config) as run, pytest.raises(UserError) as error:
        train(config, Spoilt(**spoilt), run)  # pyright: ignore[reportArgumentType]
    return error.value.line.replace(str(path), "RUN"), [file.name for file in checkpoint_files(path / "checkpoints")]


@pytest.mark.parametrize(("spoilt", "step", "good"), SPOILT)
def test_the_first_bad_step_is_named_and_good_checkpoints_stay(
    spoilt: dict[str, object], step: int, good: list[int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    at_once = stopped(tmp_path / "a", spoilt)
    request.getfixturevalue("looks")
    assert stopped(tmp_path / "b", spoilt) == at_once
    assert at_once[1] == [f"step-{one:09d}.safetensors" for one in good]
    bad_rows = f"1 of 64 rows in the batch of step {step}: they hold NaN or infinity"
    assert at_once[0].startswith(bad_rows if spoilt.get("nan") == step else f"loss inf at step {step}: ")


def test_a_gradient_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    project = TRAINABLE["topk"].project_gradients

    def spoil(self) -> None:
        project(self)
        if next(steps) == 7:
            self.b_dec.grad[0] = math.inf

    monkeypatch.setattr(TRAINABLE["topk"], "project_gradients", spoil)
    said = []
    for name in ("a", "b"):
        steps = iter(range(100))
        said.append(stopped(tmp_path / name, {}))
        request.getfixturevalue("looks")
    assert said[0] == said[1]
    assert said[0][0].startswith("gradient norm inf at step 7: training diverged; the last good checkpoint is step 5")


MUTATIONS = {
    "the last bad step is kept": (FirstFault, "note", "self.seen | ~is_bad, self", "~is_bad, self"),
    "nobody looks before a checkpoint": (Trainer, "_advance", "(logs or saves)", "logs"),
    "later steps change weights": (Adam, "step", " | skip", ""),
    "the bad step changes weights": (Adam, "step", "unusable.float()", "0 * unusable.float()"),
    "rows are not counted": (FirstFault, "note", "~rows.isfinite().all(1)", "rows.isnan().all(1)"),
}


def assert_a_fault_changes_nothing(path: Path) -> None:
    """From the first bad step on weights stay as they are, until someone looks."""
    config = small(checkpoint_every=100, log_every=100)
    with Run.open(path, "train", config) as run:
        one = Trainer.start(config, SiteRows(Spoilt()), run)
        batches = Spoilt((9,)).batches(64)
        for _ in range(9):
            one.advance(Batch(next(batches)))
        before = one.sae.W_enc_rows.detach().clone()
        for _ in range(3):
            one.advance(Batch(next(batches)))
        assert torch.equal(one.sae.W_enc_rows, before)


def assert_all_is_right(path: Path) -> None:
    """With late looks: what is said, what is kept and what is left."""
    for number, (spoilt, step, good) in enumerate(SPOILT):
        line, kept = stopped(path / str(number), spoilt)
        assert f"step {step}" in line.partition(":")[0]
        assert ("rows in the batch" in line) == (spoilt.get("nan") == step)
        assert kept == [f"step-{one:09d}.safetensors" for one in good]
    assert_a_fault_changes_nothing(path / "weights")


@pytest.mark.usefixtures("looks")
def test_late_looks_miss_nothing(tmp_path: Path) -> None:
    assert_all_is_right(tmp_path)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[name])
    with pytest.raises(AssertionError):
        assert_all_is_right(tmp_path)


def test_sums_are_those_of_python() -> None:
    numbers = [{"a": torch.tensor(1 / n), "b": n / 3} for n in range(1, 20)]
    sums = Sums(("a", "b"), torch.device("cpu"))
    for half in (numbers[:9], numbers[9:]):
        sums = Sums(("a", "b"), torch.device("cpu"), sums.read())
        for one in half:
            sums.add(one)
    assert sums.read() == {
        "steps": 19, "a": sum(float(one["a"]) for one in numbers), "b": sum(one["b"] for one in numbers)
    }  # fmt: skip
    assert Sums(("a", "b"), torch.device("cpu"), {}).read() == {"steps": 0, "a": 0.0, "b": 0.0}
