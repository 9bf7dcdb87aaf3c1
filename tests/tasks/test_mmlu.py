"""MMLU: reading, letters, cyclic orders, few-shot prompts, accuracy by subject, bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import mmlu_rows, word_tokenizer, write_csv

from trimtab.errors import UserError
from trimtab.tasks import Item, known_under_every_order, load_task
from trimtab.tasks.multiple_choice import read_letter

OPTIONS = ("red", "blue", "green", "blue green")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" B", 1),
        ("B.", 1),
        ("(C) green", 2),
        ("**D**", 3),
        ("A\nBecause", 0),
        ("The answer is C.", 2),
        ("the correct option is (B)", 1),
        ("Answer: D, clearly", 3),
        ("blue", 1),
        ("Blue.", 1),
        ("blue green", 3),
        ("red, I think", 0),
        ("B: blue", 1),
        ("E", None),
        ("A bird in the hand", None),
        ("The answer is A or the answer is B", None),
        ("The answer is Z", None),
        ("", None),
        ("Bluegreen", None),
        ("I don't know", None),
        ("blue green or blue", None),
    ],
)
def test_letters_are_read(text: str, place: int | None) -> None:
    assert read_letter(text, OPTIONS) == place


def test_blue_before_blue_green() -> None:
    """An option that begins with another: only a whole answer can tell them apart."""
    assert read_letter("blue green", OPTIONS) == 3
    assert read_letter("green it is", OPTIONS) == 2


def test_the_prompt_is_exactly_this(data: Path) -> None:
    item = Item(id="x", prompt="Which?", answer="C", options=("w", "x", "y", "z"), group="college_physics")
    task = load_task("mmlu", data)
    assert task.prompt(item, 1) == (
        "The following is a multiple choice question about college physics.\n\n"
        "Which?\nA. x\nB. y\nC. z\nD. w\n\n"
        "Answer with the letter of the correct option only.\nAnswer:"
    )


def test_every_order_has_its_own_right_letter(data: Path) -> None:
    task = load_task("mmlu", data)
    item = Item(id="x", prompt="Which?", answer="C", options=("w", "x", "y", "z"), group="anatomy")
    assert task.orders(item) == 4
    for permutation, letter in enumerate("CBAD"):
        right = task.parse(item, letter, permutation)
        assert right.correct is True
        assert right.reward == 1.0
        assert right.answer == "C"
        assert right.parts["shown"] == "ABCD".index(letter)
        shown = task.prompt(item, permutation).split("\n")
        assert f"{letter}. y" in shown
    always_a = [task.score([item], ["A"], permutation) for permutation in range(4)]
    assert [o.correct for (o,) in always_a] == [False, False, True, False]
    assert known_under_every_order(always_a) == [False]
    assert known_under_every_order([task.score([item], [a], p) for p, a in enumerate("CBAD")]) == [True]


def test_option_tokens_are_letters_as_the_model_writes_them(data: Path) -> None:
    tokenizer = word_tokenizer()
    task = load_task("mmlu", data)
    item = task.items("test")[0]
    assert task.option_tokens(item, tokenizer) == tuple(tokenizer(letter)[0] for letter in "ABCD")
    assert task.option_tokens(item, tokenizer, "Answer:") == tuple(tokenizer(f" {letter}")[0] for letter in "ABCD")


class ChatTokenizer:
    """One token per word with its leading blank, and a chat template of one of two kinds, or none."""

    def __init__(self, opening: str, blank: str = "") -> None:
        self.opening, self.blank = opening, blank
        self.chat_template = opening or None
        self.pieces = word_tokenizer()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.pieces(text)

    def apply_chat_template(
        self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = f"<u>{turns[0]['content']}"
        if len(turns) > 1 or add_generation_prompt:
            text += self.opening
        return text + (f"{self.blank}{turns[1]['content']}<e>" if len(turns) > 1 else "")


@pytest.mark.parametrize(
    ("opening", "blank", "written"),
    [("<m>assistant\n", "", "A"), ("<m>", "", "A"), ("[/INST]", " ", " A"), ("", "", " A")],
)
def test_the_chat_template_says_how_an_answer_begins(data: Path, opening: str, blank: str, written: str) -> None:
    """Without a template the answer stands behind `Answer:`, with a blank."""
    tokenizer = ChatTokenizer(opening, blank)
    task = load_task("mmlu", data)
    assert task.option_tokens(task.items("test")[0], tokenizer)[0] == tokenizer.pieces(written)[0]


def test_the_logit_difference_follows_the_order(data: Path) -> None:
    task = load_task("mmlu", data)
    item = Item(id="x", prompt="Which?", answer="C", options=("w", "x", "y", "z"), group="anatomy")
    logp = [[-1.0, -2.0, -4.0, -8.0]]
    assert task.score([item], ["A"], 0, logp)[0].parts["logit_difference"] == -3.0
    assert task.score([item], ["A"], 2, logp)[0].parts["logit_difference"] == 1.0


def test_few_shot_examples_come_from_dev(data: Path) -> None:
    task = load_task("mmlu", data, shots=2)
    item = next(i for i in task.items("test") if i.group == "anatomy")
    blocks = task.prompt(item).split("\n\n")
    assert blocks[0] == "The following are multiple choice questions (with answers) about anatomy."
    assert (
        blocks[1] == "In anatomy, what is dev question 0?\nA. first 0\nB. second 0\nC. third 0\nD. fourth 0\nAnswer: A"
    )
    assert blocks[2].endswith("Answer: B")
    assert blocks[3].startswith(item.prompt)
    assert not any(i.meta["part"] == "dev" for i in task.items("all"))


def test_val_questions_that_are_in_test_are_left_out(data: Path) -> None:
    rows = mmlu_rows("anatomy", "test", 8)
    write_csv(data / "mmlu/val/anatomy_val.csv", [*mmlu_rows("anatomy", "val", 12), rows[3], rows[4]])
    task = load_task("mmlu", data)
    assert task.notes == {"val_questions_also_in_test_dropped": 2.0}
    assert len(task.items("train")) + len(task.items("validation")) == 24


def test_repeated_questions_stay_in_one_split_under_different_ids(data: Path) -> None:
    rows = mmlu_rows("anatomy", "val", 12)
    write_csv(data / "mmlu/val/anatomy_val.csv", [*rows, *rows])
    task = load_task("mmlu", data)
    for split in ("train", "validation"):
        ids = [i.id for i in task.items(split) if i.group == "anatomy"]
        assert {i.removesuffix(".2") for i in ids} == {i for i in ids if not i.endswith(".2")}
        assert len(ids) % 2 == 0


def test_accuracy_by_subject(data: Path) -> None:
    task = load_task("mmlu", data)
    items = [i for i in task.items("test") if i.group == "anatomy"][:3]
    items += [i for i in task.items("test") if i.group == "college_physics"][:1]
    texts = [items[0].answer, "what?", "E", items[3].answer]
    summary = task.summarise(task.score(items, texts))
    assert summary["accuracy"] == 2 / 4
    assert summary["malformed"] == 2 / 4
    assert summary["accuracy_well_formed"] == 1.0
    assert summary["accuracy/anatomy"] == pytest.approx(1 / 3)
    assert summary["accuracy/college_physics"] == 1.0
    assert summary["accuracy_macro"] == pytest.approx((1 / 3 + 1) / 2)


def test_subjects_can_be_chosen(data: Path) -> None:
    assert {i.group for i in load_task("mmlu", data, subjects=["anatomy"]).items("all")} == {"anatomy"}
    with pytest.raises(UserError, match="subject 'botany': MMLU's files here have none of that name"):
        load_task("mmlu", data, subjects=["botany"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["q", "a", "b", "c", "A"], "mmlu/test/anatomy_test.csv, row 9: it has 5 fields, not 6"),
        (["q", "a", "b", "c", "d", "E"], "mmlu/test/anatomy_test.csv, row 9: 'answer' is 'E', not one of A, B, C, D"),
        (["", "a", "b", "c", "d", "A"], "mmlu/test/anatomy_test.csv, row 9: 'question' is empty"),
        (["q", "a", " ", "c", "d", "A"], "mmlu/test/anatomy_test.csv, row 9: 'B' is empty"),
    ],
)
def test_bad_rows_are_named(data: Path, row: list[str], message: str) -> None:
    write_csv(data / "mmlu/test/anatomy_test.csv", [*mmlu_rows("anatomy", "test", 8), row])
    with pytest.raises(UserError) as caught:
        load_task("mmlu", data)
    assert message in caught.value.line


def test_bad_files_are_named(data: Path) -> None:
    file = data / "mmlu/test/anatomy_test.csv"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mmlu/test/anatomy_test\.csv: it is UTF-16; convert it"):
        load_task("mmlu", data)
    file.write_bytes(b"\xff,a\n")
    with pytest.raises(UserError, match=r"mmlu/test/anatomy_test\.csv: byte 0 \(0xff\) is not UTF-8"):
        load_task("mmlu", data)
    file.write_text('"never closed,a,b\n')
    with pytest.raises(UserError, match=r"mmlu/test/anatomy_test\.csv, line 1: it is not CSV"):
        load_task("mmlu", data)


@pytest.mark.parametrize("part", ["dev", "val", "test"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files_are_named(data: Path, part: str, content: str) -> None:
    (data / f"mmlu/{part}/anatomy_{part}.csv").write_text(content)
    with pytest.raises(UserError, match=rf"mmlu/{part}/anatomy_{part}\.csv: it holds no row; put the benchmark's file"):
        load_task("mmlu", data)


def test_shots_need_examples(data: Path) -> None:
    with pytest.raises(UserError, match="shots = 6: MMLU has 5 examples"):
        load_task("mmlu", data, shots=6)
    write_csv(data / "mmlu/dev/anatomy_dev.csv", mmlu_rows("anatomy", "dev", 2))
    with pytest.raises(UserError, match="shots = 3: subject anatomy has fewer examples in dev"):
        load_task("mmlu", data, shots=3)
    for file in (data / "mmlu/dev").iterdir():
        file.unlink()
    assert load_task("mmlu", data).items("test")
    with pytest.raises(UserError, match=r"there is no file mmlu/dev/\*_dev\.csv"):
        load_task("mmlu", data, shots=1)


def test_the_official_files(real_data: Path) -> None:
    task = load_task("mmlu", real_data)
    val = sum(1 for split in ("train", "validation") for _ in task.items(split))
    assert val + task.notes["val_questions_also_in_test_dropped"] == 1531
    assert len({item.group for item in task.items("train")}) == 57
