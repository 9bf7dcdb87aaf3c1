"""Sites: every kind against an oracle that uses no hooks, stopping early, padding, edits, fingerprints, messages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import PreTrainedModel

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, site_width
from trimtab.lm.sites import HEAD_KINDS, RESIDUAL_KINDS
from trimtab.lm.taps import tap

IDS = [[7, 30, 41, 9, 55, 23, 88, 14, 61, 35, 102, 17], [90, 12, 77, 6, 33, 20, 45, 71, 50, 11, 29, 64]]
ATOL = 2e-5


def layers_of(hf: PreTrainedModel) -> nn.ModuleList:
    return hf.transformer.h if isinstance(hf, GPT2LMHeadModel) else hf.model.layers


class ByHand:
    """What every site holds, from the model's own submodules called one after the other on a layer's input.

    The layers' inputs are `transformers`' `output_hidden_states`; attention itself is written out.
    """

    def __init__(self, model: LanguageModel, ids: Tensor) -> None:
        self.hf = model.hf
        with torch.no_grad():
            out = self.hf(ids, output_hidden_states=True, use_cache=False)
        self.inputs = out.hidden_states[:-1]  # the last one has passed the final norm
        self.is_gpt2 = isinstance(self.hf, GPT2LMHeadModel)
        self.is_gemma = "Gemma" in type(self.hf).__name__

    @torch.no_grad()
    def sites(self, layer: int) -> dict[str, Tensor]:
        x, module = self.inputs[layer], layers_of(self.hf)[layer]
        attention = self._gpt2_attention if self.is_gpt2 else self._rotary_attention
        heads = attention(x, module, layer)
        if self.is_gpt2:
            attn_out = module.attn.c_proj(heads["attn_z"].flatten(-2))
            mid = x + attn_out
            mlp_out = module.mlp(module.ln_2(mid))
        elif self.is_gemma:
            attn_out = module.post_attention_layernorm(module.self_attn.o_proj(heads["attn_z"].flatten(-2)))
            mid = x + attn_out
            mlp_out = module.post_feedforward_layernorm(module.mlp(module.pre_feedforward_layernorm(mid)))
        else:
            attn_out = module.self_attn.o_proj(heads["attn_z"].flatten(-2))
            mid = x + attn_out
            mlp_out = module.mlp(module.post_attention_layernorm(mid))
        residual = {"resid_pre": x, "resid_mid": mid, "resid_post": mid + mlp_out}
        return {**residual, "attn_out": attn_out, "mlp_out": mlp_out, **heads}

    def _gpt2_attention(self, x: Tensor, module: Any, layer: int) -> dict[str, Tensor]:
        n = self.hf.config.n_head
        q, k, v = (part.unflatten(-1, (n, -1)) for part in module.attn.c_attn(module.ln_1(x)).chunk(3, -1))
        z = attend(q, k, v, q.shape[-1] ** -0.5, None)
        return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_z": z}

    def _rotary_attention(self, x: Tensor, module: Any, layer: int) -> dict[str, Tensor]:
        config, attention = self.hf.config, module.self_attn
        h = module.input_layernorm(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, config.head_dim)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned_q, turned_k, theta, window = q, k, 10_000.0, None
        if self.is_gemma:
            turned_q, turned_k = attention.q_norm(q), attention.k_norm(k)
            kind = config.layer_types[layer]
            theta = config.rope_parameters[kind]["rope_theta"]
            window = config.sliding_window if kind == "sliding_attention" else None
            scale = config.query_pre_attn_scalar**-0.5
        else:
            scale = config.head_dim**-0.5
        z = attend(rotate(turned_q, theta), rotate(turned_k, theta), v, scale, window)
        return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_z": z}


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `[B, T, h, d]`, the two halves of d being real and imaginary parts."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of `[B, T, h, d]` queries to keys and values of fewer heads, within a window."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    ago = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = (ago >= 0) & (ago < (window or len(ago)))
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("kind", [*RESIDUAL_KINDS, *HEAD_KINDS])
def test_every_site_is_what_its_name_says(any_tiny, kind):
    ids = torch.tensor(IDS)
    oracle = ByHand(any_tiny, ids)
    for layer in range(any_tiny.n_layers):
        site = Site(kind, layer)
        found = capture(any_tiny, TokenBatch.full(ids), [site])[site]
        expected = oracle.sites(layer)[kind]
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-4)
        assert site_width(any_tiny, site) == expected.flatten(2).shape[-1]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_one_head_is_that_head(any_tiny, kind):
    ids = torch.tensor(IDS)
    whole = capture(any_tiny, TokenBatch.full(ids), [f"{kind}.1"])[Site(kind, 1)]
    for head in range(whole.shape[2]):
        one = capture(any_tiny, TokenBatch.full(ids), [f"{kind}.1.{head}"])[Site(kind, 1, head)]
        assert torch.equal(one, whole[:, :, head])


def test_the_last_residual_gives_the_logits(any_tiny):
    ids = torch.tensor(IDS)
    last = Site("resid_post", any_tiny.n_layers - 1)
    x = capture(any_tiny, TokenBatch.full(ids), [last])[last]
    with torch.no_grad():
        logits = any_tiny.layout.head(any_tiny.layout.final_norm(x))
        assert torch.equal(logits, any_tiny.hf(ids).logits)


def test_capturing_many_sites_at_once_equals_one_at_a_time(any_tiny):
    batch = TokenBatch.full(torch.tensor(IDS))
    sites = ["mlp_out.2", "resid_pre.0", "attn_z.1", "resid_mid.1", "resid_mid.2", "attn_q.1.1", "resid_post.1"]
    together = capture(any_tiny, batch, sites)
    assert set(together) == {Site.parse(site) for site in sites}
    for site, x in together.items():
        assert torch.equal(x, capture(any_tiny, batch, [site])[site]), site


@pytest.mark.parametrize("kind", [*RESIDUAL_KINDS, *HEAD_KINDS])
def test_capture_stops_at_the_last_site(any_tiny, kind):
    ran: list[str] = []
    layers = layers_of(any_tiny.hf)
    watched = [(f"layer {i}", layer) for i, layer in enumerate(layers)]
    watched += [("mlp of 1", layers[1].mlp), ("head", any_tiny.layout.head)]
    handles = [m.register_forward_pre_hook(lambda *_a, name=name: ran.append(name)) for name, m in watched]
    try:
        capture(any_tiny, TokenBatch.full(torch.tensor(IDS)), [f"{kind}.1", "resid_pre.0"])
    finally:
        for handle in handles:
            handle.remove()
    needs_mlp = kind in ("mlp_out", "resid_post")
    assert ran == ["layer 0", "layer 1", *["mlp of 1"] * needs_mlp]


def test_capture_leaves_no_hook_behind(any_tiny):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_tiny.hf.modules())

    before = hooks()
    capture(any_tiny, TokenBatch.full(torch.tensor(IDS)), ["attn_z.1", "resid_mid.2"])
    with pytest.raises(UserError):
        capture(any_tiny, TokenBatch.full(torch.tensor(IDS)), ["attn_z.1", "resid_mid.99"])
    assert hooks() == before


def test_left_padding_changes_no_real_position(any_tiny):
    rows = [IDS[0], IDS[1][:5], IDS[1][:9]]
    padded = TokenBatch.pad(rows, pad_id=IDS[0][2])  # a pad token that is also a word, as SmolLM's is
    sites = ["resid_post.0", "attn_q.2", "attn_z.3", f"resid_post.{any_tiny.n_layers - 1}"]
    together = capture(any_tiny, padded, sites)
    for i, row in enumerate(rows):
        alone = capture(any_tiny, TokenBatch.full(torch.tensor([row])), sites)
        for site, x in alone.items():
            torch.testing.assert_close(together[site][i, -len(row) :], x[0], atol=ATOL, rtol=1e-4)


def test_a_batch_knows_its_positions_and_padding():
    batch = TokenBatch.pad([[5, 6, 7], [8]], pad_id=6)
    assert batch.ids.tolist() == [[5, 6, 7], [6, 6, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.padded
    assert not TokenBatch.pad([[1, 2], [3, 4]]).padded


@pytest.mark.parametrize(("rows", "says"), [([], "the prompts: it is empty"), ([[1], []], "prompt 1: it is empty")])
def test_an_empty_prompt_is_refused(rows, says):
    with pytest.raises(UserError, match=says):
        TokenBatch.pad(rows)


def test_with_nothing_edited_logits_are_transformers_bit_for_bit(any_tiny):
    ids = torch.tensor(IDS)
    with torch.no_grad():
        expected = any_tiny.hf(ids).logits
        handles = tap(any_tiny.layout, Site("resid_mid", 1), lambda x: None) + tap(
            any_tiny.layout, Site("attn_z", 2), lambda x: None
        )
        try:
            tapped = any_tiny.forward(TokenBatch.full(ids))
        finally:
            for handle in handles:
                handle.remove()
        assert torch.equal(any_tiny.forward(TokenBatch.full(ids)), expected)
        assert torch.equal(tapped, expected)
        # Rows that do not lie side by side are another product, with other last bits (see test_last_logits).
        one = any_tiny.hf(ids[:1], logits_to_keep=1).logits
        assert torch.equal(any_tiny.forward(TokenBatch.full(ids[:1]), last=1), one)
        last = any_tiny.forward(TokenBatch.full(ids), last=1)
        torch.testing.assert_close(last, any_tiny.hf(ids, logits_to_keep=1).logits, rtol=0, atol=1e-6)


def test_padded_logits_equal_unpadded_ones(any_tiny):
    rows = [IDS[0], IDS[1][:4]]
    with torch.no_grad():
        logits = any_tiny.forward(TokenBatch.pad(rows, pad_id=IDS[0][1]), last=1)
        for i, row in enumerate(rows):
            expected = any_tiny.hf(torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(logits[i, 0], expected, atol=1e-4, rtol=1e-4)


def test_logits_behind_a_cache_of_padded_rows_equal_those_without(any_tiny):
    rows, more = [IDS[0][:9], IDS[1][:4]], [[60], [18]]
    with torch.no_grad():
        cache = any_tiny.new_cache()
        prompt = TokenBatch.pad(rows, pad_id=IDS[0][1])
        any_tiny.forward(prompt, cache=cache)
        after = any_tiny.forward(TokenBatch.full(torch.tensor(more)), cache=cache, past_lengths=prompt.lengths)
        for i, row in enumerate(rows):
            expected = any_tiny.hf(torch.tensor([row + more[i]])).logits[0, -1]
            torch.testing.assert_close(after[i, -1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def edited_capture(model: LanguageModel, site: Site, change: RowDelta, read: str) -> Tensor:
    handles = tap(model.layout, site, lambda x: change)
    try:
        return capture(model, TokenBatch.full(torch.tensor(IDS)), [read])[Site.parse(read)]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post"])
def test_an_edit_reaches_the_branches_behind_it_and_the_skip_path(any_tiny, kind):
    """By hand: the edited stream goes through the layer's own modules from the site on."""
    ids, layer = torch.tensor(IDS), 1
    delta = torch.randn(any_tiny.d_model, generator=torch.Generator().manual_seed(0))
    change = RowDelta(torch.tensor([1]), torch.tensor([6]), delta[None])
    found = edited_capture(any_tiny, Site(kind, layer), change, f"resid_post.{layer}")

    oracle = ByHand(any_tiny, ids)
    plain = oracle.sites(layer)
    added = torch.zeros_like(plain["resid_mid"])
    added[1, 6] = delta
    if kind == "resid_pre":
        oracle.inputs = (*oracle.inputs[:layer], oracle.inputs[layer] + added, *oracle.inputs[layer + 1 :])
        expected = oracle.sites(layer)["resid_post"]
    elif kind in ("resid_mid", "attn_out"):
        mid, module = plain["resid_mid"] + added, layers_of(any_tiny.hf)[layer]
        with torch.no_grad():
            expected = mid + mlp_branch(oracle, module, mid)
    else:
        expected = plain["resid_post"] + added
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-4)
    assert not torch.allclose(found[1, 6], plain["resid_post"][1, 6], atol=1e-2)
    assert torch.equal(
        found[0], edited_capture(any_tiny, Site(kind, layer), no_change(any_tiny), f"resid_post.{layer}")[0]
    )


