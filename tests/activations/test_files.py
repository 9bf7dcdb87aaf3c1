"""Files as people have them: large, compressed, in shards, damaged in places, copied from a Mac."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.activations import TextConfig, as_documents, detokenise_wikitext, read_documents, tokenise, values
from trimtab.activations import text as text_module
from trimtab.activations.cutting import split_text
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.runs import Run, read_record
from trimtab.tasks.data_rows import DataDirectory


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def rows(n: int, **more: Any) -> list[Any]:
    return [{"text": f"Text {i} of some words.", **more} for i in range(n)]


def texts(path: Path | str, **options: Any) -> list[str]:
    return [document.text for document in read_documents([path], **options)]


def file(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


THREE = [row["text"] for row in rows(3)]
LAYOUTS = {
    "a line each": lines(rows(3)),
    "a line each, the first blank": b"\r\n" + lines(rows(3)).replace(b"\n", b"\r\n"),
    "a list": json.dumps(rows(3)).encode(),
    "a list over lines": json.dumps(rows(3), indent=1).encode(),
    "objects over lines": "\n".join(json.dumps(row, indent=4) for row in rows(3)).encode(),
    "texts a line each": lines(THREE),
    "with a byte-order mark": b"\xef\xbb\xbf" + lines(rows(3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", bytes),
        ("a.jsonl", bytes),
        ("a.ndjson", bytes),
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("a.jsonl.zst", lambda data: zst(data[:50]) + zst(data[50:])),
        ("a.jsonl.bz2", bz2.compress),
        ("a.json.xz", lzma.compress),
    ],
)
def test_json_is_read_whatever_it_is_called(
    tmp_path: Path, layout: str, name: str, pack: Callable[[bytes], bytes]
) -> None:
    assert texts(file(tmp_path, name, pack(LAYOUTS[layout]))) == THREE


@given(st.lists(st.text(max_size=40) | st.dictionaries(st.text(max_size=4), st.text(max_size=9), max_size=2)))
def test_a_list_is_parted_as_json_parts_it(entries: list[Any]) -> None:
    for indent in (None, 2):
        data = json.dumps(entries, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(values, "CHUNK", 3)  # marks, escapes and letters fall on the edges of what is read at once
            found = [value for _, value in values.json_values(io.BufferedReader(io.BytesIO(data)), "a.json")]  # type: ignore[arg-type]
        assert found == json.loads(data.decode("utf-8", "surrogatepass"))


class Counting(io.RawIOBase):
    """An endless file that says how much of it was read."""

    def __init__(self, line: bytes, before: bytes = b"") -> None:
        self.line, self.read_so_far, self._rest = line, 0, before

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self._rest) < len(buffer):
            self._rest += self.line * (1 + len(buffer) // len(self.line))
        buffer[:], self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        self.read_so_far += len(buffer)
        return len(buffer)


@pytest.mark.parametrize(
    ("name", "line", "before"),
    [
        ("a.jsonl", b'{"text": "Some words."}\n', b""),
        ("a.json", b'{"text": "Some words."},', b"["),
        ("a.csv", b'"Some, words."\n', b"text\n"),
        ("a.txt", b"Some words in a paragraph.\n\n", b""),
        ("a.txt", b"a line without end, ", b""),
        ("a.txt", b"oneword", b""),
    ],
)
def test_no_more_is_read_than_the_first_documents_need(name: str, line: bytes, before: bytes) -> None:
    source = Counting(line, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: io.BufferedReader(source))
        patch.setattr(Path, "exists", lambda _: True)
        patch.setattr(Path, "is_dir", lambda _: False)
        assert len(texts(name, limit=20)) == 20
    assert source.read_so_far < 4 << 20  # mutation: read the file whole (this test then does not end)


def test_no_more_of_a_table_is_read_than_the_first_documents_need(tmp_path: Path) -> None:
    path, n_read = tmp_path / "a.parquet", []

    class CountingFile(io.FileIO):
        def readinto(self, buffer: Any) -> int:  # type: ignore[override]
            n_read.append(super().readinto(buffer) or 0)
            return n_read[-1]

        def read(self, size: int | None = -1) -> bytes:
            n_read.append(len(found := super().read(-1 if size is None else size) or b""))
            return found

    table = pa.table({"text": [f"{i} " + "words " * 200 for i in range(8_000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, _: CountingFile(path))
        assert len(texts(path, limit=20)) == 20
    assert sum(n_read) < path.stat().st_size / 2  # mutation: pre_buffer=True, or no buffer_size


@pytest.mark.sweep
def test_memory_is_that_of_the_longest_document(tmp_path: Path) -> None:
    """20 documents of 300 MB, in each format, in a process of its own."""
    import subprocess

    record = {"text": "some words of text " * 50}
    line = json.dumps(record).encode() + b"\n"
    n = 300_000_000 // len(line)
    (tmp_path / "a.jsonl").write_bytes(line * n)
    (tmp_path / "b.json").write_bytes(b"[" + b",".join([line] * n) + b"]")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line * n, 1))
    (tmp_path / "d.txt").write_bytes(b"Some words of text. " * (n * 50))
    with zipfile.ZipFile(tmp_path / "e.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(tmp_path / "a.jsonl", "a.jsonl")
    pq.write_table(pa.table({"text": [f"{i} {record['text']}" for i in range(n)]}), tmp_path / "f.parquet")
    script = (  # VmHWM, as ru_maxrss would count what this process held when it started the other
        "import sys; from trimtab.activations import read_documents; import pyarrow.parquet; peak = lambda: "
        "int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]); held = lambda: "
        "int(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0]); "
        "open('/proc/self/clear_refs', 'w').write('5'); before = held(); "
        "n = sum(1 for _ in read_documents([sys.argv[1]], limit=int(sys.argv[2]))); print(n, (peak() - before) / 1024)"
    )
    for path in sorted(tmp_path.iterdir()):
        for limit in (20, 20_000):
            words = [sys.executable, "-c", script, str(path), str(limit)]
            found, grown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
            assert int(found) >= 20
            assert float(grown) < (50 if limit == 20 else 100), (path.name, limit)  # libraries keep some for themselves


@given(
    st.text(alphabet=st.sampled_from('ab.! \n\t"IV5'), max_size=300), st.integers(1, 40), st.lists(st.integers(1, 40))
)
def test_where_a_text_is_cut_does_not_depend_on_how_it_is_read(text: str, longest: int, sizes: list[int]) -> None:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    chunks = [text[i:j] for i, j in pairwise([*ends, len(text) + ends[-1]])]
    # mutation: let a line that goes on begin anew where the chunk ends (`begun = 0` in `_units_of`)
    assert list(split_text(chunks, longest, held=1)) == list(split_text(text, longest))


@given(st.text(alphabet=st.sampled_from("ab.=@-',\" \n(5"), max_size=200), st.lists(st.integers(1, 30)))
def test_wikitext_is_detokenised_alike_in_chunks(text: str, sizes: list[int]) -> None:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    chunks = [text[i:j] for i, j in pairwise([*ends, len(text) + ends[-1]])]
    assert "".join(text_module._detokenised_chunks(chunks)) == detokenise_wikitext(text)


def test_line_ends_and_letters_on_the_edge_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.activations import formats

    path = file(tmp_path, "a.txt", "é\r\n日\r\r\n本\r".encode())
    for size in range(1, 6):
        monkeypatch.setattr(formats, "CHUNK", size)
        assert texts(path) == ["é\n日\r\n本"]


def test_bad_records_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps(row) for row in rows(300)]
    path = file(tmp_path, "a.jsonl", "\n".join([*good[:7], '{"text": "cut', *good[7:]]).encode())
    found = list(read_documents([path]))
    assert [document.text for document in found] == [row["text"] for row in rows(300)]
    assert [document.id for document in found[6:8]] == ["a.jsonl#000006", "a.jsonl#000008"]  # as if it had been read
    said = capsys.readouterr().err
    assert said.startswith(
        "trimtab: warning: 1 of 301 records is bad and left out, the first is text a.jsonl, line 8: "
    )
    assert "it is not JSON (Unterminated string" in said
    with pytest.raises(UserError, match=r"^text a\.jsonl, line 8: it is not JSON \(Unterminated"):
        list(read_documents([path], bad_records="fail"))
    with pytest.raises(UserError, match="bad_records 'ignore': allowed are skip, fail"):
        list(read_documents([path], bad_records="ignore"))  # type: ignore[arg-type]


def test_more_than_one_in_a_hundred_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, "a.jsonl", lines([*rows(297), 1, 2, 3]))
    assert len(texts(path)) == 297
    path = file(tmp_path, "a.jsonl", lines([*rows(296), 1, 2, 3]))
    capsys.readouterr()
    with pytest.raises(UserError, match="3 of 299 records are bad; up to 1% are left out"):
        texts(path)
    assert not capsys.readouterr().err  # the error says it
    with pytest.raises(UserError, match="101 of the first 101"):  # what is no text at all is not read to its end
        texts(file(tmp_path, "a.jsonl", lines([*range(200), *rows(100_000)])))


def test_limits_do_not_hide_bad_records(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    path, tokenizer = file(tmp_path, "a.jsonl", lines([*rows(5), 1, 2, 3, *rows(500)])), tiny_llama.tokenizer
    with pytest.raises(UserError, match="line 6: it is neither"):
        TextConfig().corpus([str(path)], tokenizer, limit_documents=10)
    with pytest.raises(UserError, match="line 6: it is neither"):  # mutation: leave out `bad.check()` in `corpus`
        TextConfig(limit_tokens=200).corpus([str(path)], tokenizer)
    assert TextConfig().corpus([str(path)], tokenizer).bad_records == 3


def test_a_limit_judges_what_was_read(
    tmp_path: Path, tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad record of the first few says nothing about the rest; two of them are too many, and so is one of a corpus
    that has no more. Mutations: judge a whole small corpus as a part, or a part as a whole."""
    one = file(tmp_path, "one.jsonl", lines([*rows(3), 1, *rows(500)]))
    assert len(texts(one, limit=10)) == 10
    said = capsys.readouterr().err
    assert "1 of the first 11 records is bad and left out, the first is text one.jsonl, line 4" in said
    assert TextConfig(limit_tokens=200).corpus([str(one)], tiny_llama.tokenizer).bad_records == 1
    assert "1 of the first" in capsys.readouterr().err
    assert len(texts(one)) == 503
    assert "1 of 504 records is bad" in capsys.readouterr().err
    two = file(tmp_path, "two.jsonl", lines([*rows(3), 1, 2, *rows(500)]))
    with pytest.raises(UserError, match="2 of the first 12 records are bad; up to 1% are left out"):
        texts(two, limit=10)
    assert len(texts(two, limit=250)) == 250  # 2 of 252
    small = file(tmp_path, "small.jsonl", lines([*rows(3), 1]))
    with pytest.raises(UserError, match="1 of 4 records is bad"):
        texts(small)
    with pytest.raises(UserError, match=r"it is neither .* \(1 of 1 records is bad"):
        texts(file(tmp_path, "none.jsonl", lines([1])), limit=10)


