from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.activations import Document, corpus_hash, detokenise_wikitext, read_documents
from trimtab.activations.cutting import split_text
from trimtab.errors import UserError

TEXTS = ["The ship turned.", 'A comma, a "quote"\nand a line.', "Émile: 日本"]
ROWS = [{"id": f"doc-{i}", "text": text, "source": "logbook"} for i, text in enumerate(TEXTS)]


def write_rows(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text", "source"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"])
@pytest.mark.parametrize("wrapping", ["", ".gz", ".zip"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, wrapping: str) -> None:
    path = write_rows(tmp_path / name)
    if wrapping == ".gz":
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    if wrapping == ".zip":
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / name, f"inner/{name}")
    assert list(read_documents([path])) == [Document(r["id"], r["text"], r["source"]) for r in ROWS]


def test_a_list_of_texts_gets_ids_by_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    documents = list(read_documents([tmp_path / "a.json"]))
    assert [(d.id, d.text) for d in documents] == [(f"a.json#{i:06d}", text) for i, text in enumerate(TEXTS)]


def test_ids_do_not_name_the_machine(tmp_path: Path) -> None:
    for home in ("here", "there/deeper"):
        for file in ("book/one.txt", "book/sub/two.txt"):
            path = tmp_path / home / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"\ufeffThis is {file}.\r\n", encoding="utf-8")
    here, there = (list(read_documents([tmp_path / home / "book"])) for home in ("here", "there/deeper"))
    assert here == there
    assert [d.id for d in here] == ["book/one.txt#0000", "book/sub/two.txt#0000"]
    assert here[0].text == "This is book/one.txt."
    both = [tmp_path / "here/book/one.txt", tmp_path / "here/book/sub/two.txt", tmp_path / "there/deeper/book/one.txt"]
    assert [d.id for d in read_documents(both)] == [
        "here/book/one.txt#0000",
        "two.txt#0000",
        "deeper/book/one.txt#0000",
    ]


def test_long_files_become_several_documents_at_chapters(tmp_path: Path) -> None:
    chapter = "Some words in a paragraph.\n\n" * 12
    (tmp_path / "novel.txt").write_text(f"CHAPTER I\n\n{chapter}CHAPTER II\n\n{chapter}III\n\n{chapter}")
    documents = list(read_documents([tmp_path / "novel.txt"], max_characters=1_000))
    assert [d.text.split("\n")[0] for d in documents] == ["CHAPTER I", "CHAPTER II", "III"]
    assert [d.id for d in documents] == [f"novel.txt#{i:04d}" for i in range(3)]


@given(
    st.text(alphabet=st.sampled_from('ab.! \n\t"IV5'), max_size=400) | st.text(max_size=200),
    st.integers(1, 60),
)
def test_splitting_loses_nothing_but_blanks(text: str, longest: int) -> None:
    parts = list(split_text(text, longest))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= longest and part.strip() == part for part in parts)


def test_limit_and_order(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    assert [d.text for d in read_documents([tmp_path], limit=2)] == ["text a", "text b"]
    assert [d.text for d in read_documents([tmp_path / "c.txt", tmp_path / "a.txt"])] == ["text c", "text a"]


def test_corpus_hash_is_sha256_over_lengths_ids_and_texts() -> None:
    documents = [Document("a", "é", "x"), Document("b", "cd", "y")]
    expected = b"".join(len(part).to_bytes(8, "little") + part for part in (b"a", "é".encode(), b"b", b"cd"))
    assert corpus_hash(documents) == hashlib.sha256(expected).hexdigest()
    assert corpus_hash([Document("a", "bc", "")]) != corpus_hash([Document("ab", "c", "")])
    assert corpus_hash(documents) != corpus_hash(documents[::-1])


TOKENISED = """ = Robert Boulter = 

 Robert Boulter is an English television actor ( born 1982 ) . He had a guest @-@ starring role ; for £ 1 @,@ 500 . 
 = = Career = = 
 " Teddy 's Story " didn 't weigh 0 @.@ 7 – 2 @.@ 2 kg : a <unk> ! """
PLAIN = """Robert Boulter

Robert Boulter is an English television actor (born 1982). He had a guest-starring role; for £1,500.
Career
"Teddy's Story" didn 't weigh 0.7–2.2 kg: a <unk>!"""


def test_wikitext_is_detokenised_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(TOKENISED, encoding="utf-8")
    assert detokenise_wikitext(TOKENISED) == PLAIN
    assert next(read_documents([tmp_path / "wiki.txt"])).text == TOKENISED.strip()
    assert next(read_documents([tmp_path / "wiki.txt"], normalise="wikitext")).text == PLAIN


def _bad(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt#0000: its character 3 is the byte 0xe9, which is not UTF-8 .*; convert"),
        ("a.txt", "\ufefftea".encode("utf-16"), r"text a\.txt: it is UTF-16; convert it: iconv -f utf-16 -t utf-8"),
        ("a.json", '[{"text": "tea"}]'.encode("utf-16-le"), r"a\.json: many of its bytes are 0, as in UTF-16"),
        ("a.jsonl", '{"text": "tea"}'.encode("utf-16-le"), r"a\.jsonl: many of its bytes are 0, as in UTF-16"),
        ("a.txt", b" \n\n ", r"text .*a\.txt: there is no text in it"),
        ("a.jsonl", b"", "there is no text in it"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": ',
            r"a\.jsonl, line 2: it is not JSON .* \(1 of 2 records is bad; up to",
        ),
        (
            "a.jsonl",
            b'{"body": "x", "title": "y"}',
            r"line 1: it has no field 'text', only body, title .*; choose",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1: its field 'text' is not a text .*; choose another --text-field"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"line 1: its character 0 is half of one \(the lone surrogate U\+D83D\)"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: it holds a number of thousands of digits"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: it ends within its list, behind 0 records"),
        ("a.json", b'["a", "b"', r"a\.json: it ends within its list, behind 1 records; get the whole file"),
        ("a.json", b'["a", "b"]["c"]', r"a\.json: it is not JSON behind record 1"),
        ("a.json", b"[3]", "record 0: it is neither a text nor an object"),
        ("a.json", b'["a", nul]', "record 1: it is not JSON"),
        ("a.csv", b"body,title\nx,y\n", "has the fields body, title"),
        ("a.csv", b"text,n\nhe said, loudly,1\n", r"a\.csv, line 2: it has 3 fields, not 2 as the first line"),
        ("a.csv", b'text,n\n"open,1\n', r"a\.csv, line 2: it is not CSV"),
        ("a.parquet", b"PAR1 no PAR1", "not a readable Parquet file"),
        ("a.zip", b"PK no", r"a\.zip: it cannot be read"),
        ("a.txt.gz", b"\x1f\x8b no", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "tea"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz: it cannot be read"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: it cannot be read"),
        ("a.docx", b"x", r"\.docx is not a known format; use \.txt"),
        ("a.jsonl", b'{"text": "x", "id": 1}\n{"text": "y", "id": 1}', "line 2: a record before it has its id, '1'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_documents([_bad(tmp_path, name, data)]))


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        list(read_documents([tmp_path / "none.txt"]))
    with pytest.raises(UserError, match="holds no file of a known format"):
        list(read_documents([tmp_path]))
    with pytest.raises(UserError, match="no text was given"):
        list(read_documents([]))


def test_hub_data_sets_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hub:someone/texts:train: .*needs `datasets`; install it: pip install"):
        list(read_documents(["hub:someone/texts:train"]))
