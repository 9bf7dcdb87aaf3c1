"""What a command is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A command's config, what runs it, and which fields are given without an option's name."""

    config: type[Any]
    run: Callable[[Any], Any]
    positional: tuple[str, ...] = ()
    example: str = ""
    """Words behind the command's name that are worth trying, for its help."""
    defaults: Callable[[Mapping[str, Sequence[str]]], Mapping[str, Any]] | None = None
    """What files among the words, given by option, say of fields that the words leave out."""
    pages: Callable[[Any, Any], Sequence[Path]] | None = None
    """From the config and the result, the runs whose page is written anew."""


@dataclass(frozen=True)
class Printed:
    """A result made of its JSON form and its text."""

    fields: dict[str, Any]
    text: str

    def to_json(self) -> dict[str, Any]:
        return self.fields

    def render(self) -> str:
        return self.text