def test_nulls_have_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nulls = [{"text": "a"}, {"text": None}, None, {"text": " "}, {"text": "b"}]
    pq.write_table(pa.Table.from_pylist([{"text": row and row["text"]} for row in nulls]), tmp_path / "a.parquet")
    file(tmp_path, "a.jsonl", lines(nulls))
    for name in ("a.parquet", "a.jsonl"):
        assert [d.id for d in read_documents([tmp_path / name])] == [f"{name}#000000", f"{name}#000004"]
        assert "2 of 5 records have null for a text" in capsys.readouterr().err
        with pytest.raises(UserError, match="its text is null"):
            texts(tmp_path / name, bad_records="fail")


TABLE = [["text", "n"], *([f'Row {i}, a "quote",\nand a line', str(i)] for i in range(400))]


def table_text(damage: Callable[[list[str]], None]) -> bytes:
    """A table some of whose rows are damaged."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(TABLE)
    found = written.getvalue().split("\n")
    damage(found)
    return "\n".join(found).encode()


def put(line: int, text: str) -> Callable[[list[str]], None]:
    return lambda found: found.__setitem__(slice(line, line + 2), [text])  # a row stands on two lines


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param('"an open quote,20', id="open"),
        pytest.param('"a quote" that goes on,20', id="goes on"),
        pytest.param("commas, that, part it,20", id="parted"),
        pytest.param("too short", id="short"),
    ],
)
def test_a_damaged_row_of_a_table_costs_itself_alone(tmp_path: Path, damaged: str) -> None:
    path = file(tmp_path, "a.csv", table_text(put(41, damaged)))
    assert texts(path) == [row[0] for i, row in enumerate(TABLE[1:]) if i != 20]  # mutation: no `give_again`
    with pytest.raises(UserError, match=r"a\.csv, line 42: it "):
        texts(path, bad_records="fail")


def test_long_fields_of_tables(tmp_path: Path) -> None:
    long, over_lines = "word " * 100_000, "word\n" * 100_000
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as out:
            csv.writer(out, delimiter=delimiter).writerows([["text"], [long], [over_lines]])
        assert texts(tmp_path / name) == [long, over_lines]
    read = DataDirectory(tmp_path).csv(tmp_path / "a.csv")  # tasks and labelled texts read by this
    assert [row.text("text") for row in read] == [long, over_lines]


def test_an_open_quote_is_given_up_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "LONGEST_RECORD", 1_000)
    path = file(tmp_path, "a.csv", ("text\n" + "words\n" * 200 + '"open\n' + "words\n" * 400).encode())
    assert len(texts(path)) == 600
    path = file(tmp_path, "a.jsonl", (lines(rows(200)) + b'{"text": ["open"\n' + b"1\n" * 800 + lines(rows(200))))
    with pytest.raises(UserError, match="line 201: it is not JSON"):
        texts(path)
    monkeypatch.setattr(values, "CHUNK", 100)
    with pytest.raises(UserError, match="record 1: a quote or bracket is open for more than 1,000 bytes"):
        texts(file(tmp_path, "a.json", b'["a", "b' + b" words" * 1_000))


def test_bytes_and_halves_that_are_no_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = [
        b'{"text": "caf\xe9"}\n',
        b'{"text": "half a fish \\ud83d"}\n',
        b'{"text": "whole \\ud83d\\udc1f", "by": "\xe9"}\n',
    ]
    found = texts(file(tmp_path, "a.jsonl", b"".join(damaged) + lines(rows(300))))
    assert found[0] == "whole \N{FISH}"
    assert len(found) == 301
    said = capsys.readouterr().err
    assert "2 of 303 records are bad and left out, the first is text a.jsonl, line 1: its character 3 is the" in said
    novel = ("A paragraph of words.\n\n" * 2_000).encode()
    found = texts(file(tmp_path, "a.txt", novel + b"caf\xe9\n\n" + novel), max_characters=100)
    assert "".join(found).count("paragraph") == pytest.approx(4_000, abs=5)
    assert "a.txt#0" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a\.txt#0000: its character 3 is the byte 0xe9, .* iconv"):
        texts(file(tmp_path, "a.txt", b"caf\xe9 au lait\n\n" * 2_000), max_characters=100)
    with pytest.raises(UserError, match="text 1: its character 0 is half"):
        list(as_documents(["a", "\ud800"]))


def test_a_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    offsets, data = (
        pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in range(301))),
        b"a" * 150 + b"\xe9" + b"a" * 149,
    )
    column = pa.StringArray.from_buffers(300, offsets, pa.py_buffer(data))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [d.id for d in read_documents([tmp_path / "a.parquet"])][150] == "a.parquet#000151"


def test_ids_of_shards_are_made_unique_by_the_files_name(tmp_path: Path) -> None:
    for part in range(3):
        file(tmp_path, f"shards/part-{part}.jsonl", lines([{"id": i, "text": f"{part} {i}"} for i in range(2)]))
    found = [(document.id, document.text) for document in read_documents([tmp_path / "shards"])]
    names = ["", "", *(f"shards/part-{part}.jsonl:" for part in (1, 1, 2, 2))]
    assert found == [(f"{name}{i % 2}", f"{i // 2} {i % 2}") for i, name in enumerate(names)]
    with zipfile.ZipFile(tmp_path / "shards.zip", "w") as archive:
        for path in sorted((tmp_path / "shards").iterdir()):
            archive.write(path, path.name)
    assert [d.id for d in read_documents([tmp_path / "shards.zip"])][2:4] == [
        f"shards.zip!part-1.jsonl:{i}" for i in (0, 1)
    ]


def test_a_file_is_given_once(tmp_path: Path) -> None:
    path = file(tmp_path, "shards/a.jsonl", lines(rows(2)))
    for paths in ([path, path], [path.parent, path], [path, path.parent / ".." / "shards"]):
        with pytest.raises(UserError, match="is given twice; give each file once"):
            list(read_documents(paths))


def test_links_keep_their_names(tmp_path: Path) -> None:
    """The hub's cache is links from names to files that are called by their hashes."""
    link = tmp_path / "train.jsonl"
    link.symlink_to(file(tmp_path, "blobs/3f5a", lines(rows(2))))
    assert [d.id for d in read_documents([link])] == ["train.jsonl#000000", "train.jsonl#000001"]


