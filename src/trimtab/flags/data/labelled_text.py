"""Labelled texts from files: folders that are labels, tables with a column of labels, AxBench's files, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from trimtab.activations import read_documents
from trimtab.errors import UserError, did_you_mean
from trimtab.runs.user_files import json_lines, json_value, utf8_text
from trimtab.tasks.data_rows import DataDirectory, DataRow

TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl", ".ndjson")
_COLUMNS = "name them with --text-field and --label-field"


class LabelledText(NamedTuple):
    """A text and its labels as a file gives them."""

    text: str
    labels: tuple[str, ...]
    where: str
    """File and row, or file and part, for messages."""
    prompt: str = ""
    """What it answers; empty if the file does not say."""
    whole: bool = False
    """Whether it stays as it is, however long."""
    unit: str | None = None
    """The document that it is a passage of, as a file of examples says it."""


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """Columns of a table."""

    text: str
    label: str
    prompt: str | None = None
    positive: str | None = None
    """Column that says `positive` where a text has its label; others have none of the concepts."""
    whole: bool = False


EXAMPLES = TableLayout(text="response", label="concepts", prompt="prompt", whole=True)
AXBENCH = TableLayout(text="output", label="output_concept", prompt="input", positive="category")
"""Tables that are known by their columns."""


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """How labelled texts lie in files."""

    label: str | None = None
    """Label of all texts, where files hold texts of one kind."""
    label_field: str | None = None
    """Column or key of the label, or a list of labels; `label` unless the table is known by its columns."""
    text_field: str | None = None
    """Column or key of the text; `text` unless the table is known by its columns."""
    prompt_field: str | None = None
    """Column or key of a prompt that the text answers."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table without a header."""
    delimiter: str | None = None
    """What parts the columns, if not a comma (.csv) or a tab (.tsv)."""
    separator: str | None = None
    """What parts several labels in one field."""
    label_names: Path | None = None
    """File of the labels' names, one a line, where labels are their numbers from 0."""

    def read(self, text: Sequence[str | Path]) -> Iterator[LabelledText]:
        """Texts of all paths, in their order.

        Args:
            text: tables (`.csv`, `.tsv`, `.parquet`, `.json`, `.jsonl`, `.ndjson`, any with `delimiter`), directories
                or `.zip` files with a folder of texts for each label, or with `label` all that `read_documents` reads.

        Raises:
            UserError: there is no such file, it cannot be read, has no such column, or a row is damaged or has no
                label.
        """
        if not text:
            raise UserError("--text", "no labelled text was given", "name files or directories")
        names = self._names()
        for path in text:
            if self.label is not None:
                for document in read_documents([path], text_field=self.text_field or "text"):
                    yield LabelledText(document.text, (self.label,), document.id)
            elif not Path(path).expanduser().exists():
                raise UserError(f"text {path}", "there is no such file or directory", "check the path")
            elif self.delimiter or PurePosixPath(str(path).lower()).suffix in TABLES:
                yield from self._of_table(Path(path).expanduser(), names)
            else:
                yield from _of_folders(path)

    def _names(self) -> list[str] | None:
        if self.label_names is None:
            return None
        try:
            text = utf8_text(self.label_names.read_bytes(), str(self.label_names))
        except OSError as error:
            raise UserError(f"label names {self.label_names}", "they cannot be read", "check the path") from error
        return [line.strip() for line in text.strip().split("\n")]

    def _of_table(self, path: Path, names: list[str] | None) -> Iterator[LabelledText]:
        fields: TableLayout | None = None
        for row in _rows(path, self.columns, self.delimiter):
            fields = fields or self._fields(row.values, path.name)
            prompt = row.text(fields.prompt) if fields.prompt else ""
            labels = self._labels(row, fields, names)
            unit = row.text("unit") if fields.whole and row.values.get("unit") is not None else None
            yield LabelledText(row.text(fields.text, empty=True), labels, row.where, prompt, fields.whole, unit)

    def _fields(self, row: Mapping[str, Any], name: str) -> TableLayout:
        """The columns of a table, from its first row."""
        found = TableLayout(text=self.text_field or "text", label=self.label_field or "label", prompt=self.prompt_field)
        if not (self.text_field or self.label_field or self.prompt_field):
            known = (EXAMPLES, AXBENCH)
            found = next(
                (one for one in known if {one.text, one.label, one.prompt, one.positive} - {None} <= row.keys()), found
            )
        for field in (found.text, found.label, found.prompt):
            if field and field not in row:
                why = f"{name} has the columns {', '.join(map(str, row))}"
                raise UserError(f"column {field!r}", why, did_you_mean(field, map(str, row), _COLUMNS))
        return found

    def _labels(self, row: DataRow, fields: TableLayout, names: list[str] | None) -> tuple[str, ...]:
        if fields.positive and row.text(fields.positive) != "positive":
            return ("none",)
        value = row.get(fields.label)
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        if isinstance(value, str) and self.separator:
            values = [part.strip() for part in value.split(self.separator)]
        found: list[str] = []
        for one in values:
            if isinstance(one, bool) or not isinstance(one, str | int):
                raise row.bad(f"{fields.label!r} is no label", "labels are texts or whole numbers")
            label = str(one).strip()
            if names is not None:
                if not label.isdecimal() or int(label) >= len(names):
                    raise row.bad(f"{fields.label!r} is {label[:20]!r}, not a number from 0 to {len(names) - 1}")
                label = names[int(label)]
            found.append(label)
        return tuple(dict.fromkeys(found))


