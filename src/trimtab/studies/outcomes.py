"""What the arms of the demo did: scores with intervals over prompts, differences pair by prompt, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray

from trimtab.runs import json_safe
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean, number_text
from trimtab.steering.fluency import Band
from trimtab.studies.choice import BaseRates

TREATMENT, CONTROL = "delta-confidence", "random"
LABELS = {
    "unsteered": "not steered",
    "delta-confidence": "delta-confidence",
    "output-score": "output score",
    "chosen-random": "random, chosen likewise",
    "random": "random features",
    "most-active": "most active feature",
}
N_EXAMPLES = 4
DOSE_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """One arm. Intervals are over prompts."""

    name: str
    label: str
    score: Interval | None
    """Rate of the steered feature minus its rate unsteered; None for the unsteered arm."""
    score_in_band: Interval | None
    """The same, texts outside the band counting 0."""
    rate: Interval | None
    """Rate of the steered feature itself."""
    in_band: Interval
    nll: Interval
    repetition: Interval
    relative_dose: float
    """Realised ‖Δ‖/‖x‖, mean over edits."""
    n_edits: int
    """Edited tokens (of one draw, where there are several)."""
    n_rows: int
    n_features: int
    """Different features that steered."""
    draws: tuple[float, ...] = ()
    """Scores of single draws, for random features."""

    @classmethod
    def of(
        cls, name: str, draws: Sequence[pd.DataFrame], band: Band, effects: Sequence[ndarray] = (), *, seed: int
    ) -> ArmOutcome:
        """From the texts of each draw, and the change of rate of each text if they were steered."""

        def mean(values: Iterable[ndarray | pd.Series]) -> Interval:
            # Every text of a draw has a random feature of its own, so that resampling prompts resamples features too.
            return bootstrap_mean(_by_prompt(draws, values), seed=seed)

        texts, in_band = pd.concat(draws), [band.holds(draw.nll) for draw in draws]
        useful = [effect * inside for effect, inside in zip(effects, in_band, strict=False)]
        return cls(
            name=name,
            label=LABELS[name],
            score=mean(effects) if effects else None,
            score_in_band=mean(useful) if effects else None,
            rate=mean(draw.rate for draw in draws) if effects else None,
            in_band=mean(inside.astype(float) for inside in in_band),
            nll=mean(draw.nll for draw in draws),
            repetition=mean(draw.repetition for draw in draws),
            relative_dose=float(np.average(texts.relative_dose, weights=np.maximum(texts.n_edits, 1e-9))),
            n_edits=int(draws[0].n_edits.sum()),
            n_rows=len(texts),
            n_features=texts.feature[texts.feature >= 0].nunique(),
            draws=tuple(float(effect.mean()) for effect in effects) if len(effects) > 1 else (),
        )


@dataclass(frozen=True, kw_only=True)
class HeldOutOutcome:
    """All arms, their differences and the verdict."""

    unsteered: pd.DataFrame
    steered: Mapping[str, pd.DataFrame]
    """By arm, draws of random features apart."""
    effects: Mapping[str, ndarray]
    band: Band
    arms: tuple[ArmOutcome, ...]
    differences: Mapping[str, Interval]
    """Score of the treatment minus that of each other arm."""
    differences_in_band: Mapping[str, Interval]

    @property
    def yes(self) -> bool:
        """Whether the chosen features steer more than random ones of equal dose."""
        return self.differences[CONTROL].low > 0

    def verdict(self) -> str:
        """The answer in two or three sentences."""
        arms = {arm.name: arm for arm in self.arms}
        treated, d = arms[TREATMENT], self.differences[CONTROL]
        assert treated.score is not None
        stays = f"{treated.in_band.estimate:.0%} of their texts stay in the unsteered band"
        usual = f"(not steered: {arms['unsteered'].in_band.estimate:.0%})"
        size = number_text(d.scaled(100), "+.1f").replace(" ", " points ", 1).replace("-", "−")
        others = sorted(set(self.differences) - {CONTROL}, key=lambda name: self.differences[name].estimate)
        best, *rest = (self._beside(name) for name in others)  # the best leaves the smallest difference
        does = "Yes: {} steer" if self.yes else "No: {} do not demonstrably steer"
        features = "features ranked by delta-confidence and chosen on validation prompts"
        return (
            f"{does.format(features)} more than random features at the same dose (the unedited model finds them on "
            f"{size} more of the new tokens), and they {best}, the best control; {stays} {usual}. Beside the other "
            f"controls they {'; '.join(rest)}."
        )

    def _beside(self, name: str) -> str:
        found = self.differences[name]
        how = "steer more than" if found.low > 0 else "steer less than" if found.high < 0 else "do not differ from"
        return f"{how} “{LABELS[name]}” ({number_text(100 * found.estimate, '+.1f')} points)".replace("-", "−")

    def by_feature(self, arm: str) -> dict[int, float]:
        """Mean score of each feature of an arm."""
        texts, effect = self.steered[arm], self.effects[arm]
        return {int(f): float(effect[texts.feature == f].mean()) for f in sorted(set(texts.feature))}

    def examples(self, prompts: Sequence[str], to_text: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
        """The first held-out prompts, first sample: unsteered and steered, whatever came out."""

        def first(texts: pd.DataFrame, p: int) -> pd.Series:
            return texts[(texts.prompt == p) & (texts.replicate == 0)].iloc[0]

        def shown(text: pd.Series) -> dict[str, Any]:
            return {"tokens": to_text(text.token_ids.tolist()), "nll": float(text.nll)}

        rows = []
        for p in range(min(N_EXAMPLES, len(prompts))):
            rows.append({"prompt": prompts[p], "unsteered": shown(first(self.unsteered, p))})
            for name in (TREATMENT, "output-score", "random-1"):
                text = first(self.steered[name], p)
                rows[-1][name] = shown(text) | {"fired": text.fired.tolist(), "feature": int(text.feature)}
        return {
            "rule": f"the first {len(rows)} held-out prompts, first sample, the feature that rotation gave",
            "rows": rows,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the run and its report."""
        return {
            "verdict": {"yes": self.yes, "text": self.verdict()},
            "band": self.band._asdict(),
            "n_prompts": int(self.unsteered.prompt.max()) + 1,
            "n_tokens": len(self.unsteered.token_ids[0]),
            "arms": json_safe(self.arms),
            "differences": [
                {
                    "arm": name,
                    "label": f"{LABELS[TREATMENT]} − {LABELS[name]}",
                    "interval": interval.to_dict(),
                    "in_band": self.differences_in_band[name].to_dict(),
                }
                for name, interval in self.differences.items()
            ],
            "equal_dose_tolerance": DOSE_TOLERANCE,
        }


