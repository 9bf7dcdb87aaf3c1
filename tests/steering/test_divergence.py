"""Divergences from what decoding kept, against the passes of `token_effects`, and what is not computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from steering_checks import prompts_of
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.lm import DecodeConfig, Decoded, InterventionSource, LanguageModel, PromptCache, decode, upper_layers
from trimtab.steering import (
    CombinedSource,
    DivergenceRecorder,
    RandomFeatureSource,
    StaticSource,
    VectorSource,
    divergence,
    token_effects,
)

LENGTHS = (3, 17, 11, 24, 2)
SAMPLED = DecodeConfig(max_new_tokens=7, temperature=1.0, stop=("e", "1", "k"), stop_at_eos=True, batch_size=6)
"""Rows of different length in several batches."""


def record(
    model: LanguageModel,
    source: InterventionSource,
    config: DecodeConfig = SAMPLED,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    repeats: int = 1,
    cache: PromptCache | None = None,
    kept_bytes: int = divergence.KEPT_BYTES,
    ahead: int = 1,
) -> tuple[Decoded, torch.Tensor]:
    recorder = DivergenceRecorder(model, source, kept_bytes=kept_bytes)
    decoded = decode(
        model, prompts_of(lengths), config, source, repeats=repeats, prompt_cache=cache, observe=recorder, ahead=ahead
    )
    return decoded, recorder.measure(decoded, cache)


def assert_total(model: LanguageModel, source: InterventionSource, decoded: Decoded, kl: torch.Tensor) -> None:
    expected = torch.zeros_like(kl)
    for row, values in enumerate(token_effects(model, decoded, source).kl_total):
        expected[row, : len(values)] = torch.tensor(values)
    assert expected.max() > 0.05, "nothing diverges, so nothing is checked"
    torch.testing.assert_close(kl, expected, atol=1e-4, rtol=1e-4)
    ends = torch.tensor([len(tokens) for tokens in decoded.token_ids])
    assert (kl[torch.arange(kl.shape[1]) >= ends[:, None]] == 0).all()


@pytest.mark.parametrize(
    "kept_bytes", [divergence.KEPT_BYTES, 20_000, 0], ids=["logits kept", "some logits kept", "head's input kept"]
)
@pytest.mark.parametrize("cached", [True, False])
def test_it_is_the_total_effect(
    any_tiny: LanguageModel, sae: Standard, cached: bool, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "LOGITS_PER_PASS", 20 * any_tiny.vocab_size)  # several passes
    source = RandomFeatureSource(sae, 0.8)
    cache = PromptCache(any_tiny) if cached else None
    decoded, kl = record(any_tiny, source, repeats=3, cache=cache, kept_bytes=kept_bytes)
    assert len(set(map(len, decoded.token_ids))) > 2, "all rows are of one length"
    assert_total(any_tiny, source, decoded, kl)


@pytest.mark.parametrize(
    "site", ["resid_pre.0", "resid_pre.2", "resid_mid.1", "mlp_out.2", "attn_z.1.0", "resid_post.0", "resid_post.3"]
)
@pytest.mark.parametrize("repeats", [1, 3])
def test_any_site(any_tiny: LanguageModel, site: str, repeats: int) -> None:
    if site == "resid_post.3":
        site = f"resid_post.{any_tiny.n_layers - 1}"
    width = 32 if not site.startswith("attn_z") else any_tiny.layout.layers[1].attention.head_dim  # pyright: ignore[reportOptionalMemberAccess]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    source = VectorSource(vector, site, 6.0, unit="absolute")
    decoded, kl = record(any_tiny, source, repeats=repeats, cache=PromptCache(any_tiny) if repeats > 1 else None)
    assert_total(any_tiny, source, decoded, kl)


def test_two_sites(any_tiny: LanguageModel, sae: Standard) -> None:
    later = make_dictionary(any_tiny, "resid_post.2")
    source = CombinedSource([StaticSource(later, 5, 0.8), StaticSource(sae, 3, 0.8)])
    decoded, kl = record(any_tiny, source)
    assert_total(any_tiny, source, decoded, kl)


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_edited_prompts_and_prompts_of_one_token_are_measured_as_well(
    positions: str, any_tiny: LanguageModel, sae: Standard
) -> None:
    source = StaticSource(sae, 3, 0.8, positions=positions)
    decoded, kl = record(any_tiny, source, lengths=(1, 1, 1) if positions == "generated" else (5, 9))
    assert_total(any_tiny, source, decoded, kl)


def test_prompts_of_one_length(any_tiny: LanguageModel, sae: Standard) -> None:
    source = RandomFeatureSource(sae, 0.8)
    config = DecodeConfig(max_new_tokens=5, stop_at_eos=False)
    decoded, kl = record(any_tiny, source, config, lengths=(9, 9, 9))
    assert_total(any_tiny, source, decoded, kl)


@pytest.mark.parametrize("repeats", [1, 2])
def test_steps_that_are_taken_ahead(any_tiny: LanguageModel, sae: Standard, repeats: int) -> None:
    """Rows end in the middle of several steps; what is behind their ends counts nowhere."""
    config = replace(SAMPLED, max_new_tokens=14)
    decoded, kl = record(any_tiny, StaticSource(sae, 3, 0.8), config, repeats=repeats, ahead=5)
    assert decoded.ahead == [5] * len(decoded)
    assert len(set(map(len, decoded.token_ids))) > 2
    assert_total(any_tiny, StaticSource(sae, 3, 0.8), decoded, kl)


def test_what_is_seen_of_other_rows_than_were_asked_for_shows(
    any_tiny: LanguageModel, sae: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: the rows of steps that were taken ahead are not those that are left."""
    real = DivergenceRecorder.keep

    def keep(self: DivergenceRecorder, rows: torch.Tensor, step: int, logits: Any, seen: Any) -> None:
        real(self, rows, step, logits, [one.roll(1, 0) for one in seen])

    monkeypatch.setattr(DivergenceRecorder, "keep", keep)
    source, config = StaticSource(sae, 3, 0.8), replace(SAMPLED, max_new_tokens=14)
    decoded, kl = record(any_tiny, source, config, ahead=5)
    with pytest.raises(AssertionError):
        assert_total(any_tiny, source, decoded, kl)


