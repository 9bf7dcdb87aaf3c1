"""Headroom where answers are longer than a token: a planted case, and decoding with one direction at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from first_letter import FirstLetter
from planted_choice import LENGTH, PUSHING, Letters, choice_sae
from planted_choice import SITE as CHOICE_SITE
from policy_rollouts import SITE, setting

from trimtab.control.masks import MaskKind
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.dictionaries import Standard
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, PromptCache, TokenBatch, capture, decode
from trimtab.policies.headroom.candidates import NothingAllowedError, TriedFeatures, candidate_order, first_allowed
from trimtab.policies.headroom.lines import chosen_features, headroom
from trimtab.policies.headroom.table import headroom_table, random_directions
from trimtab.policies.headroom.trials import Trials
from trimtab.policies.rollout import roll_out
from trimtab.selection import rank
from trimtab.steering import StaticSource, VectorSource
from trimtab.tasks import Item, Outcome


def statistics(n: int) -> FeatureStats:
    """Features fire the stronger the higher their number; every fourth never fires."""
    most = np.linspace(0.5, 2, n).astype(np.float32)
    dead = np.arange(n) % 4 == 0
    rate = np.where(dead, 0, 0.1)
    return FeatureStats(max_activation=np.where(dead, 0, most), mean_activation=most, firing_rate=rate, n_tokens=100)


def letters(model: LanguageModel, items: int) -> TaskPrompts:
    task = Letters.load()
    return TaskPrompts.of(model, task, task.items("train")[:items], options_only=True, max_new_tokens=LENGTH)


def pushed(model: LanguageModel, sae: Standard, **values: object) -> Setting:
    return setting(model, sae, CHOICE_SITE, **{"dose": -3.0, **values})


def test_a_planted_feature_flips_the_answer_at_its_third_token(choice: LanguageModel) -> None:
    """Unsteered no answer is N there, pushed every one is; an edit of the prompt's last token alone changes nothing."""
    sae, prompts = choice_sae(choice), letters(choice, 12)
    candidates = TriedFeatures((40, 3, 20, 5), 64, "random")
    table = headroom_table(pushed(choice, sae, batch_size=7), prompts, candidates)
    assert not table.unsteered.any()
    for column, feature in enumerate(candidates.features):
        assert table.reward[:, column].tolist() == [float(feature in PUSHING)] * 12, feature
    assert chosen_features(table, 2) == [3, 5]
    lines = headroom(table, site=CHOICE_SITE, dose=-3.0, unit="relative", mask="none")
    assert lines.ceiling.estimate == lines.static.estimate == 1
    assert (lines.features, lines.of_features, lines.candidates) == (4, 64, "random")
    assert lines.scheme == "every answer token"
    assert lines.ceiling_is_lower_bound
    (warning,) = lines.warnings()
    assert warning == "nothing to learn: the best static feature reaches the ceiling of the 4 features tried"
    at_once = StaticSource(sae, 3, -3.0, CHOICE_SITE, positions="prompt")
    assert [o.reward for o in roll_out(choice, at_once, prompts).outcomes] == table.unsteered.tolist()


def test_without_the_planted_features_nothing_is_seen_and_no_more_is_claimed(choice: LanguageModel) -> None:
    ground = pushed(choice, choice_sae(choice))
    table = headroom_table(ground, letters(choice, 12), TriedFeatures((40, 20), 64, "random"))
    lines = headroom(table, site=CHOICE_SITE, dose=-3.0, unit="relative", mask="none")
    assert lines.ceiling.estimate == lines.unsteered.estimate < 1
    assert lines.warnings() == (
        "no headroom seen: none of the 2 features tried, of 64, makes any wrong item right at this dose",
    )


