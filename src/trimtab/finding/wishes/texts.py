"""Texts that have a property and texts that don't: the wish is that the first become likelier than the second.

Each example is a pair of texts behind the same prompt; its score is the log-likelihood per token of the one minus that
of the other. Edits are where a decode's would be: at the prompt's last token and at every token of the text but its
last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Example, Examples, WeightedSum
from trimtab.finding.wishes.wish import Wish, check_apart, check_texts
from trimtab.lm import LanguageModel
from trimtab.runs import text_id
from trimtab.tasks.near_duplicates import first_of_each

NEUTRAL = "Here is a short text.\n\n"
"""Stands before texts that have no prompt of their own."""
TEXT_TOKENS = 16
LEAST_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Texts(Wish):
    """Texts with a property and without it.

    Raises:
        UserError: there is none of a kind, one is empty, or the same text is of both kinds.
    """

    wanted: tuple[str, ...]
    """Texts that have the property."""
    unwanted: tuple[str, ...]
    """Texts that don't. As many as of the others are paired line by line."""
    prompts: tuple[str, ...] = ()
    """One for each pair, before both of its texts; a neutral one before all if there are none."""
    chat: bool = False
    """Whether prompts are user turns in the model's chat template."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of each text that are read; longer ones are cut."""

    def __post_init__(self) -> None:
        for name in ("wanted", "unwanted"):
            texts = check_texts(getattr(self, name), f"{name} texts")
            object.__setattr__(self, name, tuple(text.strip() for text in texts))
        check_apart(self.wanted, self.unwanted, "text")
        if self.prompts and not len(self.prompts) == len(self.wanted) == len(self.unwanted):
            raise UserError(f"{len(self.prompts)} prompts", "each pair of texts needs one", "give as many of all")
        if self.text_tokens < LEAST_TOKENS:
            raise UserError(f"text_tokens {self.text_tokens}", f"it must be at least {LEAST_TOKENS}", "raise it")

    @property
    def most(self) -> int:
        return min(len(self.wanted), len(self.unwanted))

    def examples(self, model: LanguageModel) -> Examples:
        wanted, unwanted, prompts, notes = self._apart()
        n = min(len(wanted), len(unwanted))
        pairs = [_pair_id(yes, no) for yes, no in zip(wanted, unwanted, strict=False)]
        found, cut, same = list[Example](), 0, 0
        for i in range(n):
            ask = Ask(prompts[i] if prompts else NEUTRAL, self.chat)
            tokens = [ask.answer_ids(model, text) for text in (wanted[i], unwanted[i])]
            if min(map(len, tokens)) < LEAST_TOKENS:
                text = min(wanted[i], unwanted[i], key=len)
                raise UserError(f"text {text[:60]!r}", f"it has fewer than {LEAST_TOKENS} tokens", "give longer texts")
            cut += sum(len(each) > self.text_tokens for each in tokens)
            more, less = (each[: self.text_tokens] for each in tokens)
            if more == less:
                same += 1
                continue
            prompt = ask.ids(model)
            found.append(
                Example(
                    id=pairs[i],
                    answered=(Answered(prompt, more), Answered(prompt, less)),
                    score=WeightedSum((1 / len(more), -1 / len(less))),
                    asks=(ask, ask),
                )
            )
        if same:
            notes.append(f"{same} pairs were left out whose texts begin with the same {self.text_tokens} tokens")
        if cut:
            notes.append(f"{cut} of {2 * n} texts were cut after {self.text_tokens} tokens (text_tokens)")
        return Examples(
            kind="texts",
            unit="nats per token",
            examples=tuple(found),
            wanted=_by_id(wanted, pairs),
            unwanted=_by_id(unwanted, pairs),
            instructions=self.instruction,
            notes=tuple(notes),
        )

    def _apart(self) -> tuple[list[str], list[str], list[str], list[str]]:
        """Texts of which none is nearly a copy of another of its kind, their prompts, and what was left out."""
        kept = first_of_each(self.wanted), first_of_each(self.unwanted)
        if len(self.wanted) == len(self.unwanted):  # pairs stay pairs
            kept = ([a and b for a, b in zip(*kept, strict=True)],) * 2
        wanted, unwanted = (
            [text for text, keep in zip(texts, keeps, strict=True) if keep]
            for texts, keeps in zip((self.wanted, self.unwanted), kept, strict=True)
        )
        prompts = [text for text, keep in zip(self.prompts, kept[0], strict=True) if keep] if self.prompts else []
        if len(self.wanted) != len(self.unwanted):
            wanted, unwanted = (sorted(texts, key=text_id) for texts in (wanted, unwanted))
        dropped = len(self.wanted) + len(self.unwanted) - len(wanted) - len(unwanted)
        return wanted, unwanted, prompts, [f"{dropped} texts that nearly repeat others were left out"] * bool(dropped)


def _pair_id(wanted: str, unwanted: str) -> str:
    return text_id(f"{wanted}\0{unwanted}")


def _by_id(texts: Sequence[str], ids: Sequence[str]) -> dict[str, str]:
    """Texts by their pair's id, and those of no pair by their own."""
    return {ids[i] if i < len(ids) else text_id(text): text for i, text in enumerate(texts)}
