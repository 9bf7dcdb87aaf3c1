"""GSM8K: which number a text ends with; bad rows."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from data_files import gsm8k_row, write_jsonl

from trimtab.errors import UserError
from trimtab.tasks import load_task
from trimtab.tasks.gsm8k import read_number


@pytest.mark.parametrize(
    ("text", "number", "stated"),
    [
        ("#### 72", "72", True),
        ("so 3 + 4 = 7\n#### 7\nDone in 2 steps.", "7", True),
        ("#### $1,234.50", "1234.50", True),
        ("#### -5", "-5", True),
        ("#### 1 ... no, #### 2", "2", True),
        (r"hence \boxed{42}", "42", True),
        (r"hence \boxed{\$42}", "42", True),
        ("The answer is 12 apples, not 13.", "12", True),
        ("The answer is: **12**", "12", True),
        ("answer: $1,000 in 3 years", "1000", True),
        ("She has 5 apples and 7 pears.", "7", False),
        ("It costs 12.50 dollars.", "12.50", False),
        ("It is 10-3=7", "7", False),
        ("10 - 3", "3", False),
        ("It fell to -4 degrees", "-4", False),
        ("It fell to −4 degrees", "-4", False),
        ("5% of them", "5", False),
        ("1,080 in all", "1080", False),
        ("the 20th.", "20", False),
        ("Ends with a stop: 15.", "15", False),
        ("3/4 of 8 is 6", "6", False),
        ("half: .5", ".5", False),
        ("no number here", None, False),
        ("", None, False),
    ],
)
def test_numbers_are_read(text: str, number: str | None, stated: bool) -> None:
    found, marked = read_number(text)
    assert found == (None if number is None else Decimal(number))
    assert marked is stated


def test_rewards(data: Path) -> None:
    task = load_task("gsm8k", data)
    item = next(i for i in task.items("test") if i.answer == "2004")
    assert task.max_new_tokens == 512
    outcomes = task.score([item] * 4, ["1002 + 1002\n#### 2,004.00", "It is 2004", "#### 2005", "many"])
    assert [o.reward for o in outcomes] == [1.0, 1.0, 0.0, 0.0]
    assert [o.malformed for o in outcomes] == [False, False, False, True]
    assert [o.parts["stated"] for o in outcomes] == [1.0, 0.0, 1.0, 0.0]
    assert item.meta["solution"] == "1002+1002=<<1002+1002=2004>>"
    assert task.prompt(item).startswith("Tom has 1002 apples")
    assert "####" in task.prompt(item)


def test_splits(data: Path) -> None:
    task = load_task("gsm8k", data)
    assert len(task.items("train")) + len(task.items("validation")) == 60
    assert len(task.items("test")) == 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "gsm8k/test.jsonl, row 11: it has no 'answer'"),
        ({"question": 3, "answer": "#### 1"}, "gsm8k/test.jsonl, row 11: 'question' is not a text"),
        ({"question": "q", "answer": "1"}, "gsm8k/test.jsonl, row 11: 'answer' has no line '#### NUMBER'"),
        (
            {"question": "q", "answer": "#### one"},
            "gsm8k/test.jsonl, row 11: what follows '####' in 'answer' is not a number",
        ),
        (
            {"question": "q", "answer": "#### inf"},
            "gsm8k/test.jsonl, row 11: what follows '####' in 'answer' is not finite",
        ),
        ([1], "gsm8k/test.jsonl, row 11: it is not an object"),
    ],
)
def test_bad_rows_are_named(data: Path, row: object, message: str) -> None:
    write_jsonl(data / "gsm8k/test.jsonl", [*(gsm8k_row(i) for i in range(1000, 1010)), row])
    with pytest.raises(UserError) as caught:
        load_task("gsm8k", data)
    assert message in caught.value.line


def test_a_line_that_is_not_json(data: Path) -> None:
    with (data / "gsm8k/train.jsonl").open("a") as file:
        file.write("\n{oops\n")
    with pytest.raises(UserError, match=r"gsm8k/train\.jsonl, line 62: it is not JSON"):
        load_task("gsm8k", data)


def test_an_empty_file_is_named(data: Path) -> None:
    (data / "gsm8k/train.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"gsm8k/train\.jsonl: it holds no row"):
        load_task("gsm8k", data)


def test_a_question_that_occurs_twice(data: Path) -> None:
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(1)])
    with pytest.raises(UserError, match=r"task gsm8k, item gsm8k/\w+: this id occurs 2 times"):
        load_task("gsm8k", data)


def test_the_official_solutions_give_their_own_answers(real_data: Path) -> None:
    task = load_task("gsm8k", real_data)
    items = task.items("validation")
    rows = {}
    for line in (real_data / "gsm8k/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["question"].strip()] = row["answer"]
    outcomes = task.score(items, [rows[item.prompt] for item in items])
    assert all(o.correct for o in outcomes)
