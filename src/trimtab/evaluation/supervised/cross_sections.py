"""Cross-sections of the IOI circuit: locations that together carry everything of a kind, and runs with them patched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError, did_you_mean
from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.patched_runs import Location, PatchedRuns, head_location
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows, logit_difference, rows_of
from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.lm.unembedding import Unembedding
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

Values = Mapping[Location, Float[Tensor, "P width"]]
MOVERS, INHIBITION = ("name mover",), ("S-inhibition",)
CROSS_SECTIONS: Mapping[str, tuple[tuple[tuple[str, ...], str, str], ...]] = {
    "name-mover outputs": ((MOVERS, "attn_z", "END"),),
    "direct outputs": ((("name mover", "S suppressor"), "attn_z", "END"),),
    "name-mover queries": ((MOVERS, "attn_q", "END"),),
    "name-mover queries and keys": ((MOVERS, "attn_q", "END"), (MOVERS, "attn_k", "IO"), (MOVERS, "attn_k", "S1")),
    "S-inhibition outputs": ((INHIBITION, "attn_z", "END"),),
    "S-inhibition values": ((INHIBITION, "attn_v", "S2"),),
    "keys of the second S": ((("S suppressor", "S-inhibition"), "attn_k", "S2"),),
    "induction and duplicate-token outputs": ((("induction", "duplicate token"), "attn_z", "S2"),),
}
"""Per cross-section: roles, what their heads give or read, and where. *Direct outputs* are name movers with the heads
that look at the second S, which small models have beside them; *keys of the second S* are what marks it for the heads
that look there, as Gemma 3 does it. The others are the paper's."""


def check_cross_section(name: str) -> None:
    """Raise a `UserError` if there is no such cross-section."""
    if name not in CROSS_SECTIONS:
        hint = did_you_mean(name, CROSS_SECTIONS, "choose one of them")
        raise UserError(f"cross-section {name!r}", f"there are {', '.join(CROSS_SECTIONS)}", hint)


def cross_section(name: str, circuit: Circuit, model: LanguageModel) -> tuple[Location, ...]:
    """The locations of a cross-section.

    Raises:
        UserError: no such cross-section, or the circuit has no head of its roles.
    """
    check_cross_section(name)
    found = [
        head_location(model, kind, head.layer, head.head, position)
        for roles, kind, position in CROSS_SECTIONS[name]
        for role in roles
        for head in circuit.of(role)
    ]
    if not found:
        roles = " or ".join(role for part in CROSS_SECTIONS[name] for role in part[0])
        raise UserError(f"cross-section {name}", f"the circuit has no head of role {roles}", "choose another")
    return tuple(dict.fromkeys(found))  # grouped queries share keys and values


def cross_sections(
    circuit: Circuit, model: LanguageModel, names: Sequence[str] = ()
) -> dict[str, tuple[Location, ...]]:
    """The locations of several cross-sections, by default of all of which a circuit has heads.

    Raises:
        UserError: no such cross-section, or the circuit has none of its heads.
    """
    sections = {name: cross_section(name, circuit, model) for name in names}
    for name in () if names else CROSS_SECTIONS:
        if any(circuit.of(role) for roles, *_ in CROSS_SECTIONS[name] for role in roles):
            sections[name] = cross_section(name, circuit, model)
    if not sections:
        why = "it has no head of any cross-section"
        raise UserError(f"the circuit of {circuit.model}", why, "find another circuit")
    return sections


class Answers(NamedTuple):
    """What the model says behind P prompts."""

    difference: Tensor  # [P] logit of IO minus that of S
    token: Tensor  # [P] the likeliest of the whole vocabulary
    loss: Tensor  # [P] −log p(IO)


