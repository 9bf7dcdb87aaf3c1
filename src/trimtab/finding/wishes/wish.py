"""What every wish is: something that becomes examples of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.finding.examples import Examples
from trimtab.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Wish(ABC):
    """A wish. Each kind is one file here."""

    instruction: tuple[str, ...] = ()
    """What prompting tries before prompts, beside a demonstration; it takes part in nothing else."""

    @property
    def about(self) -> str:
        """What is wished for in a few words; nothing where examples alone say it."""
        return ""

    @property
    def most(self) -> int | None:
        """Examples that it can make; None where that is not known before a model is there."""
        return None

    @abstractmethod
    def examples(self, model: LanguageModel) -> Examples:
        """The wish as examples of a model, before they are divided.

        Raises:
            UserError: something of the wish cannot be one, or not with this model.
        """


def check_texts(texts: Sequence[str], what: str) -> tuple[str, ...]:
    """Texts as they are given.

    Raises:
        UserError: they are no list of texts, one is empty, or there is none.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError(what, "they are no list of texts", "give a list of texts")
    found = tuple(texts)
    if not all(text.strip() for text in found) or not found:
        raise UserError(what, "there is none" if not found else "one is empty", "give some text")
    return found


def check_apart(wanted: Sequence[str], unwanted: Sequence[str], what: str) -> None:
    """Raise a `UserError` if the same text is wanted and unwanted."""
    if both := set(wanted) & set(unwanted):
        shown = min(both)[:60]
        raise UserError(f"{what} {shown!r}", "it is wanted and unwanted", "leave it out on one side")
