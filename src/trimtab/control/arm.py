"""What an arm is, and how one is added: a kind of arm chooses on train and validation, and its arms answer items.

An arm may be compared at three strengths. `own` is the arm as it would be used by itself. `dose`
edits at the reference arm's decisions with its relative doses, so that ‖Δ‖/‖x‖ and the number of edits agree. `kl` is
the same with all doses multiplied by one number, found on validation, at which the mean divergence from the unsteered
model is the reference's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

from trimtab.control.answers import Answers, ItemSet, MatchedSource
from trimtab.control.dose_search import KlMatch
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError
from trimtab.lm import InterventionSource
from trimtab.runs import keyword_types, registered_class
from trimtab.steering import DirectionSource

Match = Literal["own", "dose", "kl"]
Answer = Callable[[ItemSet, float], list[Answers]]
"""Answers items under an arm, its doses multiplied by a number; several results are repeated draws."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of answering a task's items."""

    name: str
    match: Match = "own"
    answer: Answer
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """How it was chosen or trained."""
    main: bool = False
    """Whether it is shown on companion tasks and under other orders of options, too."""
    per_training: bool = True
    """Whether its answers depend on the reference arm or on the setting's seed."""
    scheduled: bool = False
    """Whether it edits where the reference arm does, and so needs one that edits."""
    scale: float = 1.0
    """Multiplies its doses."""
    kl: KlMatch | None = None

    @property
    def label(self) -> str:
        return self.name if self.match == "own" else f"{self.name} at equal {self.match}"

    def answers(self, items: ItemSet) -> list[Answers]:
        """Answer items under the arm, at its scale."""
        return self.answer(items, self.scale)


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """All that an arm may be chosen and trained with."""

    train: ItemSet
    validation: ItemSet
    """With the schedule of the reference arm, if there is one yet."""
    reference: ArmKind | None = None
    """What the arms are compared with."""
    candidates: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Features to try, by where they come from; the arm's own if there are none."""
    made: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        setting: Setting,
        prompts: Mapping[str, TaskPrompts],
        candidates: Mapping[str, Sequence[int]] | None = None,
    ) -> Self:
        """Items of `train` and `validation` under a setting."""
        train, validation = (ItemSet.of(setting, prompts[split]) for split in ("train", "validation"))
        return cls(train=train, validation=validation, candidates=candidates or {})

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What several kinds of arms need, made once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


