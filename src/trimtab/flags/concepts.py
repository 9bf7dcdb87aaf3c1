"""The concepts that flags stand for, as a file lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.flags.spec import check_concepts
from trimtab.runs.user_files import utf8_text

_SHAPES = 'give lines like "sea: the sea, ships and sailors", a JSON list of names, or a JSON object of descriptions'


def read_concepts(path: Path | str) -> dict[str, str]:
    """Names of concepts, and what each is in words, in the file's order.

    Args:
        path: a text file with `name` or `name: description` in each line (one that begins with `#` is a comment), a
            JSON list of names, or a JSON object from names to descriptions. What has no description is described by its
            name.

    Raises:
        UserError: the file cannot be read, holds no concept or one twice, or is none of these.
    """
    try:
        text = utf8_text(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(str(path), "it cannot be read", "check the path") from error
    pairs = _of_json(text, str(path)) if text.lstrip()[:1] in ("[", "{") else _of_lines(text)
    if not pairs:
        raise UserError(str(path), "it names no concept", _SHAPES)
    try:
        check_concepts([name for name, _ in pairs])
    except UserError as error:
        raise UserError(str(path), f"{error.what}: {error.why}", error.hint) from None
    return {name: description or name for name, description in pairs}


def _of_lines(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.split("\n")]
    parts = [line.partition(":") for line in lines if line and not line.startswith("#")]
    return [(name.strip(), description.strip()) for name, _, description in parts]


def _of_json(text: str, where: str) -> list[tuple[str, str]]:
    def pairs(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return found  # a dict would forget names that stand twice

    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(where, f"it is not JSON (line {error.lineno}: {error.msg})", "correct the file") from error
    entries = [entry if isinstance(entry, tuple) else (entry, "") for entry in value]
    for entry in entries:
        if not all(isinstance(part, str) for part in entry):
            raise UserError(where, "names and descriptions are texts", _SHAPES)
    return cast(list[tuple[str, str]], entries)
