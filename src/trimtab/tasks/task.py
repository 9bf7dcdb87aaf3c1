"""What a task is: items with prompts, in fixed splits; how an answer is read and rewarded; what is reported."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

from trimtab.errors import UserError
from trimtab.judges import Judge
from trimtab.runs import split_ids, text_id
from trimtab.tasks.tokens import Tokenizer, chat_answer_prefix, continuation_token

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a task."""

    id: str
    """Fixed: the benchmark's own, or made from the content, so that it names the same question everywhere."""
    prompt: str
    """What the user says; options, examples and instructions are added by `Task.prompt`."""
    answer: str
    """The gold answer, in the task's own form (a letter, a number, a name, what is to be done)."""
    options: tuple[str, ...] = ()
    """Texts of the options, in the benchmark's order; empty where there are none."""
    group: str = ""
    """Subject, category or context, by which results are broken down."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one answer was read and rewarded."""

    reward: float
    """What a policy is trained on; finite."""
    correct: bool | None
    """Whether the answer is the wanted one; None where a task has no right and wrong."""
    malformed: bool = False
    """No answer could be read from the text (or, for refusals, the text is gibberish). Counted apart from wrong."""
    answer: str | None = None
    """What was read from the text, in the form of `Item.answer`."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers behind the reward and the metrics."""
    item: str = ""
    """The item's id."""
    group: str = ""
    """The item's group."""

    def __post_init__(self) -> None:
        if not isinstance(self.reward, int | float) or not math.isfinite(self.reward):
            where = f" of item {self.item}" if self.item else ""
            raise UserError(f"reward {self.reward!r}{where}", "it must be a finite number", "correct the task's reward")


class UnsuitedModelError(UserError):
    """This model's tokenizer does not suit the task; another model is needed."""


class Companion(NamedTuple):
    """A task whose results must stand beside another's, since a policy can earn that one's reward by harm here."""

    task: str
    split: str
    """Split of that task, or `all`."""
    why: str


