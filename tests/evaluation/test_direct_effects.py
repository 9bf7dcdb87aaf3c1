"""Direct logit attribution against sums written out from a plain model's weights; attention against its definition."""

from __future__ import annotations

import pytest
import torch
from circuit_prompts import Hooks, aligned, logits
from torch import nn

from trimtab.errors import UserError
from trimtab.evaluation.circuits.direct_effects import attention_from, direct_effects, fixed_norm
from trimtab.evaluation.circuits.rows import PlainRun, logit_difference
from trimtab.lm import LanguageModel, Site, TokenBatch, capture
from trimtab.lm.unembedding import Unembedding


def test_as_written_out_from_the_weights(any_tiny: LanguageModel) -> None:
    """Each head's z times its columns of the output projection, times the norms' weights over their scales."""
    rows, _ = aligned(any_tiny)
    hf, number, end = any_tiny.hf, torch.arange(len(rows.ids)), rows.positions["END"]
    z: dict[int, torch.Tensor] = {}
    with Hooks(any_tiny) as hooks:
        hooks.read_z(z)
        hidden = hf(input_ids=rows.ids, output_hidden_states=True, use_cache=False).hidden_states
        outs = [hooks.out(layer) for layer in range(any_tiny.n_layers)]
        blocks = hooks.layers
    n_heads, last = hf.config.num_attention_heads, {}
    handle = blocks[-1].register_forward_hook(
        lambda _m, _a, out: last.update(x=out[0] if isinstance(out, tuple) else out)
    )
    logits(any_tiny, rows.ids)
    handle.remove()
    x = last["x"][number, end]
    gemma, gpt2 = "Gemma" in type(hf).__name__, "GPT2" in type(hf).__name__
    norm = hf.transformer.ln_f if gpt2 else hf.model.norm
    epsilon = norm.eps if gpt2 or gemma else norm.variance_epsilon
    towards = hf.lm_head.weight[rows.answers[:, 0]] - hf.lm_head.weight[rows.answers[:, 1]]
    found = direct_effects(any_tiny, rows)
    for layer, out in enumerate(outs):
        weight = out.weight.T if gpt2 else out.weight  # [d, heads · head_dim]
        own = z[layer][number, end]
        size = own.shape[1] // n_heads
        for head in range(n_heads):
            part = slice(head * size, (head + 1) * size)
            written = own[:, part] @ weight[:, part].T
            if gemma:
                whole = own @ weight.T
                post = blocks[layer].post_attention_layernorm
                written = written * (1 + post.weight) / (whole.square().mean(-1, keepdim=True) + post.eps).sqrt()
            if gpt2:
                normed = (written - written.mean(-1, keepdim=True)) * norm.weight
                normed = normed / (x.var(-1, correction=0, keepdim=True) + epsilon).sqrt()
            else:
                normed = written * (1 + norm.weight if gemma else norm.weight)
                normed = normed / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
            torch.testing.assert_close(found[:, layer, head], (normed * towards).sum(-1), atol=1e-4, rtol=1e-4)
    assert len(hidden) == any_tiny.n_layers + 1


def test_parts_add_up_to_the_logit_difference(tiny_llama: LanguageModel) -> None:
    """Embedding, heads and MLPs; Llama's projections have no bias."""
    rows, _ = aligned(tiny_llama)
    run = PlainRun.of(tiny_llama, rows.ids)
    mlps = [Site("mlp_out", layer) for layer in range(tiny_llama.n_layers)]
    read = capture(tiny_llama, TokenBatch.full(rows.ids), mlps)
    x = rows.at(run.inputs[-1], "END")
    final, head = fixed_norm(tiny_llama.layout.final_norm, x), tiny_llama.hf.lm_head.weight
    towards = head[rows.answers[:, 0]] - head[rows.answers[:, 1]]
    others = [run.inputs[0], *read.values()]
    total = sum((final(rows.at(part, "END")) * towards).sum(-1) for part in others)
    total = total + direct_effects(tiny_llama, rows, run).sum((1, 2))
    expected = logit_difference(Unembedding(tiny_llama), x, rows.answers)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)
    last = logits(tiny_llama, rows.ids)[torch.arange(len(x)), rows.positions["END"]]
    torch.testing.assert_close(
        expected, (last.gather(1, rows.answers) * torch.tensor([1, -1])).sum(1), atol=1e-4, rtol=1e-4
    )


def test_a_norm_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="norm Tanh: it is neither a LayerNorm nor an RMSNorm"):
        fixed_norm(nn.Tanh(), torch.randn(2, 8))


def test_attention_is_a_softmax_over_what_came_before(tiny_gpt2: LanguageModel, tiny_gemma3: LanguageModel) -> None:
    """GPT-2's first layer from its own weights; Gemma 3's window of 8."""
    rows, _ = aligned(tiny_gpt2)
    found = attention_from(tiny_gpt2, rows, "S2")
    block, hf = tiny_gpt2.hf.transformer.h[0], tiny_gpt2.hf
    x = hf.transformer.wte(rows.ids) + hf.transformer.wpe(torch.arange(rows.ids.shape[1]))
    q, k, _ = block.attn.c_attn(block.ln_1(x)).split(32, dim=-1)
    at = rows.positions["S2"]
    for prompt in range(len(rows.ids)):
        seen = int(at[prompt]) + 1
        scores = q[prompt, seen - 1].unflatten(0, (4, 8)) * k[prompt, :seen].unflatten(1, (4, 8)) / 8**0.5
        torch.testing.assert_close(found[prompt, 0, :, :seen], scores.sum(-1).softmax(0).T, atol=1e-5, rtol=1e-5)
        assert not found[prompt, :, :, seen:].any()
    assert tiny_gpt2.hf.config._attn_implementation == "sdpa"
    windowed = attention_from(tiny_gemma3, aligned(tiny_gemma3)[0], "END")
    assert not windowed[:, 0, :, :-8].any()
    assert windowed[:, 2, :, :-8].any()
