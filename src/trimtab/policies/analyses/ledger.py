"""The feature ledger: how often, where and with what effect a policy used each feature.

Effects are measured twice: by the divergence of the next token with and without the edit, and by the reward of the
whole answer with the feature and without it. For the latter, items that used the feature are decoded again with the
same draws; wherever the policy would choose the feature nothing is added, and the policy goes on from there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.dictionaries.meanings import describe_features
from trimtab.lm import EditRequest
from trimtab.policies.analyses.forks import ChangedPolicy
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts, rewards
from trimtab.policies.source import PolicySource
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.steering import Choice, TokenEffects, token_effects

WINDOW = 16
"""Tokens shown before an edited one."""


@dataclass(frozen=True, kw_only=True)
class FeatureUse:
    """One use of a feature. Texts are hidden where a task holds harmful prompts."""

    item: str
    step: int
    position: int
    before: str
    """The tokens before the edited one."""
    token: str
    """The edited token."""
    after: str
    """The token chosen next."""
    kl_local: float


@dataclass(frozen=True)
class TokenCount:
    """How often a feature was used at a token."""

    token: str
    count: int


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One feature."""

    feature: int
    uses: int
    share: float
    """Of all decisions."""
    items: int
    """Items in which it was used."""
    first_step: int
    median_step: float
    last_step: int
    tokens: tuple[TokenCount, ...]
    """Edited tokens, the most frequent first."""
    kl_local: Interval
    """Mean over uses, in nats; bootstrapped over items."""
    reward_difference: Interval | None
    """Reward with the feature minus without it, over the items that used it; None where that was not measured."""
    contexts: tuple[FeatureUse, ...]
    """Uses with the largest local divergence."""
    words: str = ""
    """What the feature means, fires on and promotes, as far as it is known."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All features used, the most used first."""

    entries: tuple[LedgerEntry, ...]
    decisions: int
    no_edit: int
    """Decisions to leave the activation alone."""
    items: int


class WithoutFeature(ChangedPolicy):
    """A policy that does nothing wherever it would choose one feature."""

    def __init__(self, inner: PolicySource, feature: int) -> None:
        super().__init__(inner)
        self.feature = feature

    def pick(self, request: EditRequest) -> Choice:
        choice = self.inner.pick(request)
        return choice._replace(feature=torch.where(choice.feature == self.feature, -1, choice.feature))


def feature_ledger(rollouts: PolicyRollouts, *, ablated: int = 16, contexts: int = 5, seed: int = 0) -> Ledger:
    """Account for every edit of a policy's rollouts.

    Args:
        rollouts: the rollouts.
        ablated: measure the reward without it for this many of the most used features.
        contexts: uses to show of each feature.
        seed: of the bootstrap.
    """
    n = rollouts.source.table.n
    effects = token_effects(rollouts.setup.model, rollouts.decoded, rollouts.source, top_k=1)
    action = rollouts.decisions.action.cpu()
    valid = rollouts.decisions.valid.cpu()
    uses = Counter(action[valid].tolist())
    no_edit = uses.pop(n, 0)
    words = describe_features(rollouts.setup.model, rollouts.setup.dictionary, sorted(uses), 3)
    in_words = {one.feature: str(one) for one in words}
    entries = []
    for rank, (feature, count) in enumerate(sorted(uses.items(), key=lambda use: (-use[1], use[0]))):
        where = ((action == feature) & valid).nonzero().tolist()
        items = sorted({item for item, _ in where})
        kl = np.array([effects.kl_local[item][step] for item, step in where])
        of_item = np.searchsorted(items, [item for item, _ in where])
        difference = None
        if rank < ablated:
            without = WithoutFeature(rollouts.setup.source(rollouts.policy, greedy=rollouts.greedy), feature)
            _, outcomes = rollouts.decode_again(without, items)
            with_it = rewards(rollouts.outcomes)[items]
            difference = bootstrap_mean(with_it - rewards(outcomes), seed=seed)
        steps = [step for _, step in where]
        edited = Counter(rollouts.ids(item)[rollouts.position(item, step)] for item, step in where)
        tokens = [] if rollouts.hides_text else edited.most_common(5)
        shown = [where[i] for i in np.argsort(-kl, kind="stable")[:contexts]]
        entries.append(
            LedgerEntry(
                feature=feature,
                uses=count,
                share=count / int(valid.sum()),
                items=len(items),
                first_step=min(steps),
                median_step=float(np.median(steps)),
                last_step=max(steps),
                tokens=tuple(TokenCount(rollouts.text([token]), count) for token, count in tokens),
                kl_local=bootstrap_ratio_of_sums(np.bincount(of_item, kl), np.bincount(of_item), seed=seed),
                reward_difference=difference,
                contexts=tuple(_context(rollouts, effects, item, step) for item, step in shown),
                words=in_words[feature],
            )
        )
    return Ledger(entries=tuple(entries), decisions=int(valid.sum()), no_edit=no_edit, items=len(rollouts))


def _context(rollouts: PolicyRollouts, effects: TokenEffects, item: int, step: int) -> FeatureUse:
    ids, place = rollouts.ids(item), rollouts.position(item, step)
    before = ids[max(0, place - WINDOW) : place]
    return FeatureUse(
        item=rollouts.prompts.items[item].id,
        step=step,
        position=place,
        before=rollouts.text(before) if before else "",
        token=rollouts.text([ids[place]]),
        after=rollouts.text([ids[place + 1]]),
        kl_local=effects.kl_local[item][step],
    )
