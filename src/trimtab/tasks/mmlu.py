"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): 57 subjects, four options, accuracy by subject.

Splits: `dev` gives the examples of few-shot prompts and nothing else; `val` is divided by hash into train (2/3) and
validation (1/3), a question that occurs again in `test` being left out; `test` is the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Self

from trimtab.errors import UserError
from trimtab.runs import text_id
from trimtab.tasks.data_rows import DataDirectory, DataRow, hub_name, hub_splits, is_hub
from trimtab.tasks.multiple_choice import LETTERS, MultipleChoice, question_block
from trimtab.tasks.task import Item, Outcome, accuracy_by_group, check_groups, mean, split_items
from trimtab.tasks.tokens import Tokenizer

_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_HUB_SPLITS = {"dev": "dev", "validation": "val", "test": "test"}


class MMLU(MultipleChoice):
    """`metric` is the share of right answers over questions (micro); `accuracy_macro` is the mean over subjects."""

    name: ClassVar[str] = "mmlu"
    files: ClassVar[tuple[str, ...]] = ("mmlu/dev/*_dev.csv", "mmlu/val/*_val.csv", "mmlu/test/*_test.csv")
    hub: ClassVar[str | None] = "cais/mmlu"
    needs_tokenizer: ClassVar[bool] = False
    instructions: ClassVar[tuple[str, ...]] = (
        "You are an expert in the subject of this question. Choose the correct option.",
        "Consider every option, then give the letter of the one that is right.",
        "This is an exam. Only the letter of the right option counts.",
    )

    def __init__(
        self,
        items: Mapping[str, Iterable[Item]],
        *,
        notes: Mapping[str, float] | None = None,
        examples: Mapping[str, Sequence[Item]] | None = None,
        shots: int = 0,
    ) -> None:
        super().__init__(items, notes=notes)
        self._examples = dict(examples or {})
        self._shots = shots

    @classmethod
    def load(
        cls,
        data: str | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        shots: int = 0,
        subjects: Sequence[str] | None = None,
    ) -> Self:
        """Read MMLU.

        Args:
            data: a directory with `mmlu/{dev,val,test}/SUBJECT_{dev,val,test}.csv`, or `hub[:NAME]`.
            tokenizer: not used.
            shots: examples of the same subject before each question, 0 to 5, in `dev`'s order.
            subjects: take only these.

        Raises:
            UserError: files are missing, a row is malformed, or there are fewer examples than `shots`.
        """
        assert data is not None
        if not 0 <= shots <= 5:
            raise UserError(f"shots = {shots}", "MMLU has 5 examples for each subject", "choose 0 to 5")
        read = {"dev": [], "val": [], "test": []} | _read(data, shots)
        if subjects is not None:
            check_groups("subject", subjects, itertools.chain(*read.values()), "MMLU")
            read = {part: [item for item in items if item.group in subjects] for part, items in read.items()}
        tested = {item.meta["content"] for item in read["test"]}
        kept = [item for item in read["val"] if item.meta["content"] not in tested]
        divided = split_items(kept, {"train": 2 / 3, "validation": 1 / 3}, "mmlu", key=lambda i: i.meta["content"])
        examples: dict[str, list[Item]] = {}
        for item in read["dev"]:
            examples.setdefault(item.group, []).append(item)
        for item in (*kept, *read["test"]):
            if len(examples.get(item.group, ())) < shots:
                raise UserError(f"shots = {shots}", f"subject {item.group} has fewer examples in dev", "lower shots")
        notes = {"val_questions_also_in_test_dropped": float(len(read["val"]) - len(kept))}
        return cls({**divided, "test": read["test"]}, notes=notes, examples=examples, shots=shots)

    def prompt(self, item: Item, permutation: int = 0) -> str:
        """The subject, examples if asked for, the question, its options and the instruction."""
        text = super().prompt(item, permutation)
        subject = item.group.replace("_", " ")
        blocks = [f"The following is a multiple choice question about {subject}."]
        if self._shots:
            blocks = [f"The following are multiple choice questions (with answers) about {subject}."]
            blocks += [f"{question_block(e)}\nAnswer: {e.answer}" for e in self._examples[item.group][: self._shots]]
        return "\n\n".join([*blocks, text])

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Adds `accuracy_macro` and `accuracy/SUBJECT`."""
        summary = super().summarise(outcomes)
        subjects = accuracy_by_group(outcomes)
        return summary | {"accuracy_macro": mean(subjects.values())} | subjects


def _read(data: str, shots: int) -> dict[str, list[Item]]:
    read: dict[str, list[Item]] = {}
    for part, rows in _hub_parts(data) if is_hub(data) else _directory_parts(DataDirectory(data), shots):
        seen: dict[str, int] = {}
        read.setdefault(part, []).extend(_item(row, subject, part, seen) for subject, row in rows)
    return read


def _directory_parts(directory: DataDirectory, shots: int) -> Iterator[tuple[str, Iterator[tuple[str, DataRow]]]]:
    for part in ("dev", "val", "test"):
        if part == "dev" and not shots and not list(directory.path.glob("mmlu/dev/*_dev.csv")):
            continue
        files = directory.files(f"mmlu/{part}/*_{part}.csv")
        rows = ((file.stem.removesuffix(f"_{part}"), row) for file in files for row in directory.csv(file, _COLUMNS))
        yield part, rows


def _hub_parts(data: str) -> Iterator[tuple[str, Iterator[tuple[str, DataRow]]]]:
    for split, rows in hub_splits(hub_name(data, MMLU.hub, MMLU.name), "all"):
        if split in _HUB_SPLITS:
            yield _HUB_SPLITS[split], ((row.text("subject"), _lettered(row)) for row in rows)


def _lettered(row: DataRow) -> DataRow:
    """A hub row (`choices`, and `answer` as a number) with the columns of the official files."""
    choices = row.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        raise row.bad("'choices' is not a list of four")
    letter = LETTERS[row.number("answer", 4)]
    return DataRow(dict(zip(_COLUMNS, (row.text("question"), *choices, letter), strict=True)), row.where)


def _item(row: DataRow, subject: str, part: str, seen: dict[str, int]) -> Item:
    """An item whose id is made from subject, question and options; repeated questions get `.2`, `.3`, …"""
    question = row.text("question").strip()
    options = tuple(row.text(letter).strip() for letter in "ABCD")
    content = text_id("|".join((question, *options)))
    id_ = f"{subject}/{content}"
    seen[id_] = seen.get(id_, 0) + 1
    if seen[id_] > 1:
        id_ = f"{id_}.{seen[id_]}"
    return Item(
        id=id_, prompt=question, answer=row.choice("answer", tuple("ABCD")), options=options, group=subject,
        meta={"part": part, "content": content},
    )  # fmt: skip
