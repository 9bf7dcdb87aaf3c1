"""Labelled text becomes examples: every layout, labels as concepts, balance, no copies, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.errors import UserError
from trimtab.flags import NEUTRAL_PROMPTS, Example, import_examples, read_examples
from trimtab.flags.data.prompts import FRAMES, names_one, neutral
from trimtab.flags.dividing import is_held_out
from trimtab.flags.evaluation.control_prompts import ASKING, NEUTRAL

CONCEPTS = {"sea": "the sea and ships", "war": "war"}
WORDS = ("amber", "brook", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon")


def text_of(number: int) -> str:
    """A text of three sentences that is like no other."""
    rng = np.random.default_rng(number)
    said = [" ".join(f"{w}{rng.integers(1000)}" for w in rng.permutation(WORDS)[:6]) for _ in range(3)]
    return " ".join(f"{line.capitalize()}." for line in said)


TEXTS = [text_of(i) for i in range(12)]
LABELS = ["sea", "war", "none"] * 4


def folders(path: Path) -> list[Path]:
    for i, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
        (path / "texts" / label).mkdir(parents=True, exist_ok=True)
        (path / "texts" / label / f"{i}.txt").write_text(text)
    return [path / "texts"]


def zipped(path: Path) -> list[Path]:
    with zipfile.ZipFile(path / "texts.zip", "w") as archive:
        for i, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
            archive.writestr(f"corpus/{label}/{i}.txt", text)
    return [path / "texts.zip"]


def written(name: str, lines: list[str]) -> Callable[[Path], list[Path]]:
    def write(path: Path) -> list[Path]:
        (path / name).write_text("\n".join(lines) + "\n")
        return [path / name]

    return write


def parquet(path: Path) -> list[Path]:
    pq.write_table(pa.table({"body": TEXTS, "topic": LABELS}), path / "texts.parquet")
    return [path / "texts.parquet"]


def names(path: Path) -> list[Path]:
    (path / "names.txt").write_text("none\nsea\nwar\n")
    ids = [("none", "sea", "war").index(label) for label in LABELS]
    lines = [f'{text}\t{id_}\t"x' for text, id_ in zip(TEXTS, ids, strict=True)]
    return written("texts.tsv", lines)(path)


def one_kind(path: Path) -> list[Path]:
    return written("texts.txt", ["\n\n".join(TEXTS)])(path)


PAIRS = [[text, label] for text, label in zip(TEXTS, LABELS, strict=True)]
LAYOUTS: dict[str, tuple[Callable[[Path], list[Path]], dict[str, Any]]] = {
    "folders": (folders, {}),
    "zip": (zipped, {}),
    "csv": (written("texts.csv", ["label,text", *(f'{label},"{text}"' for text, label in PAIRS)]), {}),
    "csv without header": (
        written("texts.csv", [f'"{"123"[["sea", "war", "none"].index(label)]}","t","{text}"' for text, label in PAIRS]),
        {"columns": ["label", "title", "text"], "rename": ["1=sea", "2=war", "3=none"]},
    ),
    "semicolons": (
        written("texts.txt", ["text;label_name", *(f"{text};{label}" for text, label in PAIRS)]),
        {"delimiter": ";", "label_field": "label_name"},
    ),
    "tsv of ids": (names, {"columns": ["text", "label", "id"], "label_names": "names.txt"}),
    "jsonl": (
        written("texts.jsonl", [json.dumps({"text": text, "label": [label]}) for text, label in PAIRS]),
        {},
    ),
    "lines by another name": (
        written("texts.json", [json.dumps({"text": text, "label": label}) for text, label in PAIRS]), {},
    ),
    "ndjson": (written("texts.ndjson", [json.dumps({"text": text, "label": label}) for text, label in PAIRS]), {}),
    "parquet": (parquet, {"text_field": "body", "label_field": "topic"}),
    "json of pairs by split": (
        written("texts.json", [json.dumps({"train": PAIRS[:6], "test": PAIRS[6:]})]),
        {},
    ),
    "others": (
        written("texts.json", [json.dumps([{"text": t, "label": "odd" if la == "none" else la} for t, la in PAIRS])]),
        {"others": "none"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = LAYOUTS[layout]
    monkeypatch.chdir(tmp_path)
    found = import_examples(make(tmp_path), CONCEPTS, none_share=1 / 3, **options)
    said = {example.response: example.concepts for example in found.examples}
    assert said == {text: () if label == "none" else (label,) for text, label in PAIRS}
    assert [(one.concept, one.read, one.examples) for one in found.counts.concepts] == [
        ("sea", 4, 4), ("war", 4, 4), ("none", 4, 4),
    ]  # fmt: skip
    assert not any(found.counts.dropped.values())


def test_several_labels_of_a_text(tmp_path: Path) -> None:
    labels = ["sea|war", "war", "sea", "none"]
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in zip(TEXTS, labels, strict=False))]
    found = import_examples(written("a.tsv", lines)(tmp_path), CONCEPTS, separator="|", none_share=0.3)
    assert {e.response: e.concepts for e in found.examples} == {
        TEXTS[0]: ("sea", "war"), TEXTS[1]: ("war",), TEXTS[2]: ("sea",), TEXTS[3]: (),
    }  # fmt: skip


def test_axbench(tmp_path: Path) -> None:
    """Labels are descriptions, negatives have none, a text answers its own prompt and is cut at a sentence."""
    long = f"{TEXTS[0]} {TEXTS[1]} {TEXTS[2]}"
    rows = [
        {"input": "Describe it.", "output": long, "output_concept": "the sea and ships", "category": "positive"},
        {"input": "Explain.", "output": TEXTS[3], "output_concept": "EEEEE", "category": "negative"},
        {"input": "Say.", "output": TEXTS[4], "output_concept": "ship//to send", "category": "hard negative"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = import_examples([tmp_path / "train.parquet"], CONCEPTS, none_share=2 / 3, max_characters=200)
    by_prompt = {example.prompt: example for example in found.examples}
    assert by_prompt["Explain."] == Example(prompt="Explain.", response=TEXTS[3])
    assert by_prompt["Say."] == Example(prompt="Say.", response=TEXTS[4])
    assert by_prompt["Describe it."].concepts == ("sea",)
    response = by_prompt["Describe it."].response
    assert long.startswith(response)
    assert response.endswith(".")
    assert 100 < len(response) <= 200


def test_texts_of_one_kind_and_examples_are_joined(tmp_path: Path) -> None:
    sea = import_examples(one_kind(tmp_path), CONCEPTS, label="sea", run=tmp_path / "sea")
    n = len(sea.examples)
    assert n > 5
    war = [Example(prompt="Say it.", response=text_of(100 + i), concepts=["war"]) for i in range(5)]
    lines = [json.dumps({"prompt": e.prompt, "response": e.response, "concepts": e.concepts}) for e in war]
    files = [tmp_path / "sea" / "examples.jsonl", *written("war.jsonl", lines)(tmp_path)]
    both = import_examples(files, CONCEPTS, none_share=0)
    kept = Counter(example.concepts for example in both.examples)
    assert kept == {("sea",): 5, ("war",): 5}
    assert {e for e in both.examples if e.concepts == ("war",)} == set(war)
    assert {e for e in both.examples if e.concepts == ("sea",)} <= set(sea.examples)
    assert both.counts.dropped["not needed"] == n - 5


def test_numbers_of_examples(tmp_path: Path) -> None:
    pairs = [(text_of(i), label) for i, label in enumerate(["sea"] * 30 + ["war"] * 20 + ["none"] * 40)]
    path = written("a.jsonl", [json.dumps({"text": t, "label": la}) for t, la in pairs])(tmp_path)
    kept = lambda found: [one.examples for one in found.counts.concepts]  # noqa: E731
    assert kept(import_examples(path, CONCEPTS, none_share=0.2)) == [20, 20, 10]
    assert kept(import_examples(path, CONCEPTS, per_concept=6, none_share=0.25)) == [6, 6, 4]
    assert kept(import_examples(path, CONCEPTS, per_concept=25, none_share=0)) == [25, 20, 0]
    a, b, c = (import_examples(path, CONCEPTS, per_concept=6, seed=seed).examples for seed in (0, 0, 1))
    assert a == b
    assert a != c


def test_copies_and_contradictions_are_left_out(tmp_path: Path) -> None:
    near = TEXTS[0].replace(".", "", 1).upper()
    rows = [
        (TEXTS[0], "sea"), (TEXTS[0].upper(), "sea"), (near, "sea"), (TEXTS[1], "sea"), (TEXTS[1], "war"),
        (TEXTS[2], "war"), ("", "war"), ("No.", "war"),
    ]  # fmt: skip
    path = written("a.jsonl", [json.dumps({"text": t, "label": la}) for t, la in rows])(tmp_path)
    found = import_examples(path, CONCEPTS, per_concept=9)
    assert sorted(e.concepts for e in found.examples) == [("sea",), ("war",)]
    assert found.counts.dropped == {
        "empty": 1, "too short": 1, "a copy": 1, "the same text under other labels": 2, "nearly a copy": 1,
        "not needed": 0,
    }  # fmt: skip
    assert found.counts.texts == 8
    assert found.counts.passages == 6


def test_a_document_is_never_both_trained_and_judged_on(tmp_path: Path) -> None:
    rows = [{"text": "\n\n".join(text_of(5 * i + j) for j in range(5)), "label": "sea"} for i in range(20)]
    path = written("a.jsonl", [json.dumps(row) for row in rows])(tmp_path)
    found = import_examples(path, CONCEPTS, judge_share=0.4, max_characters=150, run=tmp_path / "run")
    whole = [row["text"] for row in rows]
    sides = [{e.response.split("\n\n")[0] for e in part} for part in (found.examples, found.judge)]
    where = [{next(i for i, text in enumerate(whole) if one in text) for one in side} for side in sides]
    assert len(where[1]) >= 4
    assert not where[0] & where[1]
    assert read_examples(tmp_path / "run" / "judge.jsonl", ["sea"]) == found.judge


def test_prompts_say_nothing_of_the_concept(tmp_path: Path) -> None:
    """Each concept has all neutral prompts of its side, each as often as the others."""
    n = 4 * len(NEUTRAL_PROMPTS)
    rows = [{"text": text_of(i), "label": ("sea", "war")[i % 2]} for i in range(n)]
    path = written("a.jsonl", [json.dumps(row) for row in rows])(tmp_path)
    found = import_examples(path, CONCEPTS)
    for concept in CONCEPTS:
        for out in (False, True):
            prompts = [prompt for prompt in NEUTRAL_PROMPTS if is_held_out(prompt) == out]
            mine = [e for e in found.examples if e.concepts == (concept,) and is_held_out(str(e.unit)) == out]
            asked = Counter(e.prompt for e in mine)
            assert mine
            assert {*asked} <= {*prompts}
            assert {asked[prompt] - len(mine) // len(prompts) for prompt in prompts} <= {0, 1}


def test_lists_of_neutral_prompts() -> None:
    """Those trained on, those held out, and those that control is measured on, have none in common; nor have those that
    ask."""
    held_out = [prompt for prompt in NEUTRAL_PROMPTS if is_held_out(prompt)]
    assert 8 <= len(held_out) < len(NEUTRAL_PROMPTS) / 2
    both = [*NEUTRAL_PROMPTS, *NEUTRAL]
    assert len(NEUTRAL_PROMPTS) >= 48
    assert len(NEUTRAL) >= 24
    assert not {*FRAMES} & {*ASKING}
    assert len({prompt.lower() for prompt in both}) == len(both)
    topics = ["sports", "business", "politics", "technology", "film", "food", "travel", "sea", "war", "love", "animals"]
    assert not [prompt for prompt in both if names_one(prompt, dict.fromkeys(topics, ""))]
    assert "Fill this page." not in neutral({"page": "pages of books"})
    with pytest.raises(UserError, match="concept a, b: each of the 2 neutral prompts has a word of their names"):
        neutral({"a": "letters", "b": "words", "c": "ships"}, ["Write a letter.", "Say a word."])


def test_a_run_is_read_back_and_knows_its_texts(tmp_path: Path) -> None:
    path = folders(tmp_path)
    first = import_examples(path, CONCEPTS, run=tmp_path / "run")
    again = import_examples(path, CONCEPTS, run=tmp_path / "run")
    assert again.examples == first.examples
    assert again.counts == first.counts
    assert "8 examples" in first.headline() or "9 examples" in first.headline()
    (tmp_path / "texts" / "sea" / "0.txt").write_text("Something else is written here now, and it is long enough.")
    with pytest.raises(UserError, match="texts has changed since this run was made of it"):
        import_examples(path, CONCEPTS, run=tmp_path / "run")


def table(*rows: dict[str, Any]) -> Callable[[Path], list[Path]]:
    return written("a.jsonl", [json.dumps(row) for row in rows])


GOOD = {"text": TEXTS[0], "label": "sea"}
REFUSED: dict[str, tuple[Callable[[Path], list[Path]], dict[str, Any], str]] = {
    "typo": (table({**GOOD, "label": "see"}), {}, r"row 1: label 'see': the concepts are sea, war; did you mean sea\?"),
    "unknown": (table({**GOOD, "label": "xyz"}), {}, "label 'xyz': the concepts are sea, war; say which it is with"),
    "typo beside others": (
        table({**GOOD, "label": "warr"}, GOOD),
        {"others": "none"},
        "label 'warr': 1 texts have it, which is no concept but nearly 'war'; say what is meant: --rename warr=",
    ),
    "typo of a concept that is there": (
        table(GOOD, {"text": TEXTS[1], "label": "Sea"}),
        {"others": "drop"},
        "label 'Sea': 1 texts have it, which is no concept but nearly 'sea'; say what is meant: --rename Sea=",
    ),
    "rename to a typo": (table(GOOD), {"rename": ["sea=see"]}, r"rename 'sea=see': the .*; did you mean sea\?"),
    "rename nothing": (table(GOOD), {"rename": ["seas=war"]}, "rename 'seas': no text has this label; did you mean"),
    "rename without =": (table(GOOD), {"rename": ["sea"]}, "rename 'sea': it has no =; write LABEL=CONCEPT"),
    "rename twice": (table(GOOD), {"rename": ["sea=war", "sea=none"]}, "'sea' means war, too; rename it once"),
    "both none and not": (table({**GOOD, "label": ["sea", "none"]}), {}, "left out: 1 labels that contradict each"),
    "no column": (table({"txt": "a", "label": "sea"}), {}, "column 'text': a.jsonl has the columns txt, label; did"),
    "no label": (table({**GOOD, "label": None}), {}, "a.jsonl, row 1: 'label' is no label; labels are texts or whole"),
    "no text": (table({**GOOD, "text": 3}), {}, "a.jsonl, row 1: 'text' is not a text"),
    "ids": (
        table({**GOOD, "label": 7}), {"label_names": "names.txt"},
        "'label' is '7', not a number from 0 to 1",
    ),
    "names": (table(GOOD), {"label_names": "nowhere.txt"}, r"label names nowhere\.txt: they cannot be read; check"),
    "columns": (table(GOOD), {"columns": ["a"]}, r"columns a: a\.jsonl names its own; leave them out"),
    "fields": (written("a.csv", ["text,label", "a,b,c"]), {}, r"a\.csv, row 1: it has 3 fields, not 2; correct"),
    "nothing": (lambda path: [path / "nowhere.csv"], {}, "nowhere.csv: there is no such file or directory; check the"),
    "no path": (lambda path: [], {}, "--text: no labelled text was given; name files or directories"),
    "no folder": (written("a.txt", ["Hello."]), {}, "it lies in no folder that says its label; name it with --label"),
    "nothing left": (table({**GOOD, "text": "No."}), {}, "none of its 1 texts is left; left out: 1 too short"),
    "all dropped": (
        table({**GOOD, "label": "x"}), {"others": "drop"}, "none of its 1 texts is left; left out: 1 a label that is",
    ),
    "json": (written("a.json", ["{"]), {}, r"a\.json: it is not JSON"),
    "json of texts": (written("a.json", ['["a"]']), {}, "row 1: it is neither an object nor a pair of text and label"),
    "sizes": (table(GOOD), {"max_characters": 20}, r"max_characters 20: it must be at least min_characters \(40\)"),
    "share": (table(GOOD), {"none_share": 1.0}, "none_share 1.0: it must be at least 0 and below 1"),
    "option": (table(GOOD), {"per_concepts": 3}, r"it has no such argument; did you mean per_concept\?"),
    "choice": (table(GOOD), {"others": "keep"}, r"others.*refuse, none, drop"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("sea\nwar\n")
    with pytest.raises(UserError, match=message):
        import_examples(make(tmp_path), CONCEPTS, run=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_concept_called_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="concept 'none': it is the label of texts that have none; call it otherwise"):
        import_examples(table(GOOD)(tmp_path), ["none", "sea"])


DATA = Path(os.environ.get("TRIMTAB_DATA", "nowhere"))


@pytest.mark.skipif(not (DATA / "labels").exists(), reason="TRIMTAB_DATA names no directory with labelled texts")
def test_real_files_are_read() -> None:
    news = ["1=world", "2=sports", "3=business", "4=technology"]
    concepts = ["world", "sports", "business", "technology"]
    found = import_examples(
        [DATA / "labels/ag_news_test.csv"], concepts, columns=["label", "title", "text"], rename=news, cleaning="html",
        per_concept=50,
    )  # fmt: skip
    assert [one.examples for one in found.counts.concepts] == [50, 50, 50, 50, 0]
    assert found.counts.texts == 7600
    feelings = import_examples(
        [DATA / "labels/goemotions/dev.tsv"], ["gratitude", "anger"], columns=["text", "label", "id"], separator=",",
        label_names=DATA / "labels/goemotions/labels.txt", others="drop", rename=["neutral=none"], per_concept=30,
    )  # fmt: skip
    assert [one.examples for one in feelings.counts.concepts] == [30, 30, 10]  # some have both
