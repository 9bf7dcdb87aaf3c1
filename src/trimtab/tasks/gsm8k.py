"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems whose answer is a number.

Splits: `train.jsonl` is divided by hash into train (9/10) and validation (1/10); `test.jsonl` is the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import ClassVar, Self

from trimtab.runs import text_id
from trimtab.tasks.data_rows import DataDirectory, DataRow, hub_name, hub_splits, is_hub
from trimtab.tasks.task import Item, Outcome, Task, split_items
from trimtab.tasks.tokens import Tokenizer

INSTRUCTION = "Think step by step, then end with the line: #### followed by the answer as a number."
_NUMBER = r"(?:[-−–]?[$€£]\s?|[-−–])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NO_SIGN = re.compile(r"(?<=[\d)])\s*[-−–]\s*(?=[$€£]?\d)|(?<=\w)[-−–](?=[$€£]?\d)")
_FINAL = (
    rf"####\s*({_NUMBER})",
    rf"\\boxed\{{\s*\\?({_NUMBER})",
    rf"(?i:answer(?:\s+is)?)\s*[:=]?\s*(?:\\?[*_$(]+\s*)?({_NUMBER})",
)


class GSM8K(Task):
    """Reward 1 if the last stated answer equals the gold number, else 0."""

    name: ClassVar[str] = "gsm8k"
    max_new_tokens: ClassVar[int] = 512
    files: ClassVar[tuple[str, ...]] = ("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    hub: ClassVar[str | None] = "openai/gsm8k"
    needs_tokenizer: ClassVar[bool] = False
    instructions: ClassVar[tuple[str, ...]] = (
        "Solve the problem step by step, and give the final number at the end.",
        "You are careful with arithmetic. Write down every step.",
    )

    @classmethod
    def load(cls, data: str | None = None, tokenizer: Tokenizer | None = None) -> Self:
        """Read GSM8K.

        Args:
            data: a directory with `gsm8k/train.jsonl` and `gsm8k/test.jsonl`, or `hub[:NAME]`.
            tokenizer: not used.

        Raises:
            UserError: files are missing, a row is malformed, or a question occurs twice.
        """
        assert data is not None
        read: dict[str, list[Item]] = {"train": [], "test": []}
        for part, rows in _parts(data):
            read[part].extend(map(_item, rows))
        divided = split_items(read["train"], {"train": 0.9, "validation": 0.1}, "gsm8k")
        return cls({**divided, "test": read["test"]})

    def prompt(self, item: Item, permutation: int = 0) -> str:
        """The problem and the instruction."""
        return f"{super().prompt(item, permutation)}\n\n{INSTRUCTION}"

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        """The part `stated` is 1 where the answer was marked as such and 0 where the last number was taken."""
        number, stated = read_number(text)
        if number is None:
            return Outcome(reward=0.0, correct=False, malformed=True, parts={"stated": 0.0})
        correct = number == Decimal(item.answer)
        return Outcome(reward=float(correct), correct=correct, answer=str(number), parts={"stated": float(stated)})


def read_number(text: str) -> tuple[Decimal | None, bool]:
    """The number that a text ends with, and whether it was marked as the answer.

    The last number behind `####`, else the last in `\\boxed{}`, else the last behind `answer is` or `answer:`, else the
    last number of all. Thousands separators, a currency sign and whatever unit follows are left out.
    """
    for pattern in _FINAL:
        if found := re.findall(pattern, text):
            return _decimal(found[-1]), True
    # A minus between two numbers, or a hyphen behind a letter, is no sign.
    found = re.findall(rf"(?<![\w.])(?:{_NUMBER})", _NO_SIGN.sub(" ", text))
    return (_decimal(found[-1]) if found else None), False


def _decimal(text: str) -> Decimal | None:
    plain = re.sub(r"[,\s$€£]", "", text).replace("−", "-").replace("–", "-")
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None


def _parts(data: str) -> Iterator[tuple[str, Iterator[DataRow]]]:
    if is_hub(data):
        for split, rows in hub_splits(hub_name(data, GSM8K.hub, GSM8K.name), "main"):
            if split in ("train", "test"):
                yield split, rows
        return
    directory = DataDirectory(data)
    for part in ("train", "test"):
        yield part, directory.jsonl(directory.files(f"gsm8k/{part}.jsonl")[0])


def _item(row: DataRow) -> Item:
    question, solution = row.text("question").strip(), row.text("answer")
    before, mark, gold = solution.rpartition("####")
    if not mark:
        raise row.bad("'answer' has no line '#### NUMBER'")
    try:
        number = Decimal(gold.strip().replace(",", ""))
    except InvalidOperation:
        raise row.bad("what follows '####' in 'answer' is not a number") from None
    if not number.is_finite():
        raise row.bad("what follows '####' in 'answer' is not finite")
    return Item(id=f"gsm8k/{text_id(question)}", prompt=question, answer=str(number), meta={"solution": before.strip()})
