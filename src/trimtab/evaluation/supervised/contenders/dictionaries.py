"""Dictionaries, one for each location: the user's own, and task SAEs, with and without a decoder that learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, Kept, Way, kind
from trimtab.evaluation.supervised.control import edit_by_meaning, edits_greedy
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.interpretability import (
    INTERPRETABLE,
    Predicates,
    best_meanings,
    f1_scores,
    kept_and_removed,
    value_scores,
)
from trimtab.evaluation.supervised.section import Section
from trimtab.evaluation.supervised.task_saes import train_task_saes


class Dictionaries(Contender):
    """One dictionary for each location.

    Args:
        name: in tables.
        saes: by location.
        ground: whose prompts say what features mean.
    """

    def __init__(self, name: str, saes: Mapping[Location, Dictionary], ground: Ground) -> None:
        self.name, self.saes, self.ks = name, saes, ground.config.k
        self.predicates = Predicates.of(ground.train)
        self._fires = {p: sae.encode(ground.activations[p]).detach() > 0 for p, sae in saes.items()}
        self._f1 = {p: f1_scores(fires, self.predicates.truth) for p, fires in self._fires.items()}

    def lacks(self, section: Section) -> tuple[Location, ...]:
        return tuple(place for place in section.locations if place not in self.saes)

    @torch.no_grad()
    def rebuilt(self, section: Section) -> Values:
        return {p: self.saes[p](section.prompts.activations[p]) for p in section.locations}

    @torch.no_grad()
    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        x, true, changed = section.prompts.activations, section.true[attribute], section.changed[attribute]
        greedy = {p: edits_greedy(self.saes[p], x[p], true[p], self.ks) for p in section.locations}
        for k in self.ks:
            yield Way("greedy", k, {p: of[k] for p, of in greedy.items()})
        values = {
            p: [value_scores(self._f1[p], self.predicates, attribute, of) for of in (section.test, changed)]
            for p in section.locations
        }
        for k in self.ks:
            rows = {p: edit_by_meaning(self.saes[p], x[p], true[p], old, new, k) for p, (old, new) in values.items()}
            yield Way("meaning", k, rows)

    @torch.no_grad()
    def kept(self, section: Section) -> Kept:
        x, kept, without, shares = section.prompts.activations, {}, {}, []
        for place in section.locations:
            fires = self._fires[place]
            keep = torch.tensor([one.f1 >= INTERPRETABLE for one in best_meanings(fires, self.predicates)])
            shares.append(keep[fires.any(0)].double().mean())
            kept[place], without[place] = kept_and_removed(self.saes[place], x[place], keep)
        return Kept(float(torch.stack(shares).nanmean()), kept, without)


def _trained(ground: Ground, arch: Sequence[str], name: str, label: str = "", **settings: Any) -> list[Contender]:
    config = ground.config
    saes = train_task_saes(
        ground.model, ground.activations, ground.held, ground.directory / name, arch=arch, l0=config.l0,
        n_features=config.n_features, epochs=config.epochs, seed=(ground.seed,), **settings,
    )  # fmt: skip
    return [
        Dictionaries(f"{label}{setting.removesuffix(f'-seed{ground.seed}')}", of, ground)
        for setting, of in saes.items()
    ]


@kind("task-saes")
def task_saes(ground: Ground) -> list[Contender]:
    """SAEs of the training prompts' activations, of every architecture, sparsity and size that was asked for."""
    return _trained(ground, ground.config.arch, "task-saes")


@kind("frozen-decoder")
def frozen_decoder(ground: Ground) -> list[Contender]:
    """TopK SAEs whose decoder rows stay random: what an encoder alone makes of any directions."""
    return _trained(ground, ("topk",), "frozen-decoder", "frozen ", freeze_decoder=True)


@kind("own")
def own(ground: Ground) -> list[Contender]:
    """The user's dictionaries. Raises a `UserError` if there are none."""
    if not ground.dictionaries:
        raise UserError("contender own", "no dictionary was given", "name some with --dictionary")
    return [*(Dictionaries(name, saes, ground) for name, saes in ground.dictionaries.items())]
