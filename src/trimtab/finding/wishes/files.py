"""Wishes out of files: texts a line each or in records, and rows of a contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.activations.formats import TEXT_SUFFIXES, is_readable
from trimtab.activations.text import read_documents
from trimtab.errors import UserError
from trimtab.runs.user_files import json_lines, read_text


def read_texts(path: Path) -> tuple[str, ...]:
    """Texts of a file: a record each, as `harvest` reads them, or a line each of a plain one, blank ones left out.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    found = tuple(text for text in _texts(path) if text.strip())
    if not found:
        raise UserError(str(path), "there is no text in it", "give a file with a text in each line")
    return found


def read_sides(wanted: Path, unwanted: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Wanted and unwanted texts of two files, as `read_texts`; those of a line are a pair where both have as many.

    Raises:
        UserError: as `read_texts`, or there are blank lines that would shift the pairs.
    """
    sides = read_texts(wanted), read_texts(unwanted)
    blank = [[i for i, text in enumerate(_texts(path), 1) if not text.strip()] for path in (wanted, unwanted)]
    if len(sides[0]) == len(sides[1]) and blank[0] != blank[1]:
        line = min(set(blank[0]) ^ set(blank[1]))
        why = f"line {line} is blank in one of them alone, so that their lines are no pairs"
        raise UserError(f"{wanted} and {unwanted}", why, "leave out blank lines, or the line in both")
    return sides


def _texts(path: Path) -> list[str]:
    if path.is_dir() or (is_readable(path.name) and path.suffix.lower() not in TEXT_SUFFIXES):
        # none is left out, as that would shift the pairs
        return [document.text for document in read_documents([path], bad_records="fail")]
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def read_labelled(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Wanted and unwanted texts of one JSONL file of `text` and `wanted`, which is true or false.

    Raises:
        UserError: it cannot be read, or a line is otherwise.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for number, row in json_lines(read_text(path), str(path)):
        good = isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("wanted"), bool)
        if not good:
            why = "it does not hold a text and whether it is wanted"
            raise UserError(f"{path}, line {number}", why, 'write {"text": "…", "wanted": true}')
        found[row["wanted"]].append(row["text"])
    return tuple(found[True]), tuple(found[False])


def read_rows(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a JSONL file. Raises a `UserError` that names a line which is none."""
    rows = []
    for number, row in json_lines(read_text(path), str(path)):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}", "it is no object", "write prompt, wanted and unwanted")
        rows.append(row)
    return tuple(rows)
