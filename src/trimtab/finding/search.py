"""A search from a wish to what was found: gradients, exact scores, choices, and the report on what chose nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trimtab.control.dose_search import match_kls
from trimtab.dictionaries.meanings import FeatureWords, describe_features
from trimtab.errors import UserError
from trimtab.finding import ways
from trimtab.finding.choosing import Choice, affordable, choose
from trimtab.finding.generated import Reader, Written, make_reader, unsteered, write
from trimtab.finding.ground import Ground
from trimtab.finding.prompting import InstructionChoice, choose_instruction, instructed_effects, instructed_kl
from trimtab.finding.result import (
    FOUND,
    RANDOM,
    SHOWN_TEXTS,
    SINGLE,
    Agreement,
    FoundFacts,
    Judged,
    Measured,
    Origin,
    RankedFeatures,
    ScoredFeature,
    SteeredPart,
    WayResult,
    WrittenEffect,
    WrittenTexts,
)  # fmt: skip
from trimtab.finding.sets import forward_selection
from trimtab.finding.shortlist import best_features, predicted, random_features, shortlist
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean, bootstrap_statistic
from trimtab.steering.ordinary_texts import OrdinaryText, fluency, ordinary_text

RESAMPLES = 2000
SAME_PRICE = 0.05
"""Relative difference that is allowed between equal prices."""
PRICE_TRIES = 3
"""Doses that are tried to reach a price."""
ALONE = 4
"""Directions of what was found that are measured by themselves, too, if there are no more."""
RANKED = 256
"""Features of each site whose first-order effects are kept."""
Values = NDArray[np.float64]
Strength = Literal["own", "dose", "kl"]
"""As chosen, at the dose of what was found, at its price."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What every way chose."""

    edits: Mapping[str, Sequence[Choice]]
    """By way, what was found first; of random features one choice for each draw."""
    instruction: InstructionChoice | None

    @property
    def found(self) -> Choice:
        return self.edits[FOUND][0]


@dataclass(frozen=True)
class _Measured:
    """A way at one strength; of random features the mean over draws."""

    edits: Sequence[SteeringEdit]
    effects: Values
    """On the report's examples."""
    kl: Values
    """On its neutral text."""


