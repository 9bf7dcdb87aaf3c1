"""First-order effects against finite differences, slow autograd, and what is planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted_wishes import (
    HELD_FEATURE,
    N_FEATURES,
    SITE,
    SITES,
    UP_FEATURE,
    Ground,
    contrast_wish,
    texts_wish,
    words_wish,
)  # fmt: skip

from trimtab.finding.examples import Examples
from trimtab.finding.first_order import first_order
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.steering import DirectionTable

KINDS = {
    "texts": texts_wish(6),
    "contrast": contrast_wish(6, ("YY", "N")),
    "words": words_wish(6, more=("Y", "bcY"), less=("N",)),
    "words-more": words_wish(6, less=()),
    "words-less": words_wish(6, more=()),
}
EPSILON = 1e-3
"""The norms of the model compute in single precision whatever it is loaded in."""


def tables(ground: Ground) -> dict[Any, DirectionTable]:
    return {site: DirectionTable.of(sae) for site, sae in ground.saes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_additions_are_finite_differences(exact_ground: Ground, kind: str) -> None:
    model, saes = exact_ground
    examples = KINDS[kind].examples(model)
    found = first_order(model, saes, examples)
    scores, at = scorer(model, examples, SITES), tables(exact_ground)
    for site in SITES:
        up, down = (
            scores.effects(at, [SteeringEdit((Part(site, i, e),)) for i in range(N_FEATURES)]).mean(1)
            for e in (EPSILON, -EPSILON)
        )
        slope = (up - down) / (2 * EPSILON)
        assert (found[site].add - slope).abs().max() < 1e-3 * slope.abs().max()


def test_removals_are_derivatives(exact_ground: Ground) -> None:
    """Of the score by a factor on each feature's contribution, through plain autograd without any cache."""
    model, saes = exact_ground
    examples = contrast_wish(5, ("YY", "N")).examples(model)
    sae, found = saes[SITE], first_order(model, saes, examples)[SITE].remove
    factor = torch.ones(N_FEATURES, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for example in examples.examples:
        logp = torch.stack([slow_log_prob(model, one, sae, factor) for one in example.answered])
        total = total + example.score(logp)
    (slope,) = torch.autograd.grad(total / len(examples), factor)
    assert (found + slope).abs().max() < 1e-5  # removing takes the factor from 1 to 0
    assert found.abs().max() > 0.01


def slow_log_prob(model: Any, one: Any, sae: Any, factor: torch.Tensor) -> torch.Tensor:
    """Log-probability of an answer by one whole forward pass, every feature's contribution multiplied by a factor."""

    def scale(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        edited = x.clone()
        mine = x[:, len(one.prompt) - 1 :].detach()
        edited[:, len(one.prompt) - 1 :] = mine + (sae.encode(mine).detach() * (factor - 1)) @ sae.W_dec.detach()
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    ids = torch.tensor([[*one.prompt, *one.answer]])
    handle = model.hf.model.layers[SITE.layer].register_forward_hook(scale)
    try:
        logits = model.hf(ids).logits[0]
    finally:
        handle.remove()
    places = torch.arange(len(one.prompt) - 1, ids.shape[1] - 1)
    return logits.log_softmax(-1)[places, ids[0, places + 1]].sum()


@pytest.mark.parametrize("kind", ["texts", "contrast", "words"])
def test_the_planted_feature_is_first_with_its_sign_and_layer(ground: Ground, kind: str) -> None:
    model, saes = ground
    wish = {"texts": texts_wish(12), "contrast": contrast_wish(12), "words": words_wish(12)}[kind]
    found = first_order(model, saes, wish.examples(model))
    add = torch.cat([found[site].add for site in SITES])
    best = int(add.abs().argmax())
    assert divmod(best, N_FEATURES) == (SITES.index(SITE), UP_FEATURE)
    assert add[best] < 0
    # HELD favours N, and its feature fires everywhere; of two that fire and do much, the planted one is first.
    remove = torch.cat([found[site].remove for site in SITES])
    assert divmod(int(remove.argmax()), N_FEATURES) == (SITES.index(SITE), HELD_FEATURE)


def test_around_a_steered_point(exact_ground: Ground) -> None:
    """The gradient of what is added to an edit that is there already."""
    model, saes = exact_ground
    examples, at = contrast_wish(4, ("YY", "N")).examples(model), tables(exact_ground)
    there = SteeringEdit((Part(SITES[0], 5, 0.5),))
    found = first_order(model, saes, examples, at=there, tables=at)
    scores = scorer(model, examples, SITES)
    for site in SITES[1:]:  # at its own site, ‖x‖ is that before the first edit
        both = [SteeringEdit((*there.parts, Part(site, i, e))) for e in (EPSILON, -EPSILON) for i in range(N_FEATURES)]
        up, down = scores.effects(at, both).mean(1).split(N_FEATURES)
        slope = (up - down) / (2 * EPSILON)
        assert (found[site].add - slope).abs().max() < 1e-3 * slope.abs().max()


def test_what_features_read(ground: Ground) -> None:
    """Mean codes on the answers' own tokens, against whole forward passes."""
    model, saes = ground
    examples = texts_wish(5).examples(model)
    found = first_order(model, saes, examples)[SITE]
    codes: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for example in examples.examples:
        for wanted, one in zip((True, False), example.answered, strict=True):
            states = model.hf(torch.tensor([[*one.prompt, *one.answer]]), output_hidden_states=True).hidden_states
            x = states[SITE.layer + 1][0, len(one.prompt) :]
            codes[wanted].append(saes[SITE].encode(x).mean(0))
    yes, no = (torch.stack(codes[kind]) for kind in (True, False))
    assert torch.allclose(found.reads, yes.mean(0) - no.mean(0), atol=1e-5)
    won = (yes[:, None] > no[None]).float() + 0.5 * (yes[:, None] == no[None]).float()
    assert torch.allclose(found.auc, won.mean((0, 1)), atol=1e-6)


def test_batches_change_nothing(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.finding import passes

    model, saes = ground
    examples: Examples = texts_wish(6).examples(model)
    whole = first_order(model, saes, examples)[SITE]
    monkeypatch.setattr(passes, "ROWS", 2)
    parts = first_order(model, saes, examples)[SITE]
    for name in ("add", "remove", "reads", "auc", "difference"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5), name
