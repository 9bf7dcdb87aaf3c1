"""Finetunings to evaluate: what they are called, and how their models are loaded, moment by moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trimtab.errors import UserError
from trimtab.flags.evaluation.measured import Moment
from trimtab.flags.result import TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel


class State(NamedTuple):
    """A model that a finetuning went through."""

    step: int
    tokens: int
    """Trained on up to then."""
    identity: str
    """Names its weights, so that what was measured is not taken for another model's."""
    load: Callable[[], LanguageModel]


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """One run of a finetuning with flags."""

    label: str
    curriculum: str
    seed: int
    flags: FlagSpec
    states: tuple[State, ...]
    """In order; the original model is none of them."""
    last_phase: int = 0
    """Step from which its curriculum stays as it is to the end."""

    def moment(self, state: State) -> Moment:
        """What a state is called in results."""
        return Moment(
            run=self.label, curriculum=self.curriculum, seed=self.seed, step=state.step, tokens=state.tokens,
            last_phase=state.step >= self.last_phase,
        )  # fmt: skip

    @property
    def beginning(self) -> Moment:
        """The original model, as this finetuning's first moment."""
        return Moment(run=self.label, curriculum=self.curriculum, seed=self.seed, step=0, tokens=0, last_phase=False)

    @classmethod
    def of(cls, trained: TrainedFlags, label: str) -> Finetuning:
        """A finetuning in memory, of which the end alone is known."""
        result = trained.result
        state = State(result.steps, result.tokens, trained.model.fingerprint, lambda: trained.model)
        return cls(
            label=label, curriculum=result.curriculum, seed=result.seed, flags=trained.flags, states=(state,)
        )  # fmt: skip


def check_alike(finetunings: Sequence[Finetuning]) -> None:
    """Raise a `UserError` unless there are finetunings, of the same concepts, each with a name of its own."""
    if not finetunings:
        raise UserError("flags evaluate", "there is no finetuning to evaluate", "name a run of `flags train`")
    first = finetunings[0]
    for other in finetunings[1:]:
        if other.flags.concepts != first.flags.concepts:
            why = f"its concepts are {', '.join(other.flags.concepts)}, not {', '.join(first.flags.concepts)}"
            raise UserError(f"run {other.label}", why, "evaluate runs of the same concepts together")
        if other.flags.d_model != first.flags.d_model:
            why = f"its model has {other.flags.d_model} dimensions, not {first.flags.d_model}"
            raise UserError(f"run {other.label}", why, "evaluate runs of one model together")
    labels = [one.label for one in finetunings]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"run {label}", "two runs have this name", "give each once, or rename a directory")


def plain_finetuning(of: Finetuning, among: Sequence[Finetuning]) -> Finetuning | None:
    """The plain finetuning of the same seed, if there is one."""
    return next((one for one in among if one.curriculum == "plain" and one.seed == of.seed and one is not of), None)


def labels_of(paths: Sequence[Path]) -> list[str]:
    """For each run the shortest trailing part of its path that no other one shares."""
    resolved = [path.resolve() for path in paths]
    found: list[str] = []
    for path in resolved:
        for n in range(1, len(path.parts)):
            name = "/".join(path.parts[-n:])
            if sum(other.parts[-n:] == path.parts[-n:] for other in resolved) == 1:
                break
        else:
            name = str(path)
        found.append(name)
    return found