def test_a_prompt_of_one_token_beside_longer_ones(tiny_llama: LanguageModel) -> None:
    """They are fed apart, and then together."""
    source = StaticSource(make_dictionary(tiny_llama), 3, 0.8)
    config = DecodeConfig(max_new_tokens=5, stop_at_eos=False)
    decoded, kl = record(tiny_llama, source, config, lengths=(4, 1, 6), repeats=2)
    assert_total(tiny_llama, source, decoded, kl)


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_forked_answers(positions: str, any_tiny: LanguageModel, sae: Standard) -> None:
    """Tokens that were given, edited or not, are fed to the unsteered model as they are."""
    source = StaticSource(sae, 3, 0.8, positions=positions)
    prompts, config = prompts_of((5, 9)), DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    recorder = DivergenceRecorder(any_tiny, source)
    decoded = decode(any_tiny, prompts, config, source, forced=[[7, 8, 9], [11]], repeats=2, observe=recorder)
    assert_total(any_tiny, source, decoded, recorder.measure(decoded))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("kept_bytes", [divergence.KEPT_BYTES, 0], ids=["logits kept", "head's input kept"])
def test_a_model_that_is_changed_otherwise(any_tiny: LanguageModel, kept_bytes: int, repeats: int) -> None:
    """Against the same change made by a source; no layer is left out."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    source = VectorSource(vector, "resid_post.1", 6.0, unit="absolute")
    unit = vector / vector.norm()

    def add(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] += 6.0 * unit
        return output

    config = DecodeConfig(max_new_tokens=3, stop_at_eos=False)
    recorder = DivergenceRecorder(any_tiny, None, kept_bytes=kept_bytes)
    cache = PromptCache(any_tiny)
    cache.load([prompt[:-1] for prompt in prompts_of((5, 9, 4))], 16)  # of the model as it is
    handle = any_tiny.layout.layers[1].module.register_forward_hook(add)
    decoded = decode(any_tiny, prompts_of((5, 9, 4)), config, repeats=repeats, prompt_cache=cache, observe=recorder)
    handle.remove()
    steered = decode(any_tiny, prompts_of((5, 9, 4)), config, source, repeats=repeats)
    assert steered.token_ids == decoded.token_ids
    assert_total(any_tiny, source, steered, recorder.measure(decoded))


def test_edits_of_nothing_diverge_by_nothing(any_tiny: LanguageModel, sae: Standard) -> None:
    _, kl = record(any_tiny, StaticSource(sae, 3, 0.0))
    assert kl.max() < 1e-6


@contextmanager
def rows_fed(model: LanguageModel, layer: int) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every call of a layer's attention."""
    seen: list[tuple[int, int]] = []
    attention = model.layout.layers[layer].attn_branch
    assert attention is not None
    handle = attention.register_forward_hook(lambda _m, _a, output: seen.append(tuple(output.shape[:2])))  # type: ignore[func-returns-value]
    try:
        yield seen
    finally:
        handle.remove()


def test_what_decoding_computed_is_not_computed_again(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    cache, source = PromptCache(tiny_llama), RandomFeatureSource(sae, 0.8)
    config = DecodeConfig(max_new_tokens=1, stop_at_eos=False)
    record(tiny_llama, source, config, cache=cache)  # fills the cache, and tries whether layers can be left out
    recorder = DivergenceRecorder(tiny_llama, source)
    decoded = decode(tiny_llama, prompts_of(LENGTHS), config, source, repeats=8, prompt_cache=cache, observe=recorder)
    with rows_fed(tiny_llama, 1) as below, rows_fed(tiny_llama, 2) as above:
        kl = recorder.measure(decoded, cache)
    assert below == []
    assert above == [(5, 1)]
    assert_total(tiny_llama, source, decoded, kl)


def test_a_model_that_cannot_begin_at_a_layer_is_run_whole(
    any_tiny: LanguageModel, sae: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = upper_layers.given_below
    monkeypatch.setattr(upper_layers, "given_below", lambda model, layer, hidden: given(model, layer, hidden.flip(-1)))
    monkeypatch.setattr(upper_layers, "_works", {})
    source = StaticSource(sae, 3, 0.8)
    decoded, kl = record(any_tiny, source)
    assert upper_layers._works[any_tiny.hf]["start", 2, "sdpa", "float32"] is False
    assert_total(any_tiny, source, decoded, kl)
    monkeypatch.setattr(upper_layers, "can_run_from", lambda *_: True)
    with pytest.raises(AssertionError, match="not close"):  # what trying the model guards against
        assert_total(any_tiny, source, decoded, record(any_tiny, source)[1])


def test_the_model_is_left_as_it_was(any_tiny: LanguageModel, sae: Standard) -> None:
    def state() -> list[tuple[set[str], list[int], list[int]]]:  # hooks of transformers' own may be there already
        modules = any_tiny.hf.modules()
        return [(set(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in modules]

    before = state()
    record(any_tiny, RandomFeatureSource(sae, 0.8), kept_bytes=0)
    assert state() == before
