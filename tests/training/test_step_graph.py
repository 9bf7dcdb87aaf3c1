"""Training steps that are replayed as graphs, by a stand-in for them on the CPU (`tests.lm.taped_graphs`): whatever a
training goes through, it ends as one that takes every step by itself, to the last bit."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_rows import MemorySource, Planted
from tests.lm.taped_graphs import TapedGraph, tape_graphs
from torch import Tensor
from training_saes import mutate

from trimtab.dictionaries import l0_control, topk_like
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.l0_control import L0Control
from trimtab.dictionaries.topk_like import TopKLike
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.errors import UserError
from trimtab.lm import captured
from trimtab.runs import Run, read_metrics, read_record
from trimtab.training import SiteRows, TrainConfig, Training, late, step_graph, train, train_all, trainer
from trimtab.training.checkpoint import checkpoint_files, latest_checkpoint
from trimtab.training.late import FirstFault, Sums
from trimtab.training.step_graph import UnknownValueError, python_values
from trimtab.training.trainer import Trainer

Patch = pytest.MonkeyPatch
STEPS = 120
RootReLU = importlib.import_module("own_architecture").TrainableRootReLU  # when the options of `train` are known
TRAINABLE.pop(RootReLU.architecture, None)  # known to its own test alone
SCHEDULES: dict[str, dict[str, Any]] = {
    **{arch: {} for arch in TRAINABLE},
    "topk": {"k_start": 8, "ema_decay": 0.9},
    "batchtopk": {"decay": "cosine"},
    "matryoshka": {"groups": (0.25, 0.75), "k_start": 9},
    "relu": {"decoder_norm": "free", "ema_decay": 0.9},
    "gated": {"clip_norm": 0.1},
    "jumprelu": {"penalty": "tanh"},
}
"""What changes in a training, beside the learning rate, the sparsity weight, p, and which features are dead."""


class Card:
    """The CPU taken for a card, on which dense steps can be captured."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.trainers: list[Trainer] = []
        self._hosts: dict[int, Tensor] = {}
        self.graphs = tape_graphs(patch, lambda one: id(one) in self._hosts)
        patch.setattr(captured, "WARM", 10**9)
        for module in (topk_like, late, trainer):
            patch.setattr(module, "looks_late", lambda _device: True)
        patch.setattr(l0_control, "_exp", torch.exp)  # as on a card
        patch.setattr(l0_control, "_log", torch.log)
        patch.setattr(topk_like, "LOOK_EVERY", 4)
        patch.setattr(topk_like, "LIST_LENGTHS", 4)
        patch.setattr(captured, "CALLS_PER_CAPTURE", 5)
        captured.say_once.cache_clear()
        start = Trainer.start

        def started(*args: Any) -> Trainer:
            made = start(*args)
            made.sae.execution = "dense" if made.sae.is_written_out else None
            self._hosts |= {id(one): one for name, one in made.sae.named_buffers() if name in made.sae.on_host}
            self.trainers.append(made)
            return made

        patch.setattr(Trainer, "start", started)

    def capture(self) -> None:
        """From now on steps are captured."""
        self.patch.setattr(captured, "WARM", 2)

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)


@pytest.fixture
def card(monkeypatch: Patch) -> Card:
    return Card(monkeypatch)


def config_of(arch: str, **settings: object) -> TrainConfig:
    base = {"n_features": 96, "l0": 3, "rows": 64 * STEPS, "batch_size": 64, "heldout_rows": 64, "dead_after": 320}
    base |= {"checkpoint_every": 25, "log_every": 7}
    return TrainConfig(arch=arch, **(base | SCHEDULES.get(arch, {}) | settings))  # pyright: ignore[reportArgumentType]


class Rows(MemorySource):
    """Rows of which those of one step may hold one that is no number, or make the loss overflow."""

    def __init__(self, nan: int | None = None, spike: int | None = None) -> None:
        super().__init__(Planted(24, 8, 2.0).rows(64 * 16))
        self.nan, self.spike = nan, spike

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        for step, batch in enumerate(super().batches(batch_size, start_step), start_step):
            if step == self.nan:
                batch[7, 3] = math.nan
            yield batch * (1e30 if step == self.spike else 1.0)


