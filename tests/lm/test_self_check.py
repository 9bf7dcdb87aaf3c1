"""A model's check of itself: what it lets pass, and that each claim fails where the claim is wrong.

Every case breaks one thing, in the model or in what was recognised of it, and says what must be off then. So no part of
the check can be left out unnoticed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, LlamaForCausalLM

from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    LanguageModel,
    TokenBatch,
    capture,
    check_model,
    decode,
    findings,
    load_model,
    show,
    site_check,
)
from trimtab.lm import self_check as checking
from trimtab.lm.layouts import LayerLayout, Layout
from trimtab.lm.logit_lens import logit_lens
from trimtab.lm.precision import FLOAT32
from trimtab.lm.taps import hooked
from trimtab.lm.upper_layers import difference
from trimtab.lm.windows import short_windows
from trimtab.lm.zoo import build_tiny

HEADS = {"attn_q", "attn_k", "attn_v", "attn_z"}


def off(model: LanguageModel) -> set[str]:
    found = check_model(model)
    assert found is not None
    return set(found.off)


def copied(model: LanguageModel) -> LanguageModel:
    return LanguageModel(copy.deepcopy(model.hf), model.tokenizer, "changed")


def with_layers(model: LanguageModel, change: Callable[[int, LayerLayout], LayerLayout]) -> LanguageModel:
    """The same model, otherwise recognised."""
    other = copied(model)
    layers = tuple(change(number, layer) for number, layer in enumerate(other.layout.layers))
    other.layout = replace(other.layout, layers=layers)
    return other


def attention(layer: LayerLayout, **parts: Any) -> LayerLayout:
    assert layer.attention is not None
    return replace(layer, attention=replace(layer.attention, **parts))


def test_the_known_layouts_are_right(any_tiny: LanguageModel) -> None:
    assert off(any_tiny) == set()
    assert any_tiny.capabilities.off == {}


def test_a_model_is_left_as_it_was(tiny_gemma3: LanguageModel) -> None:
    model = copied(tiny_gemma3)
    config, state = model.hf.config.to_dict(), torch.random.get_rng_state()
    model.hf.train()
    ids = torch.arange(10, 30)[None]
    before = model.hf(input_ids=ids).logits

    def hooks() -> list[Any]:
        of = [hooks for module in model.hf.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        return [hook for each in of for hook in each.values()]

    hooked = hooks()
    check_model(model)
    assert model.hf.training
    assert all(module.training for module in model.hf.modules())
    assert model.hf.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hooks() == hooked
    assert torch.equal(model.hf(input_ids=ids).logits, before)


SWAPS: dict[str, tuple[Callable[[int, LayerLayout], LayerLayout], set[str]]] = {
    "the norm before attention, for that between the branches": (
        lambda _n, layer: replace(layer, mlp_norm=layer.module.get_submodule("input_layernorm")),
        {"resid_mid", "attn_out", "mlp_out"},
    ),
    "a part of the attention branch, for all of it": (
        lambda _n, layer: replace(layer, attn_branch=layer.module.get_submodule("self_attn.v_proj")),
        {"attn_out", "resid_mid", "mlp_out", "attn_v"},
    ),
    "the MLP's norm, for its output": (
        lambda _n, layer: replace(layer, mlp_branch=layer.module.get_submodule("post_attention_layernorm")),
        {"mlp_out"},
    ),
    "keys and values of each other, in one layer alone": (
        lambda n, layer: attention(layer, k=layer.attention.v, v=layer.attention.k) if n == 2 else layer,  # type: ignore[union-attr]
        {"attn_k", "attn_v"},
    ),
    "queries for keys": (
        lambda _n, layer: attention(layer, k=layer.attention.q),  # type: ignore[union-attr]
        {"attn_q", "attn_k"},
    ),
    "heads of half the width": (
        lambda _n, layer: attention(layer, n_heads=8, n_kv_heads=4, head_dim=4),
        HEADS,
    ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_what_is_taken_for_another_part_is_off(tiny_llama: LanguageModel, name: str) -> None:
    change, expected = SWAPS[name]
    assert off(with_layers(tiny_llama, change)) == expected


@pytest.mark.parametrize("multi_query", [True, False])
def test_star_coders_heads_are_right_or_off(tiny_tokenizer: Any, multi_query: bool) -> None:
    """Its fused projection holds one key and value head, or queries, keys and values head by head."""
    config = GPTBigCodeConfig(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=multi_query,
                              initializer_range=0.3)  # fmt: skip
    model = LanguageModel(GPTBigCodeForCausalLM(config), tiny_tokenizer, "star-coder")
    assert {"attn_k", "attn_v"} <= set(model.capabilities.off)
    with pytest.raises(UserError, match="site kind attn_k of star-coder: in layer 0 it is "):
        model.site("attn_k.1")
    assert not {"decode", "resid_mid", "attn_out", "mlp_out", "attn_z", "logit-lens"} & set(model.capabilities.off)


def test_a_final_norm_that_is_missed_switches_off_the_lens(tiny_llama: LanguageModel) -> None:
    model = copied(tiny_llama)
    model.layout = Layout(model.layout.layers, None, model.layout.head)
    assert off(model) == {"logit-lens"}
    model = copied(tiny_llama)
    model.hf.lm_head.register_forward_hook(lambda _m, _a, logits: logits * 3)
    assert off(model) == set()  # the head's own hooks are part of it
    model.hf.__class__ = type("Scaled", (LlamaForCausalLM,), {"forward": _scaled})
    assert off(model) == {"logit-lens"}


def _scaled(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
    output = LlamaForCausalLM.forward(self, *args, **kwargs)
    output.logits = output.logits * 3
    return output


def test_a_swallowed_argument_is_found(tiny_llama: LanguageModel, tiny_tokenizer: Any) -> None:
    class WithoutPositions(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **rest):  # type: ignore[no-untyped-def, override]
            return super().forward(input_ids, **rest)

    class WithoutMask(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **rest):  # type: ignore[no-untyped-def, override]
            return super().forward(input_ids, **rest)

    class WithoutCache(LlamaForCausalLM):
        def forward(self, input_ids=None, cache=None, **rest):  # type: ignore[no-untyped-def, override]
            return super().forward(input_ids, **rest)

    hf = copy.deepcopy(tiny_llama.hf)
    for kind, expected in (
        (WithoutMask, {"padding", "decode", "prefix"}),
        (WithoutCache, {"decode", "prefix"}),
    ):
        hf.__class__ = kind
        model = LanguageModel(hf, tiny_tokenizer, "deaf")
        assert off(model) == expected, kind
        with pytest.raises(UserError, match="decoding with deaf"):
            decode(model, [[7, 8, 9]], DecodeConfig(max_new_tokens=2))
        checking._known.pop(hf)
    half = copy.deepcopy(hf).to(torch.bfloat16)  # where most positions agree, those of the row that is not padded
    half.__class__ = WithoutMask
    assert off(LanguageModel(half, tiny_tokenizer, "deaf")) >= {"padding", "decode"}
    hf.__class__ = WithoutPositions  # rotary embeddings see differences alone: nothing is lost but with a cache
    assert off(LanguageModel(hf, tiny_tokenizer, "deaf")) == {"decode", "prefix"}


def test_an_encoder_is_no_decoder(tiny_llama: LanguageModel) -> None:
    model = copied(tiny_llama)
    model.hf.config.is_causal = False
    for layer in model.layout.layers:
        layer.module.self_attn.is_causal = False  # type: ignore[union-attr]
    sees_all = type("SeesAll", (LlamaForCausalLM,), {"forward": _sees_all})
    model.hf.__class__ = sees_all
    assert {"decode", "resid_pre", "resid_post"} <= off(model)


def _sees_all(self: LlamaForCausalLM, input_ids: Any = None, **kwargs: Any) -> Any:
    if kwargs.get("attention_mask") is None:
        length = input_ids.shape[1]
        kwargs["attention_mask"] = torch.zeros(len(input_ids), 1, length, length)
    return LlamaForCausalLM.forward(self, input_ids, **kwargs)


def test_windows_are_short_for_the_trial_alone(tiny_gemma3: LanguageModel) -> None:
    model = copied(tiny_gemma3)
    ids = torch.arange(10, 16)[None]
    whole = model.hf(input_ids=ids).logits
    with short_windows(model.hf, 2):
        short = model.hf(input_ids=ids).logits
    assert torch.equal(whole[:, :2], short[:, :2])
    assert (whole[:, 3:] - short[:, 3:]).norm(dim=-1).min() > 0.1
    assert torch.equal(model.hf(input_ids=ids).logits, whole)


def test_a_cache_that_forgets_beyond_the_window_is_found(
    tiny_gemma3: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is shorter than the window of 8, but the window is shortened."""
    from transformers.masking_utils import create_causal_mask

    module = "transformers.models.gemma3.modeling_gemma3.create_sliding_window_causal_mask"

    def whole_behind_a_cache(**kwargs: Any) -> Any:
        own = originals[0]
        past = kwargs.get("past_key_values", kwargs.get("cache"))
        return create_causal_mask(**kwargs) if past is not None and past.get_seq_length() else own(**kwargs)

    from transformers.models.gemma3 import modeling_gemma3

    originals = [modeling_gemma3.create_sliding_window_causal_mask]
    monkeypatch.setattr(module, whole_behind_a_cache)
    assert off(copied(tiny_gemma3)) == {"decode", "prefix"}