def mlp_branch(oracle: ByHand, module: Any, mid: Tensor) -> Tensor:
    if oracle.is_gpt2:
        return module.mlp(module.ln_2(mid))
    if oracle.is_gemma:
        return module.post_feedforward_layernorm(module.mlp(module.pre_feedforward_layernorm(mid)))
    return module.mlp(module.post_attention_layernorm(mid))


def no_change(model: LanguageModel) -> RowDelta:
    return RowDelta(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, model.d_model))


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_an_edit_of_one_head_changes_that_head_only(any_tiny, kind):
    site = Site(kind, 1, 0)
    delta = torch.ones(1, site_width(any_tiny, site))
    change = RowDelta(torch.tensor([0]), torch.tensor([3]), delta)
    plain = ByHand(any_tiny, torch.tensor(IDS)).sites(1)
    handles = tap(any_tiny.layout, site, lambda x: change)
    handles += tap(any_tiny.layout, Site(kind, 1), seen_by(seen := []))
    try:
        with torch.no_grad():
            any_tiny.forward(TokenBatch.full(torch.tensor(IDS)))
    finally:
        for handle in handles:
            handle.remove()
    expected = plain[kind].clone()
    expected[0, 3, 0] += 1
    torch.testing.assert_close(seen[0].unflatten(-1, expected.shape[2:]), expected, atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("kind", [*RESIDUAL_KINDS, *HEAD_KINDS])
def test_what_takes_an_activation_s_place_is_there_bit_for_bit(any_tiny, kind):
    """Small values where large ones were: x + (y − x) would lose their last bits."""
    site = Site(kind, 1, 0 if kind in HEAD_KINDS else None)
    width = site_width(any_tiny, site)
    given = 1e-3 * torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    given[1, ::2] = float("nan")  # there x stays
    change = RowDelta(torch.tensor([0, 1]), torch.tensor([3, 6]), torch.full((2, width), -0.0), given)
    before, after = [], []
    handles = tap(any_tiny.layout, site, seen_by(before)) + tap(any_tiny.layout, site, lambda x: change)
    handles += tap(any_tiny.layout, site, seen_by(after))
    try:
        with torch.no_grad():
            any_tiny.forward(TokenBatch.full(torch.tensor(IDS)))
    finally:
        for handle in handles:
            handle.remove()
    expected = before[0].clone()
    expected[0, 3] = given[0]
    expected[1, 6, 1::2] = given[1, 1::2]
    assert torch.equal(after[0], expected)
    summed = before[0][0, 3] + (given[0] - before[0][0, 3])
    assert not torch.equal(summed, given[0]), "adding the difference would do, so nothing is checked"


def seen_by(into: list[Tensor]) -> Any:
    def read(x: Tensor) -> None:
        into.append(x.clone())

    return read


def test_names_go_both_ways():
    for name in ("resid_post.15", "attn_z.9.6", "attn_k.0", "mlp_out.3"):
        assert str(Site.parse(name)) == name
    assert Site.parse("attn_z.9.6") == Site("attn_z", 9, 6)


@pytest.mark.parametrize(
    "name", ["resid_post", "resid.3", "resid_post.-1", "resid_post.1.2", "attn_z.1.2.3", "", "attn_z.a"]
)
def test_a_malformed_site_names_the_kinds(tiny_llama, name):
    with pytest.raises(
        UserError,
        match=r"site '.*': a site is KIND\.LAYER, .*resid_pre, resid_mid.*(like resid_post\.15|did you mean )",
    ):
        tiny_llama.site(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resid_post.4", "site resid_post.4: tiny-llama has layers 0 to 3; choose a layer in that range"),
        ("attn_k.1.2", "site attn_k.1.2: attn_k has heads 0 to 1; choose one of them"),
        ("attn_z.1.4", "site attn_z.1.4: attn_z has heads 0 to 3; choose one of them"),
    ],
)
def test_a_site_out_of_range_names_the_range(tiny_llama, name, says):
    with pytest.raises(UserError) as caught:
        tiny_llama.site(name)
    assert caught.value.line == says


