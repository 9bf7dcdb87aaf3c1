"""Each item's outcome under each arm, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from trimtab.control.comparison import Compared
from trimtab.control.replicates import Replicate
from trimtab.runs import write_table

ITEM_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("arm", pa.string()),
        ("run", pa.string()),  # empty for an arm that no training changes
        ("seed", pa.int64()),
        ("draw", pa.int64()),
        ("item", pa.string()),
        ("group", pa.string()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("malformed", pa.bool_()),
        ("answer", pa.string()),  # what the task read from the text, such as a letter or "refusal"
        ("text", pa.string()),  # null for tasks that hide their texts, unless they are kept
        ("kl", pa.float64()),
    ]
)


def item_rows(compared: Compared, replicates: Sequence[Replicate], *, keep_texts: bool = False) -> list[dict[str, Any]]:
    """A row for each arm, training, draw and item; texts of a task that hides them only if they are to be kept."""
    task = compared.items[0].prompts.task
    hidden = task.hides_text and not keep_texts
    rows = []
    for one in compared.answered:
        shared = len(one.runs) < len(replicates)
        for replicate, run in zip(replicates, one.runs, strict=False):
            for draw, answers in enumerate(run):
                for j, outcome in enumerate(answers.outcomes):
                    rows.append(
                        {
                            "task": task.name,
                            "split": compared.result.split,
                            "arm": one.arm.label,
                            "run": "" if shared else replicate.name,
                            "seed": None if shared else replicate.setting.seed,
                            "draw": draw,
                            "item": outcome.item,
                            "group": outcome.group,
                            "reward": float(outcome.reward),
                            "correct": outcome.correct,
                            "malformed": outcome.malformed,
                            "answer": outcome.answer,
                            "text": None if hidden or answers.decoded is None else answers.decoded.texts[j],
                            "kl": None if answers.kl is None else float(answers.kl[j]),
                        }
                    )
    return rows


def write_item_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of items as a Parquet table."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=ITEM_SCHEMA))
