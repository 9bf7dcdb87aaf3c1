"""Advantages in closed form, the loss and its gradients from their definitions in float64, the first ratio."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from policy_rollouts import RollOut
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.control.masks import MASKS, FixedMask, MaskKind
from trimtab.errors import UserError
from trimtab.policies import ppo
from trimtab.policies.networks import ObservationNormaliser, Policy
from trimtab.policies.ppo import Learner, PPOConfig, UpdateReport, explained_variance, returns
from trimtab.policies.source import Decisions


def test_advantages_have_their_closed_form_on_rows_of_different_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 3, 5, generator=generator)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    gamma, lam = 0.9, 0.7
    found = returns(reward, value, valid, gamma=gamma, gae_lambda=lam)
    for row in range(3):
        length = int(valid[row].sum())
        for t in range(length):
            expected = 0.0
            for i in range(t, length):
                following = float(value[row, i + 1]) if i + 1 < length else 0.0
                delta = float(reward[row, i]) + gamma * following - float(value[row, i])
                expected += (gamma * lam) ** (i - t) * delta
            assert float(found.advantage[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(found.target[row, t]) == pytest.approx(expected + float(value[row, t]), abs=1e-5)
    assert (found.advantage[~valid] == 0).all()


def test_a_terminal_reward_reaches_every_token_undiminished_at_gamma_and_lambda_one() -> None:
    reward = torch.tensor([[0.0, 0.0, 1.0]])
    found = returns(reward, torch.full((1, 3), 0.25), torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
    assert found.target[0].tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("mask", MASKS)
def test_the_probability_ratio_is_one_before_the_first_update(
    mask: MaskKind, policy: Policy, roll_out: RollOut
) -> None:
    decisions = roll_out(mask).source.decisions
    learner = Learner(policy, PPOConfig(minibatch=7))
    assert learner.max_abs_log_ratio(decisions) <= 1e-5
    reward = torch.randn(decisions.valid.shape, generator=torch.Generator().manual_seed(1))
    report = learner.update(decisions, reward, generator=torch.Generator().manual_seed(2))
    assert report.max_abs_log_ratio <= 1e-5
    assert learner.max_abs_log_ratio(decisions) > 1e-3
    assert all(math.isfinite(value) for value in report)


def test_the_first_gradient_equals_the_definition_in_float64(policy: Policy, roll_out: RollOut) -> None:
    decisions = roll_out("accumulated").source.decisions
    config = PPOConfig(epochs=1, minibatch=10_000, entropy_bonus=0.03, critic_weight=0.7, normalise_advantages=False)
    reward = torch.randn(decisions.valid.shape, generator=torch.Generator().manual_seed(1))
    learner = Learner(policy, config)
    exact = copy.deepcopy(policy).double()
    row, step = decisions.valid.nonzero(as_tuple=True)
    with torch.no_grad():  # an old policy that differs, so that some ratios are clipped
        decisions.logp[row, step] += 0.4 * torch.randn(len(row), generator=torch.Generator().manual_seed(5))
    x = policy.normaliser(decisions.observation[row, step]).double()
    found = returns(reward, decisions.value, decisions.valid, gamma=1.0, gae_lambda=0.95)
    logits = exact.actor(x).masked_fill(~decisions.allowed(row, step), -1e30)
    p = logits.softmax(-1)
    logp = p.gather(1, decisions.action[row, step].long()[:, None])[:, 0].log()
    ratio = (logp - decisions.logp[row, step].double()).exp()
    advantage = found.advantage[row, step].double()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    objective = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    entropy = -(p * (p + 1e-300).log()).sum(-1).mean()
    critic = (exact.critic(x)[:, 0] - found.target[row, step].double()).square().mean()
    (objective - 0.03 * entropy + 0.7 * critic).backward()
    assert 0 < float((ratio != clipped).double().mean()) < 1

    captured: list[list[torch.Tensor]] = []
    learner.optimiser.step = lambda *_a, **_k: captured.append([p.grad.clone() for p in learner.parameters])  # pyright: ignore
    config_free = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda parameters, _limit: torch.ones(())  # pyright: ignore
    try:
        learner.update(decisions, reward, generator=torch.Generator().manual_seed(2))
    finally:
        torch.nn.utils.clip_grad_norm_ = config_free
    expected = [p.grad for p in (*exact.actor.parameters(), *exact.critic.parameters())]
    for ours, reference in zip(captured[0], expected, strict=True):
        assert reference is not None
        assert float((ours - reference).abs().max()) <= 1e-5 * float(reference.abs().max()) + 1e-7


def report_of_two_actions(q: float, p: float, actions: list[int], clip: float = 0.2) -> UpdateReport:
    """Of one step from a policy that takes action 0 with probability p, on actions drawn when that was q."""
    policy = Policy.build(torch.tensor([[1.0, 0.0]]), hidden=())
    with torch.no_grad():
        policy.actor.head.weight.zero_()
        policy.actor.head.bias.copy_(torch.tensor([p, 1 - p]).log())
    action = torch.tensor(actions, dtype=torch.int32)[:, None]
    zero = torch.zeros(len(actions), 1)
    decisions = Decisions(
        observation=torch.zeros(len(actions), 1, 2), action=action, logp=torch.tensor([q, 1 - q]).log()[action.long()],
        value=zero, entropy=zero, n_allowed=zero.int(), valid=zero == 0, mask=FixedMask(torch.tensor([True])).record(),
    )  # fmt: skip
    learner = Learner(policy, PPOConfig(epochs=1, minibatch=len(actions), clip=clip))
    return learner.update(decisions, zero + 1, generator=torch.Generator())


def check_estimates_of_kl() -> None:
    """On actions in the old policy's own shares both estimates are the KL itself; on others they differ."""
    q, p = 0.75, 0.6
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    report = report_of_two_actions(q, p, [0, 0, 0, 1])
    assert (report.old_approx_kl, report.approx_kl) == pytest.approx((kl, kl), rel=1e-4)
    ratio = (1 - p) / (1 - q)
    report = report_of_two_actions(q, p, [1, 1])
    assert report.old_approx_kl == pytest.approx(-math.log(ratio), rel=1e-5)
    assert report.approx_kl == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)


