"""Subspaces of IO, S and Pos, learned through the model at each cross-section, beside random ones of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, Way, kind
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts, Values
from trimtab.evaluation.supervised.rotation import LearnedRotation, Rotation, learn_rotation, random_rotation
from trimtab.evaluation.supervised.section import PromptPairs, Section
from trimtab.runs import Meter
from trimtab.tasks.ioi_prompts import ATTRIBUTES


class Subspaces(Contender):
    """One rotation for each cross-section, made when it is first asked for."""

    def __init__(self, name: str, make: Callable[[Section], Rotation]) -> None:
        self.name, self._make, self._made = name, make, dict[str, Rotation]()

    def at(self, section: Section) -> Rotation:
        """The rotation of a cross-section."""
        if section.name not in self._made:
            self._made[section.name] = self._make(section)
        return self._made[section.name]

    def rebuilt(self, section: Section) -> Values:
        rotation, x = self.at(section), section.prompts.activations
        return {place: rotation.reconstruct(place, x[place]) for place in section.locations}

    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        rotation, x, true = self.at(section), section.prompts.activations, section.true[attribute]
        yield Way("interchange", None, {p: rotation.edit(p, x[p], true[p], attribute) for p in section.locations})


class _Learner:
    """Learns a rotation at each cross-section, once; training prompts with their counterfactuals are read once."""

    def __init__(self, ground: Ground) -> None:
        self.ground, self._learned = ground, dict[str, LearnedRotation]()

    @cached_property
    def pairs(self) -> PromptPairs:
        """Of the first training prompts."""
        ground = self.ground
        few = ground.train[: ground.config.rotation_prompts]
        return PromptPairs(ground.model, ground.ioi, few, tuple(ground.activations), ground.seed)

    def at(self, section: Section) -> LearnedRotation:
        """The subspaces of a cross-section."""
        if section.name not in self._learned:
            ground, plain, places = self.ground, self.pairs.plain, section.locations
            prompts = PatchedPrompts(ground.model, ground.ioi, plain.prompts, places, plain=plain)
            true = {attribute: {place: x[place] for place in places} for attribute, x in self.pairs.true.items()}
            with torch.enable_grad(), Meter(f"learning a rotation of {section.name}, steps") as meter:
                self._learned[section.name] = learn_rotation(
                    prompts, true, section.means, rank=ground.config.rank, seed=ground.seed, progress=meter.advance
                )
        return self._learned[section.name]


@kind("rotation")
def learned_rotation(ground: Ground) -> list[Contender]:
    """The learned one, what it began with (in closed form), and random subspaces of the same sizes."""
    directions, learner = f"{len(ATTRIBUTES) * ground.config.rank} directions", _Learner(ground)
    return [
        Subspaces(f"rotation, {directions}", lambda of: learner.at(of).rotation),
        Subspaces(f"differences, {directions}", lambda of: learner.at(of).start),
        Subspaces(f"random, {directions}", lambda of: random_rotation(learner.at(of).rotation, seed=ground.seed)),
    ]