def _of_folders(path: str | Path) -> Iterator[LabelledText]:
    for document in read_documents([path]):
        folder = PurePosixPath(document.source.rpartition("!")[2]).parent.name
        if not folder:
            hint = "name it with --label, or give a directory that has a folder of texts for each label"
            raise UserError(f"text {document.source}", "it lies in no folder that says its label", hint)
        yield LabelledText(document.text, (folder,), document.id)


def _rows(path: Path, columns: Sequence[str], delimiter: str | None) -> Iterator[DataRow]:
    suffix = path.suffix.lower()
    directory = DataDirectory(path.parent)
    if delimiter or suffix in (".csv", ".tsv"):
        usual = "\t" if suffix == ".tsv" else ","
        return directory.csv(path, columns or None, delimiter=delimiter or usual)
    if columns:
        raise UserError(f"columns {', '.join(columns)}", f"{path.name} names its own", "leave them out")
    if suffix in (".jsonl", ".ndjson"):
        return directory.jsonl(path)
    return _parquet_rows(path) if suffix == ".parquet" else _json_rows(path)


def _parquet_rows(path: Path) -> Iterator[DataRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield DataRow(row, f"{path.name}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"text {path}", "it is not a readable Parquet file", "check the file") from error


def _json_rows(path: Path) -> Iterator[DataRow]:
    """Objects, or pairs of text and label: in a list, in lists by name as CLINC150 has for splits, or a line each."""
    text = utf8_text(path.read_bytes(), path.name)
    try:
        value = json_value(text, path.name, "correct the file", whole=True)
    except UserError as error:
        if "Extra data" not in error.why:
            raise
        value = [row for _, row in json_lines(text, path.name)]
    parts = value if isinstance(value, dict) else {"": value}
    for part, rows in parts.items():
        if not isinstance(rows, list):
            raise UserError(path.name, "it is neither a list nor lists by name", "put the entries into a list")
        for number, row in enumerate(rows, start=1):
            where = f"{path.name}, {part} row {number}" if part else f"{path.name}, row {number}"
            if isinstance(row, list) and len(row) == 2:
                yield DataRow({"text": row[0], "label": row[1]}, where)
            elif isinstance(row, dict):
                yield DataRow(row, where)
            else:
                why = "it is neither an object nor a pair of text and label"
                raise UserError(where, why, "correct it; a list of texts alone needs --label")
