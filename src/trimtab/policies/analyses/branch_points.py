"""Branch points: tokens at which the choice of a feature decides the reward.

At a token of a policy's rollout the past is replayed and one decision replaced: by the policy's m other most likely
allowed features, by no steering, and by m random live features with the same local divergence as those candidates;
then the policy goes on. With the draws of tokens and actions shared, a copy whose decision is left alone repeats the
rollout. A token is a branch point if the candidates change the reward more often than the random features do: Fisher's
exact test of m against m, one-sided, corrected by Benjamini and Hochberg for all tokens tried.

The random features' doses are scaled until their local divergence is that of the candidate each is paired with; of
several draws the first that gets there is taken, and a candidate for which none does is left out of the test.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.lm.sampling import uniform
from trimtab.policies.analyses.forks import NO_EDIT, OWN_CHOICE, Decision, Substitutes, fork_source
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts, rewards, right, spread
from trimtab.policies.source import masked_log_softmax
from trimtab.stats import Interval, benjamini_hochberg, bootstrap_statistic, wilson_interval
from trimtab.steering.controls import CONTROL_STREAM, draw_without_replacement

FLIP = 1e-6
"""Smallest change of a reward that counts."""


@dataclass(frozen=True, kw_only=True)
class BranchToken:
    """What replacing one decision did."""

    item: str
    step: int
    """Number of the decision, from 0."""
    position: int
    """Of the edited token, absolute."""
    token: str
    """The edited token."""
    feature: int
    """What the policy chose; −1 for no steering."""
    reward: float
    """Of the rollout as the policy made it."""
    tried: int
    """Candidates that were tried, each beside a random feature of equal divergence."""
    unmatched: int
    """Candidates left out because no random feature reached their divergence."""
    flips: int
    """Candidates that changed the reward."""
    random_flips: int
    """Random features that did."""
    flips_without: bool
    """Whether no steering here changes the reward."""
    p_value: float
    q_value: float
    """The same, corrected for all tokens tried."""
    branch_point: bool
    excess: float
    """Flip rate of the candidates minus that of the random features."""


@dataclass(frozen=True, kw_only=True)
class Fork:
    """One replaced decision."""

    item: str
    step: int
    kind: str
    """`candidate`, `random`, `none`, or `own` for the policy's own choice."""
    pair: int
    """Which candidate a random feature is matched with; −1 for the others."""
    feature: int
    dose: float
    kl_local: float
    """KL of the next token with and without the edit, in nats."""
    reward: float
    flip: bool


@dataclass(frozen=True, kw_only=True)
class BranchPoints:
    """Every token tried."""

    tokens: tuple[BranchToken, ...]
    forks: tuple[Fork, ...]
    items: int
    excess: Interval | None
    """Mean excess flip rate over tokens, bootstrapped over items."""
    rescued: Interval | None
    """Among items tried that are wrong with and without the policy, the share that another decision of the policy's (a
    candidate or none) improves; None if there is none."""
    false_discovery_rate: float
    not_repeated: int
    """Tokens at which the copy with the policy's own choice did not repeat the rollout (a tie that rounding broke)."""
    warnings: tuple[str, ...]

    @property
    def found(self) -> tuple[BranchToken, ...]:
        """The branch points."""
        return tuple(token for token in self.tokens if token.branch_point)


class _TriedToken(NamedTuple):
    """One token with what will replace its decision: candidates, each with a random feature of its divergence."""

    item: int
    step: int
    candidates: Tensor
    random: Tensor
    random_dose: Tensor
    kl: Tensor
    random_kl: Tensor
    own: int
    """What the policy chose; −1 for no steering."""
    own_kl: float
    unmatched: int


