"""Prompts, and words that are to come next more, or less, likely than they do.

A word of several tokens counts by the probability of all of them in order. With words of both kinds the score is the
log-odds of the first against the second, with one kind against everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Example, Examples, LogOdds
from trimtab.finding.wishes.wish import Wish, check_apart, check_texts
from trimtab.lm import LanguageModel
from trimtab.runs import text_id


@dataclass(frozen=True, kw_only=True)
class Words(Wish):
    """Words to be more or less likely next.

    Raises:
        UserError: there is no prompt or word, one is empty, a prompt is there twice, or a word is of both kinds.
    """

    prompts: tuple[str, ...]
    """What the words are to follow."""
    more: tuple[str, ...] = ()
    """Words to be likelier."""
    less: tuple[str, ...] = ()
    """Words to be less likely."""
    chat: bool = False
    """Whether prompts are user turns in the model's chat template."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", check_texts(self.prompts, "prompts"))
        if not self.more and not self.less:
            raise UserError("the words", "there is none", "give some to be more likely, or less")
        for name in ("more", "less"):
            if words := getattr(self, name):
                object.__setattr__(self, name, tuple(map(str.strip, check_texts(words, f"words to be {name} likely"))))
        check_apart(self.more, self.less, "word")
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError("the prompts", "one is given twice, so that it could be in two splits", "give each once")

    @property
    def most(self) -> int:
        return len(self.prompts)

    def examples(self, model: LanguageModel) -> Examples:
        found, several = list[Example](), dict[str, int]()
        for text in self.prompts:
            ask = Ask(text, self.chat)
            prompt, tokens = ask.ids(model), dict[tuple[int, ...], bool]()
            for word in (*self.more, *self.less):
                ids = ask.answer_ids(model, word)
                if tokens.setdefault(ids, word in self.more) != (word in self.more):
                    raise UserError(f"word {word!r}", "it has the tokens of one of the other kind", "leave it out")
                if len(ids) > 1:
                    several[word] = len(ids)
            # What begins with another word of its kind is counted with that one.
            kept = {
                ids: wanted
                for ids, wanted in tokens.items()
                if not any(ids[: len(o)] == o and w == wanted for o, w in tokens.items() if len(o) < len(ids))
            }
            found.append(
                Example(
                    id=text_id(text),
                    answered=tuple(Answered(prompt, ids) for ids in kept),
                    score=LogOdds(tuple(kept.values())),
                    asks=(ask,) * len(kept),
                )
            )
        said = ", ".join(f"{word!r} ({n} tokens)" for word, n in several.items())
        return Examples(
            kind="words",
            unit="nats of log-odds",
            examples=tuple(found),
            more=self.more,
            less=self.less,
            instructions=self.instruction,
            notes=(f"by the probability of all their tokens in order: {said}",) * bool(said),
        )
