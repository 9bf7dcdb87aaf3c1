"""`trimtab study ioi`: how well dictionaries do where the truth is known, in one run that goes on where it stopped.

The circuit is found and measured; then dictionaries of every kind are held against supervised codes at each of its
cross-sections; attention scores are taken apart; features that are missed (occlusion) and features that split are
counted, on the model and in toys. Dictionaries are fitted on training prompts; the location of the occlusion is chosen
on validation prompts; everything is reported on test prompts.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import CIRCUIT_FILE, Circuit
from trimtab.evaluation.circuits.command import CircuitConfig, CircuitResult, run_circuit
from trimtab.evaluation.supervised.activation_files import kept_activations
from trimtab.evaluation.supervised.attention_result import AttentionTerms
from trimtab.evaluation.supervised.attention_scores import score_locations
from trimtab.evaluation.supervised.attention_terms import attention_terms
from trimtab.evaluation.supervised.codes import FITS, Factors
from trimtab.evaluation.supervised.command import (
    ACTIVATIONS_FILE,
    HELDOUT_FILE,
    IOIConfig,
    IOIResult,
    figures_of,
    hashes_of,
    run_ioi,
)
from trimtab.evaluation.supervised.contenders import Ground, make_contenders
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.dictionary_files import load_dictionaries
from trimtab.evaluation.supervised.name_codes import name_locations
from trimtab.evaluation.supervised.occlusion import ALPHAS, Occlusion, occlusion
from trimtab.evaluation.supervised.occlusion_toy import OcclusionToy, occlusion_toy
from trimtab.evaluation.supervised.parts import FittedCodes, Splitters
from trimtab.evaluation.supervised.splitting import Splitting, splitting
from trimtab.evaluation.supervised.splitting_toy import SplittingToy, splitting_toy
from trimtab.lm import LanguageModel, site_width
from trimtab.lm.config import ModelConfig
from trimtab.lm.sites import HEAD_KINDS
from trimtab.runs import (
    Meter,
    Run,
    SourceName,
    check_choices,
    json_safe,
    part_of,
    read_json,
    read_typed,
    text_id,
    write_json,
)
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown, write_shown
from trimtab.runs.tables import Column, Table
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIDistribution, IOIPrompt, TemplateSet

_R = TypeVar("_R", bound=Result)
UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20
"""Of `ru_maxrss`."""
TRAINED = ("task-saes", "frozen-decoder", "text-saes")
"""Contenders that are read back from the run rather than fitted again."""
ALL_CONTENDERS = ("codes", "task-saes", "frozen-decoder", "text-saes", "pca", "random", "rotation")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each part is."""

    circuit: CircuitConfig
    contenders: IOIConfig
    more: int
    """Test prompts on which features are counted."""
    seeds: tuple[int, ...]
    """Of SAEs whose features are counted, and of the toy."""
    alphas: tuple[float, ...]
    """Shares of the longer codes that are taken out."""