def branch_points(
    rollouts: PolicyRollouts,
    *,
    items: int = 8,
    tokens: int = 8,
    candidates: int = 8,
    draws: int = 3,
    tolerance: float = 0.1,
    false_discovery_rate: float = 0.05,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> BranchPoints:
    """Try tokens of a policy's rollouts.

    Args:
        rollouts: the rollouts.
        items: how many of them, from the first on; their outcome plays no part in the choice.
        tokens: decisions of each, evenly spaced.
        candidates: m.
        draws: random features drawn for each candidate; the first whose dose can be matched is taken.
        tolerance: allowed relative difference of matched divergences.
        false_discovery_rate: level of the corrected test.
        seed: of the draws of random features.
        progress: called with the number of tokens done.
    """
    by_step: defaultdict[int, list[_TriedToken | None]] = defaultdict(list)
    for item in range(min(items, len(rollouts))):
        for step in spread(int(rollouts.steps[item]), tokens):
            by_step[step].append(_prepare(rollouts, item, step, candidates, draws, tolerance, seed))
    rows: list[BranchToken] = []
    forks: list[Fork] = []
    not_repeated = 0
    for step, tries in sorted(by_step.items()):
        if kept := [one for one in tries if one is not None]:
            not_repeated += _decode(rollouts, step, kept, candidates, rows, forks)
        if progress is not None:
            progress(len(tries))
    excess = None
    if rows:
        corrected = benjamini_hochberg([row.p_value for row in rows]).tolist()
        rows = [
            replace(row, q_value=q, branch_point=q <= false_discovery_rate)
            for row, q in zip(rows, corrected, strict=True)
        ]
        place = {item.id: i for i, item in enumerate(rollouts.prompts.items)}
        rows.sort(key=lambda row: (place[row.item], row.step))
        values = np.array([row.excess for row in rows])
        excess = bootstrap_statistic(lambda v: float(v.mean()), [values], groups=[row.item for row in rows], seed=seed)
    return BranchPoints(
        tokens=tuple(rows),
        forks=tuple(forks),
        items=len({row.item for row in rows}),
        excess=excess,
        rescued=_rescued(rollouts, rows, forks),
        false_discovery_rate=false_discovery_rate,
        not_repeated=not_repeated,
        warnings=_warnings(rows, candidates, false_discovery_rate, not_repeated),
    )


def fisher_greater(a: int, n_a: int, b: int, n_b: int) -> float:
    """One-sided exact p-value that a of n_a is no larger a share than b of n_b (Fisher 1935).

    Of all ways to deal the a + b successes among n_a + n_b places, the share that puts at least a among the first n_a.
    """
    successes, total = a + b, n_a + n_b
    ways = sum(
        math.comb(successes, k) * math.comb(total - successes, n_a - k) for k in range(a, min(successes, n_a) + 1)
    )
    return ways / math.comb(total, n_a)


def _prepare(
    rollouts: PolicyRollouts, item: int, step: int, candidates: int, draws: int, tolerance: float, seed: int
) -> _TriedToken | None:
    """What a token is tried with; None where nothing else is allowed, or no random feature reaches its divergence."""
    decisions, dose = rollouts.decisions, rollouts.source.dose
    n, device = rollouts.source.table.n, decisions.observation.device
    row, at = torch.tensor([item], device=device), torch.tensor([step], device=device)
    with torch.no_grad():
        logits = rollouts.policy.actor(rollouts.policy.normaliser(decisions.observation[row, at]))
        logp = masked_log_softmax(logits, decisions.allowed(row, at))[0].cpu()
    taken = int(decisions.action[item, step])
    logp[taken] = logp[n] = float("-inf")
    order = logp.argsort(descending=True, stable=True)[:candidates]
    chosen = order[logp[order] > float("-inf")]
    live = rollouts.source.table.live_ids()
    pool = live[~torch.isin(live, torch.cat([chosen, torch.tensor([taken])]))]
    per = min(draws, len(pool) // max(1, len(chosen)))
    if not len(chosen) or not per:
        return None
    decision = Decision(rollouts, item, step)
    kl = decision.local_kl(chosen, torch.full((len(chosen),), dose))
    key, position = torch.tensor([item]), torch.tensor([rollouts.position(item, step)])
    streams = range(CONTROL_STREAM, CONTROL_STREAM + per * len(chosen))
    u = torch.stack([uniform(seed, key, 0, position, stream) for stream in streams], dim=1)
    drawn = pool[draw_without_replacement(u, len(pool))[0]]
    found = decision.match(drawn, kl.repeat_interleave(per), dose, tolerance=tolerance)
    within = torch.tensor([match.within for match in found]).reshape(-1, per)
    scales, reached = (torch.tensor([getattr(m, name) for m in found]) for name in ("scale", "reached"))
    matched = within.any(1)
    if not matched.any():
        return None
    pick = (within.int().argmax(1) + torch.arange(len(chosen)) * per)[matched]
    return _TriedToken(
        item, step, chosen[matched], drawn[pick], dose * scales[pick], kl[matched], reached[pick],
        own=taken if taken < n else NO_EDIT,
        own_kl=float(decision.local_kl(torch.tensor([taken]), torch.tensor([dose]))) if taken < n else 0.0,
        unmatched=int((~matched).sum()),
    )  # fmt: skip


def _decode(
    rollouts: PolicyRollouts, step: int, tries: list[_TriedToken], m: int, rows: list[BranchToken], forks: list[Fork]
) -> int:
    """Decode all forks at one step, all items together; give the number of rollouts that were not repeated."""
    feature = torch.full((len(tries), 2 + 2 * m), OWN_CHOICE)
    dose = torch.full((len(tries), 2 + 2 * m), float(rollouts.source.dose))
    feature[:, 1] = NO_EDIT
    for i, one in enumerate(tries):
        tried = len(one.candidates)
        feature[i, 2 : 2 + tried] = one.candidates
        feature[i, 2 + m : 2 + m + tried] = one.random
        dose[i, 2 + m : 2 + m + tried] = one.random_dose
    which = [one.item for one in tries]
    source = fork_source(rollouts, which, step, Substitutes(feature, dose))
    decoded, outcomes = rollouts.decode_again(source, which, step=step, repeats=feature.shape[1])
    reward = rewards(outcomes).reshape(feature.shape)
    repeated = 0
    for i, one in enumerate(tries):
        repeated += decoded.token_ids[i * feature.shape[1]] == rollouts.decoded.token_ids[one.item][step:]
        mine = _forks(rollouts, one, dose[i], reward[i], m)
        rows.append(_token(rollouts, one, mine))
        forks += mine
    return len(tries) - repeated


def _forks(rollouts: PolicyRollouts, one: _TriedToken, dose: Tensor, reward: NDArray[np.float64], m: int) -> list[Fork]:
    """What came of each decision; the policy's own comes first, then none."""
    listed = [("own", -1, one.own, 0, one.own_kl), ("none", -1, NO_EDIT, 1, 0.0)]
    for i in range(len(one.candidates)):
        listed.append(("candidate", i, int(one.candidates[i]), 2 + i, float(one.kl[i])))
        listed.append(("random", i, int(one.random[i]), 2 + m + i, float(one.random_kl[i])))
    return [
        Fork(
            item=rollouts.prompts.items[one.item].id,
            step=one.step,
            kind=kind,
            pair=pair,
            feature=feature,
            dose=float(dose[column]) if feature >= 0 else 0.0,
            kl_local=kl,
            reward=float(reward[column]),
            flip=bool(abs(reward[column] - reward[0]) > FLIP),
        )
        for kind, pair, feature, column, kl in listed
    ]


def _token(rollouts: PolicyRollouts, one: _TriedToken, forks: list[Fork]) -> BranchToken:
    flips, tried = Counter(fork.kind for fork in forks if fork.flip), len(one.candidates)
    position = rollouts.position(one.item, one.step)
    p = fisher_greater(flips["candidate"], tried, flips["random"], tried)
    return BranchToken(
        item=forks[0].item,
        step=one.step,
        position=position,
        token=rollouts.text([rollouts.ids(one.item)[position]]),
        feature=one.own,
        reward=forks[0].reward,
        tried=tried,
        unmatched=one.unmatched,
        flips=flips["candidate"],
        random_flips=flips["random"],
        flips_without=flips["none"] > 0,
        p_value=p,
        q_value=p,
        branch_point=False,
        excess=(flips["candidate"] - flips["random"]) / tried,
    )


def _rescued(rollouts: PolicyRollouts, rows: list[BranchToken], forks: list[Fork]) -> Interval | None:
    ids = [item.id for item in rollouts.prompts.items]
    failing = np.flatnonzero(~right(rollouts.unsteered) & ~right(rollouts.outcomes))
    wrong = {ids[i] for i in failing} & {row.item for row in rows}
    own = {(fork.item, fork.step): fork.reward for fork in forks if fork.kind == "own"}
    open_to_it = [fork for fork in forks if fork.kind in ("candidate", "none")]
    helped = {fork.item for fork in open_to_it if fork.reward > own[fork.item, fork.step] + FLIP} & wrong
    return wilson_interval(len(helped), len(wrong)) if wrong else None


def _warnings(rows: list[BranchToken], m: int, level: float, not_repeated: int) -> tuple[str, ...]:
    found = []
    if not rows:
        return ("no token could be tried: nothing else was allowed, or no random feature reached its divergence",)
    least = 1 / math.comb(2 * m, m)
    if least * len(rows) > level:
        found.append(
            f"with {m} candidates p is at least {least:.2g}: one branch point among {len(rows)} tokens cannot be "
            "shown; try fewer tokens or more candidates"
        )
    if unmatched := sum(row.unmatched for row in rows):
        found.append(f"{unmatched} candidates were left out: no random feature reached their divergence")
    if not_repeated:
        found.append(f"{not_repeated} of {len(rows)} tokens: the rollout was not repeated token by token")
    return tuple(found)
