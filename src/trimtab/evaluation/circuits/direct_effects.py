"""Direct logit attribution, and where heads look.

A residual is a sum, and the final norm divides all of it by one number. With that number fixed, what a head adds to the
difference of two logits is a product of its output with the head's rows, and the parts add up to the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows
from trimtab.lm import LanguageModel, Site
from trimtab.lm.unembedding import Unembedding

LARGE = 1e4
"""A constant vector so long that a norm's epsilon does not count beside it."""


def fixed_norm(norm: nn.Module | None, x: Float[Tensor, "B d"]) -> Callable[[Tensor], Tensor]:
    """A norm with the scale that it has at x: a linear map, which parts of x `[B, ..., d]` may be put through.

    The parts' images add up to the norm of x, a LayerNorm's bias aside.

    Raises:
        UserError: it is neither a LayerNorm nor an RMSNorm.
    """
    if norm is None:
        return lambda part: part
    norm, x = copy.deepcopy(norm).float(), x.float()  # what is split into parts must add up
    centred = isinstance(norm, nn.LayerNorm)
    weight = norm.weight if centred else norm(torch.full_like(x[:1], LARGE))[0]
    bias = norm.bias if centred and norm.bias is not None else torch.zeros_like(weight)

    def unscaled(part: Tensor) -> Tensor:
        return weight * (part - part.mean(-1, keepdim=True) if centred else part)

    whole, normed = unscaled(x), norm(x) - bias
    scale = (normed * whole).sum(-1) / whole.square().sum(-1)
    if not torch.allclose(scale[:, None] * whole, normed, atol=1e-3 * float(normed.abs().max()), rtol=1e-3):
        raise UserError(f"norm {type(norm).__name__}", "it is neither a LayerNorm nor an RMSNorm", "use another model")
    return lambda part: unscaled(part) * scale.reshape(-1, *[1] * (part.ndim - 1))


@torch.no_grad()
def direct_effects(
    model: LanguageModel, rows: PromptRows, run: PlainRun | None = None
) -> Float[Tensor, "B layers heads"]:
    """What each head's output at the last token adds to the logit of the right name minus that of the wrong one.

    Norms behind it (Gemma's after attention, the final one) have the scale of the plain run; a soft cap on logits is
    left out.

    Args:
        model: with attention sites.
        rows: the prompts.
        run: a plain run of them, if there is one.

    Raises:
        UserError: a norm that is neither a LayerNorm nor an RMSNorm.
    """
    run = run or PlainRun.of(model, rows.ids)
    final = fixed_norm(model.layout.final_norm, rows.at(run.inputs[-1], "END"))
    head = Unembedding(model).head.weight
    towards = head[rows.answers[:, 0]].float() - head[rows.answers[:, 1]].float()  # type: ignore[index]
    effects = []
    for layer, found in enumerate(model.layout.layers):
        model.site(Site("attn_out", layer))
        assert found.attention is not None
        out, z = found.attention.out, rows.at(run.z[layer], "END")
        alone = torch.diag_embed(z.transpose(1, 2)).permute(0, 2, 3, 1).flatten(2)  # [B, heads, heads · head_dim]
        parts = out(alone) - out(torch.zeros_like(alone))
        if found.attn_branch is not out:
            parts = fixed_norm(found.attn_branch, out(z.flatten(1)))(parts)
        effects.append((final(parts) * towards[:, None]).sum(-1))
    return torch.stack(effects, 1)


@torch.no_grad()
def attention_from(model: LanguageModel, rows: PromptRows, position: str) -> Float[Tensor, "B layers heads T"]:
    """Attention weights of every head from one position to all tokens.

    Raises:
        UserError: the model does not give them.
    """
    with _eager_attention(model):
        found = model.call(input_ids=rows.ids, use_cache=False, output_attentions=True, logits_to_keep=1).attentions
    if not found or any(weights is None for weights in found):
        raise UserError(f"model {model.name}", "it does not give attention weights", "use another model")
    return torch.stack([rows.at(weights.transpose(1, 2), position) for weights in found], 1)


@contextmanager
def _eager_attention(model: LanguageModel) -> Iterator[None]:
    """The implementation that computes weights; others give none."""
    before = str(model.hf.config._attn_implementation)
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)