MASKS = (-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4)


def mask_logits(hf: Any, value: float, begin: int) -> None:
    """Of tokens from one on."""

    def mask(_module: object, _args: object, output: Any) -> None:
        output.logits[..., begin:] = value

    hf.register_forward_hook(mask)


def ignore_attention_mask(hf: Any) -> None:
    hf.register_forward_pre_hook(lambda _m, args, given: (args, given | {"attention_mask": None}), with_kwargs=True)


@pytest.mark.parametrize(("value", "begin"), list(zip(MASKS, (30, 130, 30, 130), strict=True)))
def test_masked_logits_hide_no_fault(tiny_llama: LanguageModel, value: float, begin: int) -> None:
    """Mutations: compare finite models alone; compare masked columns; take the median for a logit's usual size."""
    hf = copy.deepcopy(tiny_llama.hf)
    mask_logits(hf, value, begin)
    model = LanguageModel(hf, tiny_llama.tokenizer, "masked")
    assert off(model) == {"logit-lens"}  # norm and head alone do not mask
    assert model.capabilities.differs["logit-lens"] >= 1
    ignore_attention_mask(hf)
    assert off(model) >= {"decode", "prefix"}


def test_what_is_masked_must_be_masked_in_both() -> None:
    """Mutation: leave out masked columns without a look at them."""
    expected = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    assert difference(expected * 1.01, expected) == pytest.approx(0.01, rel=0.02)
    assert math.isclose(difference(expected - 5, expected), 5, rel_tol=0.1)
    for value in MASKS:
        masked = expected.clone()
        masked[:, 300:] = value
        assert difference(masked.clone(), masked) == 0
        wrong = masked.clone()
        wrong[:, :300] *= 1.01
        assert difference(wrong, masked) == pytest.approx(0.01, rel=0.02)
        wrong[1, 350] = 0.5
        assert difference(wrong, masked) == 1
        assert difference(masked, expected) > 10
    assert math.isnan(difference(expected, torch.full_like(expected, -math.inf)))
    assert math.isnan(difference(expected, expected.clone().fill_(math.inf)))
    assert math.isnan(difference(expected * math.nan, expected))


