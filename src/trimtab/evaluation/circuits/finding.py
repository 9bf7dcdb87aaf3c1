"""Find the IOI circuit of a model: from the logits back, each kind of head through the one behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import ROLES, Circuit, CircuitHead, Role
from trimtab.evaluation.circuits.direct_effects import attention_from, direct_effects
from trimtab.evaluation.circuits.patched_runs import head_location
from trimtab.evaluation.circuits.path_patching import path_patch
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows, logit_difference, rows_of
from trimtab.lm import LanguageModel
from trimtab.lm.unembedding import Unembedding
from trimtab.stats import Interval, bootstrap_mean
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt
from trimtab.tasks.task import UnsuitedModelError

LEAST_ACCURACY, LEAST_ATTENTION = 0.5, 0.1


def check_solves(
    model: LanguageModel, runs: Iterable[tuple[PromptRows, PlainRun]], *, force: bool = False
) -> tuple[Interval, Interval]:
    """Logit difference and accuracy (the likeliest token is the right name) in plain runs.

    Raises:
        UnsuitedModelError: the model names the right one in fewer than half of the prompts, unless it is forced.
    """
    unembedding, differences, right = Unembedding(model), list[Tensor](), list[Tensor]()
    for rows, run in runs:
        last = rows.at(run.inputs[-1], "END")
        differences.append(logit_difference(unembedding, last, rows.answers))
        right.append(unembedding.logits(last).argmax(-1) == rows.answers[:, 0])
    difference, accuracy = bootstrap_mean(torch.cat(differences).cpu()), bootstrap_mean(torch.cat(right).float().cpu())
    if accuracy.estimate < LEAST_ACCURACY and not force:
        named = f"it names the right one in {accuracy.estimate:.0%} of {accuracy.n} prompts"
        raise UnsuitedModelError(
            f"the IOI circuit of {model.name}",
            f"{named}, a circuit needs {LEAST_ACCURACY:.0%}",
            "choose another model, or force it",
        )
    return difference, accuracy


def find_circuit(
    model: LanguageModel,
    ioi: IOIDistribution,
    prompts: Sequence[IOIPrompt],
    *,
    share: float = 0.02,
    most: int = 8,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Circuit:
    """The heads of each role.

    Heads that act on the logits directly (name movers and others) by direct logit attribution; S-inhibition heads by
    path patching into the queries of all of these; induction and duplicate-token heads into the keys and values at S2
    of all heads that look there from the end; previous-token heads into the induction heads' keys at S1+1. Corrupted
    prompts name three other persons. A head has a role if its mean effect is at least a share of the logit difference,
    beyond two standard errors of it, and if it looks where the role looks: with a weight of 0.1, and more than where
    the neighbouring role looks.

    Args:
        model: with attention sites.
        ioi: where the prompts are from.
        prompts: some dozens.
        share: a head's least effect, as a share of the logit difference.
        most: heads per role.
        seed: of the corrupted prompts.
        force: go on although the model does not solve the task.
        progress: called with the number of layers that were patched.

    Raises:
        UnsuitedModelError: the model names the right one too seldom, or no head is a name mover.
        UserError: fewer than two prompts.
    """
    if len(prompts) < 2:
        raise UserError(f"{len(prompts)} prompts", "an effect's standard error takes two", "give some dozens")
    batches = list(_aligned(model, ioi, prompts, seed))
    difference, accuracy = check_solves(model, ((rows, run) for rows, _, run in batches), force=force)
    least = share * abs(difference.estimate)
    heads: list[CircuitHead] = []

    def add(role: str, effects: Tensor, fits: Tensor) -> list[CircuitHead]:
        position, looks_at, *_ = ROLES[role]
        weights = attention[position].get(looks_at)
        found = _strongest(role, effects, fits & _large(effects, least), weights)[:most]
        heads.extend(found)
        return found

    attention = {place: _attention(model, batches, place) for place in ("END", "S2", "S1+1")}
    looks = {role: _looks(attention[found.position], found) for role, found in ROLES.items()}
    direct = torch.cat([direct_effects(model, rows, run) for rows, _, run in batches])
    positive = direct.mean(0) > 0
    movers = add("name mover", direct, positive & looks["name mover"])
    suppressors = add("S suppressor", direct, positive & looks["S suppressor"])
    add("negative name mover", direct, ~positive & looks["negative name mover"])
    add("other direct", direct, ~looks["name mover"] & ~(positive & looks["S suppressor"]))
    if not movers:
        raise UnsuitedModelError(
            f"the IOI circuit of {model.name}",
            f"no head adds {share:.0%} of the logit difference ({difference:.2f}) and looks at IO more than at S2",
            "choose another model, or a lower share",
        )

    def taken_away(kinds: Sequence[str], through: Sequence[CircuitHead], position: str, *roles: str) -> Tensor:
        """What patching takes from the logit difference, of the heads that look where one of the roles does."""
        receivers = [head_location(model, kind, h.layer, h.head, position) for kind in kinds for h in through]
        if not receivers:
            return torch.zeros_like(direct)
        senders = torch.stack([looks[role] for role in roles]).any(0)
        changes = [path_patch(model, rows, other, receivers, progress, senders) for rows, other, _ in batches]
        return -torch.cat(changes)

    def add_patched(role: str, effects: Tensor) -> list[CircuitHead]:
        return add(role, effects, (effects.mean(0) > 0) & looks[role])

    inhibition = add_patched("S-inhibition", taken_away(["attn_q"], list(heads), "END", "S-inhibition"))
    at_s2 = taken_away(["attn_k", "attn_v"], [*suppressors, *inhibition], "S2", "induction", "duplicate token")
    induction = add_patched("induction", at_s2)
    add_patched("duplicate token", at_s2)
    add_patched("previous token", taken_away(["attn_k"], induction, "S1+1", "previous token"))
    return Circuit(
        model=model.name, fingerprint=model.fingerprint, heads=tuple(heads), logit_difference=difference,
        accuracy=accuracy, templates=tuple(dict.fromkeys(p.template for p in prompts)), seed=seed, share=share,
    )  # fmt: skip


def _aligned(
    model: LanguageModel, ioi: IOIDistribution, prompts: Sequence[IOIPrompt], seed: int
) -> Iterator[tuple[PromptRows, Tensor, PlainRun]]:
    """Rows, the ids of their corrupted prompts, and a plain run."""
    for rows in rows_of([ioi.tokenise(prompt) for prompt in prompts], model):
        other = [ioi.tokenise(ioi.without_repeat(prompts[number], seed=seed)) for number in rows.numbers]
        yield rows, torch.tensor([prompt.ids for prompt in other], device=rows.ids.device), PlainRun.of(model, rows.ids)


def _attention(
    model: LanguageModel, batches: Sequence[tuple[PromptRows, Tensor, PlainRun]], position: str
) -> dict[str, Float[Tensor, "layers heads"]]:
    """Mean weight from a position on each of the others."""
    found: dict[str, list[Tensor]] = {}
    for rows, _, _ in batches:
        weights = attention_from(model, rows, position).permute(0, 3, 1, 2)
        for name in rows.positions:
            found.setdefault(name, []).append(rows.at(weights, name))
    return {name: torch.cat(parts).mean(0) for name, parts in found.items()}


def _looks(attention: Mapping[str, Float[Tensor, "layers heads"]], role: Role) -> Bool[Tensor, "layers heads"]:
    """Whether heads look where the role looks, more than where its neighbour does."""
    if not role.looks_at:
        return torch.ones_like(attention["END"], dtype=torch.bool)
    there = attention[role.looks_at]
    return (there >= LEAST_ATTENTION) & (there > attention[role.instead_of])


def _large(effects: Float[Tensor, "P layers heads"], least: float) -> Bool[Tensor, "layers heads"]:
    mean, error = effects.mean(0).abs(), effects.std(0) / len(effects) ** 0.5
    return (mean >= least) & (mean > 2 * error)


def _strongest(
    role: str, effects: Float[Tensor, "P layers heads"], fits: Bool[Tensor, "layers heads"], weights: Tensor | None
) -> list[CircuitHead]:
    """The heads that fit, with their effects."""
    size = effects.mean(0).abs()
    return [
        CircuitHead(
            layer=layer, head=head, role=role, effect=bootstrap_mean(effects[:, layer, head].cpu()),
            attention=None if weights is None else float(weights[layer, head]),
        )
        for layer, head in sorted(fits.nonzero().tolist(), key=lambda at: -float(size[tuple(at)]))
    ]  # fmt: skip
