"""Decisions inside the forward pass against a slow environment, and what they leave behind."""

from __future__ import annotations

import itertools

import pytest
import torch
from policy_rollouts import PROMPTS, SITE, RollOut

from trimtab.control.masks import MASKS, MaskKind, build_mask
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import DecodeStream, LanguageModel, Row, TokenBatch
from trimtab.lm.sampling import ACTION_STREAM, inverse_cdf, uniform
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource, masked_log_softmax, with_no_edit


def slow_episode(
    model: LanguageModel, sae: Standard, policy: Policy, prompt: list[int], mask: str, key: tuple[int, int], tokens: int
) -> tuple[list[int], list[int], list[float]]:
    """One token at a time without a cache: every pass computes everything anew and applies all earlier edits."""
    site, ids = model.site(SITE), list(prompt)
    deltas: dict[int, torch.Tensor] = {}
    fired = torch.zeros(sae.n_features, dtype=torch.bool)
    actions, logps = [], []
    layer = model.layout.layers[site.layer].module

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []

        def hook(_module: object, _inputs: object, output: object) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            assert isinstance(hidden, torch.Tensor)
            hidden = hidden.clone()
            for position, delta in deltas.items():
                hidden[0, position] += delta
            seen.append(hidden[0])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = layer.register_forward_hook(hook)
        try:
            logits = model.forward(TokenBatch.full(torch.tensor([ids])))[0, -1]
        finally:
            handle.remove()
        return seen[0], logits

    special = set(model.tokenizer.all_special_ids)
    rows, _ = forward()
    for position in range(1, len(ids) - 1):
        if ids[position] not in special:
            fired |= sae.encode(rows[position]) > 0
    for _ in range(tokens):
        rows, _ = forward()
        x = rows[-1]
        now = sae.encode(x) > 0
        fired |= now
        allowed = {"none": torch.ones_like(now), "current": now, "accumulated": fired}.get(mask)
        if allowed is None:
            allowed = torch.zeros_like(now)
            allowed[[3, 5, 8, 40]] = True
        logp = masked_log_softmax(policy.actor(policy.normaliser(x[None])), with_no_edit(allowed[None]))
        sample, branch = key
        u = uniform(4, torch.tensor([sample]), torch.tensor([branch]), torch.tensor([len(ids) - 1]), ACTION_STREAM)
        action = int(inverse_cdf(logp.exp(), u))
        actions.append(action)
        logps.append(float(logp[0, action]))
        if action < sae.n_features:
            deltas[len(ids) - 1] = 0.5 * x.norm() * sae.directions[action]
        _, logits = forward()
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], actions, logps


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
def test_the_forward_pass_gives_the_trajectory_of_a_slow_environment(
    mask: MaskKind, tiny_llama: LanguageModel, sae: Standard, policy: Policy, roll_out: RollOut
) -> None:
    rollout = roll_out(mask, tokens=4)
    decisions = rollout.source.decisions
    different = set()
    for row in range(len(rollout.decoded)):
        prompt, branch = divmod(row, 3)
        tokens, actions, logps = slow_episode(tiny_llama, sae, policy, PROMPTS[prompt], mask, (prompt, branch), 4)
        assert rollout.decoded.token_ids[row] == tokens
        assert decisions.action[row].tolist() == actions
        assert decisions.logp[row].tolist() == pytest.approx(logps, abs=1e-4)
        different.add(tuple(actions))
    assert len(different) > 3


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_rebuilt_bit_for_bit(mask: MaskKind, roll_out: RollOut, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, int], torch.Tensor] = {}
    import trimtab.policies.source as module

    original = module.with_no_edit

    def spy(allowed: torch.Tensor) -> torch.Tensor:
        pending.append(allowed.clone())
        return original(allowed)

    pending: list[torch.Tensor] = []
    monkeypatch.setattr(module, "with_no_edit", spy)
    pick = PolicySource.pick

    def watch(self: PolicySource, request: object) -> object:
        choice = pick(self, request)  # pyright: ignore[reportArgumentType]
        steps = request.position - self._first[request.row]  # pyright: ignore[reportAttributeAccessIssue]
        for row, step, allowed in zip(request.row.tolist(), steps.tolist(), pending.pop(), strict=True):  # pyright: ignore[reportAttributeAccessIssue]
            seen[row, step] = allowed
        return choice

    monkeypatch.setattr(PolicySource, "pick", watch)
    decisions = roll_out(mask).source.decisions
    row, step = decisions.valid.nonzero(as_tuple=True)
    assert len(row) == len(seen) == 9 * 6
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    rebuilt = original(decisions.mask(row[order], step[order]))
    expected = torch.stack([original(seen[int(row[i]), int(step[i])][None])[0] for i in order])
    assert torch.equal(rebuilt, expected)
    assert torch.equal(
        decisions.n_allowed[row, step].long(),
        torch.stack([seen[int(r), int(s)].sum() for r, s in zip(row, step, strict=True)]),
    )
    if mask in ("current", "accumulated"):
        assert 0 < rebuilt[:, :-1].float().mean() < 0.9