def test_file_names_that_are_no_text(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    path = file(tmp_path, "caf\udce9/a.txt", b"Some words in a text. " * 40)
    for named in (path.parent, path):
        (document,) = read_documents([named])
        assert document.id.endswith("a.txt#0000")
        assert tokenise([document], tiny_llama.tokenizer).ids == (document.id,)
    with Run.open(tmp_path / "run", "harvest", {"text": str(path)}) as run:
        run.finish({})
    assert read_record(tmp_path / "run")["config"]["text"] == str(path)  # mutation: `encode("utf-8")` in `write_text`


FORK = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xff\xfe\x00"


def test_what_macos_puts_beside_files_is_no_text(tmp_path: Path) -> None:
    beside = ("docs/._a.txt", "__MACOSX/docs/._a.txt", "docs/.ipynb_checkpoints/a.txt", ".cache/b.jsonl")
    with zipfile.ZipFile(tmp_path / "docs.zip", "w") as archive:
        archive.writestr("docs/a.txt", "Some words.")
        for name in beside:
            archive.writestr(name, FORK)
            file(tmp_path, f"copy/{name}", FORK)
    file(tmp_path, "copy/docs/a.txt", b"Some words.")
    assert texts(tmp_path / "docs.zip") == texts(tmp_path / "copy") == ["Some words."]
    hidden = file(tmp_path, ".here/a.txt", b"Some words.").parent  # what is named is read
    assert texts(hidden) == ["Some words."]
    assert [p.name for p in DataDirectory(tmp_path / "copy").files("docs/*.txt")] == ["a.txt"]


def test_archives(tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(1)), table)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.txt", "Deep.")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.parquet", table.getvalue())
        archive.writestr("b.jsonl.gz", gzip.compress(lines(["In gzip."])))
        archive.writestr("c.zip", inner.getvalue())
        archive.writestr("d/", b"")
        archive.writestr("e.docx", b"not read")
    assert texts(tmp_path / "a.zip") == [*THREE[:1], "In gzip.", "Deep."]
    data = bytearray((tmp_path / "a.zip").read_bytes())
    start = -1
    while (start := data.find(b"PK\x01\x02", start + 1)) >= 0:
        data[start + 8] |= 1  # the central directory's flag of an encrypted member
    with pytest.raises(UserError, match=r"b\.zip: it is encrypted; unpack it"):
        texts(file(tmp_path, "b.zip", bytes(data)))


