"""Proximal policy optimisation over decisions: advantages, the clipped loss, one batch's update.

GAE, the clipped loss and the masked distribution are TorchRL's, on TensorDicts. They are imported when they are used,
since that takes seconds.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.policies.networks import Policy
from trimtab.policies.source import Decisions, masked_log_softmax
from trimtab.runs import check_least, check_values


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How a policy learns from a batch of rollouts."""

    lr: float = 1e-3
    """Of Adam, at the start; falls linearly to 0 over the training."""
    epochs: int = 4
    """Passes over a batch's decisions."""
    minibatch: int = 256
    """Decisions per gradient step."""
    clip: float = 0.2
    """How far the probability ratio may move in one batch before its gradient is cut off."""
    gamma: float = 1.0
    """Discount per token; 1 leaves a terminal reward as it is."""
    gae_lambda: float = 0.95
    """Weight of later tokens in the advantage."""
    entropy_bonus: float = 0.01
    """Weight of the entropy over the allowed actions."""
    critic_weight: float = 0.5
    """Weight of the critic's squared error."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient of all parameters."""
    normalise_advantages: bool = True
    """Bring each minibatch's advantages to mean 0 and variance 1."""

    def __post_init__(self) -> None:
        above_0 = ("lr", "epochs", "minibatch", "clip", "max_grad_norm")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, *above_0)
        check_values(self, "from 0 to 1", lambda value: 0 <= value <= 1, "gamma", "gae_lambda")
        check_least(self, 0, "entropy_bonus", "critic_weight")


class UpdateReport(NamedTuple):
    """One batch's update, means over gradient steps unless said otherwise; names follow CleanRL's `losses/`."""

    policy_loss: float
    value_loss: float
    entropy: float
    old_approx_kl: float
    """KL(policy at rollout ‖ policy now), estimated as −log ratio: unbiased, may be negative."""
    approx_kl: float
    """The same, estimated as (ratio − 1) − log ratio: unbiased, never negative (http://joschu.net/blog/kl-approx.html)."""
    clipfrac: float
    """Share of decisions whose ratio is more than `clip` from 1."""
    explained_variance: float
    """Of the returns by the critic's values at rollout: 1 − Var(return − value) / Var(return)."""
    max_abs_log_ratio: float
    """Before the first gradient step: how far the update's log-probabilities are from the rollout's."""
    grad_norm: float


REPORTED = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
"""Fields of `UpdateReport` that are means over gradient steps."""


class Returns(NamedTuple):
    """What decisions were worth."""

    advantage: Float[Tensor, "N T"]
    target: Float[Tensor, "N T"]


