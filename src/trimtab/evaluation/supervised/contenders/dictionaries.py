"""Dictionaries, one for each location: the user's own, and task SAEs, with and without a decoder that learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, Interpreted, Way, kind
from trimtab.evaluation.supervised.control import edit_by_meaning, edits_greedy
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.interpretability import (
    Predicates,
    best_meanings,
    f1_scores,
    interpretable,
    kept_and_removed,
    value_scores,
)
from trimtab.evaluation.supervised.section import Section
from trimtab.evaluation.supervised.task_saes import train_task_saes
from trimtab.tasks.ioi_prompts import ATTRIBUTES

ABOUT = ("IO", "S", "Pos", "named", "gender")
"""What features may say."""


class _Said(NamedTuple):
    """What the features of one dictionary say."""

    f1: Tensor  # [n, values] F1 for each value of IO, S and Pos, on training prompts
    fires: Tensor  # [n] whether it ever fires on them
    keep: Tensor  # [n] whether it is interpretable
    groups: tuple[str, ...]  # what the meaning is about


class Dictionaries(Contender):
    """One dictionary for each location.

    Args:
        name: in tables.
        saes: by location.
        ground: whose prompts say what features mean.
    """

    def __init__(self, name: str, saes: Mapping[Location, Dictionary], ground: Ground) -> None:
        self.name, self.saes, self.ground = name, saes, ground
        self._known: dict[Location, _Said] = {}

    def lacks(self, locations: Sequence[Location]) -> tuple[Location, ...]:
        return tuple(place for place in locations if place not in self.saes)

    @torch.no_grad()
    def rebuilt(self, section: Section) -> Values:
        return {p: self.saes[p](section.prompts.activations[p]) for p in section.locations}

    @torch.no_grad()
    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        x, true, changed = section.prompts.activations, section.true[attribute], section.changed[attribute]
        ks, values = self.ground.config.k, self._values
        greedy = {p: edits_greedy(self.saes[p], x[p], true[p], ks) for p in section.locations}
        for k in ks:
            yield Way("greedy", k, {p: of[k] for p, of in greedy.items()})
        scores = {
            p: [value_scores(self._said(p).f1, values, attribute, of) for of in (section.test, changed)]
            for p in section.locations
        }
        for k in ks:
            rows = {p: edit_by_meaning(self.saes[p], x[p], true[p], old, new, k) for p, (old, new) in scores.items()}
            yield Way("meaning", k, rows)

    @torch.no_grad()
    def interpreted(self, section: Section) -> Interpreted:
        x, shares = section.prompts.activations, defaultdict[str, float](float)
        said = {place: self._said(place) for place in section.locations}
        split = {place: kept_and_removed(self.saes[place], x[place], of.keep) for place, of in said.items()}
        for of in said.values():
            for feature in (of.keep & of.fires).nonzero().flatten().tolist():
                shares[of.groups[feature]] += 1 / (int(of.fires.sum()) * len(said))
        return Interpreted(
            {about: shares[about] for about in ABOUT},
            {place: kept for place, (kept, _) in split.items()}, {place: rest for place, (_, rest) in split.items()},
        )  # fmt: skip

    @property
    def _values(self) -> Predicates:
        """The predicates that are values of one attribute."""
        every = self.ground.predicates
        index = [i for i, group in enumerate(every.groups) if group in ATTRIBUTES]
        return Predicates(
            tuple(every.names[i] for i in index), tuple(every.groups[i] for i in index), every.truth[:, index]
        )

    @torch.no_grad()
    def _said(self, place: Location) -> _Said:
        if place not in self._known:
            ground, every = self.ground, self.ground.predicates
            fires = self.saes[place].encode(ground.activations[place]) > 0
            held = self.saes[place].encode(ground.held[place]) > 0
            meanings = best_meanings(fires, every)
            group = dict(zip(every.names, every.groups, strict=True))
            about = [group[m.predicates[0]] if m.predicates else "" for m in meanings]
            groups = ("gender" if "gender" in one else one.partition(",")[0] for one in about)
            self._known[place] = _Said(
                f1_scores(fires, self._values.truth), fires.any(0),
                interpretable(held, meanings, every, ground.holds), tuple(groups),
            )  # fmt: skip
        return self._known[place]


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
    return [*(Dictionaries(f"own {name}", saes, ground) for name, saes in ground.dictionaries.items())]
