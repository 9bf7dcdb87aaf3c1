"""Hub data sets through a stand-in for `datasets`: the same items as from the official files."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import bbq_row, gsm8k_row, harmbench_rows, mmlu_rows, xstest_rows

from trimtab.errors import UserError
from trimtab.tasks import load_task

Load = Callable[..., dict[str, list[dict[str, Any]]]]


def serve(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def prompts(task: Any, split: str) -> list[str]:
    return sorted(task.prompt(item) for item in task.items(split))


def test_mmlu(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def load(name: str, config: str) -> dict[str, list[dict[str, Any]]]:
        assert (name, config) == ("cais/mmlu", "all")
        splits = {}
        for hub, part, n in (("dev", "dev", 5), ("validation", "val", 12), ("test", "test", 8)):
            splits[hub] = [
                {"question": row[0], "subject": subject, "choices": row[1:5], "answer": "ABCD".index(row[5])}
                for subject in ("anatomy", "college_physics")
                for row in mmlu_rows(subject, part, n)
            ]
        return {**splits, "auxiliary_train": []}

    serve(monkeypatch, load)
    hub, files = load_task("mmlu", "hub", shots=1), load_task("mmlu", data, shots=1)
    assert hub.splits == files.splits
    assert prompts(hub, "train") == prompts(files, "train")
    assert {i.id: i.answer for i in hub.items("all")} == {i.id: i.answer for i in files.items("all")}


def test_gsm8k(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    rows = {"train": [gsm8k_row(i) for i in range(1, 61)], "test": [gsm8k_row(i) for i in range(1000, 1010)]}
    serve(monkeypatch, lambda name, config: rows if (name, config) == ("openai/gsm8k", "main") else {})
    assert load_task("gsm8k", "hub:openai/gsm8k").splits == load_task("gsm8k", data).splits


def test_bbq(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for q in range(12):
        row = bbq_row(q, q, "ambig", "neg")
        row["answer_label"] = row.pop("label")
        rows.append(row)
    serve(monkeypatch, lambda name: {"age": rows})
    task = load_task("bbq-ambiguous", "hub")
    assert len(task.items("all")) == 12
    assert {i.answer for i in task.items("all")} == {"C"}


def test_xstest(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    header, *rows = xstest_rows(16)
    serve(monkeypatch, lambda name: {"train": [dict(zip(header, row, strict=True)) for row in rows]})
    assert load_task("xstest", "hub").splits == load_task("xstest", data).splits


def test_harmbench_gives_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str) -> dict[str, list[dict[str, Any]]]:
        rows = [dict(zip(harmbench_rows(6)[0], row, strict=True)) for row in harmbench_rows(6)[1:]]
        return {
            "train": [
                {"prompt": r["Behavior"], "context": r["ContextString"] or None}
                for r in rows
                if r["FunctionalCategory"] == config
            ]
        }

    serve(monkeypatch, load)
    task = load_task("harmbench", "hub")
    assert len(task.items("test")) == 6
    with pytest.raises(
        UserError, match="split 'train' of task harmbench: nothing is in it; load the task with more data"
    ):
        task.items("train")
    with pytest.raises(UserError, match="from the hub only the test is read"):
        load_task("harmbench", "hub", harmless=1)


def test_a_bad_hub_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"question": "q", "subject": "s", "choices": ["a", "b"], "answer": 0}
    serve(monkeypatch, lambda name, config: {"test": [bad]})
    with pytest.raises(UserError, match="hub:cais/mmlu test, row 1: 'choices' is not a list of four"):
        load_task("mmlu", "hub")
    bad.update(choices=list("abcd"), answer=4)
    with pytest.raises(UserError, match="hub:cais/mmlu test, row 1: 'answer' is 4, out of the range 0 to 3"):
        load_task("mmlu", "hub")


def test_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, config: str | None = None) -> dict[str, list[dict[str, Any]]]:
        raise OSError("no such data set")

    serve(monkeypatch, fail)
    with pytest.raises(UserError, match=r"data hub:a/b: it could not be read \(no such data set\)"):
        load_task("gsm8k", "hub:a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs `datasets`; install it: pip install 'trimtab\[hub\]'"):
        load_task("gsm8k", "hub")


def test_items_can_be_written_down(data: Path) -> None:
    """Every item's fields are plain, so that a run can record them."""
    for name in ("mmlu", "bbq-ambiguous", "gsm8k", "xstest", "harmbench"):
        for item in load_task(name, data).items("all"):
            json.dumps({"id": item.id, "options": item.options, "meta": dict(item.meta)})