def test_both_estimates_of_the_kl_have_their_closed_form() -> None:
    check_estimates_of_kl()


def test_mutation_the_estimates_of_the_kl_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(**fields: float) -> UpdateReport:
        return UpdateReport(**fields | {"approx_kl": fields["old_approx_kl"], "old_approx_kl": fields["approx_kl"]})

    monkeypatch.setattr(ppo, "UpdateReport", swapped)
    with pytest.raises(AssertionError):
        check_estimates_of_kl()


@pytest.mark.parametrize(("clip", "share"), [(0.1, 1.0), (0.3, 0.25), (0.7, 0.0)])
def test_the_clip_fraction_counts_ratios_further_than_clip_from_one(clip: float, share: float) -> None:
    assert report_of_two_actions(0.75, 0.6, [0, 0, 0, 1], clip).clipfrac == share  # ratios 0.8 and 1.6


def test_a_reward_that_is_not_finite_names_its_row(policy: Policy, roll_out: RollOut) -> None:
    decisions = roll_out("none").source.decisions
    reward = torch.zeros(decisions.valid.shape)
    reward[4, 2] = float("nan")
    with pytest.raises(UserError, match="the reward of row 4: it is not finite"):
        Learner(policy, PPOConfig()).update(decisions, reward, generator=torch.Generator())


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_that_is_not_finite_is_refused(late: bool, policy: Policy, roll_out: RollOut) -> None:
    """And changes no weights, be it noticed at once or when a batch is done."""
    decisions = roll_out("none").source.decisions
    reward, learner = torch.ones(decisions.valid.shape), Learner(policy, PPOConfig(epochs=2))
    if late:
        learner.waits_for_nothing = True
        learner.optimiser = torch.optim.Adam(learner.parameters, fused=True)
    before = copy.deepcopy(policy.state_dict())
    hook = learner.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match=r"the gradient: it is not finite; lower --ppo\.lr"):
        learner.update(decisions, reward, generator=torch.Generator())
    hook.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        self.count += boolean or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
        return func(*args, **(kwargs or {}))


def waits_of(policy: Policy, decisions: Decisions, config: PPOConfig) -> int:
    reward, learner = torch.ones(decisions.valid.shape), Learner(copy.deepcopy(policy), config)
    learner.waits_for_nothing = True
    learner.optimiser.step = lambda: None  # type: ignore[method-assign]  # torch's own counts its steps on the host
    with _Waits() as waits:
        learner.update(decisions, reward, generator=torch.Generator().manual_seed(0))
    return waits.count


@pytest.mark.parametrize("mask", MASKS)
def test_gradient_steps_wait_for_no_device(
    mask: MaskKind, policy: Policy, roll_out: RollOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = roll_out(mask).source.decisions
    few, many = (waits_of(policy, decisions, PPOConfig(epochs=n, minibatch=5)) for n in (1, 3))
    assert 0 < few == many
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: real(*a, error_if_nonfinite=True))  # a mutation
    few, many = (waits_of(policy, decisions, PPOConfig(epochs=n, minibatch=5)) for n in (1, 3))
    assert few < many


def test_the_normaliser_agrees_with_the_whole_sample_and_is_frozen_by_an_update(
    policy: Policy, roll_out: RollOut
) -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6) + 3
    normaliser = ObservationNormaliser(5)
    for part in x.split(17):
        normaliser.show(part)
    expected = (x - x.mean(0)) / x.std(0, correction=0)
    assert torch.allclose(normaliser(x), expected, atol=1e-5)
    decisions = roll_out("none").source.decisions
    before = policy.normaliser.mean.clone()
    Learner(policy, PPOConfig()).update(decisions, torch.ones(decisions.valid.shape), generator=torch.Generator())
    assert torch.equal(policy.normaliser.mean, before)


def test_explained_variance_of_perfect_constant_and_opposite_values() -> None:
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert explained_variance(target, target) == pytest.approx(1.0)
    assert explained_variance(target, torch.full((4,), 0.3)) == pytest.approx(0.0)
    assert explained_variance(target, 1 - target) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(torch.ones(4), target))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip": 0.0}, "clip 0.0"), ({"gamma": 1.5}, "gamma 1.5"), ({"entropy_bonus": -1.0}, "entropy_bonus -1.0")],
)
def test_impossible_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PPOConfig(**settings)  # pyright: ignore[reportArgumentType]
