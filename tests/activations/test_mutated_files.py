"""Files of text damaged at random: each is read rightly, as slow readers of the whole file read it, or refused in one
line; a harvest that is refused leaves nothing behind."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trimtab.cli as cli
from trimtab.activations import read_documents
from trimtab.activations.cutting import split_text
from trimtab.errors import UserError
from trimtab.lm import LanguageModel

N = 300
FORMATS = (
    ".txt", ".jsonl", ".ndjson", ".json", ".json lines", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".txt.gz",
    ".json.zst", ".csv.bz2", ".jsonl.xz", ".zip",
)  # fmt: skip
HOW = ("truncate", "flip", "cut", "insert", "swap", "rename", "types", "types", "utf16", "twice", "none")
WORDS = ("tide", "anchor,", 'the "reef"', "harbour\nwall", "é日本", "a\tmast", "sea.", "then")


def rows(rng: random.Random) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "text": f"{i} {' '.join(rng.choices(WORDS, k=6))}"} for i in range(150)]


def table(given: list[Any], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(row.values() if isinstance(row, dict) else [row] for row in given)
    return out.getvalue().encode()


def written(given: list[Any], kind: str) -> bytes:
    """Records in a format; Parquet gets those that it can hold."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in given)
    if kind == ".parquet":
        out = io.BytesIO()
        held = [row for row in given if isinstance(row, dict) and isinstance(row.get("text"), str | None)]
        pq.write_table(pa.Table.from_pylist(held), out)
        return out.getvalue()
    if kind == ".zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", lines[: len(lines) // 2].rpartition(b"\n")[0])
            archive.writestr("b/b.txt", "\n\n".join(str(row) for row in given[:20]))
        return out.getvalue()
    text = "\n\n".join(str(row["text"]) for row in given if isinstance(row, dict) and row.get("text"))
    if kind.startswith(".txt"):
        data = text.encode()
    elif kind.startswith((".csv", ".tsv")):
        data = table(given, "\t" if kind == ".tsv" else ",")
    else:
        data = json.dumps(given).encode() if kind in (".json", ".json.zst") else lines
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }  # fmt: skip
    packer = packers.get(Path(kind).suffix or kind)
    return packer(data) if packer else data


def mutated(seed: int) -> tuple[str, bytes]:
    """A name and what the file of that name holds."""
    rng = random.Random(seed)
    kind, given = FORMATS[seed % len(FORMATS)], rows(rng)
    how = rng.choice(HOW)
    if how == "types":
        wrong = (3, None, ["a"], {"b": 1}, True, "\ud83d", "", 1e400)
        for row in rng.sample(range(len(given)), rng.choice([1, 1, 2, 40])):
            field = rng.choice(["text", "id", "row"])
            given[row] = rng.choice(wrong) if field == "row" else {**given[row], field: rng.choice(wrong)}
            if kind.startswith((".csv", ".tsv", ".txt", ".parquet")) or kind == ".zip":
                given[row] = {"id": "r", "text": None} if kind == ".parquet" else given[row - 1]
    data = bytearray(written(given, kind))
    place, other = sorted(rng.randrange(1, len(data)) for _ in range(2))
    if how == "truncate":
        del data[place:]
    elif how == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[place : place + rng.choice([1, 9, 200])]
    elif how == "insert":
        data[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 9, 200])))
    elif how == "swap":
        data[:] = data[other:] + data[place:other] + data[:place]
    elif how == "twice":
        data[:] = bytes(data) * 2
    elif how == "utf16" and not kind.startswith((".parquet", ".zip")) and Path(kind).suffix == "":
        data[:] = bytes(data).decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32"]))
    name = f"a{rng.choice(FORMATS) if how == 'rename' else kind}".replace(" lines", "")
    return name, bytes(data)


