"""Runs to evaluate: what they are called, how they were trained, and how their models are loaded, moment by moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import UserError
from trimtab.flags.config import LR, FlagTraining
from trimtab.flags.evaluation.measured import Moment
from trimtab.flags.examples import Example
from trimtab.flags.result import TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.runs import config_dict

PLAIN = "plain"
"""The curriculum that is the control."""
FLAGS_LOSS = ("loss", "flag_weight")
NOT_SETTINGS = ("seed", "snapshots", "log_every", "checkpoint_every", "gradient_checkpointing", "holdout", *FLAGS_LOSS)
"""Options of a finetuning in which a plain run, which has no loss of flags, may differ from one that it is compared
with."""


class State(NamedTuple):
    """A model that a finetuning went through."""

    step: int
    tokens: int
    """Trained on up to then."""
    identity: str
    """Names its weights, so that what was measured is not taken for another model's."""
    load: Callable[[], LanguageModel]


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """One finetuning with flags."""

    label: str
    curriculum: str
    seed: int
    flags: FlagSpec
    states: tuple[State, ...]
    """In order; the original model is none of them."""
    last_phase: int = 0
    """Step from which its curriculum stays as it is to the end."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How it was trained, but for curriculum and seed."""
    examples: tuple[Example, ...] = ()
    """Those that it was trained on; empty if they are not known."""

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

    def differences(self, other: EvaluatedRun) -> list[str]:
        """In which settings another run differs."""
        names = dict.fromkeys([*self.settings, *other.settings])
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        found = [f"{name} {b}, not {a}" for name, a, b in pairs if a != b]
        return found + ["its flags are in other places"] * (self.flags != other.flags)

    @classmethod
    def of(cls, trained: TrainedFlags, label: str, examples: Sequence[Example] = ()) -> EvaluatedRun:
        """A finetuning in memory, of which the end alone is known."""
        result = trained.result
        state = State(result.steps, result.tokens, trained.model.fingerprint, lambda: trained.model)
        return cls(
            label=label, curriculum=result.curriculum, seed=result.seed, flags=trained.flags, states=(state,),
            settings=settings_of(config_dict(trained.config), trained.data),
            examples=tuple(examples),
        )  # fmt: skip


def settings_of(config: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """What a finetuning and its control have in common.

    Args:
        config: fields of `FlagTraining`, among others, as a run records them.
        data: hash of the examples.
    """
    found = {one.name: config.get(one.name) for one in fields(FlagTraining) if one.name not in NOT_SETTINGS}
    found["lr"] = found["lr"] or LR.get(str(found["adapt"]))
    return found | {"examples of hash": data}


def plain_of(run: EvaluatedRun, among: Sequence[EvaluatedRun]) -> EvaluatedRun | None:
    """The plain finetuning of the same seed, settings and places of flags; None if there is none."""
    found = (one for one in among if one.curriculum == PLAIN and one.seed == run.seed and one is not run)
    return next((one for one in found if not run.differences(one)), None)


def unlike_plain(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Says of runs that have no plain one to compare with, though there is one of their seed, in what it differs."""
    found: list[str] = []
    for run in (one for one in runs if one.curriculum != PLAIN and plain_of(one, runs) is None):
        for other in (one for one in runs if one.curriculum == PLAIN and one.seed == run.seed):
            found.append(f"{other.label} is no control of {run.label}: {', '.join(run.differences(other))}")
    return found


def check_alike(runs: Sequence[EvaluatedRun]) -> None:
    """Raise a `UserError` unless there are runs, of the same concepts, each with a name of its own."""
    if not runs:
        raise UserError("flags evaluate", "there is no finetuning to evaluate", "name a run of `flags train`")
    first = runs[0]
    for other in runs[1:]:
        if other.flags.concepts != first.flags.concepts:
            why = f"its concepts are {', '.join(other.flags.concepts)}, not {', '.join(first.flags.concepts)}"
            raise UserError(f"run {other.label}", why, "evaluate runs of the same concepts together")
    labels = [one.label for one in runs]
    for label in labels:
        if labels.count(label) > 1:
            hint = "give each run once; in Python, give a dict with a name for each"
            raise UserError(f"run {label}", "two runs have this name", hint)


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
