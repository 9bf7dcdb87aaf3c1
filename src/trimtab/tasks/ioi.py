"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593), generated: whose name comes next?

Three tasks over the same sentences. `ioi` rewards the indirect object, which models give anyway; `ioi-swapped` rewards
the subject instead, which one static intervention may bring about; `ioi-mixture` puts a cue before each sentence that
says which of the two is wanted, so that no single static intervention can serve both and what a policy gains over the
best of them is due to choosing. Every sentence of the mixture occurs with both cues.

Sentences are drawn from a fixed list that depends on the seed alone; a tokenizer only leaves out those whose names are
not one token each, so that two models share ids wherever both can take a sentence. Splits go by the pair of names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Self

from trimtab.errors import UserError
from trimtab.runs import split_ids, text_id
from trimtab.tasks.ioi_material import NAMES, OBJECTS, PLACES, TEMPLATES
from trimtab.tasks.task import SPLITS, Item, Outcome, Task, UnsuitedModelError, accuracy_by_group
from trimtab.tasks.tokens import Tokenizer, token_behind

SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
CUES = {"other": "Name the other one.", "same": "Repeat the same name."}
_TRIES, _TRIES_PER_ITEM = 20_000, 60


class Sentence(NamedTuple):
    """One sentence of the fixed list."""

    text: str
    io: str
    s: str
    template: int
    io_first: bool


class IOI(Task):
    """Reward 1 if the next word is the wanted name, whatever else the vocabulary offers; any word but the two names is
    malformed. Restricted to `option_tokens`, the same reward compares just the two names. The options are always
    (indirect object, subject)."""

    name: ClassVar[str] = "ioi"
    max_new_tokens: ClassVar[int] = 1
    chat: ClassVar[bool] = False
    options_only: ClassVar[bool] = True
    instructions: ClassVar[tuple[str, ...]] = (
        "Complete the sentence with the name of the person who receives something.",
        "The next word is a name.",
    )

    @classmethod
    def load(
        cls,
        data: str | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        n_train: int = 2000,
        n_validation: int = 400,
        n_test: int = 800,
        seed: int = 0,
    ) -> Self:
        """Generate the task.

        Args:
            data: not used.
            tokenizer: the model's; only names that are one token behind a blank are used.
            n_train: items for training.
            n_validation: items for choosing.
            n_test: items for reporting.
            seed: of the list of sentences.

        Raises:
            UserError: no tokenizer, or fewer different sentences than asked for.
            UnsuitedModelError: too few names are one token.
        """
        if tokenizer is None:
            raise UserError(f"task {cls.name}", "it needs the model's tokenizer", "give tokenizer=model.tokenizer")
        wanted: dict[str, int] = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
        for split, n in wanted.items():
            if n < 0:
                raise UserError(f"n_{split} = {n}", "it must be at least 0", "change it")
        names = {name for name in NAMES if token_behind(tokenizer, "then", f" {name}") is not None}
        if len(names) < 4:
            raise UnsuitedModelError(
                f"task {cls.name}", f"only {len(names)} of {len(NAMES)} names are one token", "choose another model"
            )
        pairs = [f"{a}+{b}" for a in sorted(NAMES) for b in sorted(NAMES) if a < b]  # which stay on one side
        side = {pair: split for split, members in split_ids(pairs, SHARES, "ioi").items() for pair in members}
        items: dict[str, list[Item]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        tries = _TRIES + _TRIES_PER_ITEM * sum(wanted.values())
        for sentence in sentences(seed, tries):
            split = side["+".join(sorted((sentence.io, sentence.s)))]
            if len(items[split]) >= wanted[split] or not {sentence.io, sentence.s} <= names or sentence.text in seen:
                if all(len(items[s]) >= wanted[s] for s in SPLITS):
                    break
                continue
            seen.add(sentence.text)
            items[split].extend(cls._items_of(sentence)[: wanted[split] - len(items[split])])
        for split, n in wanted.items():
            if len(items[split]) < n:
                raise UserError(f"n_{split} = {n}", f"there are only {len(items[split])} sentences", "ask for fewer")
        return cls(items, notes={"names_of_one_token": float(len(names))})

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        """The first word decides."""
        found = re.match(r"\s*([^\W\d_]+)", text)
        name = found.group(1) if found else None
        if name not in item.options:
            return Outcome(reward=0.0, correct=False, malformed=True)
        return Outcome(reward=float(name == item.answer), correct=name == item.answer, answer=name)

    def option_strings(self, item: Item) -> tuple[str, ...]:
        """The two names: indirect object, subject."""
        return item.options

    def correct_option(self, item: Item, permutation: int = 0) -> int:
        """0 if the indirect object is wanted, 1 if the subject is."""
        return item.options.index(item.answer)

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Adds `accuracy/GROUP`: by cue in the mixture, else by the order of the two names (ABBA, BABA)."""
        return super().summarise(outcomes) | accuracy_by_group(outcomes)

    @classmethod
    def _items_of(cls, sentence: Sentence) -> list[Item]:
        return [cls._item(sentence, sentence.text, sentence.io, "BABA" if sentence.io_first else "ABBA")]

    @classmethod
    def _item(cls, sentence: Sentence, prompt: str, answer: str, group: str) -> Item:
        return Item(
            id=f"{cls.name}/{text_id(prompt)}",
            prompt=prompt,
            answer=answer,
            options=(sentence.io, sentence.s),
            group=group,
            meta={
                "io": sentence.io,
                "s": sentence.s,
                "template": sentence.template,
                "sentence": text_id(sentence.text),
            },
        )


class IOISwapped(IOI):
    """The subject's name is wanted."""

    name: ClassVar[str] = "ioi-swapped"
    instructions: ClassVar[tuple[str, ...]] = (
        "Complete the sentence with the name that is mentioned twice.",
        "The next word is the name of the one who acts, mentioned twice.",
    )

    @classmethod
    def _items_of(cls, sentence: Sentence) -> list[Item]:
        return [cls._item(sentence, sentence.text, sentence.s, "BABA" if sentence.io_first else "ABBA")]


class IOIMixture(IOI):
    """A cue before the sentence asks for the other name (the indirect object) or the same one again (the subject)."""

    name: ClassVar[str] = "ioi-mixture"
    instructions: ClassVar[tuple[str, ...]] = (
        "Follow the instruction and complete the sentence with a name.",
        "First read which name is wanted, then complete the sentence with it.",
    )

    @classmethod
    def _items_of(cls, sentence: Sentence) -> list[Item]:
        answers = {"other": sentence.io, "same": sentence.s}
        return [cls._item(sentence, f"{cue} {sentence.text}", answers[group], group) for group, cue in CUES.items()]


def sentences(seed: int, n: int) -> Iterator[Sentence]:
    """The first n sentences of a seed's list, repetitions among them."""
    for i in range(n):
        rng = random.Random(f"ioi/{seed}/{i}")
        template = rng.randrange(len(TEMPLATES))
        io, s = rng.sample(NAMES, 2)
        io_first = rng.random() < 0.5
        first, second = (io, s) if io_first else (s, io)
        text = TEMPLATES[template].format(
            first=first, second=second, s=s, place=rng.choice(PLACES), object=rng.choice(OBJECTS)
        )
        yield Sentence(text, io, s, template, io_first)
