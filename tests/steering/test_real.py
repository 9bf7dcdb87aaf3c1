"""The steering contract on the real default model, where rounding, attention sinks and a true tokenizer come in."""

from __future__ import annotations

import pytest
import torch
from steering_checks import (
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
    compare_with_oracle,
    recorded_logits,
)
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, capture, decode
from trimtab.steering import PatchSource, RandomFeatureSource, StaticSource, TopActiveSource, steer

pytestmark = pytest.mark.real
TOLERANCE = 5e-3
"""For logits of size 20 after 30 layers in float32."""
TEXTS = (
    "The ship",
    "From my experience, the best thing about the sea is that",
    "In 1842, the harbour of Valparaíso was",
)


@pytest.fixture(scope="module")
def real_sae(real_model: LanguageModel) -> Standard:
    """Random directions: the contract does not care what features mean."""
    return make_dictionary(real_model, "resid_post.15", n=128)


@pytest.fixture(scope="module")
def prompts(real_model: LanguageModel) -> list[list[int]]:
    return [real_model.encode_text(text) for text in TEXTS]


def test_cached_decoding_equals_a_cache_free_forward(
    real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]
) -> None:
    check_cached_equals_cache_free(real_model, RandomFeatureSource(real_sae, 0.4), prompts, tolerance=TOLERANCE)


def test_a_turn_that_holds_the_pad_token_is_read(real_model: LanguageModel, real_sae: Standard) -> None:
    """SmolLM's pad token ends turns, so a mask made from it would hide the system turn's end."""
    chats = [real_model.encode_text(text, chat=True) for text in ("Hello!", "Name three rivers in Europe, please.")]
    assert all(real_model.pad_id in chat for chat in chats)
    config = DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    check_cached_equals_cache_free(real_model, StaticSource(real_sae, 3, 0.4), chats, config, TOLERANCE)


def test_positions_and_stops(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    check_default_positions(real_model, StaticSource(real_sae, 3, 0.4), prompts)
    check_nothing_after_stop(real_model, StaticSource(real_sae, 3, 0.4), prompts)


def test_reconstruction_error_is_kept(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    source = StaticSource(real_sae, 3, 30.0, operation="clamp", unit="absolute")
    check_reconstruction_error_kept(real_model, real_sae, source, 3, prompts[1], tolerance=1e-3)


def test_empty_edits_change_no_bit(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    check_empty_edit(real_model, StaticSource(real_sae, -1, 0.5, positions="all"), prompts)


def test_rows_do_not_depend_on_their_batch(
    real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]
) -> None:
    ties = check_batch_independence(real_model, lambda: TopActiveSource(real_sae, 0.3), prompts, tolerance=TOLERANCE)
    assert ties <= 1
    check_draws_are_keyed(real_model, prompts)


def test_doses_are_logged(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    check_doses_logged(real_model, StaticSource(real_sae, 3, 0.4), 0.4, prompts)


def test_replay_gives_the_same_bits(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    check_replay(real_model, RandomFeatureSource(real_sae, 0.4, k=2), prompts)


def test_heads_of_another_run_are_patched_in(real_model: LanguageModel, prompts: list[list[int]]) -> None:
    other = real_model.encode_text("On the other side of the river stood an old mill, and nobody had lived there since")
    values = capture(real_model, TokenBatch.full(torch.tensor([other])), ["attn_z.9.6", "attn_z.12", "resid_post.3"])
    source = PatchSource(values, positions="prompt", keep_replacements=True)
    check_cached_equals_cache_free(real_model, source, prompts, tolerance=TOLERANCE)
    check_replay(real_model, source, prompts)


def test_forks_equal_each_branch_alone(real_model: LanguageModel, real_sae: Standard, prompts: list[list[int]]) -> None:
    check_fork(real_model, real_sae, prompts[:2], tolerance=TOLERANCE)


def test_unsteered_decoding_is_the_model_s_own(real_model: LanguageModel, prompts: list[list[int]]) -> None:
    with recorded_logits() as logits:
        decoded = decode(real_model, prompts, DecodeConfig(max_new_tokens=6, stop_at_eos=False))
    compare_with_oracle(real_model, decoded, logits, None, TOLERANCE)


def test_stronger_doses_move_the_model_further(real_model: LanguageModel, real_sae: Standard) -> None:
    result = steer(
        real_model, real_sae, TEXTS[1], 3, sweep=(0.1, 0.4, 1.0), decoding=DecodeConfig(max_new_tokens=8)
    )  # fmt: skip
    kl = [arm.kl_local for arm in result.arms]
    assert kl == sorted(kl)  # type: ignore[type-var]
    assert [arm.realised.relative for arm in result.steered] == pytest.approx([0.1, 0.4, 1.0], abs=1e-3)