PRESETS = {
    "quick": Sizes(
        circuit=CircuitConfig(n_prompts=32, n_test=32),
        contenders=IOIConfig(
            contender=ALL_CONTENDERS, arch=tuple(sorted(TRAINABLE)), n_train=2000, n_test=96, k=(1, 2, 8, 32),
            text_tokens=20_000,
        ),
        more=1000,
        seeds=(0, 1),
        alphas=ALPHAS,
    ),
    "paper": Sizes(
        circuit=CircuitConfig(n_prompts=128, n_test=256),
        contenders=IOIConfig(
            contender=ALL_CONTENDERS, arch=tuple(sorted(TRAINABLE)), l0=(2.0, 3.0, 6.0, 12.0), n_train=20_000,
            n_test=500, text_tokens=1_000_000,
        ),
        more=8000,
        seeds=(0, 1, 2, 3, 4),
        alphas=tuple(round(0.1 * step, 1) for step in range(11)),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IOIStudyConfig(ModelConfig):
    """Hold dictionaries of every kind against supervised codes, on the circuit by which a model solves IOI."""

    needs = ("prefix", "logit-lens", *HEAD_KINDS)

    run: Path = Path("runs/study-ioi")
    """Directory to write; the same command goes on with it."""
    preset: Literal["quick", "paper"] = "quick"
    """Sizes: quick (2,000 prompts, SAEs of L0 3; about 35 minutes on two cores) or paper (20,000 prompts, SAEs of four
    L0; many hours)."""
    circuit: SourceName | None = None
    """A circuit to take instead of finding one: its run, its file, or gpt2-small."""
    templates: TemplateSet = "paper"
    """Sentences: paper (three), wang (fifteen) or all."""
    dictionary: tuple[SourceName, ...] = ()
    """Dictionaries of your own at the circuit's sites: directories of one each, or of many (a bank)."""
    text: tuple[SourceName, ...] = ()
    """Files or directories for SAEs of general text; by default the sample that ships with trimtab."""
    force: bool = False
    """Go on although the model does not solve the task."""
    seed: int = 0
    """Of prompts, random circuits and SAEs."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class IOIStudy(Result):
    """What every part came to."""

    model: str
    run: str
    circuit: CircuitResult
    contenders: IOIResult
    attention: AttentionTerms | None
    """None where it cannot be had."""
    attention_left_out: str
    """Why not; empty where there is one."""
    occlusion: Occlusion
    splitting: Splitting
    occlusion_toy: OcclusionToy
    splitting_toy: SplittingToy
    seconds: dict[str, float]
    """That each part took, when it was computed."""
    peak_gib: float
    """Largest memory of the last process that worked on it."""

    @property
    def parts(self) -> dict[str, Result]:
        """By the title of each."""
        found = {
            "The circuit": self.circuit, "Dictionaries beside supervised codes": self.contenders,
            "What name movers look for": self.attention, "Occlusion": self.occlusion,
            "Occlusion in a toy": self.occlusion_toy, "Over-splitting": self.splitting,
            "Over-splitting in a toy": self.splitting_toy,
        }  # fmt: skip
        return {title: part for title, part in found.items() if part is not None}

    def headline(self) -> str:
        """Each part in a line."""
        said = [f"{title}: {part.headline()}" for title, part in self.parts.items()]
        return "\n".join([*said, *[f"no attention terms: {self.attention_left_out}"] * bool(self.attention_left_out)])

    def tables(self) -> dict[str, Table]:
        """One of each cross-section, and the main table of every other part."""
        found = dict(self.contenders.tables())
        for name in ("frontier", "edits", "locations"):
            found.pop(name)
        for title, part in self.parts.items():
            if part is not self.contenders:
                name, table = next(iter(part.tables().items()))
                found[f"{title}: {name}"] = replace(table, title=title)
        rows = [{"part": part, "seconds": seconds} for part, seconds in self.seconds.items()]
        columns = [Column("part", "part"), Column("seconds", "seconds", ",.0f")]
        return {**found, "seconds": Table(columns=columns, rows=rows, caption=f"{self.peak_gib:.1f} GiB of memory.")}

    def shown(self) -> list[Shown]:
        """Sections of the page."""
        sections = []
        for title, part in self.parts.items():
            if isinstance(part, IOIResult):
                sections.append(Shown.of(title, part, figures_of(part), leave_out=("edits",)))
            else:
                sections.append(Shown.of(title, part, {part.headline(): part.draw}))
        return sections


def run_ioi_study(config: IOIStudyConfig) -> IOIStudy:
    """Run what is left of the study; a run that is done is read back.

    Raises:
        UserError: see `run_circuit` and `run_ioi`; a run directory of another config.
    """
    with Run.open(
        config.run, "study ioi", config, seeds=[config.seed], device=config.device, ignore_fields=("run",)
    ) as run:
        run.record(hashes=_hashes(config))
        if run.done and run.results:
            return read_typed(IOIStudy, run.results, f"run {config.run}")
        study = _Study(config, run).result()
        write_shown(run, study.shown())
        run.finish(study)
        return study


def _hashes(config: IOIStudyConfig) -> dict[str, str]:
    """What says that the run goes on with what it began with."""
    circuit = config.circuit and Path(config.circuit)
    file = circuit / CIRCUIT_FILE if circuit and circuit.is_dir() else circuit
    known = {"circuit": text_id(file.read_text(encoding="utf-8"))} if file and file.is_file() else {}
    return {"model": config.load_model().fingerprint, **known, **hashes_of(config.dictionary, config.text)}


class _Study:
    """The parts of one study; each writes its result and is read back where that exists."""

    def __init__(self, config: IOIStudyConfig, run: Run) -> None:
        self.config, self.run, self.sizes = config, run, PRESETS[config.preset]
        self.seconds: dict[str, float] = {}

    def result(self) -> IOIStudy:
        """All parts in turn."""
        sizes, model = self.sizes, part_of(self.config, ModelConfig)
        shared = {**model, "templates": self.config.templates, "seed": self.config.seed, "force": self.config.force}
        own = {"circuit": self.config.circuit} if self.config.circuit else {}
        circuit = self.part(
            "circuit", CircuitResult,
            lambda: run_circuit(replace(sizes.circuit, **shared, **own, run=self.run.path / "circuit")),
        )  # fmt: skip
        fitted = replace(
            sizes.contenders, **shared, text=self.config.text, dictionary=self.config.dictionary,
            circuit=str(self.run.path / "circuit"), run=self.run.path / "contenders",
        )  # fmt: skip
        rest = _Rest(self.run.path, fitted, sizes)
        contenders = self.part("contenders", IOIResult, lambda: run_ioi(rest.fitting()))
        attention, left_out = None, ""
        try:
            attention = self.part("attention", AttentionTerms, rest.attention)
        except UserError as error:  # no name mover, or attention that is not taken apart
            left_out = error.line
        return IOIStudy(
            model=circuit.circuit.model, run=str(self.run.path), circuit=circuit, contenders=contenders,
            attention=attention, attention_left_out=left_out,
            occlusion=self.part("occlusion", Occlusion, rest.occlusion),
            splitting=self.part("splitting", Splitting, rest.splitting),
            occlusion_toy=self.part(
                "occlusion-toy", OcclusionToy,
                lambda: occlusion_toy(seeds=sizes.seeds, run=self.run.path / "occlusion-toy"),
            ),
            splitting_toy=self.part("splitting-toy", SplittingToy, splitting_toy), seconds=self.seconds,
            peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNITS_PER_GIB,
        )  # fmt: skip

    def part(self, name: str, kind: type[_R], make: Callable[[], _R]) -> _R:
        """A part's result, from its file or made now."""
        file = self.run.file(f"part-{name}.json")
        if (kept := read_json(file)) is not None:
            self.seconds[name] = kept["seconds"]
            return read_typed(kind, kept["result"], f"file {file}")
        began = time.perf_counter()
        result = make()
        self.seconds[name] = time.perf_counter() - began
        write_json(file, {"seconds": self.seconds[name], "result": json_safe(result)})
        return result


class _Rest:
    """What the parts behind the contenders share, loaded when the first of them asks."""

    def __init__(self, directory: Path, config: IOIConfig, sizes: Sizes) -> None:
        self.directory, self.config, self.sizes = directory, config, sizes

    @cached_property
    def model(self) -> LanguageModel:
        return self.config.load_model()

    @cached_property
    def ioi(self) -> IOIDistribution:
        return IOIDistribution.load(self.model.encode_text, self.config.templates)

    @cached_property
    def circuit(self) -> Circuit:
        return Circuit.load(self.directory / "circuit", self.model)

    @cached_property
    def train(self) -> list[IOIPrompt]:
        return self.ioi.prompts(self.config.n_train, seed=self.config.seed)

    @cached_property
    def test(self) -> list[IOIPrompt]:
        """More than the contenders' test prompts, which are the first of them."""
        return self.ioi.prompts(self.sizes.more, "test", seed=self.config.seed)

    @cached_property
    def activations(self) -> tuple[Values, Values]:
        """Of the training and the test prompts, at every location of every cross-section."""
        places = name_locations(self.circuit, self.model)
        files = self.directory / "contenders" / ACTIVATIONS_FILE, self.directory / "test.safetensors"
        with Meter("reading activations", len(self.train) + len(self.test)) as meter:
            train, test = (
                kept_activations(file, self.model, self.ioi, prompts, places, meter.advance)
                for file, prompts in zip(files, (self.train, self.test), strict=True)
            )
        return train, test

    def fitting(self) -> IOIConfig:
        """The contenders' config, with no more directions in a rotation than heads have room for."""
        widths = [site_width(self.model, place.site) for place in name_locations(self.circuit, self.model)]
        return replace(self.config, rank=min(self.config.rank, min(widths) // len(ATTRIBUTES)))

    def attention(self) -> AttentionTerms:
        """Name movers' scores in terms of MSE codes and of every task SAE."""
        train, test = self.activations
        places = score_locations(self.model, [(h.layer, h.head) for h in self.circuit.of("name mover")])
        factors = Factors.of(self.train, self.config.parametrisation)
        rows = factors.rows(self.train)
        contenders: dict[str, Splitters] = {
            "supervised, mse": {p: FittedCodes(FITS["mse"](train[p], factors, rows), factors) for p in places}
        }
        heldout = self.ioi.prompts(self.config.n_heldout, "validation", seed=self.config.seed)
        every = name_locations(self.circuit, self.model)
        held = kept_activations(self.directory / "contenders" / HELDOUT_FILE, self.model, self.ioi, heldout, every)
        own = load_dictionaries(self.config.dictionary, self.model, every).dictionaries
        ground = Ground(
            model=self.model, ioi=self.ioi, train=self.train, activations=train, heldout=heldout, held=held,
            dictionaries=own, config=self.config, directory=self.directory / "contenders", seed=self.config.seed,
        )  # fmt: skip
        kinds = [kind for kind in self.config.contender if kind in TRAINED]
        for one in make_contenders([*kinds, *["own"] * bool(own)], ground):
            if isinstance(one, Dictionaries) and not one.lacks(places):
                contenders[one.name] = {place: one.saes[place] for place in places}
        with Meter("taking attention scores apart", len(contenders)) as meter:
            return attention_terms(
                self.model, self.ioi, self.circuit, self.train, self.test, contenders, train_activations=train,
                test_activations=test, progress=meter.advance,
            )  # fmt: skip

    def occlusion(self) -> Occlusion:
        """Features that are missed."""
        train, test = self.activations
        validation = self.ioi.prompts(64, "validation", seed=self.config.seed)
        return occlusion(
            self.model, self.ioi, self.circuit, self.train, train, self.test, test, validation,
            alphas=self.sizes.alphas, seeds=self.sizes.seeds, epochs=self.config.epochs,
            run=self.directory / "occlusion",
        )  # fmt: skip

    def splitting(self) -> Splitting:
        """Features that say Pos many times."""
        train, test = self.activations
        return splitting(
            self.model, self.train, train, self.test, test, seeds=self.sizes.seeds, epochs=self.config.epochs,
            run=self.directory / "splitting",
        )  # fmt: skip