def test_the_accumulated_mask_only_grows_and_begins_with_the_prompt(roll_out: RollOut) -> None:
    decisions = roll_out("accumulated").source.decisions
    rows = torch.arange(len(decisions.valid))
    masks = [decisions.mask(rows, torch.full_like(rows, step)) for step in range(6)]
    for before, after in itertools.pairwise(masks):
        assert bool((after | ~before).all())
    current = roll_out("current").source.decisions
    first_current = current.mask(rows, torch.zeros_like(rows))
    assert bool((masks[0] | ~first_current).all())
    assert masks[0].sum() > first_current.sum()


def test_no_intervention_is_always_possible_and_edits_nothing(sae: Standard, policy: Policy, roll_out: RollOut) -> None:
    with torch.no_grad():
        policy.actor.head.bias[-1] = 1e4
    rollout = roll_out("accumulated")
    assert (rollout.source.decisions.action == sae.n_features).all()
    assert (rollout.decoded.edits.feature == -1).all()
    assert (rollout.decoded.edits.delta_norm == 0).all()


def test_the_log_holds_what_was_decided(roll_out: RollOut) -> None:
    rollout = roll_out("accumulated")
    decisions, log = rollout.source.decisions, rollout.decoded.edits
    first = torch.tensor([len(p) - 1 for p in rollout.decoded.prompts])
    place = (log.row, log.position - first[log.row])
    assert len(log) == int(decisions.valid.sum())
    assert torch.equal(log.action_logp, decisions.logp[place])
    assert torch.equal(log.value, decisions.value[place])
    assert torch.equal(log.n_allowed, decisions.n_allowed[place].long())
    assert torch.equal(torch.where(log.feature[:, 0] < 0, 64, log.feature[:, 0]), decisions.action[place].long())
    used = log.feature[:, 0] >= 0
    assert torch.allclose(log.relative_dose[used], torch.tensor(0.5), atol=1e-5)


def test_greedy_takes_the_most_likely_allowed_action(roll_out: RollOut, policy: Policy) -> None:
    decisions = roll_out("accumulated", greedy=True, repeats=1).source.decisions
    row, step = decisions.valid.nonzero(as_tuple=True)
    logits = policy.actor(policy.normaliser(decisions.observation[row, step]))
    best = masked_log_softmax(logits, decisions.allowed(row, step)).argmax(-1)
    assert torch.equal(best, decisions.action[row, step].long())


def test_impossible_masks_and_policies_are_refused(sae: Standard, policy: Policy) -> None:
    with pytest.raises(UserError, match="mask: it allows no feature"):
        build_mask("top-confidence", sae, features=[])
    with pytest.raises(UserError, match="feature 64: the dictionary has features 0 to 63"):
        build_mask("top-confidence", sae, features=[64])
    with pytest.raises(UserError, match="allowed are none, current, accumulated, top-confidence, found"):
        build_mask("everything", sae)  # pyright: ignore[reportArgumentType]
    other = Policy.build(sae.directions[:10], hidden=(4,))
    with pytest.raises(UserError, match="a policy over 10 features: the directions are 64"):
        PolicySource(other, sae, build_mask("none", sae), 0.5)


def test_rows_that_join_are_refused(tiny_llama: LanguageModel, sae: Standard, policy: Policy) -> None:
    """Buffers of decisions are laid out at the start."""
    stream = DecodeStream(tiny_llama, PolicySource(policy, sae, build_mask("current", sae), 0.5))
    stream.add(Row(PROMPTS[0]))
    next(iter(stream))
    with pytest.raises(UserError, match="a row that joins a stream steered by PolicySource: this source learns of all"):
        stream.add(Row(PROMPTS[1]))