class PlainPrompts:
    """Plain runs of P prompts, which patches at any locations start from.

    Args:
        model: the model.
        ioi: where the prompts are from.
        prompts: P of them.
        locations: whose activations are kept.
        batch_size: prompts per forward pass.

    Attributes:
        activations: per location `[P, width]`, in float32 on the CPU.
        batches: rows of one length and their runs.
        back: `[P]`: where each prompt is among the batches' rows.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        ioi: IOIDistribution,
        prompts: Sequence[IOIPrompt],
        locations: Sequence[Location],
        batch_size: int = 64,
    ) -> None:
        self.model, self.prompts, self.batches = model, tuple(prompts), list[tuple[PromptRows, PlainRun]]()
        for rows in rows_of([ioi.tokenise(prompt) for prompt in prompts], model, batch_size=batch_size):
            self.batches.append((rows, PlainRun.of(model, rows.ids)))
        order = torch.tensor([number for rows, _ in self.batches for number in rows.numbers])
        self.back: Int[Tensor, " P"] = order.argsort()
        self.activations = activations_of(model, ioi, prompts, locations, batch_size=batch_size)


class _Batch(NamedTuple):
    rows: PromptRows
    runs: PatchedRuns


class PatchedPrompts:
    """Prompts whose runs can be patched at all locations of a cross-section at once.

    Args:
        model: the model.
        ioi: where the prompts are from.
        prompts: P of them.
        locations: of a cross-section.
        plain: their plain runs, if they are known.

    Attributes:
        activations: per location what it is in the plain runs, `[P, width]`, as `activations_of` gives it.
        plain: the plain answers, on the CPU, too.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        ioi: IOIDistribution,
        prompts: Sequence[IOIPrompt],
        locations: Sequence[Location],
        *,
        batch_size: int = 64,
        plain: PlainPrompts | None = None,
    ) -> None:
        plain = plain or PlainPrompts(model, ioi, prompts, locations, batch_size)
        self.model, self.prompts, self.locations = model, tuple(prompts), tuple(locations)
        self._unembedding, self._back = Unembedding(model), plain.back
        self.activations = {location: plain.activations[location] for location in locations}
        self._batches = [_Batch(rows, PatchedRuns(model, rows, run, locations, 1)) for rows, run in plain.batches]
        self.plain = self._answers([rows.at(run.inputs[-1], "END") for rows, run in plain.batches])

    @torch.no_grad()
    def answers(self, values: Values) -> Answers:
        """The answers when locations have other values, which may be on any device."""
        return self._answers([self._hidden(batch, values) for batch in self._batches])

    @property
    def batches(self) -> list[list[int]]:
        """Which prompts share a forward pass."""
        return [list(batch.rows.numbers) for batch in self._batches]

    def logits(self, batch: int, values: Values) -> Float[Tensor, "B vocabulary"]:
        """Logits of all tokens behind the prompts of one batch when locations have other values.

        Gradients, where they are on, reach these; never the model, which is frozen.

        Args:
            batch: its number among `batches`.
            values: per location those of all P prompts.
        """
        return self._unembedding.logits(self._hidden(self._batches[batch], values))

    def _hidden(self, batch: _Batch, values: Values) -> Float[Tensor, "B d"]:
        chosen = {place: value[list(batch.rows.numbers)] for place, value in values.items()}
        return batch.runs.run({place: value.to(self.model.device) for place, value in chosen.items()})

    def _answers(self, hidden: Sequence[Float[Tensor, "B d"]]) -> Answers:
        parts: list[Answers] = []
        for batch, x in zip(self._batches, hidden, strict=True):
            logits = self._unembedding.logits(x)
            right = logits.gather(1, batch.rows.answers[:, :1])[:, 0].float()
            difference = logit_difference(self._unembedding, x, batch.rows.answers)
            parts.append(Answers(difference, logits.argmax(-1), logits.float().logsumexp(-1) - right))
        return Answers(*(torch.cat(of).cpu()[self._back] for of in zip(*parts, strict=True)))


def activations_of(
    model: LanguageModel,
    ioi: IOIDistribution,
    prompts: Sequence[IOIPrompt],
    locations: Sequence[Location],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> dict[Location, Float[Tensor, "P width"]]:
    """What locations are in the plain runs of prompts, as dictionaries are fitted on: in float32 on the CPU.

    Args:
        model: the model.
        ioi: where the prompts are from.
        prompts: P of them.
        locations: each a head's site at a position.
        batch_size: prompts per forward pass.
        progress: called with the number of prompts done.
    """
    order: list[int] = []
    found: dict[Location, list[Tensor]] = {location: [] for location in locations}
    for rows in rows_of([ioi.tokenise(prompt) for prompt in prompts], model, batch_size=batch_size):
        read = capture(model, TokenBatch.full(rows.ids), [location.site for location in locations])
        for location, parts in found.items():
            parts.append(rows.at(read[location.site], location.position).float().cpu())
        order += rows.numbers
        if progress is not None:
            progress(len(rows.numbers))
    back: Int[Tensor, " P"] = torch.tensor(order).argsort()
    return {location: torch.cat(parts)[back] for location, parts in found.items()}
