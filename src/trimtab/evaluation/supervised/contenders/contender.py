"""What a contender is, and how one is added: a way of taking activations apart, held against the others' tests.

A kind of contender is one file of this package. It is told everything that may be fitted on (training prompts and their
activations at all locations) and gives contenders; each says how it rebuilds the test prompts' activations at a
cross-section, and how it edits an attribute there.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError, named
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.codes import Parametrisation
from trimtab.evaluation.supervised.control import EditedRows
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.interpretability import Predicates
from trimtab.evaluation.supervised.section import Section
from trimtab.lm import LanguageModel
from trimtab.runs import SourceName, check_least
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt
from trimtab.training.config import TrainConfig


class Way(NamedTuple):
    """One way of editing an attribute at all locations."""

    name: str
    k: int | None  # features that may change at each location
    rows: Mapping[Location, EditedRows]


class Interpreted(NamedTuple):
    """What interpretable features are, and activations by them alone and without them."""

    shares: Mapping[str, float]  # of the features that fire, by what they say: IO, S, Pos, named, gender
    kept: Values
    without: Values


class Contender(ABC):
    """One way of taking activations apart."""

    name: str

    @abstractmethod
    def rebuilt(self, section: Section) -> Values:
        """â of the section's test prompts at each of its locations."""

    @abstractmethod
    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        """The test prompts' activations with the attribute changed to what it is in the section's counterfactuals."""

    def interpreted(self, section: Section) -> Interpreted | None:
        """What its features say and do; None if it has none."""
        del section
        return None

    def lacks(self, locations: Sequence[Location]) -> tuple[Location, ...]:
        """Which locations it says nothing of; a cross-section that has one is left out."""
        del locations
        return ()


@dataclass(frozen=True, kw_only=True)
class ContenderConfig:
    """What contenders are fitted with."""

    parametrisation: Parametrisation = "independent"
    """Of supervised codes: independent (IO, S, Pos), coupled (IO and S each with Pos) or names (first to third)."""
    arch: tuple[str, ...] = ("topk",)
    """Architectures of task SAEs."""
    l0: tuple[float, ...] = (3.0,)
    """Active features of task SAEs."""
    n_features: tuple[int, ...] = (1024,)
    """Features of task SAEs."""
    epochs: int = 100
    """Passes of a task SAE over its rows."""
    k: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Features that an edit may change at each location."""
    text: tuple[SourceName, ...] = ()
    """Files or directories that text-saes are trained on; by default the sample that ships with trimtab."""
    text_tokens: int = 100_000
    """Tokens of text that text-saes are trained on, at most."""
    text_l0: float = 16.0
    """Active features of text-saes."""
    rank: int = 16
    """Directions of an attribute in a learned rotation, on average: the stronger ones get more."""
    rotation_prompts: int = 128
    """Training prompts that a rotation learns from."""

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "k", "text_tokens", "rank", "rotation_prompts")
        for name in ("arch", "l0", "n_features", "k"):
            if not getattr(self, name):
                raise UserError(name, "there is none", "give at least one")
        for arch, l0, n in itertools.product(self.arch, self.l0, self.n_features):
            TrainConfig(arch=arch, l0=l0, n_features=n)  # refuses what cannot be trained


@dataclass(frozen=True, kw_only=True)
class Ground:
    """All that contenders may be fitted on."""

    model: LanguageModel
    ioi: IOIDistribution
    train: Sequence[IOIPrompt]
    activations: Values
    """Of the training prompts, at all locations of all cross-sections."""
    heldout: Sequence[IOIPrompt]
    """Validation prompts: thresholds of SAEs are set on them, and it is measured what features say."""
    held: Values
    """Their activations."""
    config: ContenderConfig = field(default_factory=ContenderConfig)
    dictionaries: Mapping[str, Mapping[Location, Dictionary]] = field(default_factory=dict)
    """The user's own, by name."""
    directory: Path
    """For what is trained."""
    seed: int = 0

    @cached_property
    def predicates(self) -> Predicates:
        """What may be said of the training prompts."""
        return Predicates.of(self.train)

    @cached_property
    def holds(self) -> Tensor:
        """[Q, K] which of the predicates hold of the validation prompts."""
        return self.predicates.hold(self.heldout)


Kind = Callable[[Ground], list[Contender]]
KINDS: dict[str, Kind] = {}
"""By name; tables show them in the order in which they were asked for."""


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a function from all that may be fitted on to contenders."""

    def add(make: Kind) -> Kind:
        KINDS[name] = make
        return make

    return add


def make_contenders(names: Iterable[str], ground: Ground) -> list[Contender]:
    """Fit the contenders of several kinds.

    Raises:
        UserError: there is no such kind; one cannot be fitted.
    """
    return [one for name in names for one in named(KINDS, name, "contender")(ground)]


class Fixed(Contender):
    """The ends that every edit lies between: nothing is done, or everything is put to its mean."""

    def __init__(self, name: str, change: Callable[[Section], Values], removed: float) -> None:
        self.name, self._change, self._removed = name, change, removed

    def rebuilt(self, section: Section) -> Values:
        return self._change(section)

    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        del attribute
        rows = self.rebuilt(section)
        yield Way("all", None, {p: EditedRows(x, x.new_full((len(x),), self._removed)) for p, x in rows.items()})


NO_EDIT = Fixed("no edit", lambda section: section.prompts.activations, 0.0)
MEAN = Fixed(
    "mean", lambda section: {p: section.means[p].expand_as(x) for p, x in section.prompts.activations.items()}, 1.0
)
