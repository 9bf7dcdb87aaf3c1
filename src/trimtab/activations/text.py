"""Documents from files, directories and hub data sets, with ids that stay the same wherever the files lie.

A document is the unit of held-out splits and of bootstraps, so a novel must not be one: plain text files are cut
where a chapter begins or, failing that, between paragraphs, into documents of at most `max_characters`.
Records of JSON, tables and data sets are documents as they stand.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from trimtab.activations.formats import Record, is_readable, read_file
from trimtab.errors import UserError
from trimtab.runs import ASSETS
from trimtab.runs.user_files import reading_from_hub

MAX_CHARACTERS = 8_000
Normalisation = Literal["none", "wikitext"]

_HEADING = re.compile(
    r"(?:chapter|book|part|volume|act|scene|canto|letter|section)\b[^\n]{0,80}|[IVXLC]{1,7}\.?|\d{1,3}\.?",
    re.IGNORECASE,
)
# From coarse to fine: where a text may be cut, the separator staying with what precedes it.
_CUTS = (re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n"), re.compile(r"[.!?][\"')\]]*\s+"), re.compile(r"\s+"))


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
) -> Iterator[Document]:
    """Documents of all paths, in the order given; directories and archives in the order of their names.

    Args:
        paths: text (`.txt`, `.md`), `.jsonl`, `.json` (a list of texts or objects), `.parquet`, `.csv`, `.tsv`, a `.gz`
            of one of these, a `.zip` of them, a directory of them, or `hub:NAME[:SPLIT]` (extra `hub`).
        text_field: the key or column that holds the text.
        limit: stop after this many documents.
        normalise: `wikitext` undoes the tokenisation of the WikiText corpora; `none` leaves every text as it is.
        max_characters: longest document that a plain text file is cut into.

    Raises:
        UserError: nothing there, not readable, not UTF-8, no such field, no text, or an id that occurs twice.
    """
    if not paths:
        raise UserError("--text", "no text was given", "name a file, a directory or hub:NAME")
    seen: set[str] = set()
    for path, name in zip(paths, _short_names(paths), strict=True):
        found = False
        for document in _documents_of(path, name, text_field, normalise, max_characters):
            if limit is not None and len(seen) >= limit:
                return
            if document.id in seen:
                raise UserError(f"document {document.id!r}", "two documents have this id", "give each text once")
            seen.add(document.id)
            found = True
            yield document
        if not found:
            raise UserError(f"text {path}", "there is no text in it", "give a file with text")


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
        yield text if isinstance(text, Document) else Document(f"text#{number:06d}", text, "text")


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


def split_text(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Cut a text into parts of at most `max_characters`, none of them blank.

    A part ends before a chapter heading if it has reached a quarter of the longest length, else between paragraphs;
    only a paragraph that is too long by itself is cut at a line, a sentence, a word, and at last anywhere. Joined, the
    parts give the text back, blanks around the cuts aside.
    """
    assert max_characters > 0
    parts: list[str] = []
    part = ""
    for unit in _units(text, max_characters, 0):
        is_heading = _HEADING.fullmatch(unit.strip()) is not None
        if len(part) + len(unit) > max_characters or (is_heading and len(part) >= max_characters / 4):
            parts.append(part)
            part = ""
        part += unit
    parts.append(part)
    return [stripped for p in parts if (stripped := p.strip())]


def detokenise_wikitext(text: str) -> str:
    """Undo the tokenisation of the WikiText corpora: `@-@` joins, blanks before punctuation, `= Title =` lines.

    `<unk>` cannot be undone and is left.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"^[ =]*= (.*?) =[ =]*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€]) ", r"\1", text)
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", text)
    text = re.sub(r" '(?= |$)", "'", text, flags=re.MULTILINE)
    text = re.sub(r'"[^\S\n]*([^"\n]*?)[^\S\n]*"', r'"\1"', text)
    text = re.sub(r"(\d) – (\d)", r"\1–\2", text)
    return re.sub(r"[^\S\n]+\n|\n[^\S\n]+", "\n", text).strip()


def _units(text: str, max_characters: int, level: int) -> Iterator[str]:
    """Pieces that a part is made of: paragraphs, and finer ones where a paragraph is too long."""
    if level == len(_CUTS):
        yield from (text[i : i + max_characters] for i in range(0, len(text), max_characters))
        return
    ends = [match.end() for match in _CUTS[level].finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:end]
        if len(piece) > max_characters:
            yield from _units(piece, max_characters, level + 1)
        elif piece:
            yield piece


def _documents_of(
    path: str | Path, name: str, text_field: str, normalise: Normalisation, max_characters: int
) -> Iterator[Document]:
    for record in _records_of(path, name, text_field):
        text = detokenise_wikitext(record.text) if normalise == "wikitext" else record.text
        source = record.source or record.name
        if record.id is not None:
            if text.strip():
                yield Document(record.id, text, source)
            continue
        for number, part in enumerate(split_text(text, max_characters)):
            yield Document(f"{record.name}#{number:04d}", part, source)


def _records_of(path: str | Path, name: str, text_field: str) -> Iterator[Record]:
    if str(path).startswith("hub:"):
        yield from _read_hub(str(path), text_field)
        return
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"text {path}", "there is no such file or directory", "check the path")
    if not path.is_dir():
        yield from read_file(path, name, text_field)
        return
    files = sorted(p for p in path.rglob("*") if p.is_file() and is_readable(p.name))
    if not files:
        raise UserError(f"text {path}", "the directory holds no file of a known format", "give another directory")
    for file in files:
        yield from read_file(file, f"{name}/{file.relative_to(path).as_posix()}", text_field)


def _read_hub(name: str, text_field: str) -> Iterator[Record]:
    _, data_set, *split = name.split(":")
    with reading_from_hub(f"text {name}") as datasets:
        rows = datasets.load_dataset(data_set, split=split[0] if split else "train", streaming=True)
        for number, row in enumerate(rows):
            if not isinstance(row.get(text_field), str):
                raise UserError(
                    f"text field {text_field!r}", f"{name} has the fields {', '.join(row)}", "choose with --text-field"
                )
            yield Record(row[text_field], f"{name}#{number:08d}", None, name)


def _short_names(paths: Sequence[str | Path]) -> list[str]:
    """For each path its shortest trailing part that no other path shares, so that ids do not name the machine."""
    full = [str(p) if str(p).startswith("hub:") else Path(p).expanduser().resolve().as_posix() for p in paths]
    names = [f if f.startswith("hub:") else f.rsplit("/", 1)[-1] for f in full]
    depth = 1
    while any(count > 1 for count in Counter(names).values()) and len(set(full)) == len(full):
        depth += 1
        clashing = {name for name, count in Counter(names).items() if count > 1}
        names = ["/".join(f.split("/")[-depth:]) if n in clashing else n for f, n in zip(full, names, strict=True)]
    return names
