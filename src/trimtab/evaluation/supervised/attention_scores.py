"""A head's attention score from END to a name, as what the model computes from the head's query and key sites.

score = s · A_q(q) · A_k(k): A is QK-norm, if the model has it, with the scale of the plain run, and then the model's
own rotation at the token's position; s is the model's scaling. Behind the sites all of it is linear in q and in k, so
that parts of a query and of a key have scores that add up to the head's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.evaluation.circuits.direct_effects import attention_from, fixed_norm
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.circuits.rows import rows_of
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.lm import LanguageModel, Site, TokenBatch, capture
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt, TokenisedPrompt

KEYS = ("IO", "S1")
"""Positions whose keys are looked at."""
CLOSE = {torch.float32: 1e-3}
"""How far scores may be from the model's own, as a share of their size; in lower precision 0.1."""

EVERY = slice(None)
"""All prompts."""
UNDERFLOW = -80.0
"""Below this log a weight may be 0 without being masked."""

Rotary = tuple[Float[Tensor, "T w"], Float[Tensor, "T w"]]
"""Cosines and sines of a rotary position embedding."""


class ScoredHead(NamedTuple):
    """A head's score on P prompts, as a product of parts of its query and of its key."""

    name: str
    query: Location
    keys: Mapping[str, Location]
    scaling: float
    through: Mapping[Location, Callable[[Tensor, slice], Tensor]]
    """Per location, parts of the activations of some of the prompts `[p, a, w]` as they enter the product, in
    float64."""

    def scores(self, activations: Values) -> dict[str, Float[Tensor, " P"]]:
        """Per position of a key the head's score, before the softmax."""
        q = self.through[self.query](activations[self.query][:, None], EVERY)
        return {
            position: self.scaling * (q * self.through[key](activations[key][:, None], EVERY)).sum((1, 2))
            for position, key in self.keys.items()
        }


def score_locations(model: LanguageModel, heads: Iterable[tuple[int, int]]) -> tuple[Location, ...]:
    """What heads read for their scores: queries at END, keys at IO and S1, of grouped-query attention their group's.

    Raises:
        UserError: there is no such head.
    """
    found = [
        head_location(model, kind, layer, head, position)
        for layer, head in heads
        for kind, position in (("attn_q", "END"), *(("attn_k", key) for key in KEYS))
    ]
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def scored_heads(
    model: LanguageModel,
    ioi: IOIDistribution,
    prompts: Sequence[IOIPrompt],
    heads: Sequence[tuple[int, int]],
    activations: Values,
) -> list[ScoredHead]:
    """How the scores of heads (layer, query head) come from what stands at their sites.

    Args:
        model: with attention sites.
        ioi: where the prompts are from.
        prompts: P of them.
        heads: whose scores.
        activations: of the same prompts in plain runs, at `score_locations`; `[P, w]` each.

    Raises:
        UserError: the model caps its scores, has a norm over all heads, rotates a part of a head, or does not say its
            scaling or rotation.
    """
    tokenised = [ioi.tokenise(prompt) for prompt in prompts]
    modules = {layer: _attention(model, layer) for layer, _ in heads}
    rotations = _rotations(model, modules, tokenised)
    found: list[ScoredHead] = []
    for layer, head in heads:
        module, name = modules[layer], f"{layer}.{head}"
        query, *keys = score_locations(model, [(layer, head)])
        through = {
            place: _through(model, module, place, activations[place], rotations[layer], tokenised)
            for place in (query, *keys)
        }
        found.append(
            ScoredHead(name, query, {key.position: key for key in keys}, float(module.scaling), through)  # type: ignore[arg-type]
        )
    return found