class Ended:
    """All that a training leaves."""

    def __init__(self, path: Path) -> None:
        checkpoint = latest_checkpoint(path / "checkpoints")
        assert checkpoint is not None
        self.state = {name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors.items()}
        self.lines = [{k: v for k, v in line.items() if k != "rows_per_second"} for line in read_metrics(path)]


def trained(path: Path, config: TrainConfig, rows: Rows | None = None, **how: Any) -> Ended:
    with Run.open(path, "train", config) as run:
        train(config, rows or Rows(), run, **how)
    return Ended(path)


def check(found: Ended, expected: Ended) -> None:
    assert found.lines == expected.lines
    assert found.state.keys() == expected.state.keys()
    assert [name for name, value in found.state.items() if value != expected.state[name]] == []


def check_with_graphs(card: Card, path: Path, config: TrainConfig, replays: int, **how: Any) -> Ended:
    """A training with graphs and one without are the same, and a step changes nothing that its proof does not know."""
    expected = trained(path / "plain", config, **how)
    card.capture()
    found = trained(path / "graphs", config, **how)
    check(found, expected)
    assert card.replays >= replays
    known = {one.untyped_storage().data_ptr() for one in card.trainers[-1]._state()}
    assert {address for graph in card.graphs for address in graph.written} <= known
    assert read_record(path / "graphs")["captured"] is True
    assert read_record(path / "plain")["captured"] is False
    return found


