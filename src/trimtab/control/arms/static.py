"""The best static feature: one feature at one dose for all items, chosen on validation among as many as are tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float

from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, register
from trimtab.control.setting import Setting
from trimtab.steering import DirectionTable, StaticSource

LIVE_SAMPLE = "sample of live features"
"""Where candidates come from that nothing else names."""
LIVE_FEATURES, FIRST_ITEMS = 96, 48
"""How many those are, and validation items on which all candidates are tried."""


@dataclass(frozen=True, kw_only=True)
class StaticChoice:
    """A feature and a dose, chosen on validation."""

    feature: int
    dose: float
    """In the setting's unit: the best of those tried."""
    reward: float
    """Mean on validation; the largest of many, and so too good."""
    features_tried: int
    doses_tried: tuple[float, ...]
    origins: dict[str, int]
    """Where the candidates came from, and how many each gave first."""


def used_features(answers: Iterable[Answers], count: int) -> list[int]:
    """The features that were edited with most often, most often first."""
    counts: Counter[int] = Counter()
    for one in answers:
        feature = one.edits.feature
        counts.update(feature[feature >= 0].tolist())
    return [feature for feature, _ in counts.most_common(count)]


def gather(sources: Mapping[str, Sequence[int]]) -> tuple[list[int], dict[str, int]]:
    """Candidates of several origins, each once, with the number that each origin was first to name."""
    seen: dict[int, str] = {}
    for origin, features in sources.items():
        for feature in features:
            seen.setdefault(int(feature), origin)
    counts = Counter(seen.values())
    return list(seen), {origin: counts.get(origin, 0) for origin in sources}


def sample_of_live(setting: Setting, count: int, seed: int) -> list[int]:
    """Features drawn at random among those that fire."""
    live = DirectionTable.of(setting.needed_dictionary()).live_ids().numpy()
    rng = np.random.default_rng([seed, 11])
    return rng.choice(live, min(count, len(live)), replace=False).tolist()


def rewards_with(items: ItemSet, features: Sequence[int], doses: Sequence[float]) -> Float[np.ndarray, "F P"]:
    """Reward of every item with each feature at its dose, at every decision.

    Args:
        items: whose.
        features: ids.
        doses: one for each, in the setting's unit.
    """
    block = max(1, min(len(features), items.setting.batch_size))
    parts = []
    for start in range(0, len(features), block):
        ids = torch.tensor(features[start : start + block])
        strength = torch.tensor(doses[start : start + block], dtype=torch.float32)
        rows = len(items)
        source = items.setting.static_source(ids.repeat(rows)[:, None], strength.repeat(rows)[:, None])
        parts.append(items.answer(source, repeats=len(ids)).reward.reshape(rows, len(ids)).T)
    return np.concatenate(parts)


def best_static(
    validation: ItemSet,
    candidates: Mapping[str, Sequence[int]],
    *,
    factors: Sequence[float] = (0.5, 1.0, 2.0),
    first_items: int = FIRST_ITEMS,
    finalists: int = 16,
) -> StaticChoice:
    """Choose a feature and a dose by mean reward on validation.

    All candidates are tried at the setting's dose on the first items; the best of them on all items at every dose. Ties
    go to the dose nearest the setting's, then to the candidate that was named first.

    Args:
        validation: items of validation.
        candidates: features by where they come from.
        factors: doses to try, as multiples of the setting's.
        first_items: items of the first round.
        finalists: features of the second.
    """
    features, origins = gather(candidates)
    dose, left = validation.setting.dose, features
    if len(features) > finalists:
        few = validation.take(range(min(first_items, len(validation))))
        scores = rewards_with(few, features, [dose] * len(features)).mean(1)
        left = [features[i] for i in np.argsort(-scores, kind="stable")[:finalists]]
    doses = sorted((dose * factor for factor in factors), key=lambda d: abs(np.log(d / dose)))
    pairs = [(feature, d) for d in doses for feature in left]
    scores = rewards_with(validation, [f for f, _ in pairs], [d for _, d in pairs]).mean(1)
    best = int(scores.argmax())
    return StaticChoice(
        feature=pairs[best][0],
        dose=pairs[best][1],
        reward=float(scores[best]),
        features_tried=len(features),
        doses_tried=tuple(sorted(doses)),
        origins=origins,
    )


def static_source(items: ItemSet, choice: StaticChoice) -> StaticSource:
    """The feature at its own dose, at every decision."""
    return items.setting.static_source(choice.feature, choice.dose)


@register
@dataclass(frozen=True, kw_only=True)
class BestStatic(ArmKind):
    """The best static feature, at its own dose and at the reference's decisions and doses."""

    name: ClassVar[str] = "static"
    main: ClassVar[bool] = True
    finalists: int = 16
    """Features that are tried on all validation items and at all doses."""
    dose_factor: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Doses that are tried, as multiples of the setting's."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        n, candidates = len(choosing.validation), len(gather(choosing.candidates)[0]) or LIVE_FEATURES
        first = candidates * min(FIRST_ITEMS, n) if candidates > self.finalists else 0
        return {"the best static feature": first + min(candidates, self.finalists) * len(self.dose_factor) * n}

    def choice(self, choosing: Choosing) -> StaticChoice:
        """The feature; several kinds that ask for the same choice make it once."""

        def choose() -> StaticChoice:
            candidates = choosing.candidates or {
                LIVE_SAMPLE: sample_of_live(choosing.validation.setting, LIVE_FEATURES, 0)
            }
            return best_static(
                choosing.validation, candidates, factors=self.dose_factor, finalists=self.finalists
            )  # fmt: skip

        return choosing.once((BestStatic, self.finalists, self.dose_factor), choose)

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = self.choice(choosing)
        return self.steered(lambda items, draw: static_source(items, choice), asdict(choice))
