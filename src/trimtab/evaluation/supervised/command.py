"""`trimtab evaluate ioi`: dictionaries held against supervised codes at the cross-sections of a model's IOI circuit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trimtab.activations import read_documents
from trimtab.dictionaries import Dictionary, load_dictionary
from trimtab.dictionaries.files import dictionaries_below
from trimtab.errors import UserError, named
from trimtab.evaluation.circuits.circuit import CIRCUIT_FILE, Circuit, given_circuit
from trimtab.evaluation.circuits.finding import check_solves, find_circuit
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.activation_files import kept_activations
from trimtab.evaluation.supervised.codes import Factors
from trimtab.evaluation.supervised.contenders import KINDS, Contender, Ground, make_contenders
from trimtab.evaluation.supervised.contenders.contender import MEAN, NO_EDIT, ContenderConfig
from trimtab.evaluation.supervised.contenders.dictionaries import ABOUT
from trimtab.evaluation.supervised.control import LEAST_COUNTED, Point, frontier
from trimtab.evaluation.supervised.cross_sections import check_cross_section, cross_sections
from trimtab.evaluation.supervised.dictionary_files import load_dictionaries
from trimtab.evaluation.supervised.scores import Scores, score
from trimtab.evaluation.supervised.section import PromptPairs, Section, counterfactuals
from trimtab.lm import LanguageModel, site_width
from trimtab.lm.config import ModelConfig
from trimtab.lm.sites import HEAD_KINDS
from trimtab.runs import (
    Meter,
    Run,
    SourceName,
    check_choices,
    check_least,
    config_dict,
    json_safe,
    read_json,
    read_typed,
    text_id,
    write_json,
)
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.shown import Shown, write_shown
from trimtab.runs.tables import Column, Table
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIDistribution, TemplateSet
from trimtab.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACTIVATIONS_FILE = "activations.safetensors"
"""Activations of the training prompts, in a run."""
HELDOUT_FILE = "heldout.safetensors"
"""Those of the validation prompts."""
MOST_HASHED = 10_000
"""Documents of a text that are looked at to see whether it is the same as before."""
FINDING_PROMPTS = 64
"""By which a circuit is found where none is given."""


@dataclass(frozen=True, kw_only=True)
class IOIConfig(ContenderConfig, ModelConfig):
    """Hold dictionaries against supervised codes at the cross-sections of a model's IOI circuit."""

    needs = ("prefix", "logit-lens", *HEAD_KINDS)

    circuit: SourceName | None = None
    """The circuit: the run of `trimtab evaluate circuit`, its circuit.json, or gpt2-small for the published one; found
    anew if none is given."""
    cross_section: tuple[str, ...] = ()
    """Which ones; by default all of which the circuit has heads."""
    contender: tuple[str, ...] = ("codes", "task-saes", "pca", "random")
    """What is held against each other: codes (supervised), task-saes, frozen-decoder, text-saes, pca, random,
    rotation."""
    dictionary: tuple[SourceName, ...] = ()
    """Dictionaries of your own at the circuit's sites, beside these: directories of one each, or of many (a bank)."""
    templates: TemplateSet = "paper"
    """Sentences: paper (three), wang (fifteen) or all."""
    n_train: int = 2000
    """Prompts that dictionaries are fitted on."""
    n_heldout: int = 500
    """Validation prompts on which SAEs are measured, and what their features say."""
    n_test: int = 128
    """Other prompts, which are reported."""
    force: bool = False
    """Go on although the model does not solve the task."""
    seed: int = 0
    """Of prompts, counterfactuals and SAEs."""
    run: Path | None = None
    """Directory to write SAEs and the result to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_least(self, 1, "n_train")
        check_least(self, 2, "n_test", "n_heldout")
        if not self.contender and not self.dictionary:
            raise UserError("contender", "there is none", "name one, or a --dictionary")
        for name in self.contender:
            named(KINDS, name, "contender")
        for name in self.cross_section:
            check_cross_section(name)
        for n in self.n_features if "text-saes" in self.contender else ():
            TrainConfig(arch="topk", l0=self.text_l0, n_features=n)


@dataclass(frozen=True, kw_only=True, repr=False)
class IOIResult(Result):
    """Scores of every contender at every cross-section."""

    model: str
    scores: tuple[Scores, ...]
    left_out: tuple[str, ...] = ()
    """Contenders that lack a location of a cross-section, and which."""

    def headline(self) -> str:
        """What was compared."""
        sections, contenders = (
            dict.fromkeys(getattr(s, f) for s in self.scores) for f in ("cross_section", "contender")
        )
        said = f"{len(contenders)} contenders at {len(sections)} cross-sections of {self.model}'s IOI circuit"
        return ". ".join((said, *self.left_out))

    def tables(self) -> dict[str, Table]:
        """One of each cross-section, then every edit, and the loss recovered at each location."""
        return {
            **{name: section_table(name, list(of)) for name, of in self.by_section().items()},
            "frontier": Table(columns=FRONTIER, rows=list(self.frontier()), caption=FRONTIER_CAPTION),
            "features": Table(
                columns=[
                    Column("cross-section", "cross_section"), Column("contender", "contender"),
                    *(Column(about, partial(_share_saying, about), ".0%") for about in ABOUT),
                    Column("without", "causal.without", ".2f"),
                ],
                rows=[one for one in self.scores if one.causal is not None], caption=FEATURES_CAPTION,
            ),
            "edits": Table(columns=EDITS, rows=list(self.edits())),
            "locations": Table(
                columns=[
                    Column("cross-section", "cross_section"), Column("contender", "contender"),
                    Column("location", "location", whole=True), Column("loss recovered", "recovered", ".2f"),
                ],
                rows=[
                    {"cross_section": s.cross_section, "contender": s.contender, "location": place, "recovered": value}
                    for s in self.scores
                    for place, value in s.loss_recovered.items()
                ],
            ),
        }  # fmt: skip

    def by_section(self) -> dict[str, list[Scores]]:
        """Scores by cross-section."""
        found: dict[str, list[Scores]] = {}
        for one in self.scores:
            found.setdefault(one.cross_section, []).append(one)
        return found

    def edits(self) -> Iterator[dict[str, Any]]:
        """Every edit as a row."""
        for one in self.scores:
            for edit in one.edits:
                about = {"cross_section": one.cross_section, "contender": one.contender, "attribute": edit.attribute}
                yield {**about, "way": edit.way, "k": edit.k, **vars(edit.result)}

    def frontier(self) -> Iterator[dict[str, Any]]:
        """Per cross-section and attribute the edits that no smaller edit matches, smallest first."""
        for name, scores in self.by_section().items():
            for attribute in ATTRIBUTES:
                edits = [
                    (f"{one.contender}, {edit.way}" + f" {edit.k}" * (edit.k is not None), edit.result)
                    for one in scores
                    for edit in one.edits
                    if edit.attribute == attribute
                ]
                points = [
                    Point(number, of.size.estimate, of.success.estimate)
                    for number, (_, of) in enumerate(edits)
                    if of.success is not None
                ]
                for point in frontier(points):
                    label, of = edits[point.number]
                    yield {"cross_section": name, "attribute": attribute, "edit": label, **vars(of)}

    def draw(self, ax: Axes, cross_section: str | None = None, attribute: str = "Pos") -> None:
        """Edit success against the weight that was removed, over k, at a cross-section (the first by default)."""
        sections = self.by_section()
        name = cross_section or next(iter(sections))
        curves = edit_curves(named(sections, name, "cross-section"), attribute)
        plot_curves(ax, curves, f"success, {attribute}", steps="weight removed")


EDITS = [
    Column("cross-section", "cross_section"), Column("contender", "contender"), Column("attribute", "attribute"),
    Column("way", "way"), Column("k", "k", "d"), Column("success", "success", ".2f"), Column("of", "counted", "d"),
    Column("all prompts", "agreement", ".2f", spare=2), Column("removed", "removed", ".2f"),
    Column("edit size", "size", ".2f", spare=1), Column("effect", "effect", ".2f"),
]  # fmt: skip
"""Of every edit."""


FRONTIER = [
    Column("cross-section", "cross_section"), Column("attribute", "attribute"), Column("edit", "edit"),
    Column("edit size", "size", ".2f"), Column("success", "success", ".2f"),
    Column("effect", "effect", ".2f", spare=2), Column("removed", "removed", ".2f", spare=1),
]  # fmt: skip
FRONTIER_CAPTION = (
    "Edits that no smaller edit matches, the smallest first (size: ‖x′ − x‖ / ‖x‖, mean over locations). They are "
    "picked on the prompts that they are reported on."
)
FEATURES_CAPTION = (
    "Share of the features that fire, by what they say; without: normalised sufficiency when these are taken out of "
    "the activations."
)


def _share_saying(about: str, scores: Scores) -> float | None:
    return scores.causal.shares[about] if scores.causal else None


def section_table(name: str, scores: Sequence[Scores]) -> Table:
    """Approximation, edits and what features say, one row for each contender; edits change at most two features."""
    ks = sorted({edit.k for one in scores for edit in one.edits if edit.k is not None})
    at = 2 if 2 in ks or not ks else ks[0]
    counted = {edit.attribute: edit.result.counted for edit in scores[0].edits}

    def success(attribute: str) -> Column:
        def of(one: Scores) -> Any:
            edit = one.edited(attribute, k=at)
            return edit.result.success if edit else None

        return Column(attribute, of, ".2f", note=f"of {counted[attribute]}")

    def removed(one: Scores) -> float | None:
        found = [e.result.removed.estimate for a in ATTRIBUTES if (e := one.edited(a, k=at)) is not None]
        return sum(found) / len(found) if found else None

    columns = [
        Column("contender", "contender"), Column("sufficient", "approximation.sufficiency", ".2f"),
        Column("normalised", "approximation.normalised_sufficiency", ".2f", spare=3),
        Column("necessary", "approximation.necessity", ".2f"), *(success(attribute) for attribute in ATTRIBUTES),
        Column("removed", removed, ".2f"), Column("F1 ≥ 0.6", "causal.interpretable", ".0%", spare=1),
        Column("kept", "causal.kept", ".2f", spare=2),
    ]  # fmt: skip
    said = ", ".join(f"{attribute} {n}" for attribute, n in counted.items())
    caption = (
        "Sufficient: logit difference over the plain one; normalised: 0 is the mean's, 1 the activation's. IO, S, Pos: "
        f"edit success with at most {at} features per location, nearest to the counterfactual activation, on prompts "
        f"whose answer the true patch changes ({said}); none is given below {LEAST_COUNTED}. Removed: weight taken "
        "out, of 1. F1: share of features that say an attribute; kept: normalised sufficiency of these alone."
    )
    return Table(columns=columns, rows=scores, title=name, caption=caption)


def edit_curves(scores: Sequence[Scores], attribute: str) -> list[Curve]:
    """Success against weight removed over k, one curve for each contender: features by `greedy` choice."""
    curves = []
    for one in scores:
        points = [
            (edit.result.removed.estimate, edit.result.success.estimate)
            for edit in one.edits
            if edit.attribute == attribute and edit.way != "meaning" and edit.result.success is not None
        ]
        if points:
            curves.append(Curve(one.contender, *map(list, zip(*points, strict=True))))
    return curves


def run_ioi(config: IOIConfig) -> IOIResult:
    """Fit, train and measure.

    What is done is not done again: SAEs and the scores of each cross-section are read back.

    Raises:
        UserError: the circuit is another model's, has no head of a cross-section that was named; too few prompts to fit
            on, so that a name has no code; or the run directory is of another config or circuit.
    """
    if config.circuit is not None:
        given_circuit(config.circuit)  # what is not there is refused before anything is loaded
    given_hashes = hashes_of(config.dictionary, config.text)
    model = config.load_model()
    ioi = IOIDistribution.load(model.encode_text, config.templates)
    given = None if config.circuit is None else given_circuit(config.circuit, model)
    if given is not None:
        _own(config, model, _checked(config, cross_sections(given, model, config.cross_section), model))
    train, test, heldout = (
        ioi.prompts(n, split, seed=config.seed)
        for n, split in ((config.n_train, "train"), (config.n_test, "test"), (config.n_heldout, "validation"))
    )
    for parametrisation in dict.fromkeys(("independent", config.parametrisation)):  # before anything is trained
        factors = Factors.of(train, parametrisation)
        for prompts in (test, heldout, *counterfactuals(ioi, test, config.seed).values()):
            factors.rows(prompts)
    with ExitStack() as stack:
        run, directory = None, config.run
        if directory is None:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="trimtab-ioi-")))
        else:
            run = stack.enter_context(
                Run.open(directory, "evaluate ioi", config, device=config.device, ignore_fields=("run",))
            )
            hashes = {} if given is None else {"circuit": text_id(str(config_dict(given)))}
            run.record(hashes={"model": model.fingerprint, **hashes, **given_hashes})
            if run.done and run.results:
                return read_typed(IOIResult, run.results, f"run {config.run}")
        circuit = given or _found(config, model, ioi, directory / CIRCUIT_FILE)
        sections = cross_sections(circuit, model, config.cross_section)
        places = _checked(config, sections, model)
        own, left_out = _own(config, model, places)
        with Meter(
            "reading activations", config.n_train + config.n_heldout + (1 + len(ATTRIBUTES)) * config.n_test
        ) as meter:
            pairs = PromptPairs(model, ioi, test, places, config.seed, progress=meter.advance)
            check_solves(model, pairs.plain.batches, force=config.force)
            x = kept_activations(directory / ACTIVATIONS_FILE, model, ioi, train, places, meter.advance)
            held = kept_activations(directory / HELDOUT_FILE, model, ioi, heldout, places, meter.advance)
        ground = Ground(
            model=model, ioi=ioi, train=train, activations=x, heldout=heldout, held=held,
            dictionaries=own, config=config, directory=directory, seed=config.seed,
        )  # fmt: skip
        contenders = [NO_EDIT, MEAN, *make_contenders(dict.fromkeys([*config.contender, *["own"] * bool(own)]), ground)]
        scores: list[Scores] = []
        meter = stack.enter_context(Meter("measuring", len(sections) * len(contenders)))
        for name, found in sections.items():
            file = directory / f"scores-{re.sub('[^A-Za-z]+', '-', name)}.json"
            if file.is_file():
                known = read_typed(tuple[Scores, ...], read_json(file), f"file {file}")
                meter.advance(len(contenders))
            else:
                known = tuple(_scored(contenders, Section(name, found, x, pairs), meter))
                write_json(file, json_safe(known))
            scores += known
            for one in contenders:
                if lacking := ", ".join(map(str, one.lacks(found))):
                    left_out.append(f"{one.name} is not shown at {name}: it has nothing for {lacking}")
        result = IOIResult(model=model.name, scores=tuple(scores), left_out=tuple(left_out))
        if run is not None:
            shown = Shown.of("Cross-sections", result, figures_of(result), leave_out=("edits",))
            write_shown(run, [shown])
            run.finish(result)
    return result


def figures_of(result: IOIResult) -> dict[str, Callable[[Axes], None]]:
    """Edit success against weight removed, by cross-section and attribute, where there is any."""
    return {
        f"{name}: edits of {attribute}, from few features changed to many": partial(
            result.draw, cross_section=name, attribute=attribute
        )
        for name, scores in result.by_section().items()
        for attribute in ATTRIBUTES
        if edit_curves(scores, attribute)
    }


def _checked(
    config: IOIConfig, sections: Mapping[str, Sequence[Location]], model: LanguageModel
) -> tuple[Location, ...]:
    """All locations, once. Raises a `UserError` where a rotation does not fit them."""
    places = tuple(dict.fromkeys(place for found in sections.values() for place in found))
    most = min(site_width(model, place.site) for place in places) // len(ATTRIBUTES)
    if "rotation" in config.contender and config.rank > most:
        why = f"heads have room for {most} directions of each attribute"
        raise UserError(f"rank {config.rank}", why, f"choose at most {most}")
    return places


def _own(
    config: IOIConfig, model: LanguageModel, places: Sequence[Location]
) -> tuple[Mapping[str, Mapping[Location, Dictionary]], list[str]]:
    """The user's dictionaries at the locations, and what is said of those that read none of them."""
    if not config.dictionary:
        return {}, []
    loaded = load_dictionaries(config.dictionary, model, places)
    said = f"{len(loaded.unused)} dictionaries read no location of these cross-sections"
    return loaded.dictionaries, [said] if loaded.unused else []


