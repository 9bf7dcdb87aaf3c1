"""Arms on a planted readout, where what each of them must find and earn is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_readout import SITE, HalfHurt, OnlyRewards, Planted, planted_sae, readout_items
from transformers import DynamicCache

from trimtab.control.adapter import Adapter
from trimtab.control.answers import EditSchedule, ItemSet, MatchedSource
from trimtab.control.arms.corrsteer import corrsteer
from trimtab.control.arms.gated_static import fit_gate, gated_like_reference, gated_source
from trimtab.control.arms.letters import always, letter_bias, without_prior
from trimtab.control.arms.lora import learn_adapter
from trimtab.control.arms.prompting import best_instruction, instructed
from trimtab.control.arms.random_allowed import AllowedRandomSource
from trimtab.control.arms.static import best_static, rewards_with, sample_of_live, static_source
from trimtab.control.arms.vector import learn_vector
from trimtab.control.learning import CROSS_ENTROPY, REINFORCE
from trimtab.control.masks import PromptFirings
from trimtab.dictionaries import FeatureStats, Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.errors import UserError
from trimtab.lm import EditRequest, LanguageModel, PromptCache, TokenBatch, capture
from trimtab.lm.answer_logits import answer_logits
from trimtab.steering import (
    Choice,
    DirectionSource,
    RandomFeatureSource,
    StaticSource,
    TopActiveSource,
    assert_equal_dose,
    token_effects,
)
from trimtab.tasks import Item, Outcome, Task


class WhereNegative(DirectionSource):
    """Feature 0 where coordinate 0 is negative, and no edit elsewhere."""

    def pick(self, request: EditRequest) -> Choice:
        feature = torch.where(request.x[:, :1] < 0, 0, -1)
        return Choice(feature, torch.full(feature.shape, 0.7))


def coordinate(items: ItemSet) -> np.ndarray:
    """x_0 of every item's last prompt token, from a pass of its own."""
    model = items.setting.model
    batch = TokenBatch.pad([list(p) for p in items.prompts.ids], model.pad_id)
    return capture(model, batch, [SITE])[model.site(SITE)][:, -1, 0].numpy()


def gold(items: ItemSet) -> np.ndarray:
    return np.array([item.answer == "Y" for item in items.prompts.items])


