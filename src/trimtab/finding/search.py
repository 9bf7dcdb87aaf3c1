"""A search from a wish to what was found: gradients, exact scores, choices, and the report on what chose nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from trimtab.control.dose_search import match_kls
from trimtab.dictionaries.meanings import describe_features
from trimtab.errors import UserError
from trimtab.finding import ways
from trimtab.finding.choosing import Choice, choose
from trimtab.finding.exact import Agreement, ScoredFeature, agreement, exact_scores, shortlist
from trimtab.finding.generated import Reader, Written, make_reader, write
from trimtab.finding.ground import Ground, TabledEdit
from trimtab.finding.prompting import InstructionChoice, choose_instruction, instructed_effects, instructed_kl
from trimtab.finding.result import (
    FOUND,
    RANDOM,
    SHOWN_TEXTS,
    FoundFacts,
    Judged,
    Measured,
    SteeredPart,
    WayResult,
    WrittenEffect,
    WrittenTexts,
)  # fmt: skip
from trimtab.finding.sets import forward_selection
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site
from trimtab.selection import FeatureTable
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean
from trimtab.steering import StaticSource
from trimtab.steering.fluency import Band

BY_RANKING = {"delta-confidence": 0, "output-score": 1}
ABOUT = 8
"""Features that are scored exactly over all SAEs, if nothing says how many of each."""
RESAMPLES = 2000


@dataclass(kw_only=True)
class Search:
    """One search; every stage is computed when it is first asked for."""

    ground: Ground
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what is done, and keep how long it took."""
        began = time.perf_counter()
        self.ground.meter.describe(name)
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)

    def score(self) -> tuple[list[SteeringEdit], tuple[ScoredFeature, ...], tuple[Agreement, ...]]:
        """Gradient and exact stage: single features as edits, best first; all that were scored; how far both agree."""
        ground, options = self.ground, self.ground.options
        with self.stage("gradients of all features"):
            first = ground.first_order
        with self.stage("exact scores"):
            per_site = options.per_site or max(1, round(ABOUT / 2 / len(ground.sites)))
            listed = shortlist(first, ground.tables, per_site, options.seed)
            candidates = [candidate for candidate, _ in listed]
            scored = exact_scores(
                ground.scorer("candidates"), ground.tables, candidates, options.dose, ground.meter.advance
            )
            order = scored.mean.max(1).values.argsort(descending=True, stable=True).tolist()
        rows = []
        for i in order:
            candidate, origin = listed[i]
            part = self.part(Part(candidate.site, candidate.feature, 0.0))
            assert part.words is not None
            rows.append(
                ScoredFeature(
                    site=str(candidate.site),
                    feature=candidate.feature,
                    sign=candidate.sign,
                    origin=origin,
                    words=part.words,
                    reads=_number(part.reads),
                    auc=_number(part.auc),
                    first_order=candidate.first_order(first, options.dose[0]),
                    writes=scored.intervals(i, options.seed),
                )
            )
        singles = [candidates[i].edit(1.0) for i in order]
        return singles, tuple(rows), agreement(scored, first, options.seed)

    def choices(self, singles: Sequence[SteeringEdit]) -> dict[str, Choice | InstructionChoice]:
        """Every way's choice; what cannot be had is in `missing`."""
        ground, options = self.ground, self.ground.options
        found: dict[str, Choice | InstructionChoice] = {}
        with self.stage("choosing features"):
            single = choose(ground, singles[: options.tried])
        with self.stage("choosing sets"):
            best = forward_selection(ground, singles, single)
        found[FOUND] = best
        if best is not single:
            found["best single"] = single
        with self.stage("choosing random features"):
            found[RANDOM] = choose(ground, ways.random_features(ground))
        made: dict[str, Callable[[], Choice | InstructionChoice]] = {
            "activation-difference": lambda: choose(ground, ways.by_activation_difference(ground)),
            **{name: self._by_ranking(which) for name, which in BY_RANKING.items()},
            "mean-difference": lambda: choose(ground, *ways.mean_difference(ground)),
            "learned-vector": lambda: choose(ground, *ways.learned_vector(ground, best.edit.sites[0])),
            "prompting": lambda: choose_instruction(ground),
        }
        for name, make in made.items():
            if name in options.way:
                try:
                    with self.stage(f"choosing by {name}"):
                        found[name] = make()
                except UserError as error:
                    self.missing[name] = f"{error.what}: {error.why}"
        return found

    @cached_property
    def _rankings(self) -> dict[Site, list[FeatureTable]]:
        return ways.rankings(self.ground)

    def _by_ranking(self, which: int) -> Callable[[], Choice]:
        def make() -> Choice:
            return choose(self.ground, ways.by_ranking(self.ground, self._rankings, which))

        return make

    def report(
        self,
        choices: Mapping[str, Choice | InstructionChoice],
        features: tuple[ScoredFeature, ...],
        agree: tuple[Agreement, ...],
    ) -> FoundFacts:
        """Everything on what chose nothing."""
        ground, options = self.ground, self.ground.options
        with self.stage("effects on the report's examples"):
            scales = self._equal_kl(choices)
            measured = self._measure(choices, scales)
        with self.stage("writing texts"):
            reader, why = self._reader()
            plain = write(ground)
            read = reader.read(plain, None, "") if reader else None
            written = {name: self._written(one, scales.get(name, 1.0)) for name, one in choices.items()}
        band = Band.of(plain.nll)
        found = measured[FOUND]
        rows = []
        for name, one in choices.items():
            texts, source, instruction = written[name]
            mine, values = measured[name], reader.read(texts, source, instruction) if reader else None
            rows.append(
                WayResult(
                    name=name,
                    parts=() if isinstance(one, InstructionChoice) else tuple(self.parts_of(one, alone=name == FOUND)),
                    operation="instruction" if isinstance(one, InstructionChoice) else one.edit.operation,
                    instruction=one.instruction if isinstance(one, InstructionChoice) else "",
                    tried=one.tried,
                    chosen_effect=self._mean(one.effects.numpy()),
                    own=self._interval(mine["own"]),
                    equal_dose=self._interval(mine["dose"]) if "dose" in mine else None,
                    equal_kl=self._interval(mine["kl"]) if "kl" in mine else None,
                    behind=None if name == FOUND else self._behind(found, mine.get("kl", mine["own"])),
                    behind_at_dose=None if name == FOUND or "dose" not in mine else self._behind(found, mine["dose"]),
                    written=self._read(texts, values, read, band),
                )
            )
        best = choices[FOUND]
        return FoundFacts(
            model=ground.model.name,
            saes=tuple(sae.name for sae in ground.saes.values()),
            sites=tuple(map(str, ground.sites)),
            n_features=sum(sae.n_features for sae in ground.saes.values()),
            wish=ground.splits["report"].kind,
            unit=ground.splits["report"].unit,
            notes=ground.splits["report"].notes,
            counts={name: len(split) for name, split in ground.splits.items()},
            budget=options.budget,
            dose=options.dose,
            features=features,
            agreement=agree,
            ways=tuple(rows),
            curse=bootstrap_difference(
                best.effects.numpy(), found["own"].effects, paired=False, n_resamples=RESAMPLES, seed=options.seed
            ),
            judge=Judged(name=reader.name if reader else "", accuracy=reader.accuracy if reader else None, missing=why),
            texts=self._shown(plain, {name: texts for name, (texts, *_) in written.items()}),
            missing=dict(self.missing),
            seed=options.seed,
            seconds=dict(self.seconds),
        )

    def part(self, part: Part, *, vector: bool = False) -> SteeredPart:
        """What is known of a feature, or of a vector."""
        site, model = str(part.site), self.ground.model
        if vector:
            return SteeredPart(site=site, feature=None, dose=part.dose, words=None, reads=None, auc=None)
        first = self.ground.first_order[part.site]
        (words,) = describe_features(model, self.ground.saes[part.site], [part.row])
        reads, auc = (None if bool(v[part.row].isnan()) else float(v[part.row]) for v in (first.reads, first.auc))
        return SteeredPart(site=site, feature=part.row, dose=part.dose, words=words, reads=reads, auc=auc)

    def parts_of(self, choice: Choice, *, alone: bool) -> list[SteeredPart]:
        """What a choice steers with; with the effect of each direction by itself, if that is asked for."""
        vector = choice.tables is not self.ground.tables
        parts = [self.part(part, vector=vector) for part in choice.edit.parts]
        if alone:
            single = [SteeringEdit((part,), choice.edit.operation) for part in choice.edit.parts]
            effects = self.ground.effects("report", single).numpy()
            parts = [replace(part, writes=self._mean(one)) for part, one in zip(parts, effects, strict=True)]
        return parts

    def _equal_kl(self, choices: Mapping[str, Choice | InstructionChoice]) -> dict[str, float]:
        """Factors on doses at which ways cost what was found costs, on neutral text for choosing."""
        target = choices[FOUND].kl
        dosed = {
            name: one
            for name, one in choices.items()
            if isinstance(one, Choice) and one.edit.operation == "add" and name != FOUND
        }
        if not dosed or target <= 0:
            return {}

        def kl(scales: list[float]) -> list[float]:
            edits = [(one.edit.scaled(scale), one.tables) for one, scale in zip(dosed.values(), scales, strict=True)]
            return [float(values.mean()) for values in self.ground.of_all("kl", "choice", edits)]

        found = match_kls(kl, [target] * len(dosed), tolerance=0.05, tries=6)
        return {name: match.scale for name, match in zip(dosed, found, strict=True)}

    def _measure(
        self, choices: Mapping[str, Choice | InstructionChoice], scales: Mapping[str, float]
    ) -> dict[str, dict[str, _Values]]:
        """Ways at their own strength, at equal dose and at equal KL, as far as they have them."""
        ground, best = self.ground, choices[FOUND]
        found: dict[str, dict[str, _Values]] = {name: {} for name in choices}
        plan: list[tuple[str, str, float, TabledEdit]] = []
        for name, one in choices.items():
            if isinstance(one, InstructionChoice):
                effects = instructed_effects(ground, "report", one.instruction).numpy()
                kl = instructed_kl(ground, "report", one.instruction).numpy()
                found[name]["own"] = _Values(1.0, effects, kl)
                continue
            factors = {"own": 1.0}
            if isinstance(best, Choice) and one.edit.operation == best.edit.operation == "add":
                factors["dose"] = best.edit.dose / one.edit.dose
            if name in scales or name == FOUND:
                factors["kl"] = scales.get(name, 1.0)
            plan += [
                (name, what, factor, (one.edit if factor == 1.0 else one.edit.scaled(factor), one.tables))
                for what, factor in factors.items()
            ]
        edits = [edit for *_, edit in plan]
        pairs = zip(ground.of_all("effects", "report", edits), ground.of_all("kl", "report", edits), strict=True)
        for (name, what, factor, _), (effects, kl) in zip(plan, pairs, strict=True):
            found[name][what] = _Values(factor, effects.numpy(), kl.numpy())
        return found

    def _written(self, choice: Choice | InstructionChoice, scale: float) -> tuple[Written, StaticSource | None, str]:
        """Texts at equal price, and what they were written under."""
        if isinstance(choice, InstructionChoice):
            return write(self.ground, instruction=choice.instruction), None, choice.instruction
        source = choice.edit.scaled(scale).source(choice.tables)
        return write(self.ground, source), source, ""

    def _reader(self) -> tuple[Reader | None, str]:
        try:
            return make_reader(self.ground), ""
        except UserError as error:
            return None, f"No judge read them: {error.what}: {error.why}"

    def _read(self, texts: Written, values: np.ndarray | None, plain: np.ndarray | None, band: Band) -> WrittenEffect:
        change = None
        if values is not None and plain is not None:
            change = bootstrap_difference(values, plain, n_resamples=RESAMPLES, seed=self.ground.options.seed)
        return WrittenEffect(
            read=None if values is None else self._mean(values),
            change=change,
            in_band=self._mean(band.holds(texts.nll).astype(float)),
            repetition=self._mean(texts.repetition),
        )

    def _shown(self, plain: Written, written: Mapping[str, Written]) -> tuple[WrittenTexts, ...]:
        every = {"unsteered": plain, **written}
        prompts = self.ground.neutral("report").prompts[:SHOWN_TEXTS]
        return tuple(
            WrittenTexts(prompt=prompt, texts={name: one.texts[i] for name, one in every.items()})
            for i, prompt in enumerate(prompts)
        )

    def _mean(self, values: np.ndarray) -> Interval:
        return bootstrap_mean(values, n_resamples=RESAMPLES, seed=self.ground.options.seed)

    def _interval(self, values: _Values) -> Measured:
        return Measured(scale=values.scale, effect=self._mean(values.effects), kl=self._mean(values.kl))

    def _behind(self, found: Mapping[str, _Values], other: _Values) -> Interval:
        return bootstrap_difference(
            found["own"].effects, other.effects, n_resamples=RESAMPLES, seed=self.ground.options.seed
        )  # fmt: skip


@dataclass(frozen=True)
class _Values:
    """An edit at one strength: effects on the report's examples, and prices on its neutral text."""

    scale: float
    effects: np.ndarray
    kl: np.ndarray


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
