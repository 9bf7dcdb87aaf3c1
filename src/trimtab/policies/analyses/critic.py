"""What the critic knows: its value along the answer, by what became of the item, and how well it tells outcomes apart.

Items fall into four groups by the unsteered model's answer and the policy's: correct (right, right), corrected (wrong,
right), misguided (right, wrong), incorrect (wrong, wrong). AUCs are taken among items that the unsteered model gets
right, and among those that it gets wrong, beside a probe on the same activations: a ridge regression, fitted on other
items, its penalty chosen by leave-one-out error among those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import StratifiedKFold

from trimtab.errors import UserError
from trimtab.policies.analyses.diagnosis import Diagnosis, diagnose
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts, as_numpy, right, spread
from trimtab.policies.headroom.candidates import COUNT
from trimtab.policies.headroom.trials import own_headroom
from trimtab.stats import Interval, best_of_some, bootstrap_statistic, wilson_interval
from trimtab.stats.resamples import pairs_won

GROUPS = ("correct", "corrected", "misguided", "incorrect")
MEAN = -1
"""The step that stands for the mean over an item's decisions."""
FOLDS = 5


@dataclass(frozen=True)
class CurvePoint:
    """The critic's value at one step, over the items of a group that reach it."""

    group: str
    step: int
    n: int
    mean: float
    sd: float
    """With n − 1; NaN for a single item."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How well right answers are told from wrong ones at one step, among items that are alike unsteered."""

    group: str
    """`unsteered right` or `unsteered wrong`."""
    step: int
    """−1 for the mean over an item's decisions."""
    n: int
    n_right: int
    """Answered right under the policy."""
    critic: Interval | None
    """AUC; None where all answers end alike."""
    probe: Interval | None
    """None where fewer than 5 items end right, or wrong."""
    difference: Interval | None
    """The probe's AUC minus the critic's."""


@dataclass(frozen=True)
class Helped:
    """Which of the items that end wrong some action helps."""

    share: Interval | None
    random: Interval | None
    """The same with as many random directions of equal length as the mask allows features of the item."""
    how: str
    lower_bound: bool = False
    """Whether actions that were not tried may help more items."""


@dataclass(frozen=True, kw_only=True)
class CriticReport:
    """Curves, AUCs and a verdict for each of the two kinds of items."""

    counts: dict[str, int]
    """Items by group."""
    curve: tuple[CurvePoint, ...]
    separations: tuple[Separation, ...]
    verdicts: tuple[Diagnosis, ...]
    helped: Helped


def critic_report(
    value: Float[np.ndarray, "P T"],
    x: Float[np.ndarray, "P T d"],
    valid: Bool[np.ndarray, "P T"],
    *,
    before: Bool[np.ndarray, " P"],
    after: Bool[np.ndarray, " P"],
    helped: Helped,
    steps: int = 16,
    n_resamples: int = 1_000,
    seed: int = 0,
) -> CriticReport:
    """Judge a critic by its values.

    Args:
        value: of each item's decisions.
        x: what the policy saw at them.
        valid: which were made.
        before: whether the unsteered model is right.
        after: whether the policy is right.
        helped: what actions do for items that are wrong before and after.
        steps: AUCs and curve points, evenly spaced over the decisions.
        n_resamples: bootstrap samples of items.
        seed: of folds and bootstrap.
    """
    value = value.astype(np.float64)
    where = np.select([before & after, ~before & after, before & ~after], [0, 1, 2], 3)
    shown = spread(value.shape[1], steps)
    curve = []
    for number, group in enumerate(GROUPS):
        for step in shown:
            mine = value[(where == number) & valid[:, step], step]
            if len(mine):
                sd = float(mine.std(ddof=1)) if len(mine) > 1 else float("nan")
                curve.append(CurvePoint(group, step, len(mine), float(mine.mean()), sd))
    separations: list[Separation] = []
    verdicts: list[Diagnosis] = []
    weight = valid / np.maximum(1, valid.sum(1, keepdims=True))
    mean_value = (np.where(valid, value, 0) * weight).sum(1)
    mean_x = np.einsum("ptd,pt->pd", np.where(valid[..., None], x, 0), weight)
    for group, members in (("unsteered right", before), ("unsteered wrong", ~before)):
        told = [(MEAN, mean_value, mean_x, members)]
        if value.shape[1] > 1:
            told += [(step, value[:, step], x[:, step], members & valid[:, step]) for step in shown]
        found = [
            _separation(group, step, score[mine], state[mine], after[mine], n_resamples, seed)
            for step, score, state, mine in told
            if mine.any()
        ]
        if not found:
            continue
        separations += found
        # What is right without an edit can be kept right by none: there, an action always helps.
        failing = int((members & ~after).sum())
        kept = wilson_interval(failing, failing) if failing else None
        verdicts.append(
            diagnose(
                group,
                critic=found[0].critic,
                probe=found[0].probe,
                difference=found[0].difference,
                helped=helped.share if group == "unsteered wrong" else kept,
                lower_bound=helped.lower_bound and group == "unsteered wrong",
            )
        )
    counts = {group: int((where == number).sum()) for number, group in enumerate(GROUPS)}
    return CriticReport(
        counts=counts, curve=tuple(curve), separations=tuple(separations), verdicts=tuple(verdicts), helped=helped
    )


