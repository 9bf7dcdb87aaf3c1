"""Read the records of one file, whatever its format: text, JSON, JSON lines, tables, zip and gzip of these."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trimtab.errors import UserError
from trimtab.runs.user_files import json_lines, json_list, utf8_text

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
KNOWN = ", ".join((*SUFFIXES, ".zip", ".gz"))


class Record(NamedTuple):
    """One text as its file gives it."""

    text: str
    id: str | None
    """The record's own id; None for a plain text, whose id comes from where it stands in the file."""
    source: str | None
    """What the record says about its origin."""
    name: str
    """Name of the file, inside its archive where there is one (`speeches.zip!1945.txt`)."""


def is_readable(name: str) -> bool:
    """Whether a file of this name is one that `read_file` reads."""
    path = PurePosixPath(name.lower())
    return path.suffix == ".zip" or path.suffix in SUFFIXES or (path.suffix == ".gz" and is_readable(path.stem))


def read_file(path: Path, name: str, text_field: str) -> Iterator[Record]:
    """The records of a file, which they and messages call by `name`; `text_field` is the column or key of the text.

    Raises a `UserError` if the file cannot be read, is not UTF-8, not well-formed, or has no such field.
    """
    if not is_readable(path.name):
        raise UserError(
            f"text {path}",
            f"{path.suffix or 'a file without a suffix'} is not a known format",
            f"use {KNOWN}",
        )
    try:
        if path.suffix.lower() == ".zip":
            yield from _read_zip(path, name, text_field)
        else:
            yield from read_bytes(path.read_bytes(), name, text_field)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"text {path}", f"it cannot be read ({error})", "check the file") from error


def read_bytes(data: bytes, name: str, text_field: str) -> Iterator[Record]:
    """The records in the content of a file, whose format the name tells."""
    suffix = PurePosixPath(name.lower()).suffix
    if suffix == ".gz":
        for record in read_bytes(gzip.decompress(data), name[: -len(".gz")], text_field):
            yield record._replace(name=name)
    elif suffix == ".parquet":
        yield from _rows(_read_parquet(data, name, text_field), name, text_field)
    else:
        said = f"text {name}"
        text = utf8_text(data, said)
        if suffix in TEXT_SUFFIXES:
            yield Record(text, None, None, name)
        elif suffix == ".jsonl":
            yield from _rows((row for _, row in json_lines(text, said)), name, text_field)
        elif suffix == ".json":
            yield from _rows(json_list(text, said), name, text_field)
        else:
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
            yield from _rows(table, name, text_field)


def _read_zip(path: Path, name: str, text_field: str) -> Iterator[Record]:
    with zipfile.ZipFile(path) as archive:
        members = sorted(m for m in archive.namelist() if is_readable(m) and not m.lower().endswith(".zip"))
        if not members:
            raise UserError(f"text {path}", "it holds no file of a known format", f"put in {KNOWN}")
        for member in members:
            yield from read_bytes(archive.read(member), f"{name}!{member}", text_field)


def _read_parquet(data: bytes, name: str, text_field: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        _check_field(text_field, file.schema_arrow.names, name)
        columns = [c for c in file.schema_arrow.names if c in (text_field, "id", "source")]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"text {name}", f"it is not a readable Parquet file ({error})", "check the file") from error


def _rows(rows: Iterable[Any], name: str, text_field: str) -> Iterator[Record]:
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield Record(row, f"{name}#{number:06d}", None, name)
            continue
        if not isinstance(row, dict):
            raise UserError(f"text {name}", f"record {number} is neither a text nor an object", "correct the record")
        _check_field(text_field, row, name)
        text, own_id = row[text_field], row.get("id")
        if not isinstance(text, str):
            raise UserError(
                f"text {name}", f"field {text_field!r} of record {number} is not a text", "choose another --text-field"
            )
        known = isinstance(own_id, str | int) and str(own_id) != ""
        source = row["source"] if isinstance(row.get("source"), str) else None
        yield Record(text, str(own_id) if known else f"{name}#{number:06d}", source, name)


def _check_field(field: str, present: Iterable[str], name: str) -> None:
    names = [str(key) for key in present]
    if field not in names:
        raise UserError(
            f"text field {field!r}", f"{name} has the fields {', '.join(names) or '(none)'}", "choose with --text-field"
        )
