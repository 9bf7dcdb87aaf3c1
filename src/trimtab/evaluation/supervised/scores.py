"""All tests of one contender at one cross-section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trimtab.evaluation.supervised.approximation import Approximation, approximation, loss_recovered, share_of_effect
from trimtab.evaluation.supervised.contenders.contender import Contender
from trimtab.evaluation.supervised.control import EditSuccess, edit_success
from trimtab.evaluation.supervised.section import Section
from trimtab.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One way of editing one attribute."""

    attribute: str
    way: str
    """`codes` (a − u_v + u_v′), `greedy`, `meaning`, `interchange` (see `control` and `rotation`), `all` (nothing, or
    everything to the mean)."""
    k: int | None
    """Features that may be changed, per location."""
    result: EditSuccess


@dataclass(frozen=True, kw_only=True)
class CausalCheck:
    """What interpretable features do: their meaning, chosen on training prompts, has an F1 of 0.6 on validation
    prompts, and more than firing always would have."""

    shares: Mapping[str, float]
    """Of the features that fire, mean over locations, by what they say (IO, S, Pos, named, gender)."""
    interpretable: float
    """All of these together."""
    kept: Interval | None
    """(LD − LD(ā)) / (LD_clean − LD(ā)) by them alone; None where the model does not need the cross-section."""
    without: Interval | None
    """The same when they are taken out."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What came out for one contender at one cross-section."""

    cross_section: str
    contender: str
    approximation: Approximation
    loss_recovered: Mapping[str, Interval | None]
    """Per location patched alone."""
    edits: tuple[Edited, ...]
    causal: CausalCheck | None = None
    """None for contenders without features of their own."""

    def edited(self, attribute: str, k: int | None = None) -> Edited | None:
        """The first edit of an attribute (`greedy` before `meaning`), with at most k features where it counts them."""
        return next((e for e in self.edits if e.attribute == attribute and e.k in (None, k)), None)


@torch.no_grad()
def score(contender: Contender, section: Section) -> Scores:
    """Measure approximation, control and interpretability."""
    prompts = section.prompts
    rebuilt = contender.rebuilt(section)
    edits = [
        Edited(attribute=a, way=way.name, k=way.k, result=edit_success(prompts, section.patched[a], way.rows))
        for a in section.changed
        for way in contender.edits(section, a)
    ]
    found, causal = contender.interpreted(section), None
    if found is not None:
        kept, without = (
            share_of_effect(prompts.plain, section.at_mean, prompts.answers(x)) for x in (found.kept, found.without)
        )
        causal = CausalCheck(shares=found.shares, interpretable=sum(found.shares.values()), kept=kept, without=without)
    return Scores(
        cross_section=section.name, contender=contender.name, edits=tuple(edits), causal=causal,
        approximation=approximation(prompts, section.means, rebuilt, section.at_mean),
        loss_recovered=loss_recovered(prompts, rebuilt, section.one_at_mean),
    )  # fmt: skip
