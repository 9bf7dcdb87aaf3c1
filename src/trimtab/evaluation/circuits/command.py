"""`trimtab evaluate circuit`: the heads by which a model solves IOI, and how much of the answer they bring about."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import CIRCUIT_FILE, Circuit, given_circuit
from trimtab.evaluation.circuits.completeness import Completeness, measure_completeness
from trimtab.evaluation.circuits.faithfulness import Faithfulness, measure_faithfulness
from trimtab.evaluation.circuits.finding import check_solves, find_circuit
from trimtab.evaluation.circuits.knock_outs import KnockOuts
from trimtab.evaluation.circuits.rows import PlainRun, rows_of
from trimtab.lm import LanguageModel
from trimtab.lm.config import DEFAULT_MODEL, ModelConfig
from trimtab.lm.sites import HEAD_KINDS
from trimtab.runs import Meter, Run, SourceName, check_choices, check_least, config_dict, read_typed, text_id
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.tasks.ioi_prompts import HELD_OUT, TEMPLATE_SETS, IOIDistribution, TemplateSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class CircuitConfig(ModelConfig):
    """Find the heads by which a model solves IOI, and measure how much of the answer they bring about."""

    needs = ("prefix", "logit-lens", *HEAD_KINDS)

    templates: TemplateSet = "paper"
    """Sentences: paper (three), wang (fifteen) or all."""
    n_prompts: int = 64
    """Prompts by which heads are found."""
    n_test: int = 64
    """Other prompts, on which the circuit is held against the model."""
    test_templates: Literal["same", "paper", "wang"] = "same"
    """Sentences that the circuit is measured on: those of --templates, or held-out ones (paper or wang)."""
    n_random: int = 100
    """Random circuits of the same size beside it."""
    n_subsets: int = 12
    """Random sets of heads that are taken from the circuit and from the model."""
    share: float = 0.02
    """A head's least effect, as a share of the logit difference."""
    most: int = 8
    """Heads per role."""
    circuit: SourceName | None = None
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
        check_least(self, 0, "n_random", "n_subsets", "share")
        if self.test_templates != "same" and self.templates in (self.test_templates, "all"):
            raise UserError(
                f"test_templates {self.test_templates}", "the circuit is found on them", "name others, or same"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class CircuitResult(Result):
    """A circuit, and what it explains."""

    circuit: Circuit
    faithfulness: Faithfulness
    completeness: Completeness
    templates: tuple[str, ...]
    """Those of the prompts that the circuit was measured on."""

    def headline(self) -> str:
        """All in a line."""
        return f"{self.circuit.headline()}. {self.faithfulness.headline()}. {self.completeness.headline()}."

    def tables(self) -> dict[str, Table]:
        """Heads, how much of the answer they bring about, what it lacks, and what each adds."""
        return {**self.circuit.tables(), **self.faithfulness.tables(), **self.completeness.tables()}

    def draw(self, ax: Axes) -> None:
        """The heads by layer."""
        self.circuit.draw(ax)


class ShownCircuit(NamedTuple):
    """What the command prints: the result, and what to do with it."""

    result: CircuitResult
    following: str
    """The command that goes on from there; empty without a run."""

    def render(self) -> RenderableType:
        """For the terminal."""
        from rich.console import Group

        return Group(self.result.render(), *([f"next: {self.following}"] if self.following else []))

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return self.result.to_json()


def show_circuit(config: CircuitConfig) -> ShownCircuit:
    """What `trimtab evaluate circuit` does; see `run_circuit`."""
    model = [] if config.model == DEFAULT_MODEL else ["--model", config.model]
    words = shlex.join([*model, "--circuit", str(config.run)])
    return ShownCircuit(run_circuit(config), f"trimtab evaluate ioi {words}" if config.run else "")


def run_circuit(config: CircuitConfig) -> CircuitResult:
    """Find a circuit, or read one, and measure it.

    A run that is done is not done again: its result is read back.

    Raises:
        UserError: the model does not solve the task or has no attention sites, or the circuit is another model's.
    """
    model = config.load_model()
    ioi = IOIDistribution.load(model.encode_text, config.templates)
    circuit = None if config.circuit is None else given_circuit(config.circuit, model)
    test, split = _test_prompts(config, model, ioi)
    prompts = test.prompts(config.n_test, split, seed=config.seed)
    if circuit is not None:
        rows = rows_of([test.tokenise(prompt) for prompt in prompts], model)
        check_solves(model, ((of, PlainRun.of(model, of.ids)) for of in rows), force=config.force)
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
        runs = KnockOuts(model, test, prompts, config.seed)
        with Meter("random circuits", config.n_random) as meter:
            faithfulness = measure_faithfulness(
                model, test, circuit, prompts, n_random=config.n_random, seed=config.seed, runs=runs,
                progress=meter.advance,
            )  # fmt: skip
        with Meter("heads taken away") as meter:
            completeness = measure_completeness(
                model, test, circuit, prompts, n_subsets=config.n_subsets, seed=config.seed, runs=runs,
                progress=meter.advance,
            )  # fmt: skip
        result = CircuitResult(
            circuit=circuit, faithfulness=faithfulness, completeness=completeness,
            templates=tuple(dict.fromkeys(prompt.template for prompt in prompts)),
        )  # fmt: skip
        if run is not None:
            run.finish(result)
    return result


def _test_prompts(config: CircuitConfig, model: LanguageModel, ioi: IOIDistribution) -> tuple[IOIDistribution, str]:
    """The distribution of prompts to measure on, and their split."""
    if config.test_templates == "same":
        return ioi, "test"
    own = TEMPLATE_SETS[config.templates]
    held_out = [template for template in TEMPLATE_SETS[config.test_templates] if template not in own]
    return IOIDistribution.load(model.encode_text, (*own, *held_out), held_out=held_out), HELD_OUT


def _found(config: CircuitConfig, model: LanguageModel, ioi: IOIDistribution) -> Circuit:
    prompts = ioi.prompts(config.n_prompts, seed=config.seed)
    with Meter("patching, layers done") as meter:
        return find_circuit(
            model, ioi, prompts, share=config.share, most=config.most, seed=config.seed, force=config.force,
            progress=meter.advance,
        )  # fmt: skip
