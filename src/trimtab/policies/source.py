"""A policy as a source of interventions: observe, mask, choose, add and record, inside the decoding forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.control.masks import FeatureMask, MaskRecord
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, Edit, EditRequest, PositionRule, Site
from trimtab.lm.sampling import ACTION_STREAM, inverse_cdf
from trimtab.policies.networks import Policy
from trimtab.steering import Choice, DirectionSource, DirectionTable, check_doses


@dataclass
class Decisions:
    """Every decision of a rollout: N rows, at most T decisions each. `action` n means no intervention."""

    observation: Float[Tensor, "N T d"]
    """Activations before the edit, not normalised."""
    action: Int[Tensor, "N T"]
    logp: Float[Tensor, "N T"]
    """Log-probability of the action under the masked distribution."""
    value: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    """Of the masked distribution, in nats."""
    n_allowed: Int[Tensor, "N T"]
    """Allowed features, no intervention not counted."""
    valid: Bool[Tensor, "N T"]
    """Which decisions were made."""
    mask: MaskRecord

    def allowed(self, row: Int[Tensor, " R"], step: Int[Tensor, " R"]) -> Bool[Tensor, "R n_and_none"]:
        """The masks that decisions were made under, no intervention included."""
        return with_no_edit(self.mask(row, step))


class PolicySource(DirectionSource):
    """Steers with the feature that a policy picks at every token.

    Args:
        policy: actor, critic, normaliser; not changed here.
        directions: what actions index: the dictionary itself, or a table with the same number of rows (a shuffled
            decoder, as a control).
        mask: what is allowed.
        dose: of every edit, in `unit`.
        site: where to steer; the dictionary's own by default.
        unit, positions: as in `DirectionSource`.
        greedy: take the most likely action instead of drawing one.

    Attributes:
        decisions: what was decided since the last `start`.

    Raises:
        UserError: the dose is not finite, or the policy has another number of features than the directions.
    """

    label = "a policy's features"
    """What results say that it steers with."""

    def __init__(
        self,
        policy: Policy,
        directions: Dictionary | DirectionTable,
        mask: FeatureMask,
        dose: float,
        site: Site | str | None = None,
        *,
        unit: str = "relative",
        positions: PositionRule | str = "generated",
        greedy: bool = False,
    ) -> None:
        super().__init__(directions, site, unit=unit, positions=positions)
        check_doses(dose)
        if policy.actor.n_features != self.table.n or mask.n != self.table.n:
            raise UserError(
                f"a policy over {policy.actor.n_features} features",
                f"the directions are {self.table.n}, the mask is over {mask.n}",
                "use the dictionary that the policy was trained with",
            )
        self.policy, self.mask, self.dose, self.greedy = policy, mask, dose, greedy

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.mask.start(start)
        rows, steps, device = len(start.prompts), start.max_new_tokens, start.device
        self._first = torch.tensor([len(prompt) - 1 for prompt in start.prompts], device=device)
        self._observation = torch.zeros(rows, steps, self.table.width, device=device)
        self._real = {name: torch.zeros(rows, steps, device=device) for name in ("logp", "value", "entropy")}
        self._action = torch.full((rows, steps), self.table.n, dtype=torch.int32, device=device)
        self._n_allowed = torch.zeros(rows, steps, dtype=torch.int32, device=device)
        self._valid = torch.zeros(rows, steps, dtype=torch.bool, device=device)

    @property
    def asks_nothing(self) -> bool:
        """Whether decisions come from tensors alone; see `InterventionSource`."""
        return type(self) is PolicySource and getattr(self.mask, "asks_nothing", False)

    def take_back(self, ends: Mapping[int, int]) -> None:
        """Forget decisions of rows at positions behind their ends."""
        row = torch.tensor([*ends], device=self._valid.device)
        steps = torch.tensor([*ends.values()], device=self._valid.device) - self._first[row]
        self._valid[row] &= torch.arange(self._valid.shape[1], device=self._valid.device) < steps[:, None]

    @property
    def decisions(self) -> Decisions:
        return Decisions(
            observation=self._observation,
            action=self._action,
            **self._real,
            n_allowed=self._n_allowed,
            valid=self._valid,
            mask=self.mask.record(),
        )

    @torch.no_grad()
    def pick(self, request: EditRequest) -> Choice:
        row, n = request.row, self.table.n
        step = request.position - self._first[row]
        allowed = self.mask.allowed(request.x, row, step)
        seen = self.policy.normaliser(request.x)
        forbidden = ~with_no_edit(allowed)
        logits = self.policy.actor(seen).masked_fill_(forbidden, float("-inf"))
        logp, p = logits.log_softmax(dim=-1), logits.softmax(dim=-1)  # exp(logp) would be slow where it is −∞
        if self.greedy:
            action = logp.argmax(dim=-1)
        else:
            action = inverse_cdf(p, request.uniform(ACTION_STREAM))
        place = (row, step)
        self._observation[place] = request.x.float()
        self._action[place] = action.int()
        self._real["logp"][place] = logp.gather(1, action[:, None])[:, 0]
        self._real["value"][place] = self.policy.critic(seen)[:, 0]
        self._real["entropy"][place] = -torch.linalg.vecdot(p, logp.masked_fill_(forbidden, 0.0))
        self._n_allowed[place] = allowed.sum(-1).int()
        self._valid[place] = torch.ones_like(row, dtype=torch.bool)
        feature = torch.where(action == n, -1, action)[:, None]
        return Choice(feature, torch.full(feature.shape, self.dose, device=feature.device))

    def choose(self, request: EditRequest) -> Edit | None:
        edit = super().choose(request)
        place = (request.row, request.position - self._first[request.row])
        assert edit is not None
        return edit._replace(
            action_logp=self._real["logp"][place],
            n_allowed=self._n_allowed[place].long(),
            value=self._real["value"][place],
        )


def with_no_edit(allowed: Bool[Tensor, "R n"]) -> Bool[Tensor, "R n_and_none"]:
    """A mask with one more action, which is always allowed."""
    return torch.cat([allowed, allowed.new_ones(len(allowed), 1)], dim=1)


def masked_log_softmax(logits: Float[Tensor, "R A"], allowed: Bool[Tensor, "R A"]) -> Float[Tensor, "R A"]:
    """Log-probabilities over the allowed actions; −∞ for all others."""
    return logits.masked_fill(~allowed, float("-inf")).log_softmax(dim=-1)
