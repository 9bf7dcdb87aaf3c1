"""Test 2 of Makelov, Lange and Nanda 2024: can an attribute be changed through a dictionary, and at what price?

Every edit turns activations into others. It is a success where the model's likeliest token, of the whole vocabulary, is
the one that it gives when the locations are those of the true counterfactual; prompts on which that patch changes
nothing say nothing, and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.supervised.codes import Codes
from trimtab.evaluation.supervised.cross_sections import Answers
from trimtab.stats import Interval, bootstrap_mean


class EditedRows(NamedTuple):
    """Activations after an edit, and how much was taken out of them."""

    x: Tensor  # [P, width]
    removed: Tensor  # [P] summed weight of what was taken out; 1 is everything that the dictionary sees


def weights(f: Float[Tensor, "P n"], rows: Float[Tensor, "n width"]) -> Float[Tensor, "P n"]:
    """How much of a reconstruction each feature is: f_i u_i · (â − b) / ‖â − b‖². They sum to 1."""
    whole = f @ rows
    return f * (whole @ rows.T) / whole.square().sum(-1, keepdim=True).clamp_min(torch.finfo(f.dtype).tiny)


def edit_supervised(
    x: Float[Tensor, "P width"], codes: Codes, old: Int[Tensor, "P F"], new: Int[Tensor, "P F"]
) -> EditedRows:
    """a − u_v + u_v' for every factor whose value changes."""
    changed = old != new
    vectors = codes.vectors
    f = torch.zeros(len(x), len(vectors), dtype=x.dtype, device=x.device).scatter_(1, old, 1.0)
    removed = (weights(f, vectors).gather(1, old) * changed).sum(1)
    delta = ((vectors[new] - vectors[old]) * changed[..., None]).sum(1)
    return EditedRows(x + delta, removed)


def edit_greedy(
    dictionary: Dictionary, x: Float[Tensor, "P width"], counterfactual: Float[Tensor, "P width"], k: int
) -> EditedRows:
    """Give at most k features their counterfactual codes so that the activation comes nearest to the counterfactual.

    Interpretation-agnostic. The best one or two features are found by trying all; from the third on, each is the one
    that brings the activation nearest. Features that do not help are left as they are. (The authors' code takes
    one after the other from the first on, and always k.)

    Raises:
        UserError: k is below 1.
    """
    if k < 1:
        raise UserError(f"k = {k}", "at least one feature must be changed", "raise it")
    rows = dictionary.W_dec.detach()
    before, after = dictionary.encode(x), dictionary.encode(counterfactual)
    change = after - before
    target = counterfactual - x
    gain = _gains(change, rows, target)
    chosen = torch.zeros_like(change, dtype=torch.bool)
    best, first = gain.max(1)
    chosen[torch.arange(len(x)), first] = best > 0
    if k > 1:
        for prompt in range(len(x)):
            pair = _best_pair(change[prompt], rows, gain[prompt])
            if pair is not None:
                chosen[prompt] = False
                chosen[prompt, pair] = True
    for _ in range(2, k):
        left = target - (change * chosen) @ rows
        gain = _gains(change, rows, left).masked_fill(chosen, 0)
        best, nearest = gain.max(1)
        chosen[torch.arange(len(x)), nearest] |= best > 0
    return _exchanged(x, before, change, rows, chosen)


def edit_by_meaning(
    dictionary: Dictionary,
    x: Float[Tensor, "P width"],
    counterfactual: Float[Tensor, "P width"],
    old: Float[Tensor, "P n"],
    new: Float[Tensor, "P n"],
    k: int,
) -> EditedRows:
    """Take out the k active features that say the old value best, and put in the k that say the new one best.

    Interpretation-aware.

    Args:
        dictionary: the dictionary.
        x: activations.
        counterfactual: those of the counterfactual prompts, whose active features are put in, as strong as there.
        old: per prompt each feature's F1 for its old value.
        new: the same for its new value.
        k: features each way.
    """
    rows = dictionary.W_dec.detach()
    before, after = dictionary.encode(x), dictionary.encode(counterfactual)
    out = _strongest(old.masked_fill(before <= 0, -1), k)
    into = _strongest(new.masked_fill(after <= 0, -1), k)
    removed = (weights(before, rows) * out).sum(1)
    return EditedRows(x - (before * out) @ rows + (after * into) @ rows, removed)


def _strongest(scores: Float[Tensor, "P n"], k: int) -> Bool[Tensor, "P n"]:
    best, index = scores.topk(min(k, scores.shape[1]), dim=1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, best >= 0)


def _gains(
    change: Float[Tensor, "P n"], rows: Float[Tensor, "n width"], target: Float[Tensor, "P width"]
) -> Float[Tensor, "P n"]:
    """How much nearer, in squared distance, each feature's change alone brings."""
    return 2 * change * (target @ rows.T) - change.square() * rows.square().sum(1)


def _best_pair(
    change: Float[Tensor, " n"], rows: Float[Tensor, "n width"], gain: Float[Tensor, " n"]
) -> Int[Tensor, 2] | None:
    """The two features that together bring nearest; None where one of them alone is as good."""
    able = change.nonzero().squeeze(1)
    if len(able) < 2:
        return None
    steps = change[able, None] * rows[able]
    both = gain[able][:, None] + gain[able] - 2 * steps @ steps.T
    both.fill_diagonal_(-torch.inf)
    at = int(both.argmax())
    pair = torch.stack([able[at // len(able)], able[at % len(able)]])
    return pair if float(both.flatten()[at]) > max(float(gain.max()), 0.0) else None


def _exchanged(x: Tensor, before: Tensor, change: Tensor, rows: Tensor, chosen: Bool[Tensor, "P n"]) -> EditedRows:
    removed = (weights(before, rows) * chosen).sum(1)
    return EditedRows(x + (change * chosen) @ rows, removed)


@dataclass(frozen=True, kw_only=True)
class EditSuccess:
    """How an edit of an attribute did."""

    success: Interval | None
    """Share of the counted prompts on which it does what the true counterfactual does; None if none counts."""
    counted: int
    """Prompts on which the true counterfactual patch changes the likeliest token."""
    removed: Interval
    """Weight taken out, mean over locations and prompts."""


def edit_success(plain: Answers, patched: Answers, edited: Answers, removed: Float[Tensor, " P"]) -> EditSuccess:
    """Compare an edit with true counterfactual patching.

    Args:
        plain: answers without any patch.
        patched: with the counterfactual activations.
        edited: with the edited ones.
        removed: weight taken out, mean over locations.
    """
    counts = patched.token != plain.token
    hit = (edited.token == patched.token)[counts].double().cpu().numpy()
    return EditSuccess(
        success=bootstrap_mean(hit) if len(hit) else None,
        counted=int(counts.sum()),
        removed=bootstrap_mean(removed.double().cpu().numpy()),
    )
