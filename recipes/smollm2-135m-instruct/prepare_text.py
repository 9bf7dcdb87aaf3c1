"""Put together the text that the shipped SAE of SmolLM2-135M-Instruct is trained on.

    python prepare_text.py DATA_DIR OUT.jsonl [--chats CHATS.jsonl] [--chats-only]

DATA_DIR holds the files of `sources.tsv` under the paths given there; each is checked against its SHA-256 before
anything is written. Every line of OUT is one document: id, text, source. Documents are drawn evenly over each source
until its share is full, by a rule that involves nothing random, so the same files give the same corpus, byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trimtab.activations.text import Document, corpus_hash, detokenise_wikitext, split_text
from trimtab.errors import UserError

HERE = Path(__file__).parent
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Characters per source, None for everything; about four characters are a token.
CHARACTERS: dict[str, int | None] = {
    "novels": 5_200_000,
    "encyclopaedia": None,
    "reviews": 1_750_000,
    "stories": None,
    "speeches": 1_000_000,
    "problems": 700_000,
}

# UTF-8 punctuation read as Windows-1252; the last byte of a closing quote has no letter there and got lost.
MISDECODED = [(f"â€{last}", right) for last, right in zip("™œ˜“”¦", "’“‘–—…", strict=True)] + [("â€", "”")]


def novels(data: Path, names: list[str]) -> Iterator[Document]:
    """Chapters or parts of chapters, without the title page and the last part (either may hold what is no novel)."""
    for name in names:
        parts = split_text((data / name).read_text("utf-8-sig"))
        for number, part in enumerate(parts[1:-1], start=1):
            yield Document(f"{Path(name).stem}#{number:04d}", part, "novels")


def encyclopaedia(data: Path, names: list[str]) -> Iterator[Document]:
    """WikiText, detokenised; sentences in which a word was replaced by `<unk>` are left out, articles kept together."""
    for name in names:
        if name.endswith(".json"):
            raw = " ".join(passage.strip() for passage in json.loads((data / name).read_text("utf-8")))
            raw = re.sub(r" ?(= (?:= )*[^=]+ (?:= )*=) ", r"\n\1\n", raw)
        else:
            raw = (data / name).read_text("utf-8")
        articles = re.split(r"^(?= ?= [^=].* = ?$)", raw, flags=re.MULTILINE)
        for number, article in enumerate(articles):
            text = detokenise_wikitext("\n".join(filter(None, map(known_sentences, article.split("\n")))))
            for part_number, part in enumerate(split_text(text)):
                if len(part) >= 200:
                    yield Document(f"{Path(name).stem}#{number:03d}.{part_number:02d}", part, "encyclopaedia")


def known_sentences(paragraph: str) -> str:
    """A tokenised paragraph without the sentences that hold `<unk>`."""
    sentences = re.split(r'(?<= [.!?]) (?=[A-Z"(\d])', paragraph.strip())
    return " ".join(s for s in sentences if "<unk>" not in s)


def reviews(data: Path, names: list[str]) -> Iterator[Document]:
    """Film reviews; the corpus is lower-cased and tokenised, punctuation is joined to its word again."""
    for path, text in zipped(data, names):
        text = re.sub(r"\s*\n", " ", text)
        text = re.sub(r" ([,.;:!?)])", r"\1", re.sub(r"([(]) ", r"\1", text))
        yield Document(f"review/{Path(path).stem}", re.sub(r'" ([^"]*?) "', r'"\1"', text).strip(), "reviews")


def stories(data: Path, names: list[str]) -> Iterator[Document]:
    """TinyStories samples; misdecoded quotes and dashes are corrected."""
    for name in names:
        for number, text in enumerate(json.loads((data / name).read_text("utf-8"))):
            for wrong, right in MISDECODED:
                text = text.replace(wrong, right)
            yield Document(f"{Path(name).stem}#{number:04d}", text.strip(), "stories")


def speeches(data: Path, names: list[str]) -> Iterator[Document]:
    """State of the Union addresses; the few that are not UTF-8 in the archive are left out."""
    for path, text in zipped(data, names):
        for number, part in enumerate(split_text(text)):
            yield Document(f"{Path(path).stem}#{number:02d}", part, "speeches")


def problems(data: Path, names: list[str]) -> Iterator[Document]:
    """Grade-school problems as one turn of chat, without the calculator marks (`<<48/2=24>>`)."""
    for name in names:
        for number, line in enumerate((data / name).read_text("utf-8").splitlines()):
            row = json.loads(line)
            yield Document(
                f"gsm8k#{number:04d}", chat(row["question"], re.sub(r"<<.*?>>", "", row["answer"])), "problems"
            )


def chats(path: Path) -> Iterator[Document]:
    """Conversations that the model wrote with itself (`write_chats.py`)."""
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        yield Document(f"chats#{number:04d}", json.loads(line)["text"], "chats")


def chat(user: str, assistant: str) -> str:
    """One exchange in the model's template."""
    turns = (("system", SYSTEM), ("user", user.strip()), ("assistant", assistant.strip()))
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def zipped(data: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Name and content of every UTF-8 text in the archives."""
    for name in names:
        with zipfile.ZipFile(data / name) as archive:
            for member in sorted(m for m in archive.namelist() if m.endswith(".txt")):
                try:
                    yield member, archive.read(member).decode("utf-8")
                except UnicodeDecodeError:
                    continue


def spread(documents: list[Document], characters: int | None) -> list[Document]:
    """Documents evenly spaced over a list, up to a number of characters, in their order."""
    total = sum(len(d.text) for d in documents)
    if characters is None or total <= characters:
        return documents
    chosen, filled, passed = [], 0, 0
    for document in documents:
        passed += len(document.text)
        if filled + len(document.text) / 2 < passed * characters / total:
            chosen.append(document)
            filled += len(document.text)
    return chosen


def check_sources(data: Path) -> dict[str, list[str]]:
    """Files by kind, after comparing each with its SHA-256.

    Raises:
        UserError: a file is missing or not the one that is listed.
    """
    files: dict[str, list[str]] = {kind: [] for kind in CHARACTERS}
    with (HERE / "sources.tsv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            path = data / row["file"]
            if not path.exists():
                raise UserError(f"source {path}", "it is missing", f"get it from {row['from']}")
            if hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
                raise UserError(
                    f"source {path}", "its SHA-256 is not the listed one", f"get it again from {row['from']}"
                )
            files[row["kind"]].append(row["file"])
    return files


READERS: dict[str, Callable[[Path, list[str]], Iterator[Document]]] = {
    "novels": novels,
    "encyclopaedia": encyclopaedia,
    "reviews": reviews,
    "stories": stories,
    "speeches": speeches,
    "problems": problems,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chats", type=Path, help="what write_chats.py wrote")
    parser.add_argument("--chats-only", action="store_true", help="leave the other sources out")
    args = parser.parse_args()
    files = check_sources(args.data)
    corpus: list[Document] = []
    for kind, reader in READERS.items() if not args.chats_only else ():
        corpus += spread(list(reader(args.data, files[kind])), CHARACTERS[kind])
    corpus += chats(args.chats) if args.chats else []
    with args.out.open("w", encoding="utf-8") as out:
        for document in corpus:
            out.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    for kind in dict.fromkeys(d.source for d in corpus):
        texts = [d.text for d in corpus if d.source == kind]
        print(f"{kind:14} {len(texts):5} documents  {sum(map(len, texts)):9,} characters")
    print(f"{args.out}: {len(corpus)} documents, corpus hash {corpus_hash(corpus)}")


if __name__ == "__main__":
    main()