def test_texts_of_an_archive_that_was_compressed_again_have_ids_of_their_own(tmp_path: Path) -> None:
    """Mutation: call all of them by the archive's name."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("one.txt", "First.")
        archive.writestr("two.txt", "Second.")
    path = file(tmp_path, "a.zip.gz", gzip.compress(inner.getvalue()))
    found = list(read_documents([str(path)]))
    assert [document.id for document in found] == ["a.zip.gz!one.txt#0000", "a.zip.gz!two.txt#0000"]


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_hub_data_sets_with_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert streaming
        yield from ({"text": f"{path} {name} {split} {i}", "id": "own"} for i in range(2))

    fake_hub(monkeypatch, load_dataset)
    for name, read in (
        ("hub:o/d", "o/d None train"),
        ("hub:o/d:test", "o/d None test"),
        ("hub:o/d:test[:2]", "o/d None test[:2]"),
        ("hub:o/d:20231101.en:train", "o/d 20231101.en train"),
    ):
        documents = list(read_documents([name]))
        assert [d.text for d in documents] == [f"{read} {i}" for i in range(2)]
        assert documents[1].id == f"{name}#00000001"
    for name in ("hub:o/d:a:b:c", "hub:", "hub:o/d::train"):
        with pytest.raises(UserError, match="write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT"):
            list(read_documents([name]))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, KeyError])
def test_hub_data_sets_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error("Config name is missing")

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(UserError, match="Config name is missing"):
        list(read_documents(["hub:o/d"]))
