"""The eight steering semantics on three tiny layouts; `test_mutations.py` shows that each check can fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steering_checks import (
    LENGTHS,
    ScheduledSource,
    check_batch_independence,
    check_cached_equals_cache_free,
    check_default_positions,
    check_doses_logged,
    check_draws_are_keyed,
    check_empty_edit,
    check_fork,
    check_nothing_after_stop,
    check_reconstruction_error_kept,
    check_replay,
    edited_positions,
    prompts_of,
    random_directions,
)

from trimtab.dictionaries import Standard
from trimtab.lm import DecodeConfig, EditRequest, LanguageModel, decode
from trimtab.steering import (
    Choice,
    RandomFeatureSource,
    StaticSource,
    TopActiveSource,
)


def active_feature(model: LanguageModel, sae: Standard, prompt: list[int]) -> int:
    """A feature that fires at the prompt's last token."""
    from trimtab.lm import TokenBatch, capture

    x = capture(model, TokenBatch.full(torch.tensor([prompt])), [sae.info.site])
    return int(sae.encode(next(iter(x.values()))[0, -1]).argmax())


@pytest.mark.parametrize("positions", ["generated", "prompt", "all", "1:12"])
def test_cached_decoding_equals_a_cache_free_forward(any_tiny: LanguageModel, sae: Standard, positions: str) -> None:
    source = RandomFeatureSource(sae, 0.7, positions=positions)
    prompts = prompts_of((12, 17, 13, 24)) if positions == "1:12" else prompts_of(LENGTHS)
    check_cached_equals_cache_free(any_tiny, source, prompts)


def test_several_features_equal_a_cache_free_forward(any_tiny: LanguageModel, sae: Standard) -> None:
    features = torch.tensor([[3, 5, -1], [4, -1, -1], [1, 2, 3], [7, 8, 9], [5, 5, 6]])
    doses = torch.tensor([[0.4, -0.3, 9.0], [0.5, 1.0, 1.0], [0.1, 0.2, 0.3], [0.3, 0.3, 0.3], [0.2, 0.2, -0.4]])
    check_cached_equals_cache_free(any_tiny, StaticSource(sae, features, doses), prompts_of(LENGTHS))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    dose=st.floats(-1.5, 1.5).filter(lambda d: abs(d) > 0.2),
    seed=st.integers(0, 1000),
)
def test_any_lengths_and_doses_equal_a_cache_free_forward(
    any_tiny: LanguageModel, sae: Standard, lengths: list[int], dose: float, seed: int
) -> None:
    config = DecodeConfig(max_new_tokens=5, temperature=1.0, seed=seed, stop_at_eos=False, batch_size=3)
    source = RandomFeatureSource(sae, dose, per="row")
    check_cached_equals_cache_free(any_tiny, source, prompts_of(lengths, seed), config)


def test_pad_tokens_inside_a_prompt_are_read(any_tiny: LanguageModel, sae: Standard) -> None:
    prompts = prompts_of(LENGTHS, pad_id=any_tiny.pad_id)
    check_cached_equals_cache_free(any_tiny, StaticSource(sae, 3, 0.6), prompts)


def test_default_positions_choose_tokens(any_tiny: LanguageModel, sae: Standard) -> None:
    check_default_positions(any_tiny, StaticSource(sae, 3, 0.6), prompts_of(LENGTHS))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("prompt", range(9)), ("all", range(9 + 5 - 1)), ("2:11", range(2, 11)), ("generated", range(8, 13))],
)
def test_other_positions(any_tiny: LanguageModel, sae: Standard, positions: str, expected: range) -> None:
    source = StaticSource(sae, 3, 0.6, positions=positions)
    decoded = decode(any_tiny, prompts_of((9, 20)), DecodeConfig(max_new_tokens=5, stop_at_eos=False), source)
    assert edited_positions(decoded.edits, 0) == list(expected)


