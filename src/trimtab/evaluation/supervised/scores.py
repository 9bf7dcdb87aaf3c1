"""All tests of all contenders at one cross-section, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.approximation import Approximation, approximation
from trimtab.evaluation.supervised.codes import FITS, Factors, Parametrisation
from trimtab.evaluation.supervised.control import (
    EditedRows,
    EditSuccess,
    edit_by_meaning,
    edit_greedy,
    edit_success,
    edit_supervised,
)
from trimtab.evaluation.supervised.cross_sections import Answers, PatchedPrompts, Values, activations_of
from trimtab.evaluation.supervised.interpretability import (
    INTERPRETABLE,
    Predicates,
    best_meanings,
    f1_scores,
    kept_and_removed,
    value_scores,
)
from trimtab.lm import LanguageModel
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIDistribution, IOIPrompt


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One way of editing one attribute."""

    attribute: str
    way: str
    """`codes` (a − u_v + u_v′), `greedy` or `meaning` (see `control`), `all` (everything to the mean)."""
    k: int | None
    """Features that may be changed, per location."""
    result: EditSuccess


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What came out for one contender at one cross-section."""

    cross_section: str
    contender: str
    approximation: Approximation
    edits: tuple[Edited, ...]
    interpretable: float | None = None
    """Share of the features that fire whose F1 is at least 0.6, mean over locations; None for codes."""
    by_meaning: Approximation | None = None
    """Approximation by the interpretable features alone."""


def counterfactuals(ioi: IOIDistribution, prompts: Sequence[IOIPrompt], seed: int) -> dict[str, list[IOIPrompt]]:
    """For each attribute a counterfactual of each prompt."""
    return {a: [ioi.draw_counterfactual(prompt, a, seed=seed) for prompt in prompts] for a in ATTRIBUTES}


class Section:
    """Test prompts at a cross-section, with their counterfactuals, and what dictionaries are fitted on.

    Args:
        model: the model.
        ioi: where the prompts are from.
        name: of the cross-section.
        locations: of it.
        train: prompts that dictionaries are fitted on.
        activations: of those, per location.
        test: other prompts.
        seed: of counterfactual names.
    """

    def __init__(
        self,
        model: LanguageModel,
        ioi: IOIDistribution,
        name: str,
        locations: Sequence[Location],
        train: Sequence[IOIPrompt],
        activations: Values,
        test: Sequence[IOIPrompt],
        seed: int = 0,
    ) -> None:
        self.name, self.locations, self.train, self.test = name, tuple(locations), tuple(train), tuple(test)
        self.activations: Values = {location: activations[location] for location in locations}
        self.means = {location: x.mean(0) for location, x in self.activations.items()}
        self.prompts = PatchedPrompts(model, ioi, test, locations)
        self.changed = counterfactuals(ioi, test, seed)
        self.true = {a: activations_of(model, ioi, prompts, locations) for a, prompts in self.changed.items()}
        self.patched = {attribute: self.prompts.answers(values) for attribute, values in self.true.items()}

    def codes(self, fit: str, parametrisation: Parametrisation) -> Scores:
        """Supervised codes, `mean` or `mse`."""
        factors = Factors.of(self.train, parametrisation)
        rows, own = factors.rows(self.train), factors.rows(self.test)
        codes = {location: FITS[fit](x, factors, rows) for location, x in self.activations.items()}
        changed = {attribute: factors.rows(prompts) for attribute, prompts in self.changed.items()}
        edits = [
            self._edited(a, "codes", None, lambda place, x, new=new: edit_supervised(x, codes[place], own, new))
            for a, new in changed.items()
        ]
        rebuilt = {location: codes[location].reconstruct(own) for location in self.locations}
        name = f"supervised, {fit}" + f", {parametrisation}" * (parametrisation != "independent")
        return Scores(
            cross_section=self.name, contender=name, edits=tuple(edits),
            approximation=approximation(self.prompts, self.means, rebuilt),
        )  # fmt: skip

    @torch.no_grad()
    def dictionaries(self, name: str, saes: Mapping[Location, Dictionary], ks: Sequence[int]) -> Scores:
        """One dictionary for each location."""
        x = self.prompts.activations
        predicates = Predicates.of(self.train)
        fires = {place: saes[place].encode(self.activations[place]) > 0 for place in self.locations}
        f1 = {place: f1_scores(fired, predicates.truth) for place, fired in fires.items()}
        keep = {
            place: torch.tensor([meaning.f1 >= INTERPRETABLE for meaning in best_meanings(fired, predicates)])
            for place, fired in fires.items()
        }
        edits: list[Edited] = []
        for attribute, prompts in self.changed.items():
            true = self.true[attribute]
            for k in ks:
                edits.append(
                    self._edited(
                        attribute, "greedy", k, lambda place, x, k=k, t=true: edit_greedy(saes[place], x, t[place], k)
                    )
                )
                edits.append(
                    self._edited(
                        attribute, "meaning", k,
                        lambda place, x, k=k, t=true, a=attribute, p=prompts: edit_by_meaning(
                            saes[place], x, t[place], value_scores(f1[place], predicates, a, self.test),
                            value_scores(f1[place], predicates, a, p), k,
                        ),
                    )
                )  # fmt: skip
        kept = {place: kept_and_removed(saes[place], x[place], keep[place])[0] for place in self.locations}
        alive = [keep[place][fired.any(0)].double().mean() for place, fired in fires.items()]
        return Scores(
            cross_section=self.name, contender=name, edits=tuple(edits),
            approximation=approximation(self.prompts, self.means, {place: saes[place](x[place]) for place in x}),
            interpretable=float(torch.stack(alive).nanmean()),
            by_meaning=approximation(self.prompts, self.means, kept),
        )  # fmt: skip

    def ends(self) -> Scores:
        """The mean in every activation's place: what taking out everything does."""
        rebuilt = {place: self.means[place].expand_as(x) for place, x in self.prompts.activations.items()}
        edits = [
            self._edited(a, "all", None, lambda place, x: EditedRows(rebuilt[place], torch.ones(len(x))))
            for a in self.changed
        ]
        return Scores(
            cross_section=self.name, contender="mean", edits=tuple(edits),
            approximation=approximation(self.prompts, self.means, rebuilt),
        )  # fmt: skip

    def _edited(
        self, attribute: str, way: str, k: int | None, edit: Callable[[Location, Float[Tensor, "P width"]], EditedRows]
    ) -> Edited:
        edits = {place: edit(place, x) for place, x in self.prompts.activations.items()}
        answers: Answers = self.prompts.answers({place: one.x for place, one in edits.items()})
        removed = torch.stack([one.removed for one in edits.values()]).mean(0)
        result = edit_success(self.prompts.plain, self.patched[attribute], answers, removed)
        return Edited(attribute=attribute, way=way, k=k, result=result)