@pytest.mark.parametrize("unit", ["relative", "max_activation", "absolute"])
def test_every_row_is_what_decoding_with_its_direction_alone_gives(
    tiny_llama: LanguageModel, sae: Standard, unit: str
) -> None:
    """Rewards of texts, so that any token of the answer counts."""
    sae.feature_stats = statistics(64)
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:5], options_only=True, max_new_tokens=3)
    task.parse = _share_of_x  # type: ignore[method-assign]
    features, dose = (9, 41, 2, 30), 2.0 if unit == "relative" else 9.0
    ground = setting(tiny_llama, sae, dose=dose, unit=unit, seed=5, batch_size=8)
    table = headroom_table(ground, prompts, TriedFeatures(features, 64, "random"), randoms=3)
    length = float(sae.feature_stats.max_activation[list(features)].mean()) * dose
    noise = random_directions(sae, 5)
    sources = [StaticSource(sae, feature, dose, SITE, unit=unit) for feature in features]
    sources += [
        VectorSource(noise[k], SITE, length if unit == "max_activation" else dose,
                     unit="absolute" if unit == "max_activation" else unit)
        for k in range(3)
    ]  # fmt: skip
    alone = np.array([[o.reward for o in roll_out(tiny_llama, source, prompts).outcomes] for source in sources]).T
    assert np.allclose(np.hstack([table.reward, table.random]), alone)
    assert table.unsteered.tolist() == pytest.approx([o.reward for o in roll_out(tiny_llama, None, prompts).outcomes])
    assert len(np.unique(alone)) > 2


def _share_of_x(item: Item, text: str, permutation: int = 0) -> Outcome:
    reward = sum((3.0**-k for k, letter in enumerate(text) if letter == "x"), start=0.0)
    return Outcome(reward=reward, correct=None, answer=text)


@pytest.mark.parametrize(("mask", "dose"), [("none", -2.0), ("current", 2.0)])
def test_with_one_token_and_all_features_it_is_the_table_of_one_edit(
    tiny_llama: LanguageModel, sae: Standard, mask: MaskKind, dose: float
) -> None:
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:6], options_only=True)
    trials = Trials.of(setting(tiny_llama, sae, dose=dose, seed=3, mask=mask), prompts)
    every = TriedFeatures(tuple(range(64)), 64, "random")
    expected, found = (one.tables()[mask] for one in (trials, trials._replace(candidates={mask: every})))
    for name in ("reward", "random", "unsteered", "x", "strength"):
        one, other = getattr(found, name), getattr(expected, name)
        # Rows together and alone differ by float32 rounding of large x, also in codes that are close to 0.
        assert np.allclose(one, other, rtol=0, atol=2e-6 * max(1, np.abs(other).max())), name
    assert np.array_equal(found.allowed, expected.allowed)
    one, other = headroom(found, **trials.setting.about), headroom(expected, **trials.setting.about)
    for name in ("unsteered", "ceiling", "random_ceiling", "static", "most_active", "allowed_per_item"):
        assert getattr(one, name) == getattr(other, name), name
    assert not one.ceiling_is_lower_bound
    assert 0 < found.reward.mean() < 1


def test_the_same_seed_gives_the_same_table_and_another_other_directions(choice: LanguageModel) -> None:
    def run(seed: int) -> np.ndarray:
        ground = pushed(choice, choice_sae(choice), dose=2.0, seed=seed)
        table = headroom_table(ground, letters(choice, 8), TriedFeatures((1, 50), 64, "random"), randoms=12)
        return np.hstack([table.reward, table.random])

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0)[:, 2:], run(1)[:, 2:])
    assert np.array_equal(run(0)[:, :2], run(1)[:, :2])