class Task(ABC):
    """A task. Subclasses set the class attributes, make items in `load`, and read answers in `parse`.

    Args:
        items: items of each split; the splits `train`, `validation` and `test` may be empty, but not all.
        notes: what the loader left out or changed, by name, for the report.

    Raises:
        UserError: two items have the same id, a split has another name, or there is no item.
    """

    name: ClassVar[str]
    """What the command line calls it."""
    metric: ClassVar[str] = "accuracy"
    """The headline number, a key of `summarise`."""
    shown_metrics: ClassVar[tuple[str, ...]] = ()
    """Further keys of `summarise` that are reported with intervals beside the reward."""
    max_new_tokens: ClassVar[int] = 1
    """How long an answer may be."""
    chat: ClassVar[bool] = True
    """Whether the caller puts the prompt into the model's chat template."""
    options_only: ClassVar[bool] = False
    """Whether decoding can be restricted to `option_tokens`."""
    companions: ClassVar[tuple[Companion, ...]] = ()
    """Tasks whose results must stand beside this one's."""
    instructions: ClassVar[tuple[str, ...]] = (
        "Read the following carefully and answer correctly.",
        "Give the best possible answer.",
    )
    """Instructions that prompting tries before the prompt."""
    best_reward: ClassVar[float | None] = 1.0
    """The largest reward of an answer; None where there is none."""
    hides_text: ClassVar[bool] = False
    """Whether prompts and answers may be harmful, so that reports and files do not show them."""
    judge: Judge | None = None
    """What reads the answers; None where the task does so itself."""
    files: ClassVar[tuple[str, ...]] = ()
    """What `load` reads below the data directory; empty for a task that is generated."""
    hub: ClassVar[str | None] = None
    """The hub data set that `hub` stands for; None where the task cannot be read from the hub."""
    needs_tokenizer: ClassVar[bool] = True
    """Whether `load` looks at the tokenizer. A task that says no is read before any model is loaded, so that mistakes
    in its data show at once."""

    def __init__(self, items: Mapping[str, Iterable[Item]], *, notes: Mapping[str, float] | None = None) -> None:
        if unknown := set(items) - set(SPLITS):
            raise UserError(
                f"task {self.name}", f"{min(unknown)!r} is not one of its splits", f"use {', '.join(SPLITS)}"
            )
        self._items = {split: tuple(items.get(split, ())) for split in SPLITS}
        self.notes: dict[str, float] = dict(notes or {})
        counts = Counter(item.id for split in SPLITS for item in self._items[split])
        if not counts:
            raise UserError(f"task {self.name}", "there is no item in it", "check the data")
        doubled, count = counts.most_common(1)[0]
        if count > 1:
            raise UserError(f"task {self.name}, item {doubled}", f"this id occurs {count} times", "make ids unique")

    def __repr__(self) -> str:
        counts = (f"{len(items):,} {split}" for split, items in self._items.items())
        return f"<{type(self).__name__} {self.name}: {', '.join(counts)} items>"

    @classmethod
    def load(cls, data: str | None = None, tokenizer: Tokenizer | None = None) -> Self:
        """Make the task's items. Subclasses add keyword-only options of their own.

        Args:
            data: the data directory, or `hub:NAME`; None for a task that is generated.
            tokenizer: the model's, for tasks whose items depend on it.
        """
        raise NotImplementedError(f"{cls.__name__} has no load")

    @property
    def hashes(self) -> dict[str, str]:
        """By name what decides rewards beside items and code of the library; a run keeps them and refuses others."""
        return {}

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """Ids of each split."""
        return {split: tuple(item.id for item in items) for split, items in self._items.items()}

    def items(self, split: str) -> tuple[Item, ...]:
        """Items of a split, or of `all`.

        Raises:
            UserError: there is no such split, or nothing is in it.
        """
        if split == "all":
            return tuple(item for name in SPLITS for item in self._items[name])
        if split not in self._items:
            raise UserError(f"split {split!r}", f"task {self.name} has {', '.join(SPLITS)} and all", "choose one")
        if not self._items[split]:
            raise UserError(f"split {split!r} of task {self.name}", "nothing is in it", "load the task with more data")
        return self._items[split]

    def sample(self, split: str, n: int | None = None) -> tuple[Item, ...]:
        """At most n items of a split, the same ones every time; those for a smaller n are among them.

        Files list their items by subject or category, so that the first n would be of one alone. Of a task that reads
        files these are therefore the n items whose ids have the smallest hashes; a generated one's are its first n.

        Args:
            split: as in `items`.
            n: all of them, in their own order, if not given.
        """
        items = self.items(split)
        if n is None:
            return items
        return (tuple(sorted(items, key=lambda item: text_id(item.id))) if self.files else items)[:n]

    def prompt(self, item: Item, permutation: int = 0) -> str:
        """The text for the model, before any chat template.

        Args:
            item: an item of this task.
            permutation: the cyclic order of the options, from 0 to `orders(item)` − 1.
        """
        self._check_permutation(item, permutation)
        return item.prompt

    def orders(self, item: Item) -> int:
        """How many cyclic orders an item's options can be shown in: 1 where the order does not show."""
        return 1

    def option_strings(self, item: Item) -> tuple[str, ...]:
        """What the model writes to choose each option, in the order shown; empty where there are no options."""
        return ()

    def option_tokens(self, item: Item, tokenizer: Tokenizer, context: str | None = None) -> tuple[int, ...]:
        """The token of each option, in the order shown, for restricting decoding.

        Args:
            item: an item of this task.
            tokenizer: the model's.
            context: what stands directly before the answer. By default the opening of the model's turn, as the
                tokenizer's chat template writes it, with the blank before the answer that the template has (usually
                none); for tasks without chat and for models without a template the end of the prompt, behind which an
                answer begins with a blank. A plain function as the tokenizer of a chat task is taken to open the turn
                with a line end.

        Raises:
            UserError: the task has no options, or one is not a single token there.
        """
        strings = self.option_strings(item)
        if not strings:
            raise UserError(f"task {self.name}", "its answers are not options", "decode without restriction")
        blank = None
        if context is None and self.chat:
            prefix = chat_answer_prefix(tokenizer)
            if prefix is not None:
                context, blank = prefix
            elif not hasattr(tokenizer, "chat_template"):
                context = "\n"
        if context is None:
            context = self.prompt(item)[-24:]
        if blank is None:
            blank = "" if context[-1:].isspace() or not context else " "
        return tuple(continuation_token(tokenizer, context, blank + string) for string in strings)

    @abstractmethod
    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        """Read and reward an answer.

        Args:
            item: the item that was asked.
            text: what the model wrote.
            permutation: the order in which the options were shown.
        """

    def score(
        self,
        items: Sequence[Item],
        texts: Sequence[str],
        permutation: int = 0,
        option_logp: Sequence[Sequence[float]] | None = None,
    ) -> list[Outcome]:
        """Outcomes of many answers: `parse` for each, with ids and groups filled in.

        Args:
            items: the items that were asked.
            texts: what the model wrote.
            permutation: the order in which all the items' options were shown.
            option_logp: per item, the log-probability (or logit) of each of `option_tokens` at the first step. Adds the
                part `logit_difference`: the wanted option's minus the best other's.

        Raises:
            UserError: a reward that is not finite.
        """
        outcomes = self._parse_all(items, texts, permutation)
        for i, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
            parts = dict(outcome.parts)
            if option_logp is not None:
                values, wanted = option_logp[i], self.correct_option(item, permutation)
                others = [value for option, value in enumerate(values) if option != wanted]
                parts["logit_difference"] = values[wanted] - max(others)
            outcomes[i] = replace(outcome, item=item.id, group=item.group, parts=parts)
        return outcomes

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Numbers over outcomes: n, mean reward, shares of correct and malformed answers, means by group.

        Raises:
            UserError: there is no outcome.
        """
        if not outcomes:
            raise UserError(f"task {self.name}", "there is no outcome to summarise", "decode at least one item")
        judged = [o for o in outcomes if o.correct is not None]
        summary = {
            "n": float(len(outcomes)),
            "reward": mean(o.reward for o in outcomes),
            "malformed": mean(o.malformed for o in outcomes),
        }
        if judged:
            summary["accuracy"] = mean(bool(o.correct) for o in judged)
            if well_formed := [o for o in judged if not o.malformed]:
                summary["accuracy_well_formed"] = mean(bool(o.correct) for o in well_formed)
        differences = [o.parts["logit_difference"] for o in outcomes if "logit_difference" in o.parts]
        if differences:
            summary["logit_difference"] = mean(differences)
        return summary

    def correct_option(self, item: Item, permutation: int = 0) -> int:
        """Place of the wanted option among those shown."""
        raise UserError(f"task {self.name}", "its answers are not options", "leave out option_logp")

    def _parse_all(self, items: Sequence[Item], texts: Sequence[str], permutation: int) -> list[Outcome]:
        outcomes = []
        for item, text in zip(items, texts, strict=True):
            try:
                outcomes.append(self.parse(item, text, permutation))
            except UserError as error:
                if not error.what.startswith("reward "):
                    raise
                raise UserError(f"task {self.name}, item {item.id}: {error.what}", error.why, error.hint) from error
        return outcomes

    def _check_permutation(self, item: Item, permutation: int) -> None:
        orders = self.orders(item)
        if not 0 <= permutation < orders:
            raise UserError(
                f"permutation {permutation}", f"item {item.id} has the orders 0 to {orders - 1}", "choose one of them"
            )


def known_under_every_order(outcomes: Sequence[Sequence[Outcome]]) -> list[bool]:
    """Whether each item was right under every order of its options: only then the model knows the answer.

    Args:
        outcomes: per order, the outcomes of the same items in the same order.
    """
    return [all(o.correct is True for o in per_item) for per_item in zip(*outcomes, strict=True)]


def split_items(
    items: Iterable[Item],
    shares: Mapping[str, float],
    salt: str,
    key: Callable[[Item], Hashable] | None = None,
) -> dict[str, list[Item]]:
    """Divide items among splits by a hash, so that adding some moves no other.

    Args:
        items: the items.
        shares: share of each split, summing to 1.
        salt: names the division.
        key: items with the same key stay together (the item's id by default).
    """
    members: dict[str, list[Item]] = {}
    for item in items:
        members.setdefault(str(item.id if key is None else key(item)), []).append(item)
    divided = split_ids(members, shares, salt)
    return {split: [item for name in names for item in members[name]] for split, names in divided.items()}


def by_group(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each group, groups in alphabetical order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.group):
        groups.setdefault(outcome.group, []).append(outcome)
    return groups


def accuracy_by_group(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """`accuracy/GROUP`: the share of right answers in each group."""
    groups = by_group(outcomes)
    return {f"accuracy/{group}": mean(bool(o.correct) for o in part) for group, part in groups.items()}


def check_groups(kind: str, names: Sequence[str], items: Iterable[Item], benchmark: str) -> None:
    """Raise a `UserError` unless there are items of every group that is named."""
    known = {item.group for item in items}
    for name in names:
        if name not in known:
            raise UserError(f"{kind} {name!r}", f"{benchmark}'s files here have none of that name", "check the name")


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    listed = list(values)
    return math.fsum(listed) / len(listed)
