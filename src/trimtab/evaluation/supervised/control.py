"""Test 2 of Makelov, Lange and Nanda 2024: can an attribute be changed through a dictionary, and at what price?

Every edit turns activations into others. It is a success where the model's likeliest token, of the whole vocabulary, is
the one that it gives when the locations are those of the true counterfactual; prompts on which that patch changes
nothing say nothing, and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.approximation import share_of_effect
from trimtab.evaluation.supervised.codes import Codes
from trimtab.evaluation.supervised.cross_sections import Answers, PatchedPrompts
from trimtab.stats import Interval, bootstrap_mean

LEAST_COUNTED = 10
"""Prompts that the true patch must change; an interval of fewer says nothing."""


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
    return edits_greedy(dictionary, x, counterfactual, (k,))[k]


def edits_greedy(
    dictionary: Dictionary, x: Float[Tensor, "P width"], counterfactual: Float[Tensor, "P width"], ks: Sequence[int]
) -> dict[int, EditedRows]:
    """`edit_greedy` for several k, which share the search.

    Raises:
        UserError: a k below 1.
    """
    if (least := min(ks)) < 1:
        raise UserError(f"k = {least}", "at least one feature must be changed", "raise it")
    rows = dictionary.W_dec.detach()
    before, after = (dictionary.encode(each) * dictionary.code_unit(each) for each in (x, counterfactual))
    change, target, each = after - before, counterfactual - x, torch.arange(len(x))
    weight, found = weights(before, rows), dict[int, EditedRows]()
    alone = _gains(change, rows, target)
    chosen = torch.zeros_like(change, dtype=torch.bool)
    chosen[each, alone.argmax(1)] = alone.max(1).values > 0
    for k in range(1, max(ks) + 1):
        if k == 2:
            chosen = _best_pairs(change, rows, alone, chosen)
        elif k > 2:
            gain = _gains(change, rows, target - (change * chosen) @ rows).masked_fill(chosen, 0)
            best, nearest = gain.max(1)
            chosen[each, nearest] |= best > 0
        if k in ks:
            found[k] = EditedRows(x + (change * chosen) @ rows, (weight * chosen).sum(1))
    return found


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
    before, after = (dictionary.encode(each) * dictionary.code_unit(each) for each in (x, counterfactual))
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


def _best_pairs(
    change: Float[Tensor, "P n"],
    rows: Float[Tensor, "n width"],
    gain: Float[Tensor, "P n"],
    single: Bool[Tensor, "P n"],
) -> Bool[Tensor, "P n"]:
    """Per prompt the two features that together bring nearest; the single best one where none joins it to a gain."""
    chosen = single.clone()
    for prompt in range(len(change)):
        able = change[prompt].nonzero().squeeze(1)
        if len(able) < 2:
            continue
        steps = change[prompt, able, None] * rows[able]
        own = gain[prompt, able]
        both = own[:, None] + own - 2 * steps @ steps.T
        both.fill_diagonal_(-torch.inf)
        at = int(both.argmax())
        if float(both.flatten()[at]) > max(float(own.max()), 0.0):
            chosen[prompt] = False
            chosen[prompt, able[[at // len(able), at % len(able)]]] = True
    return chosen


@dataclass(frozen=True, kw_only=True)
class EditSuccess:
    """How an edit of an attribute did."""

    success: Interval | None
    """Share of the counted prompts on which it does what the true counterfactual does; None below `LEAST_COUNTED`."""
    counted: int
    """Prompts on which the true counterfactual patch changes the likeliest token."""
    agreement: Interval
    """The same share of all prompts, those included on which the true patch changes nothing."""
    removed: Interval
    """Weight taken out, mean over locations and prompts."""
    size: Interval
    """‖x′ − x‖ / ‖x‖, mean over locations and prompts."""
    effect: Interval | None = None
    """(LD(x′) − LD) / (LD(true patch) − LD), means over all prompts: 1 where the edit moves the logit difference as far
    as the true patch does. None where the interval of the patch's own effect holds 0."""


def edit_success(prompts: PatchedPrompts, patched: Answers, edits: Mapping[Location, EditedRows]) -> EditSuccess:
    """Compare an edit with true counterfactual patching.

    Args:
        prompts: what was edited.
        patched: their answers with the counterfactual activations.
        edits: at every location, all made at once.
    """
    answers = prompts.answers({place: edit.x for place, edit in edits.items()})
    counts = patched.token != prompts.plain.token
    agrees = (answers.token == patched.token).double().cpu().numpy()
    hit = agrees[counts.cpu().numpy()]
    sizes = [
        (edit.x - x).norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        for x, edit in ((prompts.activations[place], edit) for place, edit in edits.items())
    ]
    removed = [edit.removed for edit in edits.values()]
    return EditSuccess(
        success=bootstrap_mean(hit) if len(hit) >= LEAST_COUNTED else None,
        counted=len(hit),
        agreement=bootstrap_mean(agrees),
        removed=bootstrap_mean(torch.stack(removed).mean(0).double().cpu().numpy()),
        size=bootstrap_mean(torch.stack(sizes).mean(0).double().cpu().numpy()),
        effect=share_of_effect(patched, prompts.plain, answers),
    )


class Point(NamedTuple):
    """One edit on the plane of effect and cost."""

    number: int  # among those that were given
    cost: float
    effect: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The edits that no cheaper edit matches: cheapest first, each better than the last."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.effect)):
        if not best or point.effect > best[-1].effect:
            best.append(point)
    return best
