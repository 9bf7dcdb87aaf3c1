"""What the arms of the demo did: scores with intervals over prompts, differences pair by prompt, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean, number_text
from trimtab.studies.choice import Band, BaseRates
from trimtab.studies.texts import Texts

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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: v.to_dict() if isinstance(v, Interval) else v for k, v in fields.items()}


@dataclass(frozen=True, kw_only=True)
class TestOutcome:
    """All arms, their differences and the verdict."""

    __test__ = False  # its name is no invitation to pytest

    unsteered: Texts
    steered: Mapping[str, Texts]
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
        return {int(f): float(effect[texts.feature == f].mean()) for f in np.unique(texts.feature)}

    def examples(self, prompts: Sequence[str], to_text: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
        """The first held-out prompts, first sample: unsteered and steered, whatever came out."""
        rows = []
        for p in range(min(N_EXAMPLES, len(prompts))):
            before = self.unsteered.take((self.unsteered.prompt == p) & (self.unsteered.replicate == 0))
            after = {
                name: self.steered[name].take((self.steered[name].prompt == p) & (self.steered[name].replicate == 0))
                for name in ("delta-confidence", "output-score", "random-1")
            }
            rows.append(
                {
                    "prompt": prompts[p],
                    "unsteered": {"tokens": to_text(before.token_ids[0].tolist()), "nll": float(before.nll[0])},
                    **{
                        name: {
                            "tokens": to_text(texts.token_ids[0].tolist()),
                            "fired": texts.fired[0].tolist(),
                            "feature": int(texts.feature[0]),
                            "nll": float(texts.nll[0]),
                        }
                        for name, texts in after.items()
                    },
                }
            )
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
            "n_tokens": int(self.unsteered.token_ids.shape[1]),
            "arms": [arm.to_json() for arm in self.arms],
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


def summarise(unsteered: Texts, rates: BaseRates, steered: Mapping[str, Texts], *, seed: int = 0) -> TestOutcome:
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
    in_band = {name: band.holds(texts.nll) for name, texts in steered.items()}
    draws = [name for name in steered if name.startswith(f"{CONTROL}-")]
    single = (TREATMENT, "output-score", "chosen-random")
    members = {**{name: [name] for name in single}, CONTROL: draws, "most-active": ["most-active"]}

    def by_prompt(values: Mapping[str, ndarray], names: list[str]) -> ndarray:
        """`[draws, prompts]`, samples averaged."""
        return np.stack([_by_prompt(steered[name], values[name]).mean(axis=0) for name in names])

    def mean(values: Mapping[str, ndarray], names: list[str]) -> Interval:
        # Every text of a draw has a random feature of its own, so that resampling prompts resamples features too.
        return bootstrap_mean(by_prompt(values, names), seed=seed)

    useful = {name: effects[name] * in_band[name] for name in steered}
    arms = [_unsteered_outcome(unsteered, band, seed)]
    for name, parts in members.items():
        texts = Texts.join([steered[part] for part in parts])
        first = steered[parts[0]]
        arms.append(
            ArmOutcome(
                name=name,
                label=LABELS[name],
                score=mean(effects, parts),
                score_in_band=mean(useful, parts),
                rate=mean({part: steered[part].rate for part in parts}, parts),
                in_band=mean({part: in_band[part].astype(float) for part in parts}, parts),
                nll=mean({part: steered[part].nll for part in parts}, parts),
                repetition=mean({part: steered[part].repetition for part in parts}, parts),
                relative_dose=float(np.average(texts.relative_dose, weights=np.maximum(texts.n_edits, 1e-9))),
                n_edits=int(first.n_edits.sum()),
                n_rows=len(texts),
                n_features=len(np.unique(texts.feature)),
                draws=tuple(float(effects[part].mean()) for part in parts) if len(parts) > 1 else (),
            )
        )

    def difference(values: Mapping[str, ndarray], name: str) -> Interval:
        a, b = (by_prompt(values, members[arm]).mean(axis=0) for arm in (TREATMENT, name))
        return bootstrap_difference(a, b, seed=seed)

    others = [name for name in members if name != TREATMENT]
    return TestOutcome(
        unsteered=unsteered,
        steered=steered,
        effects=effects,
        band=band,
        arms=tuple(arms),
        differences={name: difference(effects, name) for name in others},
        differences_in_band={name: difference(useful, name) for name in others},
    )


def _unsteered_outcome(texts: Texts, band: Band, seed: int) -> ArmOutcome:
    def mean(values: ndarray) -> Interval:
        return bootstrap_mean(_by_prompt(texts, values), seed=seed)

    return ArmOutcome(
        name="unsteered",
        label=LABELS["unsteered"],
        score=None,
        score_in_band=None,
        rate=None,
        in_band=mean(band.holds(texts.nll).astype(float)),
        nll=mean(texts.nll),
        repetition=mean(texts.repetition),
        relative_dose=0.0,
        n_edits=0,
        n_rows=len(texts),
        n_features=0,
    )


def _by_prompt(texts: Texts, values: ndarray) -> ndarray:
    """`[samples, prompts]`: every prompt has as many samples."""
    order = np.lexsort((texts.prompt, texts.replicate))
    return values[order].reshape(-1, len(np.unique(texts.prompt)))


def _check_equal_dose(steered: Mapping[str, Texts]) -> None:
    found = {name: (float(texts.relative_dose.mean()), int(texts.n_edits.sum())) for name, texts in steered.items()}
    expected = float(steered[TREATMENT].dose.mean()), found[TREATMENT][1]
    for name in found:
        for what, asked, realised in zip(("‖Δ‖/‖x‖", "number of edits"), expected, found[name], strict=True):
            if abs(realised - asked) > DOSE_TOLERANCE * asked:
                raise RuntimeError(f"the {what} of {name} is {realised:.6g}, not {asked:.6g}: arms cannot be compared")