def hashes_of(dictionaries: Sequence[str], text: Sequence[str]) -> dict[str, str]:
    """What says that the user's dictionaries and texts are the same as before.

    Raises:
        UserError: one cannot be read.
    """
    found: dict[str, str] = {}
    if dictionaries:
        paths = [path for given in dictionaries for path in dictionaries_below(given) or [given]]
        found["dictionaries"] = text_id(str([load_dictionary(path).fingerprint for path in paths]))
    if text:
        texts = (document.text for document in read_documents(text))
        found["text"] = text_id("".join(islice(texts, MOST_HASHED)))
    return found


def _found(config: IOIConfig, model: LanguageModel, ioi: IOIDistribution, file: Path) -> Circuit:
    """The circuit that an interrupted run has found, or a new one."""
    if not file.is_file():
        with Meter("finding the circuit, layers patched") as meter:
            find_circuit(
                model, ioi, ioi.prompts(FINDING_PROMPTS, seed=config.seed), seed=config.seed, force=config.force,
                progress=meter.advance,
            ).save(file)  # fmt: skip
    return Circuit.load(file, model)


def _scored(contenders: Sequence[Contender], section: Section, meter: Meter) -> Iterator[Scores]:
    for contender in contenders:
        if not contender.lacks(section.locations):
            yield score(contender, section)
        meter.advance(1)
