"""Wishes out of files: texts a line each or in records, and rows of a contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.activations.text import read_documents
from trimtab.errors import UserError
from trimtab.runs.user_files import json_lines, utf8_text


def read_texts(path: Path) -> tuple[str, ...]:
    """Texts of a file: a line each of a plain one (`.txt`), else a record each, as `harvest` reads them.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    if path.suffix != ".txt":
        found = [document.text for document in read_documents([path])]
    else:
        found = [line.strip() for line in _text(path).split("\n") if line.strip()]
    if not found:
        raise UserError(str(path), "there is no text in it", "give a file with a text in each line")
    return tuple(found)


def read_labelled(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Wanted and unwanted texts of one JSONL file of `text` and `wanted`, which is true or false.

    Raises:
        UserError: it cannot be read, or a line is otherwise.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for number, row in json_lines(_text(path), str(path)):
        good = isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("wanted"), bool)
        if not good:
            why = "it does not hold a text and whether it is wanted"
            raise UserError(f"{path}, line {number}", why, 'write {"text": "…", "wanted": true}')
        found[row["wanted"]].append(row["text"])
    return tuple(found[True]), tuple(found[False])


def read_rows(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a JSONL file. Raises a `UserError` that names a line which is none."""
    rows = []
    for number, row in json_lines(_text(path), str(path)):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}", "it is no object", "write prompt, wanted and unwanted")
        rows.append(row)
    return tuple(rows)


def _text(path: Path) -> str:
    try:
        return utf8_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(str(path), "it cannot be read", "check the path") from error
