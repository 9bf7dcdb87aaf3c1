"""What files of the user's and hub data sets hold; mistakes are named by file and line, and no content is quoted."""

from __future__ import annotations

import codecs
import csv
import importlib
import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError


def utf8_text(data: bytes, name: str) -> str:
    """Text of a file's bytes, without a byte-order mark and with `\\n` line ends.

    Raises:
        UserError: a byte is not UTF-8; the message says which.
    """
    refuse_utf16(data, name)
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
        raise UserError(name, why, "convert the file, for example with iconv -f latin1 -t utf-8") from error


def read_text(path: Path | str) -> str:
    """Text of a file that a user named; see `utf8_text`. Raises a `UserError` if it cannot be read, too."""
    try:
        return utf8_text(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(str(path), "it cannot be read", "check the path") from error


def refuse_utf16(data: bytes, name: str) -> None:
    """Raise a `UserError` if a file that begins with these bytes is in UTF-16 or UTF-32, or no text at all."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise UserError(name, f"it is {encoding}", f"convert it: iconv -f {encoding.lower()} -t utf-8")
    begin = data[:4096]
    if begin.count(0) > len(begin) / 4:
        why = "many of its bytes are 0, as in UTF-16 and in files that are no text"
        raise UserError(name, why, "if it is text, convert it: iconv -f utf-16le -t utf-8")


_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


_NO_CHARACTER = re.compile("[\ud800-\udfff]")


def text_problem(text: str) -> tuple[str, str] | None:
    """Why a text is none, and what to do: it holds half a character, or a byte that was not UTF-8.

    Bytes are found if they were decoded with `surrogateescape`, as Python does with the words of a command line.
    """
    if text.isascii() or (found := _NO_CHARACTER.search(text)) is None:
        return None
    code, place = ord(found[0]), found.start()
    if 0xDC80 <= code <= 0xDCFF:
        hint = "convert the text to UTF-8, for example with iconv -f latin1 -t utf-8"
        return f"its character {place} is the byte 0x{code - 0xDC00:02x}, which is not UTF-8", hint
    return f"its character {place} is half of one (the lone surrogate U+{code:04X})", "remove it"


def check_text(text: str, name: str) -> None:
    """Raise a `UserError` if a text holds something that is no character; see `text_problem`."""
    if (problem := text_problem(text)) is not None:
        raise UserError(name, *problem)


def csv_reader(lines: Iterable[str], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> Any:
    """A strict `csv.reader`, whose fields may be of any length: Python's own limit of 131,072 characters is raised."""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank. Raises a `UserError` that names a line without one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, json_value(line, f"{name}, line {number}", "correct the line")


def json_value(text: str, name: str, hint: str = "correct it", *, whole: bool = False) -> Any:
    """The value of a JSON text. Raises a `UserError` if it is none, or one that Python does not read; of a whole file
    it says the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if whole or "\n" in text.strip() else ""
        raise UserError(name, f"it is not JSON ({line}{error.msg})", hint) from error
    except RecursionError as error:
        raise UserError(name, "it is nested too deeply", hint) from error
    except ValueError as error:
        raise UserError(name, "it holds a number of thousands of digits", hint) from error


def json_list(text: str, name: str) -> list[Any]:
    """The values of a JSON list. Raises a `UserError` if the text is none."""
    values = json_value(text, name, "correct the file", whole=True)
    if not isinstance(values, list):
        raise UserError(name, "it is not a JSON list", "put the entries into a list")
    return cast(list[Any], values)


@contextmanager
def reading_from_hub(what: str, hint: str = "check the name") -> Generator[Any]:
    """Give the package `datasets` (extra `hub`) to read a data set with; `hint` says what to do where that fails.

    Raises:
        UserError: it is not installed, or what is done with it in the block fails.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        install = "install it: pip install 'trimtab[hub]'"
        raise UserError(what, "reading hub data sets needs `datasets`", install) from error
    try:
        yield datasets
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise UserError(what, f"it could not be read ({error})", hint) from error
