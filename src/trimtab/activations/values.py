"""Values out of JSON files and tables, read as streams, each with its place; what is no value is `Bad`.

A record that is damaged costs no more than itself: what follows its first line is read again.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from trimtab.errors import UserError
from trimtab.runs.user_files import csv_reader, json_value, refuse_utf16

CHUNK = 1 << 20
"""Bytes read at once."""
LONGEST_RECORD = 1 << 25
"""Bytes or characters after which a quote or bracket that is still open is taken for a mistake (in a table or JSON
lines only if it is open over several lines)."""


class Bad(NamedTuple):
    """A value that is none."""

    why: str
    hint: str = "correct it"


Value = tuple[str, Any]
"""Where a value stands (`line 3`), and the value, which may be `Bad`."""


class _Lines:
    r"""Lines of a file with their numbers from 1, each with its `\n`; lines of a value that failed are given again."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._again: deque[str] = deque()
        self.number = 0
        """Of the line given last."""
        self.taken: list[str] = []
        """Lines given since `begin`."""
        self._size = 0

    def begin(self) -> None:
        """What follows is another value."""
        self.taken, self._size = [], 0

    def give_again(self) -> None:
        """All lines since `begin` but the first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        self.begin()

    @property
    def start(self) -> str:
        """Where the value stands."""
        return f"line {self.number - max(len(self.taken) - 1, 0)}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        self.number += 1
        self.taken.append(line)
        self._size += len(line)
        return line

    @property
    def too_long(self) -> bool:
        return self._size > LONGEST_RECORD

    def _read(self) -> str:
        data = self._file.readline()
        if not data:
            raise StopIteration
        if not self.number:
            refuse_utf16(data, f"text {self._name}")
        text = data.decode("utf-8", "surrogateescape")
        text = text if self.number else text.removeprefix("\ufeff")
        return f"{text[:-2]}\n" if text.endswith("\r\n") else text


def table_rows(file: BinaryIO, name: str, text_field: str, delimiter: str) -> Iterator[Value]:
    """Rows of a table. One that is not well-formed, such as by a quote that is left open, is one line long."""
    lines = _Lines(file, name)

    def limited() -> Iterator[str]:
        for line in lines:
            yield line
            if lines.too_long:
                raise csv.Error(f"a quote is open for more than {LONGEST_RECORD:,} characters")

    reader = csv_reader(limited(), delimiter)
    header: list[str] | None = None
    while True:
        lines.begin()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise UserError(f"text {name}, {lines.start}", f"it is not CSV ({error})", "correct it") from error
            yield lines.start, Bad(f"it is not CSV ({error})")
            lines.give_again()
            reader = csv_reader(limited(), delimiter)
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            check_column(text_field, fields, name)
            header = fields
        elif len(fields) != len(header):
            yield lines.start, Bad(f"it has {len(fields)} fields, not {len(header)} as the first line")
        else:
            yield lines.start, dict(zip(header, fields, strict=True))


def json_values(file: BinaryIO, name: str) -> Iterator[Value]:
    """Values of JSON lines, of values behind each other over several lines, or the entries of a list."""
    begin = cast(io.BufferedReader, file).peek(4096)
    if begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        refuse_utf16(begin, f"text {name}")
        yield from _json_list(file, name)
        return
    lines = _Lines(file, name)
    while True:
        lines.begin()
        line = next(lines, None)
        if line is None:
            return
        if not line.strip():
            continue
        value = _json_value(line.rstrip())
        if isinstance(value, Bad):
            whole = _several_lines(line, lines)
            if isinstance(whole, Bad):
                yield lines.start, value
                lines.give_again()
                continue
            value = whole
        yield lines.start, value


def _several_lines(line: str, lines: _Lines) -> Any:
    """The value that begins with a line and ends in a later one, none of which begins another; `Bad` if it is none."""
    depth = _depth(line)
    while depth is not None and depth > 0:
        line = next(lines, "")
        if lines.too_long or not line or line.startswith("{") or (more := _depth(line)) is None:
            return Bad("")
        depth += more
    return _json_value("".join(lines.taken)) if depth == 0 and len(lines.taken) > 1 else Bad("")


_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


def _depth(line: str) -> int | None:
    """How many more brackets a line opens than it closes; None if a text in it is left open."""
    bare = _STRING.sub("", line)
    return None if '"' in bare else sum(map(bare.count, "{[")) - sum(map(bare.count, "]}"))


def _json_value(text: str) -> Any:
    try:
        return json_value(text, "")
    except UserError as error:
        return Bad(error.why)


_MARK = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')


def _json_list(file: BinaryIO, name: str) -> Iterator[Value]:
    """The entries of a list. One that is well-bracketed and no JSON is bad; a list that does not end is refused."""
    number = depth = start = place = 0
    data, in_string = b"", False
    while more := file.read(CHUNK):
        data, place, start = data[start:] + more, place - start, 0
        while found := (_IN_STRING if in_string else _MARK).search(data, place):
            mark, place = found[0], found.end()
            if mark == b"\\":
                place += 1
            elif mark == b'"':
                in_string = not in_string
            elif mark in b"[{":
                depth += 1
                start = place if depth == 1 else start
            else:
                depth -= mark != b","
                if depth != (mark == b","):  # neither behind an entry nor behind the list
                    continue
                entry = data[start : found.start()].decode("utf-8", "surrogateescape")
                start = place
                if depth or number or entry.strip():
                    yield f"record {number}", _json_value(entry)
                    number += 1
                if not depth:
                    if mark != b"]" or (data[place:] + file.read(CHUNK)).strip():
                        raise UserError(
                            f"text {name}", f"it is not JSON behind record {number - 1}", "correct the file"
                        )
                    return
        place = max(place, len(data))
        if place - start > LONGEST_RECORD:
            why = f"a quote or bracket is open for more than {LONGEST_RECORD:,} bytes"
            raise UserError(f"text {name}, record {number}", why, "correct the file")
    raise UserError(f"text {name}", f"it ends within its list, behind {number} records", "get the whole file")


def check_column(field: str, names: list[str], name: str) -> None:
    """Raise a `UserError` unless a table has the column of the text."""
    if field not in names:
        has = f"{name} has the fields {', '.join(names) or '(none)'}"
        raise UserError(f"text field {field!r}", has, "choose with --text-field")
