"""What files of the user's and hub data sets hold; mistakes are named by file and line, and no content is quoted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

from trimtab.errors import UserError


def utf8_text(data: bytes, name: str) -> str:
    """Text of a file's bytes, without a byte-order mark and with `\\n` line ends.

    Raises:
        UserError: a byte is not UTF-8; the message says which.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
        raise UserError(name, why, "convert the file, for example with iconv -f latin1 -t utf-8") from error


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank. Raises a `UserError` that names a line without one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                why = f"it is not JSON ({error.msg})"
                raise UserError(f"{name}, line {number}", why, "correct the line") from error


def json_list(text: str, name: str) -> list[Any]:
    """The values of a JSON list. Raises a `UserError` if the text is none."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(name, f"it is not JSON (line {error.lineno}: {error.msg})", "correct the file") from error
    if not isinstance(values, list):
        raise UserError(name, "it is not a JSON list", "put the entries into a list")
    return cast(list[Any], values)


@contextmanager
def reading_from_hub(what: str) -> Generator[Any]:
    """Give the package `datasets` (extra `hub`) to read a data set with.

    Raises:
        UserError: it is not installed, or what is done with it in the block fails.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        hint = "install it: pip install 'trimtab[hub]'"
        raise UserError(what, "reading hub data sets needs `datasets`", hint) from error
    try:
        yield datasets
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(what, f"it could not be read ({error})", "check the name") from error