def slowly(name: str, data: bytes) -> list[str | None]:
    """Texts of a file, read whole by the standard library and pyarrow; None for each record that is none. An exception
    of theirs if the file is damaged as a whole."""
    path = Path(name)
    if path.suffix in (".gz", ".bz2", ".xz", ".zst"):
        unpack: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress,
            ".zst": lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read(),
        }  # fmt: skip
        return slowly(path.stem, unpack[path.suffix](data))
    if path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = sorted(archive.namelist())
            return [text for member in inside for text in slowly(member, archive.read(member))]
    if path.suffix == ".parquet":
        return good(pq.read_table(io.BytesIO(data)).to_pylist())
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n")
    if path.suffix == ".txt":
        return good(split_text(text))
    if path.suffix in (".csv", ".tsv"):
        lines, delimiter = io.StringIO(text, newline=""), "\t" if path.suffix == ".tsv" else ","
        header, *others = csv.reader(lines, delimiter=delimiter, strict=True)
        return good(dict(zip(header, row, strict=True)) if len(row) == len(header) else 0 for row in others if row)
    if text.lstrip().startswith("["):
        return good(json.loads(text))
    found: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append(0)
    return good(found)


def good(records: Iterable[Any]) -> list[str | None]:
    """The texts of records, "" for a null; None for what is no record of a text, or has the id of one before it."""
    found, ids = list[str | None](), set[str]()
    for row in records:
        text = row.get("text", 0) if isinstance(row, dict) else row
        own = row.get("id") if isinstance(row, dict) else None
        own = str(own) if isinstance(own, str | int) and not isinstance(own, bool) and own != "" else None
        is_text = isinstance(text, str | None) and not any("\ud800" <= letter <= "\udfff" for letter in f"{text}{own}")
        found.append((text or "") if is_text and own not in ids else None)
        if is_text and own:
            ids.add(own)
    return found


def check(path: Path, name: str, data: bytes) -> str:
    """Read a file and hold it against the slow way; says how it ended."""
    path.write_bytes(data)
    try:
        expected: list[str | None] | None = slowly(name, data)
    except Exception:  # whatever damaged files make the libraries raise
        expected = None
    found, refusal = None, ""
    try:
        found = [document.text for document in read_documents([path])]
    except UserError as error:
        refusal = error.line
    if found is None:
        texts = [text for text in expected or () if text and text.strip()]
        well_known = ("it is UTF-", "many of its bytes are 0")
        few_bad = expected and texts and sum(text is None for text in expected) <= len(expected) / 100
        assert not few_bad or any(words in refusal for words in well_known), refusal
        return "refused"
    if expected is None:  # a table that is damaged in a place
        assert ".csv" in name or ".tsv" in name or ".json" in name
        return "in part"
    assert found == [text for text in expected if text and text.strip()]
    return "whole"


def check_all(tmp_path: Path, seeds: range) -> dict[str, int]:
    ends: dict[str, int] = {}
    for seed in seeds:
        name, data = mutated(seed)
        try:
            end = check(tmp_path / name, name, data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {name}") from error
        ends[end] = ends.get(end, 0) + 1
        (tmp_path / name).unlink()
    return ends


def test_damaged_files_are_read_rightly_or_refused(tmp_path: Path) -> None:
    ends = check_all(tmp_path, range(42))
    assert min(ends["refused"], ends["whole"]) >= 8


@pytest.mark.sweep
def test_three_hundred_damaged_files(tmp_path: Path) -> None:
    ends = check_all(tmp_path, range(N))
    print(ends)
    assert min(ends["refused"], ends["whole"]) >= N / 6
    assert ends.get("in part", 0) <= N / 10


@pytest.mark.parametrize("every", [pytest.param(60, id="some"), pytest.param(4, id="many", marks=pytest.mark.sweep)])
def test_a_refused_harvest_leaves_nothing(
    tmp_path: Path, tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    model = tmp_path / "model"
    tiny_llama.hf.save_pretrained(model)
    tiny_llama.tokenizer.save_pretrained(model)
    for seed in range(1, N, every):
        name, data = mutated(seed)
        path, run = tmp_path / name, tmp_path / f"run-{seed}"
        path.write_bytes(data)
        words = ["--model", model, "--site", "resid_post.1", "--text", path, "--context", 32, "--run", run]
        status = cli.main(["harvest", *map(str, words)])
        said = capsys.readouterr().err.splitlines()
        if status:
            assert (status, [line.startswith("trimtab: error: ") for line in said].count(True)) == (2, 1), seed
            assert not run.exists(), (seed, said)
        else:
            assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "done"