@torch.no_grad()
def check_scores(
    model: LanguageModel,
    ioi: IOIDistribution,
    prompts: Sequence[IOIPrompt],
    heads: Sequence[ScoredHead],
    activations: Values,
    batch_size: int = 64,
) -> None:
    """Compare with the model's own attention: log-weights of two keys differ as their scores do.

    Raises:
        UserError: a head does not reach from END to the names, or its scores come about in another way.
    """
    weights: dict[str, list[Tensor]] = {head.name: [] for head in heads}
    order: list[int] = []
    for rows in rows_of([ioi.tokenise(prompt) for prompt in prompts], model, batch_size=batch_size):
        attention = attention_from(model, rows, "END").permute(0, 3, 1, 2)  # [B, T, layers, heads]
        both = torch.stack([rows.at(attention, key) for key in KEYS], 1).cpu().double()
        for head in heads:
            layer, number = (int(part) for part in head.name.split("."))
            weights[head.name].append(both[:, :, layer, number])
        order += rows.numbers
    back = torch.tensor(order).argsort()
    for head in heads:
        own, scores = torch.cat(weights[head.name])[back], head.scores(activations)
        found, log = torch.stack([scores[key] for key in KEYS], 1), own.log()
        expected = log.flip(1) + found - found.flip(1)  # one key's log-weight by the other's
        if ((own == 0) & ((expected > UNDERFLOW) | expected.isinf())).any():
            why = "its attention at END does not reach IO and S1 in every prompt, as where a window is shorter"
            raise UserError(f"head {head.name} of {model.name}", why, "leave it out, or use shorter templates")
        wrong = (expected - log)[(own > 0).all(1)].square().mean().sqrt()
        if wrong > CLOSE.get(model.dtype, 0.1) * max(1.0, float(found.square().mean().sqrt())):
            raise UserError(
                f"attention scores of {model.name}",
                f"those of head {head.name} are not scaled products of normed and rotated queries and keys",
                "use another model",
            )


def _attention(model: LanguageModel, layer: int) -> nn.Module:
    """A layer's attention, if its scores are products."""
    model.site(Site("attn_q", layer))
    block = model.layout.layers[layer].module
    module = getattr(block, "self_attn", None) or getattr(block, "attn", None)
    assert isinstance(module, nn.Module)
    what = f"attention scores of {model.name}"
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap:
        raise UserError(what, f"they are capped (attn_logit_softcapping {cap:g})", "use a model without a cap")
    if getattr(module, "scaling", None) is None:
        raise UserError(what, f"{type(module).__name__} does not say its scaling", "use another model")
    return module


def _rotations(
    model: LanguageModel, modules: Mapping[int, nn.Module], prompts: Sequence[TokenisedPrompt]
) -> dict[int, dict[int, Rotary]]:
    """Per layer and length of a prompt the cosines and sines that the model hands to attention; none in GPT-2."""
    found: dict[int, dict[int, Rotary]] = {layer: {} for layer in modules}
    if not modules:
        return found
    for length, ids in {len(prompt.ids): prompt.ids for prompt in prompts}.items():

        def keep(layer: int, kwargs: dict[str, Any], length: int = length) -> None:
            given = kwargs.get("position_embeddings")
            if given is not None:
                cos, sin = (part[0].double().cpu() for part in given)
                found[layer][length] = cos, sin

        handles = [
            module.register_forward_pre_hook(lambda _m, _a, kwargs, at=layer: keep(at, kwargs), with_kwargs=True)
            for layer, module in modules.items()
        ]
        try:
            batch = TokenBatch.full(torch.tensor([ids], device=model.device))
            capture(model, batch, [Site("attn_q", max(modules))])
        finally:
            for handle in handles:
                handle.remove()
    return found


def _through(
    model: LanguageModel,
    module: nn.Module,
    place: Location,
    x: Float[Tensor, "P w"],
    rotations: Mapping[int, Rotary],
    prompts: Sequence[TokenisedPrompt],
) -> Callable[[Tensor, slice], Tensor]:
    """QK-norm as it is at x, then the rotation at each prompt's position."""
    part, width, what = place.site.kind[-1], x.shape[1], f"attention scores of {model.name}"
    norm = getattr(module, f"{part}_norm", None)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.shape != (width,):
        raise UserError(what, "its QK-norm is over all heads together", "use another model")
    norm = None if norm is None else copy.deepcopy(norm).cpu()
    if not rotations:
        return lambda parts, rows: fixed_norm(norm, x[rows])(parts.double())
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    both = [[rotations[len(p.ids)][side][p.positions[place.position]] for p in prompts] for side in (0, 1)]
    cos, sin = (torch.stack(rows)[:, None] for rows in both)  # [P, 1, w]
    if rotate is None:
        raise UserError(what, "it does not say how it rotates queries and keys", "use another model")
    if cos.shape[-1] != width:
        raise UserError(what, "it rotates only part of each head", "use another model")

    def through(parts: Float[Tensor, "p a w"], rows: slice) -> Float[Tensor, "p a w"]:
        normed = fixed_norm(norm, x[rows])(parts.double())[:, :, None]  # heads are where a model has them, of one token
        return rotate(normed, normed, cos[rows], sin[rows])[0 if part == "q" else 1][:, :, 0]

    return through
