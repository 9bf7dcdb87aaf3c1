"""Which execution of a step a training chooses where it is measured, and that it stays with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted_rows import MemorySource, Planted
from tests.lm.taped_graphs import tape_graphs

from trimtab.dictionaries import l0_control, topk_like
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.runs import Run, read_record
from trimtab.training import TrainConfig, execution, train, trainer
from trimtab.training.checkpoint import latest_checkpoint
from trimtab.training.execution import TURNS, fastest_execution, is_measured


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_FOUND", {})


def small(arch: str = "topk", **settings: object) -> TrainableSAE:
    base = {"n_features": 2048, "l0": 4, "arch": arch}
    sae = TrainConfig(**(base | settings)).build(8, 100)  # pyright: ignore[reportArgumentType]
    sae.initialise(rows())
    return sae


def rows() -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class FakeTimer:
    """Says how long each execution takes, and notes which were asked for. Some need too much memory."""

    def __init__(self, sae: TrainableSAE, seconds: dict[str, list[float]]) -> None:
        self.sae, self.seconds, self.asked = sae, {name: iter(s) for name, s in seconds.items()}, list[str]()

    def __call__(self, work: Callable[[], object]) -> float:
        way = str(self.sae.execution)
        self.asked.append(way)
        work()
        if way not in self.seconds:
            raise torch.OutOfMemoryError
        return next(self.seconds[way])


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({"dense": [3, 3, 3], "sparse": [9, 2, 9], "screened": [4, 4, 4]}, "sparse"),
        ({"dense": [9, 1, 9], "sparse": [2, 2, 2], "screened": [4, 4, 4]}, "dense"),
        ({"dense": [3, 3, 3], "sparse": [2, 2, 2], "screened": [1, 4, 4]}, "screened"),
        ({"sparse": [9, 9, 9], "screened": [10, 10, 10]}, "sparse"),
    ],
)
@pytest.mark.parametrize("arch", TRAINABLE)
def test_the_fastest_that_fits_is_taken_and_measured_once(
    arch: str, seconds: dict[str, list[float]], fastest: str
) -> None:
    sae = small(arch)
    timer = FakeTimer(sae, seconds)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    assert fastest_execution(sae, rows(), timer) == fastest
    asked = {way: TURNS if way in seconds else 1 for way in ("dense", "sparse", "screened")}  # 1: too little memory
    assert timer.asked == [way for way, times in asked.items() for _ in range(times)]
    assert sae.execution is None
    assert all(parameter.grad is None for parameter in sae.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert fastest_execution(small(arch), rows(), timer) == fastest
    assert len(timer.asked) == sum(asked.values())
    other = small(arch, n_features=1024)
    timer.sae, timer.seconds = other, {"sparse": iter([1, 1, 1])}
    assert fastest_execution(other, rows(), timer) == "sparse"


@pytest.mark.parametrize("arch", ["gated", "topk"])
def test_what_would_be_replayed_is_timed_as_a_graph(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, sae = tape_graphs(monkeypatch), small(arch)
    monkeypatch.setattr(topk_like, "looks_late", lambda _device: True)
    monkeypatch.setattr(l0_control, "_exp", torch.exp)
    sae.prepare(rows())
    timer = FakeTimer(sae, {"dense": [1.0] * TURNS, "sparse": [2.0] * TURNS, "screened": [2.0] * TURNS})
    assert fastest_execution(sae, rows(), timer) == "dense"
    assert next(graph.replays for graph in graphs if graph.tape) == 1 + TURNS
    assert len(graphs) == (2 if arch == "topk" else 1)  # its sparse steps are not captured on a CPU
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_only_exact_products_are_screened() -> None:
    sae = small(precision="bf16")
    timer = FakeTimer(sae, {"dense": [1.0] * TURNS, "sparse": [2.0] * TURNS})
    assert fastest_execution(sae, rows(), timer) == "dense"
    assert set(timer.asked) == {"dense", "sparse"}


def test_without_memory_for_any_it_is_said() -> None:
    sae = small()
    with pytest.raises(torch.OutOfMemoryError):
        fastest_execution(sae, rows(), FakeTimer(sae, {}))


def test_all_executions_of_a_wide_float32_dictionary_give_the_same_gradients() -> None:
    gradients = []
    for way in ("dense", "sparse", "screened"):
        sae = small()
        sae.execution = way
        sae.gradients(rows())
        gradients.append([parameter.grad for parameter in sae.parameters()])
    for name, *found in zip((name for name, _ in sae.named_parameters()), *gradients, strict=True):
        for one in found[1:]:
            assert torch.allclose(found[0], one, atol=1e-5 * float(found[0].abs().max())), name


def test_a_cpu_is_not_measured_nor_is_what_is_not_written_out() -> None:
    sae = small()
    assert not is_measured(sae)
    sae.to("meta")
    assert sae.is_written_out
    sae.by_autograd = True
    assert not sae.is_written_out


def test_a_resumed_training_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake(sae: TrainableSAE, x: torch.Tensor) -> str:
        measured.append(x.shape)
        return "dense"

    monkeypatch.setattr(trainer, "is_measured", lambda sae: sae.execution is None)
    monkeypatch.setattr(trainer, "fastest_execution", fake)
    for module in (topk_like, trainer):
        monkeypatch.setattr(module, "looks_late", lambda _device: True)
    source = MemorySource(Planted(12, 8, 2.0).rows(400))
    config = TrainConfig(n_features=16, l0=2, rows=1024, batch_size=64, heldout_rows=64, checkpoint_every=4)
    advance = trainer.Trainer.advance

    def killed(self: trainer.Trainer, batch: object) -> None:
        if self.step == 10:
            raise KeyboardInterrupt
        advance(self, batch)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt), Run.open(tmp_path / "run", "train", config) as run:
            train(config, source, run)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts["execution"], checkpoint.facts["precision"]) == (8, "dense", "fp32")
    assert read_record(tmp_path / "run")["execution"] == "dense"
    with Run.open(tmp_path / "run", "train", config) as run:
        resumed = train(config, source, run)
    assert measured == [(64, 8)]
    with Run.open(tmp_path / "whole", "train", config) as run:
        assert train(config, source, run).fingerprint == resumed.fingerprint
