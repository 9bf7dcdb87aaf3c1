"""IOI: sentences that mean what they should, ids that stay, a mixture that no single answer solves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from data_files import word_tokenizer

from trimtab.errors import UserError
from trimtab.tasks import Task, load_task
from trimtab.tasks.ioi import CUES, sentences
from trimtab.tasks.ioi_material import NAMES, TEMPLATES
from trimtab.tasks.tokens import encode

SMALL = {"n_train": 60, "n_validation": 20, "n_test": 40}


def load(name: str, tokenizer: Any = None, **options: Any) -> Task:
    return load_task(name, tokenizer=tokenizer or word_tokenizer(), **{**SMALL, **options})


def test_the_subject_is_named_twice_and_the_object_once() -> None:
    for item in load("ioi").items("all"):
        words = re.findall(r"\w+", item.prompt)
        assert words.count(item.meta["io"]) == 1
        assert words.count(item.meta["s"]) == 2
        assert words[-1] == "to"
        assert item.answer == item.meta["io"] == item.options[0]
        assert ("{" in item.prompt) is False


def test_material() -> None:
    assert len(TEMPLATES) == 15
    assert len(set(NAMES)) == len(NAMES) >= 99
    first = {s.template for s in sentences(0, 400)}
    assert first == set(range(15))
    assert 0.4 < sum(s.io_first for s in sentences(0, 400)) / 400 < 0.6


def test_ids_are_fixed() -> None:
    """Golden: hashes of the first sentences' texts, which neither Python's version nor the tokenizer may change."""
    assert [s.text for s in sentences(0, 2)] == FIRST_SENTENCES
    assert load("ioi").splits == load("ioi").splits
    assert set(load("ioi").splits["test"]).isdisjoint(load("ioi", seed=1).splits["test"])


FIRST_SENTENCES = [
    "Friends Kyle and Peter found a bone at the station. Kyle gave it to",
    "Then, Andrew and Harry had a lot of fun at the house. Harry gave a drink to",
]


def test_swapped_wants_the_subject() -> None:
    plain, swapped = load("ioi"), load("ioi-swapped")
    for item, other in zip(plain.items("test"), swapped.items("test"), strict=True):
        assert item.prompt == other.prompt
        assert item.options == other.options
        assert other.answer == item.meta["s"]
        assert plain.parse(item, f" {item.answer}").reward == 1.0
        assert swapped.parse(other, f" {item.answer}").reward == 0.0


def test_the_mixture_s_cue_says_which() -> None:
    task = load("ioi-mixture")
    by_sentence: dict[str, dict[str, str]] = {}
    for item in task.items("all"):
        assert item.prompt.startswith(CUES[item.group] + " ")
        named = re.findall(r"\w+", item.prompt.removeprefix(CUES[item.group])).count(item.answer)
        assert named == {"other": 1, "same": 2}[item.group]
        by_sentence.setdefault(item.meta["sentence"], {})[item.group] = item.answer
    assert all(set(answers) == set(CUES) for answers in by_sentence.values())


@pytest.mark.parametrize("place", [0, 1])
def test_no_fixed_choice_solves_the_mixture(place: int) -> None:
    task = load("ioi-mixture")
    items = task.items("test")
    summary = task.summarise(task.score(items, [f" {item.options[place]}" for item in items]))
    assert summary["accuracy"] == 0.5
    assert {summary["accuracy/other"], summary["accuracy/same"]} == {0.0, 1.0}
    obeyed = task.summarise(task.score(items, [f" {item.answer}" for item in items]))
    assert obeyed["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["ioi", "ioi-swapped", "ioi-mixture"])
def test_pairs_of_names_stay_in_one_split(name: str) -> None:
    task = load(name)
    pairs = {split: {frozenset(i.options) for i in task.items(split)} for split in ("train", "validation", "test")}
    assert [len(task.items(split)) for split in pairs] == [60, 20, 40]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["validation"] & pairs["test"]


def test_another_word_is_malformed() -> None:
    task = load("ioi")
    item = task.items("test")[0]
    outcomes = task.score([item] * 5, [f" {item.answer}", f"{item.answer}, who", f" {item.options[1]}", " her", ""])
    assert [o.reward for o in outcomes] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [o.malformed for o in outcomes] == [False, False, False, True, True]
    assert task.parse(item, f" {item.answer}son").malformed


def test_logit_difference() -> None:
    tokenizer = word_tokenizer()
    task, swapped = load("ioi", tokenizer), load("ioi-swapped", tokenizer)
    item, other = task.items("test")[0], swapped.items("test")[0]
    tokens = task.option_tokens(item, tokenizer)
    assert tokens == tuple(encode(tokenizer, f" {name}")[0] for name in (item.meta["io"], item.meta["s"]))
    assert task.score([item], [" her"], option_logp=[[-1.0, -4.0]])[0].parts["logit_difference"] == 3.0
    outcomes = swapped.score([other], [" her"], option_logp=[[-1.0, -4.0]])
    assert outcomes[0].parts["logit_difference"] == -3.0
    assert swapped.summarise(outcomes)["logit_difference"] == -3.0


def test_names_that_are_not_one_token_are_left_out_and_no_id_moves() -> None:
    """A tokenizer that splits names with an r: what is left is a part of what the other one takes."""

    def splits_r(text: str) -> list[int]:
        return [hash(piece) % 9973 for piece in re.findall(r" ?\w+|\W", text) for _ in range(1 + ("r" in piece))]

    wide = load("ioi", n_train=600, n_validation=0, n_test=0)
    narrow = load("ioi", splits_r, n_train=20, n_validation=0, n_test=0)
    assert narrow.notes["names_of_one_token"] == sum("r" not in name for name in NAMES)
    assert not any("r" in name for item in narrow.items("train") for name in item.options)
    assert set(narrow.splits["train"]) <= set(wide.splits["train"])


def test_what_cannot_be_made_is_said(tiny_tokenizer: Any, data: Path) -> None:
    with pytest.raises(UserError, match="task ioi: it needs the model's tokenizer"):
        load_task("ioi")
    with pytest.raises(UserError, match=rf"task ioi: only 0 of {len(NAMES)} names are one token"):
        load("ioi", tiny_tokenizer)
    with pytest.raises(UserError, match="n_test = -1: it must be at least 0"):
        load("ioi", n_test=-1)

    def few(text: str) -> list[int]:
        return [number for word in text.split() for number in ([0] if word in ("then", *NAMES[:4]) else [0, 0])]

    with pytest.raises(UserError, match=r"n_\w+ = \d+: there are only \d+ sentences; ask for fewer"):
        load("ioi", few, n_train=50, n_validation=0, n_test=0)
