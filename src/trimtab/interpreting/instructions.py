"""Instructions that steered models answer: some to choose doses on, others to report on, fixed by what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.runs import ASSETS, text_id

SHIPPED = ASSETS / "instructions.json"
"""Plain instructions, written for trimtab."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions in two parts, neither of which is used for the other."""

    choosing: tuple[str, ...]
    """To choose each dose on."""
    reporting: tuple[str, ...]
    """To report on."""

    @property
    def all(self) -> tuple[str, ...]:
        """Those to choose on first."""
        return self.choosing + self.reporting


def read_instructions(path: Path | None = None, n: int = 10) -> Instructions:
    """Draw instructions from a file, and divide them in halves.

    Which are drawn, and for which half, follows from a hash of each text alone, so that another order of the file, or
    one more line in it, changes little.

    Args:
        path: JSON list of texts or of objects with `instruction`, as AlpacaEval's, or one text a line; those that ship
            with trimtab by default.
        n: how many to draw.

    Raises:
        UserError: the file cannot be read or holds something else, or has too few different texts.
    """
    file = SHIPPED if path is None else path
    texts = sorted(set(_texts(file)), key=text_id)
    if n < 2 or len(texts) < n:
        why = (
            f"{n} are asked for, and {file.name} has {len(texts)}"
            if n >= 2
            else "one is to choose on, one to report on"
        )
        raise UserError(f"{n} instructions", why, f"ask for 2 to {len(texts)}, or name a longer file")
    return Instructions(choosing=tuple(texts[: n // 2]), reporting=tuple(texts[n // 2 : n]))


def _texts(file: Path) -> list[str]:
    hint = "give a JSON list of texts, or of objects with `instruction`, or one text a line"
    try:
        text = file.read_text(encoding="utf-8")
        rows: Any = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"instructions {file}", f"not readable ({error})", hint) from error
    if isinstance(rows, dict):
        rows = cast("dict[str, Any]", rows).get("instructions")
    if not isinstance(rows, list):
        raise UserError(f"instructions {file}", "it is no list", hint)
    found: list[str] = []
    for row in cast("list[Any]", rows):
        said = cast("dict[str, Any]", row).get("instruction") if isinstance(row, dict) else row
        if not isinstance(said, str):
            raise UserError(f"instructions {file}", f"an entry is {str(row)[:40]!r}, and no text", hint)
        if said.strip():
            found.append(said.strip())
    return found
