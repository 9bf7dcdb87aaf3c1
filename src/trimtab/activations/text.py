"""Documents from files, directories and hub data sets, with ids that stay the same wherever the files lie.

A document is the unit of held-out splits and of bootstraps, so a novel must not be one: plain text files are cut
where a chapter begins or, failing that, between paragraphs, into documents of at most `max_characters`.
Records of JSON, tables and data sets are documents as they stand. All are read as streams.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from trimtab.activations.bad_records import BadRecords, OnBadRecord
from trimtab.activations.cutting import MAX_CHARACTERS, split_text
from trimtab.activations.formats import Found, PlainText, is_hidden, is_readable, read_file, rows_of
from trimtab.errors import UserError
from trimtab.runs import ASSETS
from trimtab.runs.user_files import check_text, reading_from_hub, text_problem

Normalisation = Literal["none", "wikitext"]


class Document(NamedTuple):
    """A text that is kept together: never half in training and half held out."""

    id: str
    """`FILE#0003` for the fourth part of a text file; a record's own id where it has one."""
    text: str
    source: str
    """Where it comes from: the record's own `source`, else the file's name."""


def read_documents(
    paths: Sequence[str | Path],
    *,
    text_field: str = "text",
    limit: int | None = None,
    normalise: Normalisation = "none",
    max_characters: int = MAX_CHARACTERS,
    bad_records: OnBadRecord | BadRecords = "skip",
) -> Iterator[Document]:
    """Documents of all paths, in the order given; directories and archives in the order of their names.

    Files are read as streams: memory holds the longest record, and the ids. Null and blank texts are no documents. An
    id that another file has given before gets the file's name before it (`part-2.jsonl:17`).

    Args:
        paths: text (`.txt`, `.md`), JSON (`.jsonl`, `.ndjson`, `.json`: values behind each other or one list, of texts
            or of objects), `.parquet`, `.csv`, `.tsv`, one of these as `.gz`, `.zst`, `.bz2` or `.xz`, a `.zip` of
            them, a directory of them, or `hub:NAME[[:CONFIG]:SPLIT]` (extra `hub`). Hidden files in a directory or
            archive, and what macOS puts beside files, are left out.
        text_field: the key or column that holds the text.
        limit: stop after this many documents.
        normalise: `wikitext` undoes the tokenisation of the WikiText corpora; `none` leaves every text as it is.
        max_characters: longest document that a plain text file is cut into.
        bad_records: what happens to records that are damaged, lack the text, or hold what is no text: `skip` leaves
            them out and says on stderr how many there are and where the first one stands, `fail` refuses the first. Or
            what counts them, for whoever reads only the first documents and then asks it to `check`. Where a limit ends
            reading, what was read is judged, as `bad_records.MOST_BAD` says.

    Raises:
        UserError: nothing there, a file that is not readable, no such field, no text, a file given twice, or more bad
            records than one in a hundred.
    """
    if not paths:
        raise UserError("--text", "no text was given", "name a file, a directory or hub:NAME")
    bad = bad_records if isinstance(bad_records, BadRecords) else BadRecords(bad_records)
    try:
        yield from islice(_all_documents(paths, text_field, normalise, max_characters, bad), limit)
    except GeneratorExit:  # whoever reads them has enough
        bad.tell()
        raise
    bad.check()
    bad.tell()


def sample_text() -> str:
    """Directory of the text that ships with trimtab."""
    return str(ASSETS / "sample_text")


def as_documents(texts: str | Iterable[str | Document]) -> Iterator[Document]:
    """Texts in memory as documents, each a document of its own, named by its place. A `UserError` for other things."""
    if not isinstance(texts, Iterable):
        raise UserError(f"texts {texts!r}", "they are no texts", "give a list of texts")
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str | Document):
            raise UserError(f"text {number}", f"it is of the type {type(text).__name__}", "give a list of texts")
        document = text if isinstance(text, Document) else Document(f"text#{number:06d}", text, "text")
        check_text(document.text, f"text {number}")
        yield document


