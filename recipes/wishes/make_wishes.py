"""Sixteen wishes out of labelled text: for each a file of texts that have a property and one of texts that don't.

They were fixed before anything was found for any of them. `SOURCES` holds the public files named in `sources.tsv`.
Where a label says it, texts are that label's and, as many, the others'; four wishes are made by rule from novels:

- past_tense: sentences with was, were, had, did, or went, and no present form of to be, to have or to do; against the
  reverse.
- question: sentences that end with a question mark; against those that end with a full stop.
- formal: sentences with their contractions written out; against the same sentences as they stand.
- british: sentences with a word whose spelling differs, in British spelling; against the same in American spelling.

`code` is lines of Python's own standard library, as it is installed, against sentences of novels.

    python recipes/wishes/make_wishes.py SOURCES data/wishes
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

TEXTS = 160
"""Of each side."""
LEAST_WORDS, MOST_WORDS = 6, 40
NEWS = {"world_news": 1, "sports": 2, "business": 3, "science": 4}
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
CONTRACTIONS = {
    "don't": "do not", "didn't": "did not", "can't": "cannot", "won't": "will not", "isn't": "is not",
    "wasn't": "was not", "couldn't": "could not", "wouldn't": "would not", "shouldn't": "should not",
    "haven't": "have not", "hadn't": "had not", "doesn't": "does not", "aren't": "are not", "weren't": "were not",
    "I'm": "I am", "I've": "I have", "I'll": "I will", "you're": "you are", "you've": "you have", "you'll": "you will",
    "we're": "we are", "we'll": "we will", "they're": "they are", "it's": "it is", "that's": "that is",
    "there's": "there is",
}  # fmt: skip
BRITISH = {
    "colour": "color", "colours": "colors", "coloured": "colored", "honour": "honor", "honourable": "honorable",
    "favour": "favor", "favourite": "favorite", "neighbour": "neighbor", "neighbours": "neighbors",
    "labour": "labor", "humour": "humor", "parlour": "parlor", "harbour": "harbor", "behaviour": "behavior",
    "endeavour": "endeavor", "endeavoured": "endeavored", "grey": "gray", "centre": "center", "theatre": "theater",
    "realised": "realized", "realise": "realize", "recognised": "recognized", "recognise": "recognize",
    "travelled": "traveled", "traveller": "traveler", "travelling": "traveling", "marvellous": "marvelous",
    "defence": "defense", "offence": "offense", "jewellery": "jewelry", "plough": "plow", "cheque": "check",
    "vapour": "vapor", "splendour": "splendor", "armour": "armor", "odour": "odor", "vigour": "vigor",
    "rumour": "rumor", "flavour": "flavor", "savour": "savor",
}  # fmt: skip
MODULES = "argparse", "ast", "bisect", "calendar", "csv", "fractions", "heapq", "shutil", "statistics", "zipfile"
PAST, PRESENT = {"was", "were", "had", "did", "went"}, {"is", "are", "am", "has", "have", "does", "do"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="directory with the files named in sources.tsv")
    parser.add_argument("out", type=Path, help="directory to write: a directory for each wish")
    args = parser.parse_args()
    sentences = novel_sentences(args.sources / "novels")
    for name, (wanted, unwanted) in wishes(args.sources, sentences).items():
        place = args.out / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "wanted.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        (place / "unwanted.txt").write_text("\n".join(unwanted) + "\n", encoding="utf-8")
        print(f"{name}: {len(wanted)} and {len(unwanted)} texts")


def wishes(sources: Path, sentences: Sequence[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Both sides of every wish."""
    news = read_news(sources / "ag_news_test.csv")
    found = {name: apart(news, {number}, name) for name, number in NEWS.items()}
    reviews = [(label, text) for text, label in read_rows(sources / "sst2" / "train.tsv", "\t")]
    found["positive"] = apart(reviews, {"1"}, "positive")
    emotions = [(label, text) for text, label in read_rows(sources / "emotion" / "train.txt", ";") if label in EMOTIONS]
    found |= {name: apart(emotions, {name}, name) for name in EMOTIONS}
    found["past_tense"] = (
        picked([s for s in sentences if words_of(s) & PAST and not words_of(s) & PRESENT], "past"),
        picked([s for s in sentences if words_of(s) & PRESENT and not words_of(s) & PAST], "present"),
    )
    found["question"] = (
        picked([s for s in sentences if s.endswith("?")], "question"),
        picked([s for s in sentences if s.endswith(".")], "statement"),
    )
    found["formal"] = rewritten(sentences, CONTRACTIONS)
    found["british"] = rewritten(sentences, BRITISH)[::-1]
    found["code"] = picked(code_lines(), "code"), picked(sentences, "prose")
    return found


