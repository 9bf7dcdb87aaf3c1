"""What is held against a model's own numbers allows for the precision of products at the moment, and for no more.

No CPU is sure to have TF32 or bfloat16 products of float32 numbers, so factors are rounded here as those round them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.lm.rounded_products import BITS, RoundedProducts

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, check_model, upper_layers
from trimtab.lm.precision import FLOAT32, product_precision
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import can_run_from
from trimtab.selection import LastTokenScorer

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
PREFIX = [7, 30, 12, 9, 41, 8]


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's settings back, of which its older calls change several."""
    places = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@contextmanager
def products_in(name: str, *, said: bool = True) -> Iterator[None]:
    """Products of that precision, which torch says it is set to unless it is to be kept from trimtab."""
    with settings_kept(), RoundedProducts(name):
        if said:
            torch.backends.mkldnn.matmul.fp32_precision = name
        yield


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper_layers, "_works", {})


def test_it_is_what_torch_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of torch's ways of setting it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with settings_kept():
        assert product_precision(torch.float32, CPU) == product_precision(torch.float32, CARD) == FLOAT32
        torch.set_float32_matmul_precision("medium")
        assert product_precision(torch.float32, CPU).name == "bfloat16"
        assert product_precision(torch.float32, CARD).name == "TF32"
        torch.set_float32_matmul_precision("highest")
        assert product_precision(torch.float32, CPU) == product_precision(torch.float32, CARD) == FLOAT32
        torch.backends.cuda.matmul.allow_tf32 = True
        assert product_precision(torch.float32, CPU) == FLOAT32
        assert product_precision(torch.float32, CARD).name == "TF32"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))  # a card without it
        assert product_precision(torch.float32, CARD) == FLOAT32
        assert product_precision(torch.float16, CARD).name == "float16"
    with torch.autocast("cpu", torch.bfloat16):
        assert product_precision(torch.float32, CPU).name == "bfloat16"
        assert product_precision(torch.float64, CPU).name == "float64"  # which autocast leaves alone


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, ""), (torch.float32, "tf32"), (torch.float32, "bf16"), (torch.float16, "")]
)
def test_rounding_is_that_of_the_numbers(dtype: torch.dtype, name: str) -> None:
    """The largest that is found in many numbers, as torch or the test rounds them."""
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    with settings_kept():
        if name:
            torch.backends.mkldnn.matmul.fp32_precision = name
        said = product_precision(dtype, CPU).rounding
    rounded = RoundedProducts(name)._rounded(x.float()) if name else x.to(dtype)
    found = float(((rounded.double() - x) / x).abs().max())
    assert said / 2 < found <= said * 1.001  # numbers between 1 and 2 are rounded by up to a half and a whole of it


@pytest.mark.parametrize("name", BITS)
def test_a_right_model_passes_in_any_precision(any_tiny: LanguageModel, name: str, untried: None) -> None:
    """Mutation: trimtab does not know of the setting, and takes rounding for a fault."""
    delta = 5.0 * torch.randn(5, any_tiny.d_model, generator=torch.Generator().manual_seed(4))
    with products_in(name):
        found = check_model(any_tiny)
        assert found is not None
        assert (found.off, found.unsure) == ({}, {})
        for way in ("start", "copies"):
            assert can_run_from(any_tiny, 2, way)
        LastTokenScorer(any_tiny, "resid_post.1", PREFIX).logits(delta)
    with products_in(name, said=False):
        found = check_model(any_tiny)
    assert found is not None
    assert {**found.off, **found.unsure}


def test_a_precision_of_its_own_is_tried(any_tiny: LanguageModel, untried: None) -> None:
    """Mutation: take what was found in another precision."""
    assert can_run_from(any_tiny, 2, "start")
    with products_in("tf32"):
        assert can_run_from(any_tiny, 2, "start")
    assert [key[3] for key in upper_layers._works[any_tiny.hf]] == ["float32", "TF32"]


def keys_for_values(model: LanguageModel) -> set[str]:
    layers = []
    for layer in model.layout.layers:
        attention = layer.attention
        assert attention is not None
        layers.append(replace(layer, attention=replace(attention, k=attention.v, v=attention.k)))
    model.layout = replace(model.layout, layers=tuple(layers))
    return {"attn_k", "attn_v"}


def wrong_from_the_cache(model: LanguageModel) -> set[str]:
    def double(_module: object, _args: object, given: dict[str, Any], output: Any) -> None:
        if given["use_cache"] and given["input_ids"].shape[1] == 1:
            output.logits *= 2

    model.hf.register_forward_hook(double, with_kwargs=True)
    return {"decode"}


def a_norm_too_few(model: LanguageModel) -> set[str]:
    model.layout = replace(model.layout, final_norm=None)
    return {"logit-lens"}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("fault", [keys_for_values, wrong_from_the_cache, a_norm_too_few], ids=lambda f: f.__name__)
def test_a_wrong_model_fails_in_any_precision(
    tiny_llama: LanguageModel, fault: Callable[[LanguageModel], set[str]], name: str
) -> None:
    model = LanguageModel(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "changed")
    expected = fault(model)
    with products_in(name):
        found = check_model(model)
    assert found is not None
    assert set(found.off) == expected


@pytest.mark.parametrize("name", BITS)
def test_layers_that_cannot_be_left_out_are_not(
    tiny_llama: LanguageModel, name: str, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = upper_layers.given_below
    monkeypatch.setattr(upper_layers, "given_below", lambda model, layer, x: given(model, layer, x.flip(-1)))
    with products_in(name):
        assert not can_run_from(tiny_llama, 2, "start")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", r"more than rounding to float32\); use another model$"),
        ("tf32", r"more than rounding to TF32\); use another model, or let torch multiply in float32 \(torch\.set_"),
        ("bf16", r"more than rounding to bfloat16\); use another model, or let torch multiply in float32"),
        ("half", r"more than rounding to bfloat16\); use another model, or load it in float32 \(--dtype float32\)$"),
    ],
)
def test_what_is_refused_says_how_far_and_what_to_do(tiny_llama: LanguageModel, name: str, hint: str) -> None:
    hf = copy.deepcopy(tiny_llama.hf)
    model = LanguageModel(hf.bfloat16() if name == "half" else hf, tiny_llama.tokenizer, "scaled")
    x, logits = torch.ones(model.d_model, dtype=model.dtype), torch.ones(160)
    unembedding = Unembedding(model)
    with products_in(name) if name in BITS else nullcontext():
        logits = unembedding.logits(x[None])[0]
        unembedding.check(x, logits)
        with pytest.raises(UserError, match=r"final norm and head of its residual \(by 67 %, " + hint):
            unembedding.check(x, 3 * logits)


@pytest.mark.gpu
def test_tf32_is_allowed_for_on_a_card(any_tiny: LanguageModel, untried: None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    with ExitStack() as stack:
        stack.enter_context(settings_kept())
        hf = copy.deepcopy(any_tiny.hf).cuda()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        model = LanguageModel(hf, any_tiny.tokenizer, "on the card")
        assert product_precision(model.dtype, model.device).name == "TF32"
        assert (model.capabilities.off, model.capabilities.unsure) == ({}, {})
        assert can_run_from(model, 2, "start")
        assert can_run_from(model, 2, "copies")
