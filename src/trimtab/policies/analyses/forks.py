"""Forks of a policy's rollout: one decision replaced, what came before replayed, the policy free behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.control.dose_search import KlMatch, match_kls
from trimtab.lm import DecodeStart, EditRequest
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts
from trimtab.policies.source import PolicySource
from trimtab.selection.edited_distributions import EditedDistributions
from trimtab.selection.scorer import LastTokenScorer
from trimtab.steering import Choice, DirectionSource, ForkSource, ReplaySource, coefficients

NO_EDIT = -1
OWN_CHOICE = -2


class Substitutes(NamedTuple):
    """What replaces one decision, in C copies of each of P items."""

    feature: Int[Tensor, "P C"]
    """A feature, `NO_EDIT`, or `OWN_CHOICE` for what the policy chooses."""
    dose: Float[Tensor, "P C"]
    """In the policy's unit."""


class ChangedPolicy(DirectionSource):
    """A policy whose choices are changed before they are applied, as subclasses say."""

    def __init__(self, inner: PolicySource) -> None:
        super().__init__(inner.table, inner.sites[0], unit=inner.unit, positions=inner.positions)
        self.inner = inner

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.inner.start(start)


class SubstituteSource(ChangedPolicy):
    """A policy one of whose decisions is replaced in every row.

    Args:
        inner: the policy.
        step: number of the decision that is replaced; decisions before it are not made here.
        max_new_tokens: of the whole rollout.
        observed: what the policy saw at each row's decisions before `step`, shown again to its mask.
        substitutes: one per row.
    """

    def __init__(
        self,
        inner: PolicySource,
        step: int,
        max_new_tokens: int,
        observed: Float[Tensor, "N T d"],
        substitutes: Substitutes,
    ) -> None:
        super().__init__(inner)
        self.step, self.max_new_tokens, self.observed = step, max_new_tokens, observed
        self.feature, self.dose = substitutes.feature.flatten(), substitutes.dose.flatten()

    def start(self, start: DecodeStart) -> None:
        super().start(start._replace(max_new_tokens=self.max_new_tokens))
        self.feature, self.dose = self.feature.to(start.device), self.dose.to(start.device)
        self._at = torch.tensor([len(prompt) - 1 + self.step for prompt in start.prompts], device=start.device)
        rows = torch.arange(len(start.prompts), device=start.device)
        for step in range(self.step):
            self.inner.mask.allowed(self.observed[:, step].to(start.device), rows, torch.full_like(rows, step))

    def pick(self, request: EditRequest) -> Choice:
        choice = self.inner.pick(request)
        feature = self.feature[request.row]
        replaced = (request.position == self._at[request.row]) & (feature != OWN_CHOICE)
        return Choice(
            torch.where(replaced[:, None], feature[:, None], choice.feature),
            torch.where(replaced[:, None], self.dose[request.row][:, None].to(choice.dose), choice.dose),
        )


def fork_source(rollouts: PolicyRollouts, items: list[int], step: int, substitutes: Substitutes) -> ForkSource:
    """Copies of items' rollouts that leave the log at a decision.

    Args:
        rollouts: the rollouts.
        items: which, P of them; all reach the decision.
        step: number of the decision.
        substitutes: what replaces it; copies of an item side by side.
    """
    copies = substitutes.feature.shape[1]
    rows = torch.tensor(items).repeat_interleave(copies)
    own, setup, observed = rollouts.source, rollouts.setup, rollouts.decisions.observation
    past = DirectionSource(own.table, own.sites[0], unit=own.unit, positions=own.positions)
    seen = observed[rows.to(observed.device), :step].to(setup.model.dtype)
    policy = setup.source(rollouts.policy, greedy=rollouts.greedy)
    future = SubstituteSource(policy, step, rollouts.prompts.max_new_tokens, seen, substitutes)
    leaves = torch.tensor([rollouts.position(item, step) for item in rows.tolist()])
    return ForkSource(ReplaySource(rollouts.decoded.edits, past, rows=rows), future, leaves)


class Decision:
    """One decision of a rollout, at which edits can be weighed against each other.

    Args:
        rollouts: the rollouts.
        item: which.
        step: number of the decision.
    """

    def __init__(self, rollouts: PolicyRollouts, item: int, step: int) -> None:
        model, site, log = rollouts.setup.model, rollouts.setup.site, rollouts.decoded.edits
        ids = rollouts.ids(item)[: rollouts.position(item, step) + 1]
        mine = log.take((log.row == item) & (log.position < len(ids) - 1)).to(model.device)
        self.rollouts, self.table = rollouts, rollouts.source.table
        past = None
        if len(mine):
            past = mine.edit().change(self.table.rows, torch.zeros_like(mine.position), mine.position)
        self.scorer = LastTokenScorer(model, site, ids, past={site: lambda _x: past})

    def local_kl(self, feature: Int[Tensor, " R"], dose: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        """KL(with the edit ‖ without it) of the next token, in nats, all earlier edits in place."""
        x = self.scorer.continuation.x.expand(len(feature), -1)
        feature, dose = feature.to(x.device), dose.to(x.device)
        most = self.table.most_active(feature[:, None])
        length = coefficients(self.rollouts.source.unit, dose[:, None], x, most)[:, 0]
        found = self.scorer.score(self.table.rows[feature.clamp_min(0)], length, {"kl": EditedDistributions.kl})
        return found["kl"].cpu()

    def match(
        self, feature: Int[Tensor, " R"], target: Float[Tensor, " R"], dose: float, *, tolerance: float
    ) -> list[KlMatch]:
        """Search doses at which features have given local divergences.

        Args:
            feature: one per search.
            target: divergence to reach, in nats.
            dose: what scales multiply, in the policy's unit.
            tolerance: allowed relative difference (below 1e-6 nats every difference is allowed).
        """

        def kl(scales: list[float]) -> list[float]:
            return self.local_kl(feature, dose * torch.tensor(scales)).tolist()

        return match_kls(kl, target.tolist(), tolerance=tolerance, least=1e-6, tries=14)
