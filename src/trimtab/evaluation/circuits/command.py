"""`trimtab evaluate circuit`: the heads by which a model solves IOI, and how much of the answer they bring about."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import CIRCUIT_FILE, Circuit, gpt2_small_circuit
from trimtab.evaluation.circuits.faithfulness import Faithfulness, measure_faithfulness
from trimtab.evaluation.circuits.finding import find_circuit
from trimtab.lm import LanguageModel
from trimtab.lm.config import ModelConfig
from trimtab.runs import Meter, Run, check_choices, check_least, config_dict, json_safe, read_typed, text_id
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.tasks.ioi_prompts import IOIDistribution, TemplateSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = "gpt2-small"


@dataclass(frozen=True, kw_only=True)
class CircuitConfig(ModelConfig):
    """Find the heads by which a model solves IOI, and measure how much of the answer they bring about."""

    templates: TemplateSet = "paper"
    """Sentences: paper (three), wang (fifteen) or all."""
    n_prompts: int = 64
    """Prompts by which heads are found."""
    n_test: int = 64
    """Other prompts, on which the circuit is held against the model."""
    n_random: int = 100
    """Random circuits of the same size beside it."""
    share: float = 0.02
    """A head's least effect, as a share of the logit difference."""
    most: int = 8
    """Heads per role."""
    circuit: str | None = None
    """A circuit to measure instead of finding one: its file, or gpt2-small for the published one."""
    force: bool = False
    """Go on although the model does not solve the task."""
    seed: int = 0
    """Of prompts and random circuits."""
    run: Path | None = None
    """Directory to write circuit.json and the result to."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 2, "n_prompts", "n_test")
        check_least(self, 1, "most")
        check_least(self, 0, "n_random", "share")


@dataclass(frozen=True, kw_only=True, repr=False)
class CircuitResult(Result):
    """A circuit, and what it explains."""

    circuit: Circuit
    faithfulness: Faithfulness

    def headline(self) -> str:
        """Both in a line."""
        return f"{self.circuit.headline()}. {self.faithfulness.headline()}."

    def tables(self) -> dict[str, Table]:
        """Heads, and how much of the answer they bring about."""
        return {**self.circuit.tables(), **self.faithfulness.tables()}

    def draw(self, ax: Axes) -> None:
        """The heads by layer."""
        self.circuit.draw(ax)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json_safe(self)


def run_circuit(config: CircuitConfig) -> CircuitResult:
    """Find a circuit, or read one, and measure it.

    A run that is done is not done again: its result is read back.

    Raises:
        UserError: the model does not solve the task or has no attention sites, or the circuit is another model's.
    """
    model = config.load_model()
    ioi = IOIDistribution.load(model.encode_text, config.templates)
    circuit = None if config.circuit is None else _given(config.circuit, model)
    prompts = ioi.prompts(config.n_test, "test", seed=config.seed)
    with ExitStack() as stack:
        run = None
        if config.run is not None:
            run = stack.enter_context(
                Run.open(config.run, "evaluate circuit", config, device=config.device, ignore_fields=("run",))
            )
            given = {} if circuit is None else {"circuit": text_id(str(config_dict(circuit)))}
            run.record(hashes={"model": model.fingerprint, **given})
            if run.done and run.results:
                return read_typed(CircuitResult, run.results, f"run {config.run}")
        circuit = circuit or _found(config, model, ioi)
        if run is not None:
            circuit.save(run.path / CIRCUIT_FILE)
        meter = stack.enter_context(Meter("random circuits", config.n_random))
        measured = measure_faithfulness(
            model, ioi, circuit, prompts, n_random=config.n_random, seed=config.seed, progress=meter.advance
        )
        result = CircuitResult(circuit=circuit, faithfulness=measured)
        if run is not None:
            run.finish(result)
    return result


def _given(circuit: str, model: LanguageModel) -> Circuit:
    """That of a file, or the published one."""
    if circuit != PUBLISHED:
        return Circuit.load(circuit, model)
    if (model.hf.config.model_type, model.n_layers, model.d_model) != ("gpt2", 12, 768):
        hint = "leave out --circuit to find the model's own"
        raise UserError(f"circuit {PUBLISHED}", f"{model.name} is not GPT-2 small", hint)
    return replace(gpt2_small_circuit(), model=model.name, fingerprint=model.fingerprint)


def _found(config: CircuitConfig, model: LanguageModel, ioi: IOIDistribution) -> Circuit:
    prompts = ioi.prompts(config.n_prompts, seed=config.seed)
    with Meter("patching, layers done") as meter:
        return find_circuit(
            model, ioi, prompts, share=config.share, most=config.most, seed=config.seed, force=config.force,
            progress=meter.advance,
        )  # fmt: skip