@pytest.mark.parametrize("arch", TRAINABLE)
def test_a_training_by_graphs_is_the_training(arch: str, card: Card, tmp_path: Path) -> None:
    config = config_of(arch)
    ended = check_with_graphs(card, tmp_path, config, replays=STEPS // 2)
    if issubclass(TRAINABLE[arch], TopKLike):
        assert len({line["dead_features"] for line in ended.lines}) > 1
        assert any(line["aux"] > 0 for line in ended.lines)
    elif arch != "jumprelu":
        assert len({line["sparsity_weight"] for line in ended.lines}) == len(ended.lines)
    if getattr(config, "k_start", None) or arch == "panneal":
        assert len({line.get("k", line.get("p")) for line in ended.lines}) > 3


def test_an_architecture_of_ones_own_is_captured_by_automatic_differentiation(
    card: Card, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(TRAINABLE, "rootrelu", RootReLU)
    check_with_graphs(card, tmp_path, config_of("rootrelu"), replays=STEPS // 2)


@pytest.mark.parametrize("arch", ["gated", "jumprelu"])
def test_so_are_those_that_have_their_gradients_written_out(arch: str, card: Card, tmp_path: Path) -> None:
    check_with_graphs(card, tmp_path, config_of(arch), replays=STEPS // 2, by_autograd=True)


def test_a_training_on_a_card_ends_as_on_a_cpu_to_rounding(card: Card, tmp_path: Path, monkeypatch: Patch) -> None:
    config = config_of("relu", checkpoint_every=10, rows=640)
    card.capture()
    found = trained(tmp_path / "card", config)
    monkeypatch.undo()
    expected = trained(tmp_path / "cpu", config)
    for mine, other in zip(found.lines, expected.lines, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(("what", "said"), [("nan", "1 of 64 rows in the batch of step 58"), ("spike", "loss inf at")])
def test_the_first_bad_step_is_named(what: str, said: str, card: Card, tmp_path: Path) -> None:
    lines, kept = [], []
    for name in ("plain", "graphs"):
        path = tmp_path / name
        with pytest.raises(UserError) as error:
            trained(path, config_of("jumprelu"), Rows(**{what: 58}))
        lines.append(error.value.line.replace(str(path), "RUN"))
        kept.append([file.name for file in checkpoint_files(path / "checkpoints")])
        card.capture()
    assert lines[0].startswith(said)
    assert "step 58" in lines[0]
    assert (lines[0], kept[0]) == (lines[1], kept[1])
    assert card.replays > 30


@pytest.mark.parametrize("arch", ["topk", "panneal"])
def test_a_resumed_training_is_the_training(arch: str, card: Card, tmp_path: Path, monkeypatch: Patch) -> None:
    config, advance = config_of(arch), Trainer.advance
    expected = trained(tmp_path / "whole", config)

    def killed(self: Trainer, batch: Any) -> None:
        if self.step == 60:
            raise KeyboardInterrupt
        advance(self, batch)

    card.capture()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", config)
    made = len(card.graphs)
    check(trained(tmp_path / "killed", config), expected)
    assert made
    assert len(card.graphs) > made


def bank(path: Path) -> list[Ended]:
    """What members of a bank that take turns end with."""
    configs = [config_of(arch, rows=64 * 40, checkpoint_every=10) for arch in ("topk", "gated", "relu")]
    rows = SiteRows(Rows())
    runs = [Run.open(path / str(i), "train", config) for i, config in enumerate(configs)]
    trainings = [Training(config, rows, run) for config, run in zip(configs, runs, strict=True)]
    train_all(trainings)
    for training in trainings:
        training.run.close()
        assert training.error is None, training.error
    return [Ended(run.path) for run in runs]


def check_bank(card: Card, path: Path) -> None:
    expected = bank(path / "plain")
    card.capture()
    for found, one in zip(bank(path / "graphs"), expected, strict=True):
        check(found, one)
    assert card.replays > 40
    assert len({graph.pool() for graph in card.graphs}) == 1


def test_members_of_a_bank_share_the_memory_of_their_graphs(card: Card, tmp_path: Path) -> None:
    check_bank(card, tmp_path)


@pytest.mark.parametrize("mutated", [False, True])
def test_what_is_looked_at_when_others_were_replayed_is_not_in_their_memory(
    mutated: bool, card: Card, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Here lines are written a step late. Mutation: what they say stays where the graph computed it."""
    log, advance = Trainer._log, Trainer.advance

    def late_line(self: Trainer, batch: Any) -> None:
        if self.step and self.step % self.config.log_every == 0:
            log(self)
        advance(self, batch)

    monkeypatch.setattr(Trainer, "_log", lambda _: None)
    monkeypatch.setattr(Trainer, "advance", late_line)
    if not mutated:
        return check_bank(card, tmp_path)
    mutate(
        monkeypatch, Trainer, "_take", "self._n_dead.copy_(torch.as_tensor(loss.n_dead))", "self._n_dead = loss.n_dead"
    )
    with pytest.raises(AssertionError):
        check_bank(card, tmp_path)


MUTATIONS: dict[str, tuple[str, Any, str, str, str]] = {
    "attributes are no part of the key": (
        "topk", step_graph, "python_values", "held = {name: value for", "held = {} or {name: None for",
    ),
    "nor is which features may be dead": (
        "batchtopk", step_graph, "_known", "id(value), value.data_ptr(), value.shape, value.dtype", "0",
    ),
    "nor is whether weights are averaged": (
        "relu", Trainer, "_take_captured", '*values, ("averages", averages), ("average", id(self.average))',
        "(*values,)",
    ),
    "the learning rate is Python's": ("gated", Trainer, "_step", "lr = self._lr.fill_(lr)", "pass"),
    "batches are where they came": ("gated", Trainer, "_take_captured", "self._places.placed(x)", "x"),
    "sums are another tensor after each step": ("gated", Sums, "add", "_totals +=", "_totals = self._totals +"),
    "so is the state of the control": ("relu", L0Control, "update", "self.seen += 1", "self.seen = self.seen + 1"),
    "so are silent features": (
        "topk", TrainableSAE, "backward_prepared", "self.tokens_since_fired += len(x)",
        "self.tokens_since_fired = self.tokens_since_fired + len(x)",
    ),
    "the proof does not know of a part of the state": (
        "jumprelu", Trainer, "_state", "*self._fault.state, ", "",
    ),
    "nor of another": ("relu", Trainer, "_state", "*(self.average or {}).values(), ", ""),
}  # fmt: skip


def mutate_any(patch: Patch, owner: Any, method: str, old: str, new: str) -> None:
    """As `mutate`, of a module's functions, too."""
    if isinstance(owner, type):
        mutate(patch, owner, method, old, new)
        return
    holder = type("holder", (), {method: getattr(owner, method), "__module__": owner.__name__})
    mutate(patch, holder, method, old, new)
    for module in (owner, trainer):
        patch.setattr(module, method, vars(holder)[method], raising=False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, card: Card, tmp_path: Path, monkeypatch: Patch) -> None:
    arch, *mutation = MUTATIONS[name]
    mutate_any(monkeypatch, *mutation)
    with pytest.raises(AssertionError):
        check_with_graphs(card, tmp_path, config_of(arch), replays=STEPS // 2)


def test_without_what_is_on_the_host_p_would_stay(card: Card, tmp_path: Path, monkeypatch: Patch) -> None:
    """Mutation: neither p nor what it is to be next is a part of the key."""
    monkeypatch.setattr(TRAINABLE["panneal"], "not_in_step", ("next_p",))
    mutate_any(monkeypatch, step_graph, "python_values", "float(value) if on_host", "0 if on_host")
    with pytest.raises(AssertionError):
        check_with_graphs(card, tmp_path, config_of("panneal"), replays=STEPS // 2)


def test_facts_of_a_fault_are_written_in_place(card: Card, tmp_path: Path, monkeypatch: Patch) -> None:
    """Mutation: another tensor at each step."""
    mutate(monkeypatch, FirstFault, "note", "self._facts.copy_(", "self._facts = (")
    with pytest.raises(AssertionError):
        test_the_first_bad_step_is_named("nan", "1 of 64 rows in the batch of step 58", card, tmp_path)


def sae_of(arch: str = "relu", **settings: Any) -> TrainableSAE:
    return config_of(arch, **settings).build(8, STEPS)


@dataclass
class Record:
    held: Any


CHANGES: dict[str, Callable[[Any], object]] = {
    "another number": lambda sae: setattr(sae, "k", 4),
    "a number that was not there": lambda sae: setattr(sae, "floor", 0.1),
    "another execution": lambda sae: setattr(sae, "execution", "sparse"),
    "numbers in a list": lambda sae: sae.ends.append(7),
    "a number in a record": lambda sae: setattr(sae.record, "held", 2),
    "a parameter elsewhere": lambda sae: setattr(sae.W_dec, "data", sae.W_dec.data.clone()),
    "a parameter of another shape": lambda sae: setattr(sae.W_dec, "data", sae.W_dec.data[:3]),
    "a buffer that is another tensor": lambda sae: setattr(sae, "threshold", sae.threshold + 1),
    "a tensor beside": lambda sae: setattr(sae, "_may_be_dead", torch.zeros(3)),
    "a part": lambda sae: sae.add_module("part", L0Control(1.0)),
    "a number in a part": lambda sae: setattr(sae.inner, "target", 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_python_may_go_by_is_known(name: str) -> None:
    sae = sae_of("batchtopk")
    sae.record = Record(1)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    sae.ends, sae.inner = [3, 5], L0Control(1.0, 2.0)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    before = python_values(sae)
    assert python_values(sae) == before
    CHANGES[name](sae)
    assert python_values(sae) != before


@pytest.mark.parametrize("value", [Record({1}), iter([1]), [{1}], {"a": torch.Generator()}, lambda: 1])
def test_what_may_hold_anything_is_named(value: object) -> None:
    sae = sae_of("gated")
    sae.control.inner = value  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with pytest.raises(UnknownValueError, match=r"L0Control\.inner"):
        python_values(sae)


def test_numbers_on_the_device_change_nothing_of_it() -> None:
    sae = sae_of("relu", decoder_norm="unit")
    before = python_values(sae)
    for step in range(3):
        sae.set_progress(step / 10)
        sae.backward(torch.randn(5, 8))
        sae.constrain()
    sae.zero_grad(set_to_none=True)
    assert python_values(sae) == before


def test_what_may_hold_anything_is_not_captured(
    card: Card, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But said; and it may be named as what no step goes by."""

    class Counter:
        pass

    start = Trainer.start

    def started(*args: Any) -> Trainer:
        made = start(*args)
        made.sae.counter = Counter()  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        return made

    monkeypatch.setattr(Trainer, "start", started)
    config = config_of("gated", rows=64 * 40)
    card.capture()
    expected = trained(tmp_path / "plain", config)
    assert not card.graphs
    assert capsys.readouterr().err.count(
        "trimtab: note: training of gated SAEs is not captured as a graph, which is slower: TrainableGated.counter "
        "may hold anything; name it in not_in_step if nothing in a step goes by it\n"
    ) == 1  # fmt: skip
    monkeypatch.setattr(TRAINABLE["gated"], "not_in_step", ("counter",))
    check(trained(tmp_path / "graphs", config), expected)
    assert card.graphs


def test_a_subclass_adds_to_what_no_step_goes_by() -> None:
    """Mutation: it takes the place of what its base names."""

    class Counting(TRAINABLE["topk"]):
        not_in_step = ("counter",)

    sae = sae_of("topk")
    sae.__class__ = Counting
    before = python_values(sae)
    sae.counter, sae._looks_in = 1, 3  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert python_values(sae) == before
    Counting.not_in_step = ()
    assert python_values(sae) != before


def test_what_changes_at_each_step_is_said_once(
    card: Card, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = TRAINABLE["gated"]
    real = kind.set_progress

    def counted(self: TrainableSAE, done: float) -> None:
        real(self, done)
        self.counter = done  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    monkeypatch.setattr(kind, "set_progress", counted)
    card.capture()
    trained(tmp_path, config_of("gated", rows=64 * 40))
    assert not card.graphs
    note = "training of gated SAEs is not captured as a graph so far, which is slower: counter keeps changing\n"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_steps_that_wait_are_not_captured(
    arch: str, card: Card, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of active pairs has to be waited for, and AuxK that is differentiated."""
    start = Trainer.start

    def started(*args: Any) -> Trainer:
        made = start(*args)
        made.sae.execution = None if arch == "topk" else "sparse"
        return made

    monkeypatch.setattr(Trainer, "start", started)
    card.capture()
    trained(tmp_path / "run", config_of(arch, rows=64 * 20), by_autograd=arch == "topk")
    assert not card.graphs
    assert "captured" not in capsys.readouterr().err


@pytest.mark.parametrize(("execution", "arch", "waits"), [
    ("dense", "topk", False), ("sparse", "topk", False), ("screened", "topk", True), ("sparse", "batchtopk", True),
    ("dense", "batchtopk", False), ("screened", "gated", True), ("sparse", "jumprelu", True),
])  # fmt: skip
def test_which_steps_wait(execution: Any, arch: str, waits: bool) -> None:
    sae = sae_of(arch)
    sae.execution = execution
    assert sae.waits == waits


def test_a_graph_that_does_something_else_is_not_used(
    card: Card, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, real = config_of("gated", rows=64 * 20), TapedGraph.replay
    expected = trained(tmp_path / "plain", config)

    def replay(self: TapedGraph) -> None:
        real(self)
        card.trainers[-1].sae.W_dec.data[0] += 0.1

    card.capture()
    monkeypatch.setattr(TapedGraph, "replay", replay)
    check(trained(tmp_path / "graphs", config), expected)
    assert card.replays == 1
    assert "training of gated SAEs is not captured as a graph" in capsys.readouterr().err


def test_without_room_to_try_a_graph_steps_are_taken_plainly(
    card: Card, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, take, calls = config_of("gated", rows=64 * 20), Trainer._take, list[int]()
    expected = trained(tmp_path / "plain", config)

    def full(self: Trainer, *args: Any) -> None:
        take(self, *args)
        calls.append(1)
        if len(calls) == captured.WARM + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    card.capture()
    monkeypatch.setattr(Trainer, "_take", full)
    check(trained(tmp_path / "graphs", config), expected)
    assert len(calls) == 21
    assert not card.graphs
    assert "which is slower: there is no room to try it" in capsys.readouterr().err