def test_no_more_is_decoded_than_was_said_and_each_prompt_is_fed_once(
    choice: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.control import task_prompts

    decoded_tokens = 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal decoded_tokens
        result = decode(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        decoded_tokens += sum(map(len, result.token_ids))
        return result

    monkeypatch.setattr(task_prompts, "decode", counted)
    cache, done = PromptCache(choice), []
    ground = pushed(choice, choice_sae(choice), dose=2.0, batch_size=4, prompt_cache=cache)
    trials = Trials.of(ground, letters(choice, 5), rule="random")._replace(
        candidates={"none": TriedFeatures((1, 50, 51), 64, "random")}
    )
    trials.tables(done.append)
    assert trials.answers(1) == 35
    assert decoded_tokens == 35 * LENGTH  # no answer ends early: there are only letters
    assert sum(done) == pytest.approx(5)  # items
    assert len(done) == -(-35 // 4)
    assert cache.computed == len({prompt[:-1] for prompt in letters(choice, 5).ids}) > 1
    assert trials.describe(2) == (
        "up to 280 tokens will be decoded: 70 answers of up to 4 tokens (5 items without an edit, with 3 features and "
        "with 3 random directions, at 2 doses)"
    )


def test_activations_behind_a_cache_are_those_of_whole_prompts(tiny_llama: LanguageModel) -> None:
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:20])
    found = last_prompt_activations(tiny_llama, prompts, SITE, PromptCache(tiny_llama))
    for row, prompt in zip(found, prompts.ids, strict=True):
        whole = capture(tiny_llama, TokenBatch.full(torch.tensor([prompt])), [SITE])[tiny_llama.site(SITE)][0, -1]
        assert np.allclose(row, whole.numpy(), atol=1e-5)
    assert np.allclose(found, last_prompt_activations(tiny_llama, prompts, SITE), atol=1e-5)


def test_rules_order_the_features_that_fire_and_masks_take_the_first(tiny_llama: LanguageModel, sae: Standard) -> None:
    sae.feature_stats = statistics(64)
    ground, second = setting(tiny_llama, sae, seed=1), setting(tiny_llama, sae, seed=2)
    order = candidate_order(ground, "top-confidence")
    table = rank(tiny_llama, sae, "delta-confidence", site=SITE)
    score = dict(zip(table.feature.tolist(), np.asarray(table.score).tolist(), strict=True))
    assert [score[f] for f in order] == sorted(score.values(), reverse=True)
    drawn = candidate_order(ground, "random")
    live = [feature for feature in range(64) if feature % 4]
    assert sorted(order) == sorted(drawn) == live
    assert drawn not in (live, candidate_order(second, "random"))
    assert drawn == candidate_order(ground, "random")
    allowed = np.zeros((3, 64), dtype=bool)
    allowed[0, [6, 8]] = allowed[2, [6, 33]] = True  # 8 never fires
    found = first_allowed(order, 5, allowed, rule="top-confidence", mask="current", site=SITE)
    assert found == TriedFeatures(tuple(sorted([6, 33], key=order.index)), 64, "top-confidence")
    assert first_allowed(order, 5, ~allowed, rule="random", mask="none", site=SITE).features == tuple(order[:5])


def test_lines_of_a_mask_are_drawn_from_its_own_candidates(choice: LanguageModel) -> None:
    ground, rng = pushed(choice, choice_sae(choice)), np.random.default_rng(0)
    table = headroom_table(ground, letters(choice, 6), TriedFeatures((40, 3, 20), 64, "random"))
    allowed = rng.random((6, 64)) < 0.5
    own = table.under(TriedFeatures((20, 40), 64, "random"), allowed)
    assert np.array_equal(own.allowed, allowed[:, [20, 40]])
    assert np.array_equal(own.reward, table.reward[:, [2, 0]])
    assert np.array_equal(own.random, table.random[:, :2])
    assert np.array_equal(own.strength, table.strength[:, [2, 0]])


def test_bad_counts_masks_and_missing_statistics_are_said(tiny_llama: LanguageModel, sae: Standard) -> None:
    with pytest.raises(UserError, match="features 65: the SAE has 64; give at most 64"):
        first_allowed([1], 65, np.ones((2, 64), dtype=bool), rule="random", mask="none", site=SITE)
    with pytest.raises(NothingAllowedError) as caught:
        first_allowed([1, 2], 2, np.zeros((2, 64), dtype=bool), rule="random", mask="current", site=SITE)
    assert str(caught.value) == (
        "mask current: it allows no live feature at resid_post.1, at the last prompt token of any of 2 "
        "items; choose another mask, or an SAE trained at this site of this model"
    )
    with pytest.raises(UserError, match="the order by delta-confidence: the SAE comes without feature statistics"):
        candidate_order(setting(tiny_llama, sae), "top-confidence")


def test_a_task_may_reward_with_whole_numbers(tiny_llama: LanguageModel) -> None:
    task = FirstLetter.load()
    prompts = TaskPrompts.of(tiny_llama, task, task.items("train")[:2], options_only=True)
    task.parse = lambda item, text, permutation=0: Outcome(reward=1, correct=True)  # type: ignore[method-assign]
    assert roll_out(tiny_llama, None, prompts).reward.tolist() == [[1.0], [1.0]]