def returns(
    reward: Float[Tensor, "N T"],
    value: Float[Tensor, "N T"],
    valid: Bool[Tensor, "N T"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Returns:
    """Generalised advantages (Schulman et al. 2016) of rows that end at their last valid decision.

    Args:
        reward: of each decision; those that were not made are ignored.
        value: the critic's, at rollout.
        valid: which decisions were made; a row's come first.
        gamma: discount per decision.
        gae_lambda: λ.
    """
    from tensordict import TensorDict
    from torchrl.objectives.value import GAE

    last = valid & ~torch.nn.functional.pad(valid[:, 1:], (0, 1))
    done = (last | ~valid)[..., None]
    value = torch.where(valid, value, 0.0)[..., None]
    batch = TensorDict(
        {
            "state_value": value,
            "next": {
                "state_value": torch.nn.functional.pad(value[:, 1:], (0, 0, 0, 1)),
                "reward": torch.where(valid, reward, 0.0)[..., None],
                "done": done,
                "terminated": done.clone(),
            },
        },
        batch_size=valid.shape,
    )
    found = GAE(gamma=gamma, lmbda=gae_lambda, value_network=None)(batch)
    return Returns(
        torch.where(valid, found["advantage"][..., 0], 0.0), torch.where(valid, found["value_target"][..., 0], 0.0)
    )


class Learner:
    """Updates a policy from batches of decisions.

    Args:
        policy: changed in place.
        config: how.
    """

    def __init__(self, policy: Policy, config: PPOConfig) -> None:
        self.policy, self.config = policy, config
        self.parameters = [*policy.actor.parameters(), *policy.critic.parameters()]
        self.waits_for_nothing = self.parameters[0].is_cuda
        """Whether no step waits for the device."""
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.lr, eps=1e-5, fused=self.waits_for_nothing)
        self._loss = _clipped_loss(policy, config)

    def update(
        self, decisions: Decisions, reward: Float[Tensor, "N T"], *, generator: torch.Generator, share_left: float = 1.0
    ) -> UpdateReport:
        """Learn from one batch of rollouts. The normaliser is left as it is.

        Args:
            decisions: what was decided.
            reward: of each decision.
            generator: of the order of minibatches.
            share_left: of the training, which the learning rate is proportional to.

        Raises:
            UserError: a reward is not finite.
        """
        from tensordict import TensorDict

        c, valid = self.config, decisions.valid
        if not bool(torch.isfinite(reward[valid]).all()):
            bad = int((~torch.isfinite(reward) & valid).any(1).nonzero()[0])
            raise UserError(f"the reward of row {bad}", "it is not finite", "check the task's reward")
        found = returns(reward, decisions.value, valid, gamma=c.gamma, gae_lambda=c.gae_lambda)
        row, step = valid.nonzero(as_tuple=True)
        seen = self.policy.normaliser(decisions.observation[row, step])
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * share_left
        ratio = self.max_abs_log_ratio(decisions)
        orders = torch.stack([torch.randperm(len(row), generator=generator) for _ in range(c.epochs)]).to(row.device)
        reports: list[Float[Tensor, " names"]] = []  # which are looked at last, so that no step waits for a GPU
        for order in orders:
            for part in order.split(c.minibatch):
                r, s = row[part], step[part]
                batch = {
                    "observation": seen[part],
                    "mask": decisions.allowed(r, s),
                    "action": decisions.action[r, s].long(),
                    "action_log_prob": decisions.logp[r, s],
                    "advantage": found.advantage[r, s][:, None],
                    "value_target": found.target[r, s][:, None],
                    "state_value": decisions.value[r, s][:, None],
                }
                losses = self._loss(TensorDict(batch, batch_size=[len(part)]))
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                self.optimiser.zero_grad(set_to_none=True)
                total.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm)
                self._step(norm)
                reported = (
                    losses["loss_objective"],
                    losses["loss_critic"] / (c.critic_weight or 1),
                    losses["entropy"],
                    losses["kl_approx"],
                    losses["mean_ratio"].double() - 1 + losses["kl_approx"],
                    losses["clip_fraction"],
                    norm,
                )
                reports.append(torch.stack([value.detach().mean().double() for value in reported]))
        each = torch.stack(reports).cpu()
        if not bool(each[:, REPORTED.index("grad_norm")].isfinite().all()):
            raise _endless_gradient()
        means = dict(zip(REPORTED, each.mean(0).tolist(), strict=True))
        explained = explained_variance(found.target[valid], decisions.value[valid])
        return UpdateReport(**means, explained_variance=explained, max_abs_log_ratio=ratio)

    def _step(self, norm: Float[Tensor, ""]) -> None:
        """Change no weights where the gradient's norm is not finite; a GPU is asked about it when a batch is done."""
        if self.waits_for_nothing:
            self.optimiser.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        elif not bool(norm.isfinite()):
            raise _endless_gradient()
        self.optimiser.step()

    @torch.no_grad()
    def max_abs_log_ratio(self, decisions: Decisions) -> float:
        """The largest difference between log-probabilities now and at rollout."""
        row, step = decisions.valid.nonzero(as_tuple=True)
        largest = [decisions.logp.new_zeros(())]
        for r, s in zip(row.split(self.config.minibatch), step.split(self.config.minibatch), strict=True):
            logits = self.policy.actor(self.policy.normaliser(decisions.observation[r, s]))
            logp = masked_log_softmax(logits, decisions.allowed(r, s))
            chosen = logp.gather(1, decisions.action[r, s].long()[:, None])[:, 0]
            largest.append((chosen - decisions.logp[r, s]).abs().max())
        return float(torch.stack(largest).max())


def _endless_gradient() -> UserError:
    return UserError("the gradient", "it is not finite", "lower --ppo.lr")


def explained_variance(target: Float[Tensor, " m"], value: Float[Tensor, " m"]) -> float:
    """1 − Var(target − value) / Var(target); NaN where the targets do not vary."""
    variance = target.double().var(correction=0)
    if len(target) == 0 or float(variance) == 0:
        return float("nan")
    return float(1 - (target - value).double().var(correction=0) / variance)


def _clipped_loss(policy: Policy, config: PPOConfig) -> Any:
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    from trimtab.policies.allowed_categorical import AllowedCategorical

    class Loss(ClipPPOLoss):
        """Without a look at whether the entropy is finite, for which each gradient step would wait for a GPU."""

        def _get_entropy(self, dist: Any, adv_shape: Any) -> Tensor:
            return dist.entropy()[..., None]

    actor = ProbabilisticTensorDictSequential(  # pyright: ignore[reportCallIssue]
        TensorDictModule(policy.actor, in_keys=["observation"], out_keys=["logits"]),  # pyright: ignore[reportArgumentType]
        ProbabilisticTensorDictModule(  # pyright: ignore[reportArgumentType]
            in_keys=["logits", "mask"],
            out_keys=["action"],
            distribution_class=AllowedCategorical,
            return_log_prob=True,
        ),
    )
    critic = TensorDictModule(policy.critic, in_keys=["observation"], out_keys=["state_value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Loss(
            actor,
            critic,
            clip_epsilon=config.clip,
            entropy_bonus=True,
            entropy_coeff=config.entropy_bonus,
            critic_coeff=config.critic_weight,
            loss_critic_type="l2",
            normalize_advantage=config.normalise_advantages,
            functional=False,
        )