def apart(rows: Iterable[tuple[object, str]], wanted: set[object], name: str) -> tuple[list[str], list[str]]:
    """Texts with a label, and as many with another one."""
    rows = list(rows)
    return (
        picked([text for label, text in rows if label in wanted], f"{name}, wanted"),
        picked([text for label, text in rows if label not in wanted], f"{name}, unwanted"),
    )


def rewritten(sentences: Sequence[str], forms: dict[str, str]) -> tuple[list[str], list[str]]:
    """Sentences with some words replaced, and the same as they stand."""
    pattern = re.compile(rf"(?<![\w'])({'|'.join(map(re.escape, forms))})(?![\w'])", re.IGNORECASE)
    chosen = picked([s for s in sentences if pattern.search(" ".join(s.split()[:16]))], "".join(forms)[:20])
    return [pattern.sub(lambda m: cased(forms, m[0]), s) for s in chosen], chosen


def cased(forms: dict[str, str], word: str) -> str:
    found = forms.get(word) or forms[next(form for form in forms if form.lower() == word.lower())]
    return found[0].upper() + found[1:] if word[0].isupper() else found


def picked(texts: Iterable[str], salt: str) -> list[str]:
    """So many different ones, of some words."""
    fit = sorted({t for text in texts if LEAST_WORDS <= len((t := " ".join(text.split())).split()) <= MOST_WORDS})
    random.Random(salt).shuffle(fit)
    if len(fit) < TEXTS:
        raise SystemExit(f"{salt}: {len(fit)} texts, and {TEXTS} are needed")
    return fit[:TEXTS]


def words_of(sentence: str) -> set[str]:
    return set(re.findall(r"[a-z]+", sentence.lower()))


def novel_sentences(place: Path) -> list[str]:
    """Sentences of the novels, in straight quotes."""
    found: list[str] = []
    for file in sorted(place.glob("*.txt")):
        text = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
        text = text.translate(str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "_": ""}))
        # An apostrophe that no letter follows is a quotation mark: half a quotation is no sentence.
        found += [s for s in re.findall(r"[A-Z][^.!?\"]*[.!?]", text) if not re.search(r"'(?![a-z])", s)]
    if not found:
        raise SystemExit(f"{place}: there are no novels")
    return found


def code_lines() -> list[str]:
    """Neighbouring lines of code, joined, of modules that every Python has."""
    place, found = Path(sysconfig.get_paths()["stdlib"]), list[str]()
    for name in (
        "argparse",
        "ast",
        "bisect",
        "calendar",
        "csv",
        "fractions",
        "heapq",
        "shutil",
        "statistics",
        "zipfile",
    ):
        lines = [line.strip() for line in (place / f"{name}.py").read_text(encoding="utf-8").splitlines()]
        code = [line for line in lines if line and re.search(r"[=(\[]", line) and not line.startswith(("#", '"', "'"))]
        found += [" ; ".join(code[i : i + 3]) for i in range(0, len(code) - 2, 3)]
    return found


def read_news(file: Path) -> list[tuple[int, str]]:
    """Class and title with text."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [(int(row[0]), clean(f"{row[1]}. {row[2]}")) for row in csv.reader(lines)]


def clean(text: str) -> str:
    """Without the remains of markup, and the agency that gives no class away."""
    return re.sub(r"\\|#\d+;|&\w+;|\((AP|Reuters|AFP|SPACE\.com)\)|(AP|Reuters|AFP) - ", " ", text)


def read_rows(file: Path, separator: str) -> list[tuple[str, str]]:
    """Text and label of each line."""
    rows = [line.rsplit(separator, 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


if __name__ == "__main__":
    main()