def test_nothing_is_edited_after_a_stop(any_tiny: LanguageModel, sae: Standard) -> None:
    check_nothing_after_stop(any_tiny, StaticSource(sae, 3, 0.6), prompts_of(LENGTHS[:4]))


@pytest.mark.parametrize(("operation", "dose"), [("ablate", 1.0), ("clamp", 3.0), ("clamp", -2.0)])
def test_reconstruction_error_is_kept(any_tiny: LanguageModel, sae: Standard, operation: str, dose: float) -> None:
    prompt = prompts_of((14,))[0]
    feature = active_feature(any_tiny, sae, prompt)
    source = StaticSource(sae, feature, dose, operation=operation, unit="absolute", positions="all")
    check_reconstruction_error_kept(any_tiny, sae, source, feature, prompt)


def test_empty_edits_change_no_bit(any_tiny: LanguageModel, sae: Standard) -> None:
    prompts = prompts_of(LENGTHS)
    check_empty_edit(any_tiny, StaticSource(sae, -1, 0.5, positions="all"), prompts)
    check_empty_edit(any_tiny, StaticSource(sae, 3, 0.0, positions="all"), prompts)
    check_empty_edit(any_tiny, ScheduledSource(sae, lambda request: None, positions="all"), prompts)


def test_rows_do_not_depend_on_their_batch(any_tiny: LanguageModel, sae: Standard) -> None:
    prompts = prompts_of(LENGTHS[:4])
    greedy = DecodeConfig(max_new_tokens=6, stop_at_eos=False)
    assert check_batch_independence(any_tiny, lambda: RandomFeatureSource(sae, 0.6, k=2), prompts) <= 1
    assert check_batch_independence(any_tiny, lambda: TopActiveSource(sae, 0.6, over="context"), prompts, greedy) <= 1


def test_draws_are_keyed(any_tiny: LanguageModel) -> None:
    check_draws_are_keyed(any_tiny, prompts_of(LENGTHS))


@pytest.mark.parametrize("dose", [0.4, -1.2])
def test_doses_are_logged(any_tiny: LanguageModel, sae: Standard, dose: float) -> None:
    check_doses_logged(any_tiny, StaticSource(sae, 3, dose), dose, prompts_of(LENGTHS))


def test_replay_gives_the_same_bits(any_tiny: LanguageModel, sae: Standard) -> None:
    prompts = prompts_of(LENGTHS)
    check_replay(any_tiny, RandomFeatureSource(sae, 0.5, k=3), prompts)
    check_replay(any_tiny, StaticSource(sae, [2, 3], [0.4, 0.2], positions="all"), prompts, repeats=2)
    check_replay(any_tiny, TopActiveSource(sae, 0.5), prompts, DecodeConfig(max_new_tokens=7))
    check_replay(any_tiny, StaticSource(sae, 4, operation="ablate"), prompts)


def test_rows_and_tokens_have_their_own_dose(any_tiny: LanguageModel, sae: Standard) -> None:
    def schedule(request: EditRequest) -> Choice:
        feature = ((request.row + request.position) % 5)[:, None]
        return Choice(feature, 0.1 * (1 + request.position.float())[:, None])

    decoded = check_cached_equals_cache_free(any_tiny, ScheduledSource(sae, schedule), prompts_of(LENGTHS))
    log = decoded.edits
    assert torch.equal(log.feature[:, 0], (log.row + log.position) % 5)
    torch.testing.assert_close(log.relative_dose, 0.1 * (1 + log.position.float()))


def test_forks_equal_each_branch_alone(any_tiny: LanguageModel, sae: Standard) -> None:
    check_fork(any_tiny, sae, prompts_of((5, 18, 11)))


def test_random_directions_equal_a_cache_free_forward(any_tiny: LanguageModel, sae: Standard) -> None:
    check_cached_equals_cache_free(any_tiny, random_directions("resid_post.1", 0.8), prompts_of(LENGTHS))