class ArmKind(ABC):
    """A way of control: a frozen dataclass of its own settings that knows how its arms are chosen.

    A class that is registered is known by its name to every comparison and to `policy evaluate --control`:

        @register
        class FeatureSeven(ArmKind):
            name = "seven"

            def arms(self, choosing):
                return self.steered(lambda items, draw: items.setting.static_source(7, 1.0))
    """

    name: ClassVar[str]
    main: ClassVar[bool] = False
    """Whether its own arm is shown on companion tasks and under other orders of options, too."""
    per_training: ClassVar[bool] = False
    """Whether it is chosen anew for each training of the reference arm, rather than once for all."""
    strengths: ClassVar[tuple[Match, ...]] = ("own", "dose", "kl")
    """What its arms equal, at most; this and what follows are for plans."""
    draws = 1
    """Answers of each arm to an item."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        """Answers that choosing or training takes, at most, by what they are for; the same words are counted once."""
        del choosing
        return {}

    @abstractmethod
    def arms(self, choosing: Choosing) -> list[Arm]:
        """Choose or train, and give the arms; those of equal KL are scaled afterwards.

        Raises:
            UserError: the arm cannot be made here; the comparison says why it is missing.
        """

    def arm(
        self,
        answer: Answer,
        chosen: Mapping[str, Any] | None = None,
        *,
        match: Match = "own",
        name: str = "",
        scheduled: bool = False,
    ) -> Arm:
        """One arm of this kind.

        Args:
            answer: answers items.
            chosen: how it was chosen or trained.
            match: what its strength equals.
            name: the kind's if not given.
            scheduled: whether it edits where the reference arm does.
        """
        return Arm(
            name=name or self.name,
            match=match,
            answer=answer,
            chosen=chosen or {},
            main=self.main,
            per_training=self.per_training or scheduled or match != "own",
            scheduled=scheduled,
        )

    def steered(
        self,
        source: Callable[[ItemSet, int], DirectionSource],
        chosen: Mapping[str, Any] | None = None,
        *,
        own: bool = True,
        draws: int = 1,
    ) -> list[Arm]:
        """The arms of something that adds a direction at one site: by itself, at equal dose and at equal KL.

        Args:
            source: makes it for items and the number of the draw.
            chosen: how it was chosen or trained.
            own: whether it has a strength of its own.
            draws: repetitions of something random.
        """
        about = {**(chosen or {}), **({"draws": draws} if draws > 1 else {})}

        def by_itself(items: ItemSet, scale: float) -> list[Answers]:
            return answers_under(items, (source(items, draw) for draw in range(draws)))

        def matched(items: ItemSet, scale: float) -> list[Answers]:
            assert items.schedule is not None
            schedule = items.schedule
            return answers_under(items, (MatchedSource(source(items, d), schedule, scale) for d in range(draws)))

        arms = [self.arm(by_itself, about)] if own else []
        return [*arms, *(self.arm(matched, about, match=match, scheduled=True) for match in ("dose", "kl"))]

    @classmethod
    def with_options(cls, options: Mapping[str, Any]) -> Self:
        """The kind with those of its fields that options name: `rank` of `lora` by `lora_rank`, or by `rank`."""
        prefix, given = cls.name.replace("-", "_"), dict[str, Any]()
        for name in keyword_types(cls):
            for key in (f"{prefix}_{name}", name):
                if key in options:
                    given.setdefault(name, options[key])
        return cls(**given)


def answers_under(items: ItemSet, sources: Iterable[InterventionSource]) -> list[Answers]:
    """Answers to items under each of several sources, with the divergence from the unsteered model."""
    return [items.answer(source, kl=True) for source in sources]


class Unsteered(ArmKind):
    """The model as it is."""

    name = "unsteered"
    main = True

    def arms(self, choosing: Choosing) -> list[Arm]:
        return [self.arm(lambda items, scale: [items.answer(kl=True)])]


ARM_KINDS: dict[str, type[ArmKind]] = {}
"""Every registered kind by its name, in the order in which comparisons show them."""
_Kind = TypeVar("_Kind", bound=type[ArmKind])


def register(kind: _Kind, *, before: str | None = None) -> _Kind:
    """Make a kind of arm known by its name; as a decorator, or as a call for one that is shown before another.

    A class that is defined again, as in a notebook, replaces itself.

    Raises:
        UserError: another kind has the name.
    """
    known = ARM_KINDS.get(kind.name, kind)
    if kind.name == Unsteered.name or (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise UserError(f"arm {kind.name!r}", "there is already a kind of arm of this name", "choose another name")
    names = list(ARM_KINDS)
    later = {name: ARM_KINDS.pop(name) for name in names[names.index(before) :]} if before in names else {}
    ARM_KINDS[kind.name] = kind
    ARM_KINDS.update(later)
    return kind


def find_kind(name: str) -> type[ArmKind]:
    """A kind of arm by its registered name, or by `module:Class` (see `runs.find_class`).

    Raises:
        UserError: there is no such kind.
    """
    return Unsteered if name == Unsteered.name else registered_class(name, "control", ARM_KINDS, ArmKind)


def arm_kinds(
    arms: str | ArmKind | type[ArmKind] | Iterable[str | ArmKind | type[ArmKind]],
    options: Mapping[str, Any] | None = None,
) -> list[ArmKind]:
    """Kinds by their names, in the order of the registry, with options (see `ArmKind.with_options`); others after them,
    classes with those options, too.

    Raises:
        UserError: there is no kind of a name, or something is no kind.
    """
    listed = [arms] if isinstance(arms, str | ArmKind | type) else list(arms)
    given: list[str | ArmKind] = []
    for one in listed:
        found = one.with_options(options or {}) if isinstance(one, type) and issubclass(one, ArmKind) else one
        if not isinstance(found, str | ArmKind):
            raise UserError(f"arm {one!r}", "it is neither the name of a kind nor one", "derive it from ArmKind")
        given.append(found)
    kinds = dict.fromkeys(find_kind(one) for one in given if isinstance(one, str))
    known = [kind for kind in ARM_KINDS.values() if kind in kinds]
    ordered = [*known, *(kind for kind in kinds if kind not in known)]
    return [
        *(kind.with_options(options or {}) for kind in ordered),
        *(one for one in given if not isinstance(one, str)),
    ]
