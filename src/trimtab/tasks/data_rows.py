"""Rows of benchmark files and hub data sets, read so that whatever is wrong is named by file and row.

Messages never quote a row's content: some benchmarks hold harmful requests.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import UserError
from trimtab.runs.user_files import csv_reader, json_lines, json_list, reading_from_hub, utf8_text


class DataRow(NamedTuple):
    """One row, with the means to say what is wrong with it."""

    values: Mapping[str, Any]
    where: str
    """`FILE, row N` (rows are counted from 1, the header not among them)."""

    def bad(self, why: str, hint: str = "correct the row") -> UserError:
        """The error for this row."""
        return UserError(self.where, why, hint)

    def get(self, column: str) -> Any:
        """A value that must be there, of any kind."""
        if column not in self.values:
            raise self.bad(f"it has no {column!r}", "check that this is the benchmark's own file")
        return self.values[column]

    def text(self, column: str, *, empty: bool = False) -> str:
        """A text, blank only if `empty`."""
        value = self.get(column)
        if not isinstance(value, str):
            raise self.bad(f"{column!r} is not a text")
        if not empty and not value.strip():
            raise self.bad(f"{column!r} is empty")
        return value

    def choice(self, column: str, allowed: Sequence[str]) -> str:
        """One of a few texts."""
        value = self.text(column).strip()
        if value not in allowed:
            raise self.bad(f"{column!r} is {value[:20]!r}, not one of {', '.join(allowed)}")
        return value

    def number(self, column: str, size: int) -> int:
        """A whole number from 0 to `size` − 1, given as a number or as its digits."""
        value = self.get(column)
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.bad(f"{column!r} is not a whole number")
        if not 0 <= value < size:
            raise self.bad(f"{column!r} is {value}, out of the range 0 to {size - 1}")
        return value


class DataDirectory:
    """The data directory that holds one folder per benchmark.

    Raises:
        UserError: there is no such directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(f"data {path}", "there is no such directory", "give the directory with the benchmarks")

    def files(self, pattern: str) -> list[Path]:
        """Files that match a pattern such as `bbq/*.jsonl`, by name.

        Raises:
            UserError: no file matches.
        """
        files = (p for p in self.path.glob(pattern) if p.is_file())
        found = sorted(p for p in files if not p.name.startswith("."))  # macOS puts ._NAME beside NAME
        if not found:
            raise UserError(f"data {self.path}", f"there is no file {pattern} in it", "put the benchmark's files there")
        return found

    def name(self, file: Path) -> str:
        """A file's name below the directory, for messages."""
        return file.relative_to(self.path).as_posix()

    def csv(
        self,
        file: Path,
        columns: Sequence[str] | None = None,
        required: Sequence[str] = (),
        *,
        delimiter: str = ",",
    ) -> Iterator[DataRow]:
        """Rows of a CSV file.

        Args:
            file: the file.
            columns: names of the columns of a file without a header.
            required: columns that a file with a header must have.
            delimiter: what parts the fields. Where it is a tab, quotation marks stand for themselves.

        Raises:
            UserError: the file is not readable or holds no row, a column is missing, or a row has more or fewer fields.
        """
        name = self.name(file)
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        text = io.StringIO(self._text(file), newline="")
        reader = csv_reader(text, delimiter, quoting)
        try:
            header = list(columns) if columns is not None else next(reader, None)
            if header is None:
                raise _no_rows(name)
            for column in required:
                if column not in header:
                    raise UserError(name, f"it has no column {column!r}, only {', '.join(header)}", "check the file")
            number = 0
            for fields in reader:
                if not fields:
                    continue
                number += 1
                where = f"{name}, row {number}"
                if len(fields) != len(header):
                    raise UserError(where, f"it has {len(fields)} fields, not {len(header)}", "correct the row")
                yield DataRow(dict(zip(header, fields, strict=True)), where)
            if not number:
                raise _no_rows(name)
        except csv.Error as error:
            raise UserError(
                f"{name}, line {reader.line_num}", f"it is not CSV ({error})", "correct the line"
            ) from error

    def jsonl(self, file: Path) -> Iterator[DataRow]:
        """Objects of a file of JSON lines.

        Raises:
            UserError: the file is not readable or holds no row, or a line is no JSON object.
        """
        name, number = self.name(file), 0
        for number, value in json_lines(self._text(file), name):
            yield _object_row(value, f"{name}, row {number}")
        if not number:
            raise _no_rows(name)

    def json(self, file: Path) -> Iterator[DataRow]:
        """Objects of a JSON list.

        Raises:
            UserError: the file is not readable, not JSON or not a list, the list is empty, or an entry is no object.
        """
        name = self.name(file)
        values = json_list(self._text(file), name)
        if not values:
            raise _no_rows(name)
        for number, value in enumerate(values, start=1):
            yield _object_row(value, f"{name}, row {number}")

    def _text(self, file: Path) -> str:
        name = self.name(file)
        try:
            return utf8_text(file.read_bytes(), name)
        except OSError as error:
            raise UserError(name, f"it cannot be read ({error.strerror or error})", "check the file") from error


def is_hub(data: str | None) -> bool:
    """Whether the data are named as a hub data set: `hub`, or `hub:NAME`."""
    return data is not None and (data == "hub" or data.startswith("hub:"))


def hub_name(data: str, default: str | None, task: str) -> str:
    """The hub data set meant by `hub` or `hub:NAME`.

    Raises:
        UserError: the task cannot be read from the hub.
    """
    name = data.removeprefix("hub").removeprefix(":") or default
    if default is None or name is None:
        raise UserError(f"data {data}", f"task {task} cannot be read from the hub", "give a directory")
    return name


def hub_splits(name: str, config: str | None = None) -> Iterator[tuple[str, Iterator[DataRow]]]:
    """The splits of a hub data set with their rows (extra `hub`).

    Raises:
        UserError: `datasets` is not installed, or the data set cannot be read.
    """
    with reading_from_hub(f"data hub:{name}") as datasets:
        splits = dict(datasets.load_dataset(name, *([config] if config else [])))
    for split, rows in splits.items():
        named = ((f"hub:{name} {split}, row {number}", row) for number, row in enumerate(rows, start=1))
        yield split, (_object_row(row, where) for where, row in named)


def _no_rows(name: str) -> UserError:
    return UserError(name, "it holds no row", "put the benchmark's file there")


def _object_row(value: object, where: str) -> DataRow:
    if not isinstance(value, Mapping):
        raise UserError(where, "it is not an object with named values", "correct the row")
    return DataRow(value, where)