def judge_critic(rollouts: PolicyRollouts, helped: Helped, *, steps: int = 16, seed: int = 0) -> CriticReport:
    """Judge the critic of a policy by its rollouts.

    Args:
        rollouts: the rollouts.
        helped: as `helped_by_headroom` or the branch points give it.
        steps: AUCs and curve points along the answer.
        seed: of folds and bootstrap.
    """
    decisions = rollouts.decisions
    return critic_report(
        as_numpy(decisions.value),
        decisions.observation.float().cpu().numpy(),
        decisions.valid.cpu().numpy(),
        before=right(rollouts.unsteered),
        after=right(rollouts.outcomes),
        helped=helped,
        steps=steps,
        seed=seed,
    )


def helped_by_headroom(rollouts: PolicyRollouts, *, items: int = 24, features: int = COUNT, seed: int = 0) -> Helped:
    """Try features, and as many random directions, on items that are wrong before and after.

    Which of the random directions are taken is averaged over, so that an item counts by the chance that one helps.

    Args:
        rollouts: the rollouts.
        items: how many of those items, from the first on.
        features: where answers are longer than one token: how many features to hold over the whole answer. Where they
            are one token, every feature that the mask allows is tried.
        seed: of the random directions.
    """
    wrong = np.flatnonzero(~right(rollouts.unsteered) & ~right(rollouts.outcomes))[:items].tolist()
    if not wrong:
        return Helped(None, None, "no answer is wrong with and without the policy")
    try:
        table = own_headroom(replace(rollouts.setup, seed=seed), rollouts.prompts.take(wrong), count=features)
    except UserError as error:
        return Helped(None, None, f"not measured: {error.why}")
    own = rollouts.outcomes
    reached = np.array([own[i].reward for i in wrong]) + 1e-6
    helps = np.where(table.allowed, table.reward, -np.inf).max(1) > reached
    helping = (table.random > reached[:, None]).astype(np.float64)
    random = best_of_some(helping, table.random_counts).clip(max=1)
    tried = "every feature that the mask allows"
    some = table.scheme == "every answer token"
    if some:
        tried = (
            f"those that the mask allows of {len(table.candidates.features)} features ({table.candidates.rule}), each "
            "held over the whole answer"
        )
    return Helped(
        wilson_interval(int(helps.sum()), len(wrong)),
        wilson_interval(float(random.sum()), len(wrong)),
        f"{tried}, on {len(wrong)} items that are wrong with and without the policy",
        lower_bound=some,
    )


def cross_fitted_probe(
    x: Float[np.ndarray, "P d"], positive: Bool[NDArray[np.bool_], " P"], seed: int = 0
) -> Float[np.ndarray, " P"] | None:
    """Scores of items by ridge regressions that were fitted on the others; None with fewer than 5 of a kind."""
    if min(int(positive.sum()), int((~positive).sum())) < FOLDS:
        return None
    found = np.zeros(len(x))
    for fit, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, positive):
        mean, scale = x[fit].mean(0), x[fit].std(0) + 1e-6
        model = RidgeCV(alphas=np.logspace(-1, 5, 13) * x.shape[1] / 100)
        model.fit((x[fit] - mean) / scale, positive[fit].astype(np.float64))
        found[test] = model.predict((x[test] - mean) / scale)
    return found


def _separation(
    group: str,
    step: int,
    value: NDArray[np.float64],
    x: NDArray[np.floating],
    after: NDArray[np.bool_],
    n_resamples: int,
    seed: int,
) -> Separation:
    critic = probe = difference = None
    if after.any() and not after.all():
        rows = np.arange(len(after))

        def interval(weights: list[tuple[float, NDArray[np.float64]]]) -> Interval:
            return bootstrap_statistic(
                lambda drawn: sum(sign * _resampled_auc(pairs, drawn, after) for sign, pairs in weights),
                [rows],
                n_resamples=n_resamples,
                seed=seed,
            )

        own = pairs_won(value, after)
        critic = interval([(1, own)])
        fitted = cross_fitted_probe(x, after, seed)
        if fitted is not None:
            told = pairs_won(fitted, after)
            probe = interval([(1, told)])
            difference = interval([(1, told), (-1, own)])
    return Separation(
        group=group, step=step, n=len(value), n_right=int(after.sum()), critic=critic, probe=probe,
        difference=difference,
    )  # fmt: skip


def _resampled_auc(pairs: Float[np.ndarray, "P N"], drawn: NDArray[np.intp], positive: NDArray[np.bool_]) -> float:
    """The AUC of items drawn with repetition; NaN where one kind is missing."""
    count = np.bincount(drawn, minlength=len(positive)).astype(np.float64)
    p, n = count[positive], count[~positive]
    total = p.sum() * n.sum()
    return float(p @ pairs @ n / total) if total else float("nan")