def test_the_planted_static_feature_is_found_and_solves_everything(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    validation, test = (readout_items(planted, planted_dictionary, Planted, s) for s in ("validation", "test"))
    assert test.answer().reward.tolist() == (coordinate(test) > 0).astype(float).tolist()
    choice = best_static(validation, {"all": range(32)}, factors=(0.5, 1.0), first_items=20, finalists=4)
    assert (choice.feature, choice.dose, choice.reward, choice.features_tried) == (0, 2.0, 1.0, 32)
    assert choice.origins == {"all": 32}
    assert test.answer(static_source(test, choice)).reward.mean() == 1
    others = test.answer(StaticSource(planted_dictionary, 7, 2.0, SITE))
    assert np.array_equal(others.reward, test.answer().reward)


def test_finalists_are_compared_on_all_items(planted: LanguageModel, planted_dictionary: Standard) -> None:
    """N is right in the first ten items, Y in the thirty behind them."""
    every = readout_items(planted, planted_dictionary, HalfHurt, "train")
    yes, no = (np.flatnonzero(gold(every) == right) for right in (True, False))
    validation = every.take([*no[:10].tolist(), *yes[:30].tolist()])
    of_items = rewards_with(validation, [0, 1, 0], [2.0] * 3)
    assert np.array_equal(of_items, [gold(validation), ~gold(validation), gold(validation)])
    assert best_static(validation, {"all": [1, 0, 7]}, factors=(1.0,), first_items=10, finalists=3).feature == 0
    assert best_static(validation, {"all": [1, 0, 7]}, factors=(1.0,), first_items=10, finalists=1).feature == 1


def test_candidates_are_features_that_fire(planted: LanguageModel, planted_dictionary: Standard) -> None:
    sae = copy.copy(planted_dictionary)
    rate = np.where(np.arange(32) % 5 == 0, 0.1, 0.0)
    sae.feature_stats = FeatureStats(
        max_activation=np.ones(32, np.float32), mean_activation=np.ones(32, np.float32), firing_rate=rate, n_tokens=9
    )
    setting = readout_items(planted, sae, Planted, "test").setting
    assert sorted(sample_of_live(setting, 96, 0)) == list(range(0, 32, 5))
    few = sample_of_live(setting, 3, 0)
    assert len(set(few)) == 3
    assert few != sample_of_live(setting, 3, 1)


def test_allowed_features_are_drawn_evenly_where_the_reference_edits(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    """Under `current` only features that fire at the token may be drawn, each as likely."""
    test = readout_items(planted, planted_dictionary, Planted, "test", mask="current")
    schedule = EditSchedule.of(test.answer(test.setting.static_source(0, 2.0)))
    schedule.relative[::3] = 0  # as if the reference had left these items alone
    items = replace(test, schedule=schedule)
    batch = TokenBatch.pad([list(p) for p in items.prompts.ids], planted.pad_id)
    x = capture(planted, batch, [SITE])[planted.site(SITE)][:, -1]
    fires = (planted_dictionary.encode(x) > 0).numpy()
    edited = (schedule.relative[:, 0] != 0).numpy()
    assert 0 < edited.sum() < len(edited)
    assert 1 < fires.sum(1).min() < fires.sum(1).max() < 32
    drawn = np.zeros(fires.shape)
    for seed in range(200):
        source = MatchedSource(AllowedRandomSource(items.setting, seed), schedule)
        log = items.answer(source).edits
        kept = log.feature[:, 0] >= 0
        drawn[log.row[kept].numpy(), log.feature[kept, 0].numpy()] += 1
    assert np.array_equal(drawn.sum(1), 200 * edited)
    assert not drawn[~fires].any()
    expected = (200 / fires.sum(1, keepdims=True))[edited]
    off = (drawn[edited] - expected)[fires[edited]] / np.sqrt(expected[:, 0]).repeat(fires[edited].sum(1))
    assert np.abs(off).max() < 5


def test_matched_arms_have_the_references_dose_and_its_decisions(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    """A reference that edits where x_0 < 0 only; an arm at equal dose edits nowhere else."""
    test = readout_items(planted, planted_dictionary, Planted, "test")
    x = torch.from_numpy(test.activations())
    answers = test.answer(WhereNegative(planted_dictionary, SITE, unit="relative"))
    schedule = EditSchedule.of(answers)
    assert torch.equal(schedule.relative[:, 0] != 0, x[:, 0] < 0)
    assert 0 < schedule.edits == schedule.rows < len(test)
    assert schedule.mean == pytest.approx(0.7, abs=1e-5)
    inner = (
        RandomFeatureSource(planted_dictionary, 1.0, SITE, candidates=range(32)),
        StaticSource(planted_dictionary, 5, 9.0, SITE),
        TopActiveSource(planted_dictionary, 1.0, SITE),
    )
    logs = {"reference": answers.edits}
    for i, source in enumerate(inner):
        logs[str(i)] = test.answer(MatchedSource(source, schedule)).edits
    assert_equal_dose(logs)
    for log in logs.values():
        rows = log.row[log.feature[:, 0] >= 0]
        assert torch.equal(rows.sort().values, (x[:, 0] < 0).nonzero()[:, 0])
    assert (logs["1"].feature[logs["1"].feature >= 0] == 5).all()
    doubled = test.answer(MatchedSource(inner[1], schedule, 2.0)).edits
    assert float(doubled.relative_dose.max()) == pytest.approx(1.4, abs=1e-5)
    plain = planted_dictionary.encode(x) * planted_dictionary.decoder_norms
    used = logs["2"].feature[:, 0] >= 0
    assert torch.equal(logs["2"].feature[used, 0], plain.argmax(1)[logs["2"].row[used]])


def test_a_gate_helps_where_the_feature_hurts_half_of_the_items(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    train, validation, test = (
        readout_items(planted, planted_dictionary, HalfHurt, s) for s in ("train", "validation", "test")
    )
    choice = best_static(validation, {"planted": [0]}, factors=(1.0,))
    right = gold(test)
    unsteered = (coordinate(test) > 0) == right
    static = test.answer(static_source(test, choice)).reward
    assert np.array_equal(static, right.astype(float))
    fit = fit_gate(train, validation, choice)
    said, asked = coordinate(train) > 0, gold(train)
    assert (fit.helped, fit.hurt) == (int((asked & ~said).sum()), int((~asked & ~said).sum()))
    opened = fit.gate.score(test.activations()) > 0
    gated = test.answer(gated_source(test, choice, fit.gate)).reward
    assert np.array_equal(gated, np.where(opened, right, unsteered).astype(float))
    assert gated.mean() > max(static.mean(), unsteered.mean()) + 0.05
    assert gated.mean() <= np.maximum(right, unsteered).mean()
    everywhere = EditSchedule.of(test.answer(test.setting.static_source(0, 2.0)))
    few = EditSchedule(torch.where(torch.arange(len(test))[:, None] < 20, everywhere.relative, 0))
    scheduled = replace(test, schedule=few)
    log = scheduled.answer(gated_like_reference(scheduled, choice, fit.gate)).edits
    rows = log.row[log.feature[:, 0] >= 0]
    assert set(rows.tolist()) == set(np.argsort(-fit.gate.score(test.activations()), kind="stable")[:20].tolist())


def test_a_gate_without_harm_is_always_open(planted: LanguageModel, planted_dictionary: Standard) -> None:
    train, validation = (readout_items(planted, planted_dictionary, Planted, s) for s in ("train", "validation"))
    fit = fit_gate(train, validation, best_static(validation, {"planted": [0]}, factors=(1.0,)))
    assert fit.hurt == 0 < fit.helped
    assert (fit.penalty, fit.reward) == (None, 1.0)


def test_corrsteer_picks_the_feature_that_numpy_finds_most_correlated(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    train = readout_items(planted, planted_dictionary, Planted, "train")
    choice = corrsteer(train)
    right = train.answer().reward
    codes = planted_dictionary.encode(torch.from_numpy(train.activations())).numpy().astype(np.float64)
    correlation = [np.corrcoef(codes[:, i], right)[0, 1] if codes[:, i].std() > 0 else -1 for i in range(32)]
    assert choice.feature == int(np.argmax(correlation)) == 0
    assert choice.correlation == pytest.approx(max(correlation), abs=1e-6)
    assert choice.coefficient == pytest.approx(codes[right == 1, 0].mean(), rel=1e-5)
    assert (choice.items, choice.right) == (90, int(right.sum()))


def test_corrsteer_reads_the_largest_activation_of_a_longer_answer(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    train = readout_items(planted, planted_dictionary, Planted, "train", tokens=4).take(range(30))
    choice = corrsteer(train)
    answers = train.answer()
    assert answers.decoded is not None
    pooled = []
    for prompt, tokens in zip(answers.decoded.prompts, answers.decoded.token_ids, strict=True):
        ids = TokenBatch.full(torch.tensor([prompt + tokens[:-1]]))
        x = capture(planted, ids, [SITE])[planted.site(SITE)][0, len(prompt) - 1 :]
        assert len(x) == len(tokens)
        pooled.append(planted_dictionary.encode(x).max(0).values.numpy())
    codes, right = np.array(pooled, dtype=np.float64), answers.reward
    correlation = [np.corrcoef(codes[:, i], right)[0, 1] if codes[:, i].std() > 0 else -1 for i in range(32)]
    assert choice.feature == int(np.argmax(correlation))
    assert choice.coefficient == pytest.approx(codes[right == 1, choice.feature].mean(), rel=1e-4)


def test_corrsteer_needs_answers_of_both_kinds(planted: LanguageModel, planted_dictionary: Standard) -> None:
    train = readout_items(planted, planted_dictionary, Planted, "train")
    with pytest.raises(UserError, match="all 5 training answers are worth the same"):
        corrsteer(train.take(np.flatnonzero(train.answer().reward == 1)[:5].tolist()))


class Rated(Planted):
    """Rewards below 0, and no right and wrong."""

    name = "rated"

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return Outcome(reward=1.0 if text[:1] == "Y" else -1.0, correct=None)


def test_corrsteers_coefficient_counts_rewards_above_0(planted: LanguageModel, planted_dictionary: Standard) -> None:
    train = readout_items(planted, planted_dictionary, Rated, "train")
    reward = train.answer().reward
    codes = planted_dictionary.encode(torch.from_numpy(train.activations())).numpy()
    assert corrsteer(train).coefficient == pytest.approx(codes[reward == 1, 0].mean(), rel=1e-5)
    train.prompts.task.parse = lambda item, text, permutation=0: Outcome(reward=-float(text[:1] == "N"), correct=None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no training answer has a reward above 0"):
        corrsteer(train)


def test_all_heads_of_a_layer_are_one_activation(planted: LanguageModel) -> None:
    """A dictionary of all heads of a layer reads them side by side, as it steers them."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, 32, generator=generator)
    info = DictionaryInfo(architecture="standard", model=planted.name, site="attn_z.1")
    sae = Standard(
        rows.T.contiguous(), torch.zeros(40), rows / rows.norm(dim=1, keepdim=True), torch.zeros(32), info=info
    )
    site = planted.site("attn_z.1")
    firings = PromptFirings(planted, site, sae)
    train, validation = (
        readout_items(planted, sae, HalfHurt, s, mask="accumulated", firings=firings) for s in ("train", "validation")
    )
    ids = list(train.prompts.ids[0])
    x = capture(planted, TokenBatch.full(torch.tensor([ids])), [site])[site][0].flatten(1)
    assert train.activations()[0] == pytest.approx(x[-1].numpy(), abs=1e-5)
    assert torch.equal(firings([ids])[0], (sae.encode(x[1:-1]) > 0).any(0))
    assert firings([[7, 9, 8]]).any()
    special = planted.tokenizer.eos_token_id
    assert not firings([[7, special, 8]]).any(), "a special token counts"
    assert corrsteer(train).items == 90
    choice = best_static(validation, {"some": [3, 4]}, factors=(1.0,))
    assert fit_gate(train, validation, choice).items == 90
    drawn = train.answer(AllowedRandomSource(train.setting, 0)).edits
    assert len(drawn) == 90


@pytest.mark.parametrize(("task", "objective"), [(Planted, CROSS_ENTROPY), (OnlyRewards, REINFORCE)])
def test_the_learned_vector_turns_to_the_planted_direction(
    planted: LanguageModel, planted_dictionary: Standard, task: type[Task], objective: str
) -> None:
    train, validation, test = (
        readout_items(planted, planted_dictionary, task, s) for s in ("train", "validation", "test")
    )
    # Where Y is right one direction serves all; at this dose it must have a cosine of at least 0.7 to do so.
    train, validation, test = (s.take(np.flatnonzero(gold(s)).tolist()) for s in (train, validation, test))
    share = -coordinate(validation) / np.linalg.norm(validation.activations(), axis=1)
    dose = float(share.max()) / 0.7
    vector, learned = learn_vector(train, validation, dose, steps=60, seed=2)
    assert learned.objective == objective
    assert learned.reward == 1
    assert float((vector.vector[0] / vector.vector.norm()).detach()) >= 0.7
    answers = test.answer(vector.source(test))
    assert answers.reward.mean() > 0.95 > test.answer().reward.mean() + 0.2
    assert float(answers.edits.relative_dose.mean()) == pytest.approx(dose, abs=1e-4)


def test_the_vectors_gradient_is_that_of_a_pass_over_whole_prompts(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    """An edit in the middle of the model, prompts of different length, answers of three tokens."""
    from trimtab.control.arms.vector import LearnedVector

    lower = planted_sae(planted, "resid_post.1")
    items = readout_items(planted, lower, Planted, "train").take(range(4))
    vector = LearnedVector(32, 0.8, seed=4)
    prompts, answers = [[7, 20, 33, 9], [8, 21, 40, 52, 61], [11, 12]], [[30, 31, 32], [40], [50, 51]]

    def logp(cached: bool) -> torch.Tensor:
        if cached:
            logits = answer_logits(planted, prompts, answers, items.cache, vector.applied(items))
            return sum(  # pyright: ignore[reportReturnType]
                logits[i, t].log_softmax(-1)[token] for i, a in enumerate(answers) for t, token in enumerate(a)
            )
        total = torch.zeros(())
        site = planted.site("resid_post.1")
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt + answer[:-1]

            def hook(_module: object, _inputs: object, output: object, first: int = len(prompt) - 1) -> object:
                hidden = output[0] if isinstance(output, tuple) else output
                assert isinstance(hidden, torch.Tensor)
                length = hidden[:, first:].norm(dim=-1, keepdim=True)
                delta = 0.8 * length * vector.vector / vector.vector.norm()
                hidden = torch.cat([hidden[:, :first], hidden[:, first:] + delta], dim=1)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = planted.layout.layers[site.layer].module.register_forward_hook(hook)
            logits = planted.forward(TokenBatch.full(torch.tensor([ids])))[0].log_softmax(-1)
            handle.remove()
            total = total + sum(logits[len(prompt) - 1 + t, token] for t, token in enumerate(answer))
        return total

    gradients, values = [], []
    for cached in (True, False):
        vector.zero_grad()
        value = logp(cached)
        value.backward()
        assert vector.vector.grad is not None
        gradients.append(vector.vector.grad.clone())
        values.append(float(value.detach()))
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert float(gradients[0].norm()) > 0.1
    assert torch.allclose(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_lora_learns_the_task_and_leaves_the_model_and_its_prompts_alone(
    planted: LanguageModel, planted_dictionary: Standard, positions: str
) -> None:
    train, validation = (readout_items(planted, planted_dictionary, HalfHurt, s) for s in ("train", "validation"))
    before, fingerprint = validation.answer(), planted.fingerprint
    adapter, learned = learn_adapter(
        train,
        validation,
        rank=4,
        positions=positions,
        steps=120,
        batch=32,
        lr=1e-2,  # pyright: ignore
    )
    assert learned.objective == CROSS_ENTROPY
    assert learned.reward > before.reward.mean() + 0.15
    after = validation.answer()
    assert planted.fingerprint == fingerprint
    assert after.decoded is not None
    assert before.decoded is not None
    assert after.decoded.decided_logp == before.decoded.decided_logp
    answers = validation.answer(adapter=adapter, kl=True)
    assert answers.reward.mean() == learned.reward
    assert answers.kl is not None
    assert float(answers.kl.mean()) > 0.01
    adapter.scale = 0.0
    nothing = validation.answer(adapter=adapter, kl=True)
    assert nothing.kl is not None
    assert float(nothing.kl.max()) < 1e-6
    assert np.array_equal(nothing.reward, before.reward)


def test_a_lora_adds_its_product_to_the_projection(any_tiny: LanguageModel) -> None:
    """Against the same product merged into the weights."""
    adapter = Adapter(any_tiny, rank=3, positions="all", seed=1)
    with torch.no_grad():
        for up in adapter.up:
            up.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    batch = TokenBatch.pad([[7, 20, 33, 9], [8, 21, 40, 52, 61, 13]], any_tiny.pad_id)
    with torch.no_grad(), adapter.active():
        found = any_tiny.forward(batch, last=1)
    merged = LanguageModel.from_hf(copy.deepcopy(any_tiny.hf), any_tiny.tokenizer)
    modules = []
    for layer in merged.layout.layers:
        assert layer.attention is not None
        a = layer.attention
        modules += [m for m in ([a.fused] if a.fused is not None else [a.q, a.v]) if m is not None]
    for module, down, up in zip(modules, adapter.down, adapter.up, strict=True):
        change = 16 / 3 * up.detach() @ down.detach()
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        weight.data += change if isinstance(module, torch.nn.Linear) else change.T
    with torch.no_grad():
        expected, plain = merged.forward(batch, last=1), any_tiny.forward(batch, last=1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((found - plain).abs().max()) > 0.1


def test_divergence_is_that_of_a_pass_without_a_cache(planted: LanguageModel) -> None:
    lower = planted_sae(planted, "resid_post.1")
    items = readout_items(planted, lower, Planted, "train", tokens=5).take(range(9))
    source = StaticSource(lower, 4, 1.0)
    items = replace(items, cache=PromptCache(planted, max_bytes=0))  # prompts are computed anew every time
    answers = items.answer(source, kl=True)
    assert answers.decoded is not None
    assert answers.kl is not None
    expected = [sum(row) for row in token_effects(planted, answers.decoded, source).kl_total]
    assert answers.kl.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    unsteered = items.answer(kl=True).kl
    assert unsteered is not None
    assert unsteered.tolist() == [0] * 9
    adapter = Adapter(planted, seed=1)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.05, generator=torch.Generator().manual_seed(2))
    for positions in ("generated", "all"):
        adapter.positions = positions
        adapted = items.answer(adapter=adapter, kl=True)
        assert adapted.decoded is not None
        assert adapted.kl is not None
        expected = [
            divergence_of_whole_passes(planted, adapter, prompt, answer)
            for prompt, answer in zip(adapted.decoded.prompts, adapted.decoded.token_ids, strict=True)
        ]
        assert max(expected) > 0.01
        assert adapted.kl.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@torch.no_grad()
def divergence_of_whole_passes(model: LanguageModel, adapter: Adapter, prompt: list[int], answer: list[int]) -> float:
    """Of one answer, without any cache but the one that an adapter leaves as it is."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    plain = model.hf(ids).logits[0].double().log_softmax(-1)
    held: dict[str, object] = {"use_cache": False}
    if adapter.positions == "generated":
        held = {model.cache_argument: DynamicCache(), "use_cache": True}
        model.hf(ids[:, : len(prompt) - 1], **held)
        ids = ids[:, len(prompt) - 1 :]
    with adapter.active():
        changed = model.hf(ids, **held).logits[0].double().log_softmax(-1)
    p, q = changed[-len(answer) :], plain[-len(answer) :]
    return float((p.exp() * (p - q)).sum())


def test_prompting_puts_the_best_instruction_before_the_question(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    validation = readout_items(planted, planted_dictionary, Planted, "validation")
    texts = ("q", "zz", "and the")
    choice = best_instruction(validation, texts)
    rewards = {t: float(validation.answer(prompts=instructed(validation, t)).reward.mean()) for t in texts}
    assert choice.reward == max(rewards.values()) == rewards[choice.instruction]
    assert choice.tried == 3
    first = instructed(validation, "zz")
    assert planted.decode_ids(first.ids[0]) == f"zz\n\n{validation.prompts.items[0].prompt}"
    assert first.items == validation.prompts.items


def test_letter_baselines_name_the_best_place_and_remove_the_prior(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    validation, test = (readout_items(planted, planted_dictionary, HalfHurt, s) for s in ("validation", "test"))
    bias = letter_bias(validation)
    share = gold(validation).mean()
    assert (bias.place, bias.reward) == (int(share < 0.5), pytest.approx(max(share, 1 - share)))
    assert [o.answer for o in always(test, 1)] == ["N"] * len(test)
    decoded, known = test.answer().decoded, validation.answer().decoded
    assert decoded is not None
    assert known is not None
    margin = np.array([a - b for ((a, b),) in known.allowed_logp]).mean()
    expected = ["Y" if a - b > margin else "N" for ((a, b),) in decoded.allowed_logp]
    assert [o.answer for o in without_prior(test, bias).outcomes] == expected
    assert len(set(expected)) == 2
