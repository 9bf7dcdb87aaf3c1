"""`trimtab evaluate ioi`: supervised codes and task SAEs at the cross-sections of a model's IOI circuit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.supervised.codes import FITS, Factors, Parametrisation
from trimtab.evaluation.supervised.cross_sections import CROSS_SECTIONS, activations_of, cross_section
from trimtab.evaluation.supervised.scores import Scores, Section, counterfactuals
from trimtab.evaluation.supervised.task_saes import train_task_saes
from trimtab.lm.config import ModelConfig
from trimtab.runs import Meter, Run, check_choices, check_least, config_dict, json_safe, read_typed, text_id
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.tasks.ioi_prompts import IOIDistribution, TemplateSet


@dataclass(frozen=True, kw_only=True)
class IOIConfig(ModelConfig):
    """Hold task SAEs against supervised codes at the cross-sections of a model's IOI circuit."""

    circuit: Path
    """The circuit: the run of `trimtab evaluate circuit`, or its circuit.json."""
    cross_section: tuple[str, ...] = ()
    """Which ones; by default all of which the circuit has heads."""
    templates: TemplateSet = "paper"
    """Sentences: paper (three), wang (fifteen) or all."""
    parametrisation: Parametrisation = "independent"
    """Of supervised codes: independent (IO, S, Pos), coupled (IO and S each with Pos) or names (first to third)."""
    n_train: int = 2000
    """Prompts that dictionaries are fitted on."""
    n_test: int = 128
    """Other prompts, which are reported."""
    arch: tuple[str, ...] = ("topk",)
    """Architectures of task SAEs; none with `--arch` alone."""
    l0: tuple[float, ...] = (3.0,)
    """Active features of task SAEs."""
    n_features: tuple[int, ...] = (1024,)
    """Features of task SAEs."""
    epochs: int = 100
    """Passes of a task SAE over its rows."""
    k: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Features that an edit may change at each location."""
    seed: int = 0
    """Of prompts, counterfactuals and SAEs."""
    run: Path | None = None
    """Directory to write SAEs and the result to."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "n_train", "n_test", "epochs", "k")


@dataclass(frozen=True, kw_only=True, repr=False)
class IOIResult(Result):
    """Scores of every contender at every cross-section."""

    model: str
    scores: tuple[Scores, ...]

    def headline(self) -> str:
        """What was compared."""
        sections = dict.fromkeys(score.cross_section for score in self.scores)
        contenders = dict.fromkeys(score.contender for score in self.scores)
        return f"{len(contenders)} contenders at {len(sections)} cross-sections of {self.model}'s IOI circuit"

    def tables(self) -> dict[str, Table]:
        """Approximation, and edits."""
        approximation = [
            Column("cross-section", "cross_section"), Column("contender", "contender"),
            Column("sufficiency", "approximation.sufficiency", ".2f"),
            Column("normalised", "approximation.normalised_sufficiency", ".2f"),
            Column("necessity", "approximation.necessity", ".2f"), Column("interpretable", "interpretable", ".0%"),
        ]  # fmt: skip
        edits = [
            Column("cross-section", "cross_section"), Column("contender", "contender"),
            Column("attribute", "attribute"), Column("way", "way"),
            Column("k", "k", "d"), Column("success", "success", ".2f"), Column("of", "counted", "d"),
            Column("removed", "removed", ".2f"),
        ]  # fmt: skip
        rows = [
            {
                "cross_section": score.cross_section, "contender": score.contender, "attribute": edit.attribute,
                "way": edit.way, "k": edit.k, **vars(edit.result),
            }
            for score in self.scores
            for edit in score.edits
            if edit.result.counted
        ]  # fmt: skip
        return {
            "approximation": Table(columns=approximation, rows=self.scores),
            "edits": Table(columns=edits, rows=rows),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json_safe(self)


def run_ioi(config: IOIConfig) -> IOIResult:
    """Fit, train and measure.

    A run that is done is not done again: its result is read back.

    Raises:
        UserError: the circuit is another model's, has no head of a cross-section that was named; too few prompts to fit
            on, so that a name has no code; or the run directory is of another config or circuit.
    """
    model = config.load_model()
    circuit = Circuit.load(config.circuit, model)
    ioi = IOIDistribution.load(model.encode_text, config.templates)
    sections = {name: cross_section(name, circuit, model) for name in config.cross_section}
    for name in () if config.cross_section else CROSS_SECTIONS:
        if any(circuit.of(role) for roles, *_ in CROSS_SECTIONS[name] for role in roles):
            sections[name] = cross_section(name, circuit, model)
    if not sections:
        raise UserError(f"circuit {config.circuit}", "it has no head of any cross-section", "find another circuit")
    places = tuple(dict.fromkeys(place for found in sections.values() for place in found))
    train, test = ioi.prompts(config.n_train, seed=config.seed), ioi.prompts(config.n_test, "test", seed=config.seed)
    for parametrisation in dict.fromkeys(("independent", config.parametrisation)):  # before anything is trained
        factors = Factors.of(train, parametrisation)
        for prompts in (test, *counterfactuals(ioi, test, config.seed).values()):
            factors.rows(prompts)
    with ExitStack() as stack:
        if config.run is None:
            directory, run = Path(stack.enter_context(TemporaryDirectory(prefix="trimtab-ioi-"))), None
        else:
            run = stack.enter_context(
                Run.open(config.run, "evaluate ioi", config, device=config.device, ignore_fields=("run",))
            )
            run.record(hashes={"model": model.fingerprint, "circuit": text_id(str(config_dict(circuit)))})
            if run.done and run.results:
                return read_typed(IOIResult, run.results, f"run {config.run}")
            directory = run.path
        with Meter("reading activations", config.n_train + config.n_test) as meter:
            x = activations_of(model, ioi, train, places, progress=meter.advance)
            held = activations_of(model, ioi, test, places, progress=meter.advance)
        saes = {}
        if config.arch:
            saes = train_task_saes(
                model, x, held, directory / "saes", arch=config.arch, l0=config.l0, n_features=config.n_features,
                epochs=config.epochs, seed=(config.seed,),
            )  # fmt: skip
        scores: list[Scores] = []
        meter = stack.enter_context(Meter("measuring", len(sections) * (1 + len(FITS) + len(saes))))
        for name, found in sections.items():
            section = Section(model, ioi, name, found, train, x, test, config.seed)
            for fit in ("", *FITS):
                scores.append(section.codes(fit, config.parametrisation) if fit else section.ends())
                meter.advance()
            for setting, of in saes.items():
                scores.append(section.dictionaries(setting, of, config.k))
                meter.advance()
        result = IOIResult(model=model.name, scores=tuple(scores))
        if run is not None:
            run.finish(result)
    return result
