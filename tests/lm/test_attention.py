"""Attention of single tokens against transformers' own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from trimtab.lm import DecodeConfig, LanguageModel, attention, decode
from trimtab.lm.attention import _attend, fast_attention
from trimtab.lm.quick import quick_copy


@pytest.fixture
def halved(any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    from trimtab.lm import quick

    monkeypatch.setattr(quick, "fast_bfloat16", lambda _device: True)
    return quick_copy(any_tiny)


def given(kind: str, heads: int, kv_heads: int, queries: int = 1) -> tuple[Any, ...]:
    """Module, queries, keys, values and mask."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    q, k, v = (
        torch.randn(3, n, length, 16, generator=generator).bfloat16()
        for n, length in ((heads, queries), (kv_heads, 11), (kv_heads, 11))
    )
    seen = torch.ones(3, 1, queries, 11, dtype=torch.bool)
    seen[1, ..., :4] = seen[2, ..., :9] = False
    low = torch.finfo(torch.bfloat16).min
    mask = {"none": None, "bool": seen, "float": torch.zeros(seen.shape).bfloat16().masked_fill(~seen, low)}[kind]
    return module, q, k, v, mask


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_it_is_transformers_own(kind: str, heads: int, kv_heads: int, scaling: float | None) -> None:
    things = given(kind, heads, kv_heads)
    expected, _ = sdpa_attention_forward(*things, scaling=scaling)
    found, weights = _attend(lambda *_a, **_k: pytest.fail("the own one was asked"), *things, scaling=scaling)
    assert weights is None
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), atol=2e-2)
    exact, _ = sdpa_attention_forward(
        *(t.float() if isinstance(t, torch.Tensor) and t.dtype != torch.bool else t for t in things), scaling=scaling
    )
    assert (found.float() - exact).norm() <= 1.05 * (expected.float() - exact).norm()  # no less exact


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"position_bias": torch.zeros(1)}, {"softcap": 3.0}])
def test_what_it_does_not_know_is_left_to_transformers(more: dict[str, Any]) -> None:
    assert _attend(lambda *_a, **_k: "own", *given("bool", 6, 2), **more) == "own"


def test_several_queries_and_float32_are_left_to_transformers() -> None:
    assert _attend(lambda *_a, **_k: "own", *given("bool", 6, 2, queries=2)) == "own"
    module, q, k, v, mask = given("bool", 6, 2)
    assert _attend(lambda *_a, **_k: "own", module, q.float(), k.float(), v.float(), mask) == "own"


PROMPTS = [[7, 20, 33, 9], [8, 21, 40, 52, 61, 13, 30]]
CONFIG = DecodeConfig(max_new_tokens=6, stop_at_eos=False)


def test_decoding_uses_it_and_leaves_nothing_behind(halved: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = attention._attend

    def attend(own: Any, module: nn.Module, q: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(q.shape[2])
        return real(own, module, q, *rest, **more)

    before = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setattr(attention, "_attend", attend)
    found = decode(halved, PROMPTS, CONFIG)
    assert 1 in seen
    assert AttentionInterface._global_mapping["sdpa"] is before
    monkeypatch.setattr(attention, "IMPLEMENTATION", "none")
    expected = decode(halved, PROMPTS, CONFIG, teacher=found.token_ids)
    assert torch.allclose(torch.tensor(found.token_logp), torch.tensor(expected.token_logp), atol=0.1)


def test_a_mask_that_is_not_heeded_shows(halved: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: padding is attended to."""
    real = attention._attend
    found = decode(halved, PROMPTS, CONFIG)

    def unmasked(own: Any, module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
        return real(own, module, q, k, v, None if q.shape[2] == 1 else mask, **more)

    monkeypatch.setattr(attention, "_attend", unmasked)
    wrong = decode(halved, PROMPTS, CONFIG, teacher=found.token_ids)
    assert not torch.allclose(torch.tensor(found.token_logp), torch.tensor(wrong.token_logp), atol=1e-3)


def test_threads_that_overlap_put_it_back(halved: LanguageModel) -> None:
    before, inside, leave = AttentionInterface._global_mapping["sdpa"], threading.Event(), threading.Event()

    def other() -> None:
        with torch.no_grad(), fast_attention(halved.hf):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with torch.no_grad(), fast_attention(halved.hf):
        assert AttentionInterface._global_mapping["sdpa"] is not before
    assert AttentionInterface._global_mapping["sdpa"] is not before
    leave.set()
    thread.join()
    assert AttentionInterface._global_mapping["sdpa"] is before


def test_float32_and_gradients_are_left_alone(any_tiny: LanguageModel, halved: LanguageModel) -> None:
    before = AttentionInterface._global_mapping["sdpa"]
    with torch.no_grad(), fast_attention(any_tiny.hf):
        assert AttentionInterface._global_mapping["sdpa"] is before
    with torch.enable_grad(), fast_attention(halved.hf):
        assert AttentionInterface._global_mapping["sdpa"] is before
