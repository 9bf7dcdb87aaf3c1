"""Training on a CUDA device: nothing waits in a step, resumed trainings give the same bits, errors name their step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from planted_rows import MemorySource, Planted

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.precision import Precision
from trimtab.dictionaries.topk_like import LOOK_EVERY
from trimtab.errors import UserError
from trimtab.lm import captured
from trimtab.lm.captured import WARM
from trimtab.runs import Run, read_metrics, read_record
from trimtab.training import SiteRows, TrainConfig, Training, train, train_all, trainer
from trimtab.training.rows import Stream
from trimtab.training.step_graph import BatchPlaces
from trimtab.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")


def small(arch: str, **settings: object) -> TrainConfig:
    base = {"n_features": 1024, "l0": 4, "rows": 256 * 60, "batch_size": 256, "heldout_rows": 512, "dead_after": 2_000}
    return TrainConfig(arch=arch, **(base | settings))  # pyright: ignore[reportArgumentType]


def source() -> MemorySource:
    return MemorySource(Planted(64, 24, 3.0).rows(4_000))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("arch", "execution"), [*((arch, "dense") for arch in TRAINABLE), ("topk", "sparse")])
def test_a_step_waits_for_nothing(arch: str, execution: str, precision: Precision, tmp_path: Path) -> None:
    steps = LOOK_EVERY
    config = small(arch, precision=precision, log_every=10_000, checkpoint_every=10_000, ema_decay=0.9, decay_share=1.0)
    with Run.open(tmp_path, "train", config) as run:
        trainer = Trainer.start(config, SiteRows(source()), run, "cuda")
        trainer.sae.execution = execution  # pyright: ignore[reportAttributeAccessIssue]
        stream = Stream(source(), config.batch_size, range(60), "cuda")
        for step in range(steps):
            stream.read()
            batch = stream.batch(step)
            assert batch is not None
            settled = step > WARM  # the first step looks, and compiles; then one is captured
            torch.cuda.set_sync_debug_mode("error" if settled else "default")
            try:
                trainer.advance(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            stream.drop_before(step + 1)
        assert trainer.window.read()["steps"] == steps
        assert trainer.captured.is_captured


@pytest.mark.parametrize("arch", TRAINABLE)
def test_it_ends_as_on_a_cpu_and_a_resumed_one_with_the_same_bits(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, advance = small(arch, precision="fp32", checkpoint_every=20, log_every=7), Trainer.advance

    def killed(self: Trainer, batch: object) -> None:
        if self.step == 50:
            raise KeyboardInterrupt
        advance(self, batch)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch, Run.open(tmp_path / "killed", "train", config) as run:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, source(), run, device="cuda")
    ended = {}
    for name, device in (("killed", "cuda"), ("whole", "cuda"), ("cpu", "cpu")):
        with Run.open(tmp_path / name, "train", config) as run:
            ended[name] = train(config, source(), run, device=device)
    assert ended["cpu"].explained_variance == pytest.approx(ended["whole"].explained_variance, abs=0.02)
    records = [read_record(tmp_path / name) for name in ("killed", "whole")]
    assert all(record["precision"] == "fp32" for record in records)
    assert records[0]["execution"] == records[1]["execution"]  # measured once in this process
    assert ended["killed"].fingerprint == ended["whole"].fingerprint


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("arch", "execution"), [*((arch, "dense") for arch in TRAINABLE), ("topk", "sparse")])
def test_captured_steps_are_the_steps(
    arch: str, execution: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding, after a whole schedule; where they differ at all, products were made by other kernels."""
    config = small(arch, precision=precision, ema_decay=0.9, log_every=5)
    monkeypatch.setattr(trainer, "fastest_execution", lambda *_: execution)
    ended = {}
    for name, warm in (("captured", WARM), ("plain", 10**9)):
        monkeypatch.setattr(captured, "WARM", warm)
        with Run.open(tmp_path / name, "train", config) as run:
            train(config, source(), run, device="cuda")
        assert read_record(tmp_path / name)["captured"] is (name == "captured")
        ended[name] = read_metrics(tmp_path / name)
    for mine, other in zip(ended["captured"], ended["plain"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["l0"] == pytest.approx(other["l0"], rel=1e-2)


def test_members_hold_the_memory_of_one_step(tmp_path: Path) -> None:
    """Each needs its weights and moments; what its graph computes with is shared."""
    held = []
    for members in (1, 6):
        config = small("gated", n_features=8192, precision="fp32")
        rows = SiteRows(source())
        runs = [Run.open(tmp_path / f"{members}-{i}", "train", config) for i in range(members)]
        trainings = [Training(config, rows, run) for run in runs]
        torch.cuda.reset_peak_memory_stats()
        train_all(trainings, device="cuda")
        held.append(torch.cuda.max_memory_reserved())
        for training in trainings:
            training.run.close()
            assert training.error is None
    state = 3 * 4 * 2 * 8192 * 64
    table = 4 * 256 * 8192
    assert held[1] - held[0] < 6 * state + 10 * table  # each of their own would be five times a step's ten tables


def test_a_pool_goes_with_the_trainings(tmp_path: Path) -> None:
    used = []
    for number in range(6):
        config = small("topk", precision="fp32", n_features=4096)
        with Run.open(tmp_path / str(number), "train", config) as run:
            train(config, source(), run, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1] + 2**20


def test_the_place_of_batches_is_one() -> None:
    places, x = BatchPlaces(), torch.randn(4, 3, device="cuda")
    assert places.placed(x).data_ptr() == places.placed(x + 1).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("arch", ["topk", "gated"])
def test_a_bad_row_is_named(arch: str, tmp_path: Path) -> None:
    rows = source()
    rows.rows[rows._order(0)[256 * 9 + 3], 2] = math.nan
    rows.sample = lambda n: Planted(64, 24, 3.0).rows(n)  # pyright: ignore[reportAttributeAccessIssue]
    config = small(arch, checkpoint_every=4)
    with (
        Run.open(tmp_path, "train", config) as run,
        pytest.raises(UserError, match="1 of 256 rows in the batch of step 9: they hold NaN or infinity"),
    ):
        train(config, rows, run, device="cuda")


def test_batches_arrive_as_they_were() -> None:
    here, there = (Stream(source(), 256, range(8), device) for device in ("cpu", "cuda"))
    for step in range(8):
        for stream in (here, there):
            stream.read()
        batches = [stream.batch(step) for stream in (here, there)]
        assert batches[0] is not None
        assert batches[1] is not None
        assert torch.equal(batches[0].scaled(2.0, torch.float32), batches[1].scaled(2.0, torch.float32).cpu())
        for stream in (here, there):
            stream.drop_before(step + 1)


def test_products_have_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    """The rounding of a step's gradients, against float64."""
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(1)).cuda()
    errors = {}
    for precision in PRECISIONS:
        config = small("relu", precision=precision)
        sae, exact = config.build(24, 100, "cuda"), small("relu", precision="fp32").build(24, 100, "cuda").double()
        sae.execution = exact.execution = "dense"
        sae.backward(x)
        exact.backward(x.double())
        assert sae.W_dec.grad is not None
        assert exact.W_dec.grad is not None
        errors[precision] = float((sae.W_dec.grad - exact.W_dec.grad).norm() / exact.W_dec.grad.norm())
    assert errors["fp32"] < 1e-5 < errors["tf32"] < errors["bf16"] < 0.05