def test_attention_sites_of_an_unknown_layout_say_what_was_looked_for(tiny_tokenizer):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = LanguageModel.from_hf(GPTNeoXForCausalLM(config), tiny_tokenizer, "neox")
    ids = torch.tensor(IDS)
    x = capture(model, TokenBatch.full(ids), ["resid_post.0"])[Site("resid_post", 0)]
    with torch.no_grad():
        assert torch.equal(x, model.hf(ids, output_hidden_states=True).hidden_states[1])
    with pytest.raises(UserError, match=r"GPTNeoXLayer .*q_proj, k_proj, v_proj, o_proj.*c_attn, c_proj.*use resid_p"):
        model.site("attn_q.0")


def test_a_model_without_a_list_of_layers_says_where_it_was_looked_for(tiny_llama):
    hf = copy.deepcopy(tiny_llama.hf)
    hf.config.num_hidden_layers = 5
    with pytest.raises(UserError, match=r"LlamaForCausalLM: no list of 5 layers at model\.layers, transformer\.h"):
        LanguageModel.from_hf(hf, tiny_llama.tokenizer)


def test_a_fingerprint_names_the_weights(any_tiny):
    twin = LanguageModel.from_hf(copy.deepcopy(any_tiny.hf), any_tiny.tokenizer, "twin")
    assert twin.fingerprint == any_tiny.fingerprint
    assert len(twin.fingerprint) == 16
    nudged = copy.deepcopy(any_tiny.hf)
    with torch.no_grad():
        layers_of(nudged)[2].mlp(torch.zeros(1, 1, any_tiny.d_model))
        next(layers_of(nudged)[2].mlp.parameters()).view(-1)[3] += 1e-3
    assert LanguageModel.from_hf(nudged, any_tiny.tokenizer).fingerprint != any_tiny.fingerprint
    halved = LanguageModel.from_hf(copy.deepcopy(any_tiny.hf).bfloat16(), any_tiny.tokenizer)
    assert halved.fingerprint != any_tiny.fingerprint


def test_text_and_ids(tiny_llama):
    ids = tiny_llama.encode_text("the end")
    assert tiny_llama.decode_ids(ids) == "the end"
    chat = tiny_llama.encode_text("the end", chat=True)
    assert tiny_llama.decode_ids(chat, special=True) == "<user>the end<eos><model>"
    assert tiny_llama.decode_ids(chat) == "the end"
    with pytest.raises(UserError, match="the prompt: it is empty; give some text"):
        tiny_llama.encode_text("")
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = None
    plain = LanguageModel.from_hf(tiny_llama.hf, tokenizer, "plain")
    with pytest.raises(UserError, match="--chat with plain: the model has no chat template; give a plain prompt"):
        plain.encode_text("the end", chat=True)