def summarise(
    unsteered: pd.DataFrame, rates: BaseRates, steered: Mapping[str, pd.DataFrame], *, seed: int = 0
) -> HeldOutOutcome:
    """Score every arm on held-out prompts.

    Args:
        unsteered: their texts without steering; their negative log-likelihoods are the band.
        rates: how often every feature fires in them.
        steered: by arm, in equal order of prompts and samples; arms named `random-…` are draws of one arm.
        seed: of the bootstrap.

    Raises:
        RuntimeError: an arm's ‖Δ‖/‖x‖ is not the dose, or its number of edits another arm's, to 1%.
    """
    _check_equal_dose(steered)
    band = Band.of(unsteered.nll)
    effects = {name: rates.effect(texts) for name, texts in steered.items()}
    draws = [name for name in steered if name.startswith(f"{CONTROL}-")]
    single = (TREATMENT, "output-score", "chosen-random")
    members = {**{name: [name] for name in single}, CONTROL: draws, "most-active": ["most-active"]}
    arms = [ArmOutcome.of("unsteered", [unsteered], band, seed=seed)]
    for name, parts in members.items():
        texts, found = [steered[part] for part in parts], [effects[part] for part in parts]
        arms.append(ArmOutcome.of(name, texts, band, found, seed=seed))

    def difference(values: Mapping[str, ndarray], name: str) -> Interval:
        a, b = (
            _by_prompt([steered[part] for part in members[arm]], [values[part] for part in members[arm]]).mean(axis=0)
            for arm in (TREATMENT, name)
        )
        return bootstrap_difference(a, b, seed=seed)

    useful = {name: effects[name] * band.holds(texts.nll) for name, texts in steered.items()}
    others = [name for name in members if name != TREATMENT]
    return HeldOutOutcome(
        unsteered=unsteered,
        steered=steered,
        effects=effects,
        band=band,
        arms=tuple(arms),
        differences={name: difference(effects, name) for name in others},
        differences_in_band={name: difference(useful, name) for name in others},
    )


def _by_prompt(draws: Sequence[pd.DataFrame], values: Iterable[ndarray | pd.Series]) -> ndarray:
    """`[draws, prompts]` of a value of each draw's texts, samples averaged: every prompt has as many."""
    found = []
    for texts, of_texts in zip(draws, values, strict=True):
        order = np.lexsort((texts.prompt, texts.replicate))
        found.append(np.asarray(of_texts)[order].reshape(-1, texts.prompt.nunique()).mean(axis=0))
    return np.stack(found)


def _check_equal_dose(steered: Mapping[str, pd.DataFrame]) -> None:
    found = {name: (float(texts.relative_dose.mean()), int(texts.n_edits.sum())) for name, texts in steered.items()}
    expected = float(steered[TREATMENT].dose.mean()), found[TREATMENT][1]
    for name in found:
        for what, asked, realised in zip(("‖Δ‖/‖x‖", "number of edits"), expected, found[name], strict=True):
            if abs(realised - asked) > DOSE_TOLERANCE * asked:
                raise RuntimeError(f"the {what} of {name} is {realised:.6g}, not {asked:.6g}: arms cannot be compared")