@dataclass(kw_only=True)
class Search:
    """One search."""

    ground: Ground
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _listed: dict[SteeringEdit, Origin] = field(default_factory=dict)
    """What causal search screened, and random features, at dose 1."""
    _words: dict[tuple[Site, int], FeatureWords] = field(default_factory=dict)
    """On the features that are shown."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what is done, and keep how long it took."""
        began = time.perf_counter()
        self.ground.meter.describe(name)
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)

    @contextmanager
    def _or_missing(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.missing[name] = f"{error.what}: {error.why}"

    def choices(self) -> Choices:
        """Every way's choice; what cannot be had is in `missing`.

        Raises:
            UserError: there is no feature to try, or all are too dear.
        """
        ground, options = self.ground.quick, self.ground.options
        with self.stage("gradients of all features"):
            mine, draws = shortlist(ground), random_features(ground)
        self._listed = {**{edit: "random" for draw in draws for edit in draw}, **mine}
        candidates = {FOUND: list(mine), **{f"{RANDOM} {i}": draw for i, draw in enumerate(draws)}}
        with self.stage("candidates of other ways"):
            for name, make in ways.WAYS.items():
                if name in options.way:
                    with self._or_missing(name):
                        candidates[name] = make(ground)
        with self.stage("choosing"):
            chosen = choose(ground, candidates)
        random = [one for name in candidates if name.startswith(f"{RANDOM} ") and (one := chosen.pop(name, None))]
        best = chosen.pop(FOUND, None)
        if best is None and not mine:
            raise UserError("the features", "the gradient puts none above 0", "give other examples, or another SAE")
        if best is None or not random:
            what = "no feature that was tried" if best is None else "no random feature, the control,"
            raise UserError(f"budget {options.budget}", f"{what} costs so little", "raise it, or give another SAE")
        edits = {FOUND: [best], RANDOM: random, **{name: [one] for name, one in chosen.items()}}
        too_dear = [name for name in candidates if name in ways.WAYS and name not in chosen]
        self.missing |= dict.fromkeys(too_dear, "nothing of it is within the budget")
        if options.set_size > 1:
            with self.stage("sets of features"):
                singles = self._singles(mine)
                edits[FOUND] = [forward_selection(ground, singles, best)]
                if len(edits[FOUND][0].edit.parts) > 1 and (single := choose(ground, {SINGLE: singles})):
                    edits[SINGLE] = [single[SINGLE]]
        instruction = None
        if "prompting" in options.way:
            with self.stage("choosing instructions"), self._or_missing("prompting"):
                instruction = choose_instruction(ground)
        return Choices(edits=edits, instruction=instruction)

    def _singles(self, listed: Mapping[SteeringEdit, Origin]) -> list[SteeringEdit]:
        """Single features that are added, best by their screening first."""
        single = [edit for edit in listed if len(edit.parts) == 1 and edit.operation == "add"]
        if not single:
            return []
        means = self.ground.quick.effects("screening", affordable(self.ground.quick, single)).mean(1)
        return [single[i] for i in means.argsort(descending=True, stable=True).tolist()]

    def report(self, choices: Choices) -> FoundFacts:
        """Everything on what chose nothing."""
        ground, options, missing = self.ground, self.ground.options, ""
        self._describe([*self._listed, *(one.edit for of in choices.edits.values() for one in of)])
        with self.stage("effects on the report's examples"):
            measured = self._measure(choices)
        with self.stage("writing texts"):
            reader = None
            try:
                reader = make_reader(ground)
            except UserError as error:
                missing = f"No judge read them: {error.what}: {error.why}"
            plain, written = unsteered(ground), self._write(choices, measured)
        report, own = ground.splits["report"], measured[FOUND]["own"]
        chosen_on = choices.found.effects.numpy()
        curse = bootstrap_difference(chosen_on, own.effects, paired=False, n_resamples=RESAMPLES, seed=options.seed)
        return FoundFacts(
            model=ground.model.name,
            saes=tuple(sae.name for sae in ground.saes.values()),
            sites=tuple(map(str, ground.sites)),
            n_features=sum(sae.n_features for sae in ground.saes.values()),
            wish=report.kind,
            unit=report.unit,
            notes=(*report.notes, *([] if reader is None else reader.doubts())),
            counts={name: len(split) for name, split in ground.splits.items()},
            budget=options.budget,
            dose=options.dose,
            features=self._features(),
            agreement=self._agreement(),
            ranked=self._ranked(),
            ways=tuple(self._ways(choices, measured, written, plain, reader)),
            curse=curse,
            judge=Judged(
                name=reader.name if reader else "", unit=reader.unit if reader else "",
                accuracy=reader.accuracy if reader else None, missing=missing,
            ),
            texts=self._shown({"unsteered": plain, **written}),
            missing=dict(self.missing),
            seed=options.seed,
            seconds=dict(self.seconds),
        )  # fmt: skip

    def _measure(self, choices: Choices) -> dict[str, dict[Strength, _Measured]]:
        """Ways as they were chosen, at equal dose and at equal price, as far as they have these.

        The doses at which others cost as much as what was found are looked for on the report's own neutral text: the
        price is no outcome, and what is equal on other text would not be equal there.
        """
        ground, best = self.ground, choices.found.edit
        plan: dict[str, dict[Strength, list[SteeringEdit]]] = {}
        for name, of in choices.edits.items():
            edits = [one.edit for one in of]
            plan[name] = {"own": edits}
            if best.operation == "add" and all(edit.operation == "add" for edit in edits):
                plan[name]["dose"] = [edit.at_dose(best.dose) for edit in edits]
        for name, edits in self._at_price(choices).items():
            plan[name]["kl"] = edits
            if name != FOUND:  # shown at the one price; what it does at its own says hardly more
                del plan[name]["own"]
        flat = list(dict.fromkeys(edit for at in plan.values() for edits in at.values() for edit in edits))
        effects, kls = (dict(zip(flat, f("report", flat).numpy(), strict=True)) for f in (ground.effects, ground.kl))
        found: dict[str, dict[Strength, _Measured]] = {
            name: {
                strength: _Measured(edits, *(np.mean([of[edit] for edit in edits], 0) for of in (effects, kls)))
                for strength, edits in at.items()
            }
            for name, at in plan.items()
        }
        if (one := choices.instruction) is not None:
            values = (f(ground, "report", one.instruction).numpy() for f in (instructed_effects, instructed_kl))
            found["prompting"] = {"own": _Measured((), *values)}
        return found

    def _at_price(self, choices: Choices) -> dict[str, list[SteeringEdit]]:
        """Each way's edits at doses that cost what was found costs; a way whose price cannot be had is left out."""
        ground, best = self.ground.quick, choices.found.edit
        found: dict[str, list[SteeringEdit]] = {FOUND: [best]}
        target = float(ground.kl("report", [best]).mean())
        if target <= 0:
            return found
        dosed = [
            (name, one.edit)
            for name, of in choices.edits.items()
            for one in of
            if one.edit.operation == "add" and name != FOUND
        ]
        if not dosed:
            return found
        prices = ground.kl("report", [edit for _, edit in dosed]).mean(1).tolist()
        near = [edit.scaled(math.sqrt(target / max(kl, 1e-9))) for (_, edit), kl in zip(dosed, prices, strict=True)]

        def kl(scales: list[float]) -> list[float]:
            edits = [edit.scaled(scale) for edit, scale in zip(near, scales, strict=True)]
            return ground.kl("report", edits).mean(1).tolist()

        matches = match_kls(kl, [target] * len(near), tolerance=SAME_PRICE, tries=PRICE_TRIES)
        for (name, _), edit, match in zip(dosed, near, matches, strict=True):
            if match.within:
                found.setdefault(name, []).append(edit.scaled(match.scale))
        return {name: edits for name, edits in found.items() if len(edits) == len(choices.edits[name])}

    def _write(self, choices: Choices, measured: Mapping[str, Mapping[Strength, _Measured]]) -> dict[str, Written]:
        """Texts at equal price, or as chosen; of random features those of the first draw."""
        ways: dict[str, SteeringEdit | str] = {
            name: _shown(at).edits[0] for name, at in measured.items() if _shown(at).edits
        }
        if choices.instruction is not None:
            ways["prompting"] = choices.instruction.instruction
        return write(self.ground, ways)

    def _ways(
        self, choices: Choices, measured: Mapping[str, Mapping[Strength, _Measured]], written: Mapping[str, Written],
        plain: Written, reader: Reader | None,
    ) -> Iterator[WayResult]:  # fmt: skip
        best = measured[FOUND]["own"]
        ordinary = self._ordinary(plain)
        before = None if reader is None else reader.read(plain, None, "")
        for name, at in measured.items():
            text, of, shown = written[name], choices.edits.get(name, ()), _shown(at)
            instruction = "" if of or choices.instruction is None else choices.instruction.instruction
            source = None if not of else shown.edits[0].source(self.ground.tables)
            values = None if reader is None else reader.read(text, source, instruction)
            change = None
            if values is not None and before is not None:
                change = bootstrap_difference(values, before, n_resamples=RESAMPLES, seed=self._seed)
            tried = sum(one.tried for one in of) if of or choices.instruction is None else choices.instruction.tried
            picked = [one.effects.numpy() for one in of] or [choices.instruction.effects.numpy()]  # type: ignore[union-attr]
            price, dose = at.get("kl"), at.get("dose")
            yield WayResult(
                name=name,
                parts=tuple(part for edit in shown.edits for part in self._parts(edit, alone=name == FOUND)),
                operation=of[0].edit.operation if of else "instruction",
                instruction=instruction,
                tried=tried,
                chosen_effect=self._mean(np.mean(picked, 0)),
                own=self._interval(at["own"]) if "own" in at else None,
                equal_dose=None if dose is None else self._interval(dose),
                equal_kl=None if price is None else self._interval(price),
                behind=None if name == FOUND else self._behind(best, shown),
                behind_at_dose=None if name == FOUND or dose is None else self._behind(best, dose),
                written=WrittenEffect(
                    read=None if reader is None or values is None else reader.share(text, values),
                    change=change,
                    fluency=fluency(ordinary, text.nll.tolist(), text.tokens, len(text.texts), self._seed),
                ),
            )

    def _ordinary(self, plain: Written) -> OrdinaryText:
        """What the unsteered texts of both splits are like."""
        choice = self.ground.written["choice"]
        nll, tokens = [*plain.nll.tolist(), *choice.nll], [*plain.tokens, *choice.new]
        return ordinary_text(self.ground.model, choice.config, nll, tokens, chat=False)

    def _parts(self, edit: SteeringEdit, *, alone: bool = False) -> list[SteeredPart]:
        """What is known of an edit's directions; of a few also the effect of each by itself, if that is asked for."""
        effects: list[Interval | None] = [None] * len(edit.parts)
        if alone and len(edit.parts) <= ALONE:
            single = [SteeringEdit((part,), edit.operation) for part in edit.parts]
            effects = [self._mean(one) for one in self.ground.effects("report", single).numpy()]
        return [self._part(part, edit, writes) for part, writes in zip(edit.parts, effects, strict=True)]

    def _describe(self, edits: Sequence[SteeringEdit]) -> None:
        """Words on the features of some edits, all of an SAE at once."""
        parts = {part[:2] for edit in edits for part in edit.parts if self.ground.is_feature(part)}
        for site, sae in self.ground.saes.items():
            ids = sorted(row for at, row in parts if at == site)
            described = describe_features(self.ground.model, sae, ids)
            self._words.update({(site, one.feature): one for one in described})

    def _part(self, part: Part, edit: SteeringEdit, writes: Interval | None) -> SteeredPart:
        ground = self.ground.quick
        known = SteeredPart(
            site=str(part.site), feature=None, dose=part.dose, words=None, reads=None, auc=None, writes=writes
        )
        if not ground.is_feature(part):
            return known
        first, words = ground.first_order[part.site], self._words[part.site, part.row]
        reads, auc = (None if bool(v[part.row].isnan()) else float(v[part.row]) for v in (first.reads, first.auc))
        alone = predicted(ground.first_order, replace(edit, parts=(part,)))
        return replace(known, feature=part.row, words=words, reads=reads, auc=auc, first_order=alone)

    def _features(self) -> tuple[ScoredFeature, ...]:
        """Single features that were screened, best first."""
        single = [edit for edit in self._listed if len(edit.parts) == 1]
        at = affordable(self.ground.quick, single)
        effects = self.ground.quick.effects("screening", at)
        return tuple(
            ScoredFeature(
                **vars(self._part(at[i].parts[0], at[i], self._mean(effects[i].numpy()))),
                origin=self._listed[single[i]],
            )
            for i in effects.mean(1).argsort(descending=True, stable=True).tolist()
        )

    def _agreement(self) -> tuple[Agreement, ...]:
        """Spearman's correlation of the gradient's effects and exact ones over features, random ones included, at the
        doses that were screened. Removals are no small edits, and left out."""
        single = [edit for edit in self._listed if len(edit.parts) == 1 and edit.operation == "add"]
        ground = self.ground.quick
        at = affordable(ground, single)
        exact = ground.effects("screening", at).mean(1).numpy()
        first = np.array([predicted(ground.first_order, edit) for edit in at])
        interval = bootstrap_statistic(_correlation, [first, exact], n_resamples=500, seed=self._seed)
        return (Agreement(dose=float(np.mean([edit.dose for edit in at])), spearman=interval),)

    def _ranked(self) -> tuple[RankedFeatures, ...]:
        """The features of each site that the gradient puts first."""
        found = []
        ground = self.ground.quick
        for site, one in ground.first_order.items():
            ids = [i for _, i in best_features(ground, lambda o: o.certainty.abs(), RANKED, {site: one})]
            found.append(
                RankedFeatures(
                    site=str(site), feature=tuple(ids), effect=tuple(one.add[ids].tolist()),
                    certainty=tuple(one.certainty[ids].tolist()),
                )
            )  # fmt: skip
        return tuple(found)

    def _shown(self, written: Mapping[str, Written]) -> tuple[WrittenTexts, ...]:
        prompts = self.ground.written["report"].prompts[:SHOWN_TEXTS]
        return tuple(
            WrittenTexts(prompt=prompt, texts={name: one.texts[i] for name, one in written.items()})
            for i, prompt in enumerate(prompts)
        )

    @property
    def _seed(self) -> int:
        return self.ground.options.seed

    def _mean(self, values: Values) -> Interval:
        return bootstrap_mean(values, n_resamples=RESAMPLES, seed=self._seed)

    def _interval(self, one: _Measured) -> Measured:
        dose = float(np.mean([edit.dose for edit in one.edits])) if one.edits else None
        return Measured(dose=dose, effect=self._mean(one.effects), kl=self._mean(one.kl))

    def _behind(self, found: _Measured, other: _Measured) -> Interval:
        return bootstrap_difference(found.effects, other.effects, n_resamples=RESAMPLES, seed=self._seed)


def _shown(at: Mapping[Strength, _Measured]) -> _Measured:
    """At the price of what was found; as it was chosen where no dose comes to that."""
    return at["kl"] if "kl" in at else at["own"]


def _correlation(a: Values, b: Values) -> float:
    """Spearman's; NaN where either does not vary."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")