def corpus_hash(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over ids and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(bytes_of(document))
    return digest.hexdigest()


def bytes_of(document: Document) -> bytes:
    """What `corpus_hash` hashes of a document."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (document.id, document.text)]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def detokenise_wikitext(text: str) -> str:
    """Undo the tokenisation of the WikiText corpora: `@-@` joins, blanks before punctuation, `= Title =` lines.

    `<unk>` cannot be undone and is left.
    """
    return _detokenised(text).strip()


def _detokenised(text: str) -> str:
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"^[ =]*= (.*?) =[ =]*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€]) ", r"\1", text)
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", text)
    text = re.sub(r" '(?= |$)", "'", text, flags=re.MULTILINE)
    text = re.sub(r'"[^\S\n]*([^"\n]*?)[^\S\n]*"', r'"\1"', text)
    text = re.sub(r"(\d) – (\d)", r"\1–\2", text)
    return re.sub(r"[^\S\n]+\n|\n[^\S\n]+", "\n", text)


_LINE_APART = re.compile(r"[\w.](?:[^\S\n]+\n|\n(?=\w))")
"""Line ends at which a text can be parted: detokenised apart, the two sides give what the whole would."""


def _detokenised_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """What `detokenise_wikitext` gives for a text that comes in chunks, in chunks."""
    text, blanks = "", None  # blanks: those that end what was given so far; None before its first character

    def apart(piece: str) -> str:
        nonlocal blanks
        piece = _detokenised(piece)
        if not piece.strip():
            blanks = blanks and blanks + piece
            return ""
        piece, blanks = piece.lstrip() if blanks is None else blanks + piece, ""
        blanks = piece[len(piece.rstrip()) :]
        return piece.rstrip()

    for chunk in chunks:
        text += chunk
        if end := max((match.end() for match in _LINE_APART.finditer(text)), default=0):
            yield apart(text[:end])
            text = text[end:]
    yield apart(text)


def _all_documents(
    paths: Sequence[str | Path], text_field: str, normalise: Normalisation, max_characters: int, bad: BadRecords
) -> Iterator[Document]:
    unique, files = _UniqueIds(), set[str]()
    for path, name in zip(paths, _short_names(paths), strict=True):
        if str(path).startswith("hub:"):
            sources = iter([_read_hub(str(path), text_field)])
        else:
            sources = _files_of(Path(path).expanduser(), name, text_field, files)
        found = False
        for records in sources:
            for document in _documents_of(records, normalise, max_characters, unique, bad):
                found = True
                yield document
        if not found:
            bad.ended = True  # all that there is of it was read
            bad.check()
            raise UserError(f"text {path}", "there is no text in it", "give a file with text")
    bad.ended = True


def _documents_of(
    records: Iterator[Found], normalise: Normalisation, max_characters: int, unique: _UniqueIds, bad: BadRecords
) -> Iterator[Document]:
    plain = normalise == "none"
    for record in records:
        if isinstance(record, UserError):
            bad.add(record)
        elif isinstance(record, PlainText):
            chunks = record.chunks if plain else _detokenised_chunks(record.chunks)
            for number, part in enumerate(split_text(chunks, max_characters)):
                place = f"{record.name}#{number:04d}"
                if problem := text_problem(part):
                    bad.add(UserError(f"text {place}", *problem))
                elif (given := unique(place, record.name)) is None:
                    bad.add(UserError(f"text {place}", "a text before it has this name", "give each a name of its own"))
                elif bad.has_text(part):
                    yield Document(given, part, record.name)
        elif problem := text_problem(f"{record.text} {record.id} {record.source}"):
            bad.add(UserError(record.where, *problem))
        elif record.text is None and bad.on_bad == "fail":
            bad.add(UserError(record.where, "its text is null", "leave it out"))
        elif (given := unique(record.id or record.place, record.name)) is None:
            hint = "give each text once, under an id of its own"
            bad.add(UserError(record.where, f"a record before it has its id, {record.id!r}", hint))
        elif bad.has_text(record.text):
            text = record.text if plain else detokenise_wikitext(record.text)
            if text.strip():
                yield Document(given, text, record.source or record.name)


class _UniqueIds:
    """Makes ids unique: the same one in two files gets the name of the second before it."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._name, self._of_file = "", set[str]()

    def __call__(self, own: str, name: str) -> str | None:
        """The id of a record of a file; None if the file gave it before."""
        if name != self._name:
            self._name, self._of_file = name, set()
        if own in self._of_file:
            return None
        self._of_file.add(own)
        found = own if own not in self._given else f"{name}:{own}"
        if found in self._given:
            return None
        self._given.add(found)
        return found


def _files_of(path: Path, name: str, text_field: str, before: set[str]) -> Iterator[Iterator[Found]]:
    """Records of each file of a path. Raises a `UserError` for one that was given `before`."""
    if not path.exists():
        raise UserError(f"text {path}", "there is no such file or directory", "check the path")
    files = {name: path}
    if path.is_dir():
        below = (file for file in sorted(path.rglob("*")) if is_readable(file.name) and file.is_file())
        relative = ((file, file.relative_to(path).as_posix()) for file in below)
        files = {f"{name}/{_printable(within)}": file for file, within in relative if not is_hidden(within)}
        if not files:
            raise UserError(f"text {path}", "the directory holds no file of a known format", "give another directory")
    for file_name, file in files.items():
        if (place := os.path.abspath(file)) in before:
            raise UserError(f"text {path}", f"{file_name} is given twice", "give each file once")
        before.add(place)
        yield read_file(file, file_name, text_field)


def _read_hub(name: str, text_field: str) -> Iterator[Found]:
    _, data_set, *parts = re.split(r":(?![^\[]*\])", name)  # a split may be a slice, `train[:100]`
    if len(parts) > 2 or not all((data_set, *parts)):
        hint = "write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT"
        raise UserError(f"text {name}", "it is no name of a data set", hint)
    config, split = parts[:-1], parts[-1] if parts else "train"
    hint = "check the name; where a data set has configurations, write hub:NAME:CONFIG:SPLIT"
    with reading_from_hub(f"text {name}", hint) as datasets:
        rows = datasets.load_dataset(data_set, *config, split=split, streaming=True)
        values = ((f"row {number}", row) for number, row in enumerate(rows))
        for record in rows_of(values, name, text_field, digits=8):
            yield record if isinstance(record, UserError) else record._replace(id=None, source=None)


def _printable(name: str) -> str:
    """A file's name with what is no text in it written as numbers, as it becomes part of ids."""
    return name.encode("utf-8", "backslashreplace").decode()


def _short_names(paths: Sequence[str | Path]) -> list[str]:
    """For each path its shortest trailing part that no other path shares, so that ids do not name the machine."""
    whole = [str(p) if str(p).startswith("hub:") else os.path.abspath(Path(p).expanduser()) for p in paths]
    full = [name if name.startswith("hub:") else _printable(Path(name).as_posix()) for name in whole]
    names = [f if f.startswith("hub:") else f.rsplit("/", 1)[-1] for f in full]
    depth = 1
    while any(count > 1 for count in Counter(names).values()) and len(set(full)) == len(full):
        depth += 1
        clashing = {name for name, count in Counter(names).items() if count > 1}
        names = ["/".join(f.split("/")[-depth:]) if n in clashing else n for f, n in zip(full, names, strict=True)]
    return names
