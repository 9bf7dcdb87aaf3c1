"""Test prompts at a cross-section, with their counterfactuals: the ground that contenders are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts, PlainPrompts, Values, activations_of
from trimtab.lm import LanguageModel
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIDistribution, IOIPrompt


def counterfactuals(ioi: IOIDistribution, prompts: Sequence[IOIPrompt], seed: int) -> dict[str, list[IOIPrompt]]:
    """For each attribute a counterfactual of each prompt."""
    return {a: [ioi.draw_counterfactual(prompt, a, seed=seed) for prompt in prompts] for a in ATTRIBUTES}


class PromptPairs:
    """Test prompts and their counterfactuals in plain runs, read once for all cross-sections.

    Args:
        model: the model.
        ioi: where the prompts are from.
        prompts: none of which a dictionary was fitted on.
        locations: of all cross-sections.
        seed: of counterfactual names.
        progress: called with the number of prompts that were run.
    """

    def __init__(
        self,
        model: LanguageModel,
        ioi: IOIDistribution,
        prompts: Sequence[IOIPrompt],
        locations: Sequence[Location],
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.ioi, self.changed = model, ioi, counterfactuals(ioi, prompts, seed)
        self.plain = PlainPrompts(model, ioi, prompts, locations)
        if progress is not None:
            progress(len(prompts))
        self.true = {
            attribute: activations_of(model, ioi, of, locations, progress=progress)
            for attribute, of in self.changed.items()
        }


class Section:
    """Test prompts at a cross-section.

    Args:
        name: of the cross-section.
        locations: of it.
        activations: of the prompts that dictionaries are fitted on, per location.
        pairs: what is known of the test prompts at all cross-sections.

    Attributes:
        means: of `activations`.
        prompts: the test prompts, to be patched.
        changed: per attribute their counterfactuals.
        true: per attribute what the locations are in those.
        patched: per attribute the answers when all locations are so.
        at_mean: the answers with every location at its mean.
        one_at_mean: per location the answers with it alone at its mean.
    """

    def __init__(self, name: str, locations: Sequence[Location], activations: Values, pairs: PromptPairs) -> None:
        self.name, self.locations, self.changed = name, tuple(locations), pairs.changed
        self.model, self.ioi, self.test = pairs.model, pairs.ioi, pairs.plain.prompts
        self.means = {location: activations[location].mean(0) for location in locations}
        self.prompts = PatchedPrompts(self.model, self.ioi, self.test, locations, plain=pairs.plain)
        self.true = {a: {place: x[place] for place in locations} for a, x in pairs.true.items()}
        self.patched = {attribute: self.prompts.answers(values) for attribute, values in self.true.items()}
        mean = {place: self.means[place].expand_as(x) for place, x in self.prompts.activations.items()}
        self.at_mean = self.prompts.answers(mean)
        self.one_at_mean = {place: self.prompts.answers({place: x}) for place, x in mean.items()}