def test_numbers_that_are_not_finite_decide_nothing(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said. Mutation: leave out the note, or show it as checked."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    hf = copy.deepcopy(tiny_llama.hf)
    with torch.no_grad():
        hf.lm_head.weight[3] = float("nan")
    model = LanguageModel(hf, tiny_llama.tokenizer, "broken")
    reason = "of a few random tokens its logits are NaN, infinite, or all masked"
    assert capsys.readouterr().err == f"trimtab: note: broken is not checked: {reason}\n"
    assert check_model(model) is None
    assert model.capabilities.off == {}
    hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    shown = show(tmp_path / "model")
    assert shown.capabilities == {}
    assert f"not checked: {reason}" in shown.render()


def test_a_comparison_that_fails_switches_off(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model's activations do in it. Mutation: let the error out."""

    def refuse(*_args: object) -> float:
        raise RuntimeError("Expected all tensors to be on the same device")

    def found_with(method: str) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setattr(site_check._EditedRun, method, refuse)
            found = check_model(copied(tiny_llama))
        assert found is not None
        return {name for name, why in found.off.items() if "RuntimeError: Expected all tensors" in why}

    residuals = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"}
    assert found_with("_off_by") == residuals
    assert found_with("_turned") == HEADS
    assert found_with("compare_logits") == {"resid_pre", "resid_post", "logit-lens"}


def test_activations_are_compared_on_one_device(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers may be spread over several. Mutation: keep a clone where it is."""
    run = site_check._EditedRun(tiny_llama, torch.arange(10, 22).reshape(2, 6), 2, findings.Findings(FLOAT32, float))
    monkeypatch.setattr(LanguageModel, "device", torch.device("meta"))  # any other than theirs
    with torch.no_grad(), hooked(tiny_llama.layout, {site: run.edit(site) for site in run.sites}), run.attention_seen():
        tiny_llama.hf(input_ids=run.ids)
    tensors = [*run.read.values(), *run.after.values(), *(x for seen in run.attended.values() for x in seen)]
    assert len(tensors) == 2 * len(run.sites) + 4 * tiny_llama.n_layers
    assert {x.device.type for x in tensors} == {"meta"}


def test_one_wrong_step_is_found_in_low_precision(tiny_llama: LanguageModel) -> None:
    """Of four. Mutation: the median of all models' differences."""

    def wrong_once(_module: object, _args: object, given: dict[str, Any], output: Any) -> None:
        if given["use_cache"] and given["input_ids"].shape[1] == 1:
            output.logits *= 2

    hf = copy.deepcopy(tiny_llama.hf).to(torch.bfloat16)
    model = LanguageModel(hf, tiny_llama.tokenizer, "half")
    assert off(model) == set()
    hf.register_forward_hook(wrong_once, with_kwargs=True)
    assert off(model) == {"decode"}


def test_what_was_found_is_of_the_models_precision_and_attention(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: know a model by itself alone."""
    checks = []
    original = checking.check_model
    monkeypatch.setattr(checking, "check_model", lambda model: checks.append(model) or original(model))
    hf, tokenizer = copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer
    counts = []
    for change in (lambda: None, lambda: hf.set_attn_implementation("eager"), lambda: hf.to(torch.bfloat16)):
        change()
        LanguageModel(hf, tokenizer, "first")
        LanguageModel(hf, tokenizer, "again")
        counts.append(len(checks))
    assert counts == [1, 2, 3]


def test_a_model_whose_plain_pass_fails_is_refused(tiny_llama: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_llama.hf)
    hf.model.layers[1].mlp.down_proj = nn.Linear(7, 32)
    with pytest.raises(UserError, match=r"plain forward pass of a few tokens.*RuntimeError"):
        LanguageModel(hf, tiny_llama.tokenizer, "broken")


def test_what_is_off_is_refused_where_it_is_used(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    hf = copy.deepcopy(tiny_llama.hf)
    hf.__class__ = type("Scaled", (LlamaForCausalLM,), {"forward": _scaled})
    model = LanguageModel(hf, tiny_llama.tokenizer, "scaled")
    with pytest.raises(UserError, match="final norm and the head with scaled: its logits are not"):
        logit_lens(model, torch.ones(1, 32))
    assert capture(model, TokenBatch.full(torch.tensor([[7, 8]])), ["resid_post.1"])  # the rest works


def test_the_result_is_kept_for_models_from_files(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    first = load_model(tmp_path / "model")
    (kept,) = (tmp_path / "cache" / "checks").iterdir()
    monkeypatch.setattr(checking, "check_model", lambda _model: pytest.fail("it was checked again"))
    assert load_model(tmp_path / "model").capabilities == first.capabilities
    kept.write_text('{"off": {"decode": "it is tired"}, "differs": {"decode": 0.25}}')
    again = load_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"decoding with .*model: it is tired \(by 25 %\)"):
        decode(again, [[7, 8]])
    shown = show(tmp_path / "model")
    assert shown.capabilities["decode"] == "it is tired (by 25 %)"
    assert "it is tired" in shown.render()
    assert decode(load_model(tmp_path / "model", allow=["decode"]), [[7, 8]]).token_ids
    monkeypatch.undo()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    kept.write_text("{")
    assert load_model(tmp_path / "model").capabilities.off == {}
    first.hf.config.hidden_act = "gelu"
    first.hf.save_pretrained(tmp_path / "model")
    load_model(tmp_path / "model")
    assert len(list((tmp_path / "cache" / "checks").iterdir())) == 2


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_what_was_found_is_of_a_models_weights(
    tiny_llama: LanguageModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint is checked by itself. Mutations: leave weights out of the key; vectors; matrices."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))

    def save(hf: Any) -> None:
        hf.save_pretrained(tmp_path / "model")
        tiny_llama.tokenizer.save_pretrained(tmp_path / "model")

    hf = copy.deepcopy(tiny_llama.hf)
    save(hf)
    load_model(tmp_path / "model")
    (kept,) = (tmp_path / "cache" / "checks").iterdir()
    kept.write_text('{"off": {"decode": "it is tired"}, "differs": {}}')
    assert "decode" in load_model(tmp_path / "model").capabilities.off
    with torch.no_grad():
        hf.get_parameter(name).mul_(1.5)
    save(hf)
    assert "decode" in load_model(tmp_path / "model").capabilities
    assert show(tmp_path / "model").capabilities["decode"] == "works"


def changed(model: LanguageModel, change: Callable[[Any], None]) -> LanguageModel:
    """The same model with some weights set by hand."""
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        change(hf)
    return LanguageModel(hf, model.tokenizer, "by hand")


def _cancelling(hf: Any) -> None:
    """Two heads of a group that are almost the same, of which the branch takes 10,000 times the difference."""
    for layer in hf.model.layers:
        q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        q[8:16] = q[:8] * (1 + 1e-4)
        o[:, :8] *= 1e4
        o[:, 8:16] = -o[:, :8]


def _blind(hf: Any) -> None:
    hf.lm_head.weight.zero_()


def _empty_columns(hf: Any) -> None:
    for layer in hf.model.layers:
        for name in "qkv":
            layer.self_attn.get_submodule(f"{name}_proj").weight[1::2].zero_()
        layer.self_attn.q_proj.weight[:8].zero_()


def _no_heads(hf: Any) -> None:
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.q_proj.weight.zero_()


def _empty_embeddings(hf: Any) -> None:
    hf.model.embed_tokens.weight.zero_()


BY_HAND: dict[str, tuple[Callable[[Any], None], str]] = {
    "heads that cancel but for what rounding changes": (_cancelling, "AS_ROUNDING"),
    "a head that is blind": (_blind, ""),
    "columns of queries, keys and values that are empty": (_empty_columns, ""),
    "heads without weights": (_no_heads, ""),
    "tokens without embeddings": (_empty_embeddings, ""),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_that_are_set_by_hand_are_no_fault(
    tiny_llama: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, mutation = BY_HAND[name]
    model = changed(tiny_llama, change)
    assert off(model) == set()
    if mutation:  # what the check would say without asking how much rounding does
        said = capsys.readouterr().err
        assert "note: decode with by hand: from the cache it gives other logits" in said
        assert "but changes of the size of rounding move them by" in said
        monkeypatch.setattr(findings, mutation, 0)
        assert "decode" in off(model)


def test_what_is_wrong_is_found_where_rounding_counts(tiny_llama: LanguageModel) -> None:
    """Rounding counts for more there, and a mask that is not obeyed for more still."""
    model = changed(tiny_llama, _cancelling)
    assert off(model) == set()

    class WithoutMask(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **rest):  # type: ignore[no-untyped-def, override]
            return super().forward(input_ids, **rest)

    model.hf.__class__ = WithoutMask
    assert {"padding", "decode"} <= off(LanguageModel(model.hf, tiny_llama.tokenizer, "deaf"))


def _deaf(tiny: LanguageModel) -> Any:
    hf = copy.deepcopy(tiny.hf)
    hf.__class__ = type("Scaled", (LlamaForCausalLM,), {"forward": _scaled})
    return hf


def test_what_is_off_can_be_used_by_those_who_ask_for_it(
    tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal says how far it is off, and how to use it. Mutation: allow without a word."""
    hf = _deaf(tiny_llama)
    model = LanguageModel(hf, tiny_llama.tokenizer, "scaled")
    with pytest.raises(UserError, match=r"last residual \(by 67 %\); .*--allow logit-lens"):
        logit_lens(model, torch.ones(1, 32))
    capsys.readouterr()
    allowed = LanguageModel(hf, tiny_llama.tokenizer, "scaled", allow=["logit-lens", "attn_z"])
    assert "logit-lens" in allowed.capabilities
    assert list(allowed.capabilities.allowed) == ["logit-lens"]  # the other works anyway
    assert capsys.readouterr().err == (
        "trimtab: note: logit-lens is used with scaled, as is asked for, though its logits are not final norm and head "
        "of its last residual (by 67 %)\n"
    )
    assert logit_lens(allowed, torch.ones(1, 32)).ids.shape[0] == 1
    with pytest.raises(UserError, match="allow 'lens': allowed are padding, "):
        LanguageModel(hf, tiny_llama.tokenizer, "scaled", allow=["lens"])
    other = with_layers(tiny_llama, lambda _n, layer: replace(layer, attention=None))
    found = check_model(other)
    assert found is not None
    with pytest.raises(UserError, match=r"allow attn_q with it: its layers have no such part.*nothing to use"):
        found.allowing(["attn_q"], "it")


def test_texts_do_not_grow_beyond_a_turn_of_positions(tiny_tokenizer: Any) -> None:
    """Beyond its original length `longrope` turns all positions otherwise, those in a cache and rows beside it
    included. Mutation: leave out either check."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": 12,
        "factor": 8.0,
    }
    model = build_tiny("llama", tiny_tokenizer, rope_parameters=parameters)
    assert model.capabilities.off == {}
    assert model.turning_length == 12
    long, short, config = list(range(10, 30)), [40, 41, 42], DecodeConfig(max_new_tokens=6, stop_at_eos=False)

    def plain(ids: list[int]) -> torch.Tensor:
        return model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    for prompt in (long, short):
        (tokens,) = decode(model, [prompt], config).token_ids
        assert tokens == plain([*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1).tolist()
    with pytest.raises(UserError, match=r"together 16 tokens, but llama turns positions otherwise beyond 12 tokens"):
        decode(model, [long[:10]], config)
    with pytest.raises(UserError, match="texts that become longer, or are of both kinds"):
        decode(model, [long, short], config)
    batch = TokenBatch.pad([long, short], 0)
    arguments = {"input_ids": batch.ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    beside = model.hf(**arguments, use_cache=False).logits[1, -3:]
    assert (beside - plain(short)).norm() > 0.01 * beside.norm()  # what would be got
