"""Read the records of one file, whatever its format: text, JSON, tables, compressed or in archives.

Files are read as streams, so that memory holds the longest record and not the file. A record that cannot be read is
given as the `UserError` that says why, with its place; what is wrong with a file as a whole is raised.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from trimtab.activations.values import CHUNK, Bad, Value, check_column, json_values, table_rows
from trimtab.errors import UserError
from trimtab.runs.user_files import refuse_utf16

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
RECORD_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KNOWN = ", ".join((*SUFFIXES, ".zip", *COMPRESSED))

_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
            struct.error)  # fmt: skip


class Record(NamedTuple):
    """One text as its file gives it."""

    text: str | None
    """None for a null."""
    id: str | None
    """The record's own id."""
    place: str
    """The id by its place in the file, for a record without one."""
    source: str | None
    """What the record says about its origin."""
    where: str
    """Its place for messages: file and line, or file and number."""
    name: str
    """Name of the file, inside its archive where there is one (`speeches.zip!1945.txt`)."""


class PlainText(NamedTuple):
    """A plain text, to be cut into documents."""

    chunks: Iterator[str]
    """The text in order, to be read before the next record. A byte that is not UTF-8 is kept as `surrogateescape`."""
    name: str


Found = Record | PlainText | UserError


def is_readable(name: str) -> bool:
    """Whether a file of this name is one that `read_file` reads."""
    path = PurePosixPath(name.lower())
    return path.suffix in (".zip", *SUFFIXES) or (path.suffix in COMPRESSED and is_readable(path.stem))


def is_hidden(name: str) -> bool:
    """Whether a file lies beside the texts for another program: what macOS puts beside each file, and dot files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def read_file(path: Path, name: str, text_field: str) -> Iterator[Found]:
    """The records of a file, which they and messages call by `name`; `text_field` is the column or key of the text.

    Raises a `UserError` if the file cannot be read, is not well-formed, encrypted, or a table without such a column.
    """
    if not is_readable(path.name):
        suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSED else path.suffix
        why = f"{suffix or 'a file without a suffix'} is not a known format"
        raise UserError(f"text {path}", why, f"use {KNOWN}")
    with _reading(str(path)), path.open("rb") as file:
        yield from _read(file, name, text_field)


def rows_of(values: Iterable[Value], name: str, text_field: str, digits: int = 6) -> Iterator[Record | UserError]:
    """Values as records: texts, or objects that hold one under `text_field`; nulls have no text."""
    for number, (where, value) in enumerate(values):
        where, place = f"text {name}, {where}", f"{name}#{number:0{digits}d}"
        if isinstance(value, Bad):
            yield UserError(where, *value)
        elif value is None or isinstance(value, str):
            yield Record(value, None, place, None, where, name)
        elif not isinstance(value, dict):
            yield UserError(where, "it is neither a text nor an object", "correct it")
        elif text_field not in value:
            has = ", ".join(map(str, value)) or "(none)"
            yield UserError(where, f"it has no field {text_field!r}, only {has}", "choose with --text-field")
        elif not isinstance(text := value[text_field], str | None):
            yield UserError(where, f"its field {text_field!r} is not a text", "choose another --text-field")
        else:
            own = value.get("id")
            own_id = str(own) if isinstance(own, str | int) and not isinstance(own, bool) and str(own) else None
            source = value["source"] if isinstance(value.get("source"), str) else None
            yield Record(text, own_id, place, source, where, name)


def _suffix(name: str) -> str:
    return PurePosixPath(name.lower()).suffix


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Refuse what damaged files make the libraries raise."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"text {path}", f"it cannot be read ({error})", "check the file") from error


def _read(file: BinaryIO, name: str, text_field: str, *, seekable: bool = True) -> Iterator[Found]:
    """The records of an open file; `seekable` if going back in it costs nothing."""
    suffix = _suffix(name)
    if suffix in COMPRESSED:
        with _open_compressed(file, suffix) as inner:
            bare = name[: -len(suffix)]
            for record in _read(inner, bare, text_field, seekable=False):
                # What is in an archive that was compressed again keeps its own name behind the archive's.
                named = (
                    record if isinstance(record, UserError) else record._replace(name=name + record.name[len(bare) :])
                )
                yield named
    elif suffix in (".zip", ".parquet"):
        read = _read_zip if suffix == ".zip" else _read_parquet
        if seekable:
            yield from read(file, name, text_field)
        else:
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy, CHUNK)
                yield from read(copy, name, text_field)
    elif suffix in TEXT_SUFFIXES:
        yield PlainText(_decoded(file, name), name)
    elif suffix in JSON_SUFFIXES:
        yield from rows_of(json_values(file, name), name, text_field)
    else:
        yield from rows_of(table_rows(file, name, text_field, "\t" if suffix == ".tsv" else ","), name, text_field)


def _open_compressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), CHUNK)  # type: ignore[arg-type]
    opened: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(opened[suffix](file), CHUNK)


def _read_zip(file: BinaryIO, name: str, text_field: str) -> Iterator[Found]:
    with zipfile.ZipFile(file) as archive:
        found = (m for m in archive.infolist() if is_readable(m.filename) and not is_hidden(m.filename))
        members = sorted((m for m in found if not m.is_dir()), key=lambda member: member.filename)
        if not members:
            raise UserError(f"text {name}", "it holds no file of a known format", f"put in {KNOWN}")
        if any(member.flag_bits & 1 for member in members):
            raise UserError(f"text {name}", "it is encrypted", "unpack it with its password and give the directory")
        for member in members:
            with archive.open(member) as inner:
                stream = cast(BinaryIO, io.BufferedReader(cast(Any, inner), CHUNK))
                yield from _read(stream, f"{name}!{member.filename}", text_field, seekable=False)


def _read_parquet(file: BinaryIO, name: str, text_field: str) -> Iterator[Found]:
    yield from rows_of(_parquet_rows(file, name, text_field), name, text_field)


def _parquet_rows(file: BinaryIO, name: str, text_field: str) -> Iterator[Value]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False)
        check_column(text_field, table.schema_arrow.names, name)
        columns = [c for c in table.schema_arrow.names if c in (text_field, "id", "source")]
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for row in _python_rows(batch, columns):
                yield f"record {number}", row
                number += 1
    except pa.ArrowException as error:
        raise UserError(f"text {name}", f"it is not a readable Parquet file ({error})", "check the file") from error


def _python_rows(batch: Any, columns: list[str]) -> Iterator[dict[str, Any] | Bad]:
    """Rows of a batch, one by one where a text in it is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Bad(f"one of {', '.join(columns)} is not UTF-8")


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    r"""A file's text in chunks, with `\n` line ends, bytes that are not UTF-8 kept by `surrogateescape`."""
    with _reading(name):
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        held, is_first = "", True
        while data := file.read(CHUNK):
            if is_first:
                refuse_utf16(data, f"text {name}")
            text = held + decoder.decode(data)
            held = "\r" if text.endswith("\r") else ""
            text = text.removesuffix("\r") if held else text
            yield (text.removeprefix("\ufeff") if is_first else text).replace("\r\n", "\n")
            is_first = False
        yield held + decoder.decode(b"", final=True)
