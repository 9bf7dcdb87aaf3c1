"""The examples of docs/flags.md run, one after the other, on a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_corpus import toy_examples

from trimtab.lm import LanguageModel


def labelled_lines() -> list[str]:
    """For a judge: texts of sailors, of soldiers, and of neither."""
    rng = np.random.default_rng(0)
    words = {"sea": "sailors harbour ship tide", "war": "soldiers trench battle siege", "": "paper window table garden"}
    found: list[str] = []
    for i in range(120):
        name = tuple(words)[i % 3]
        said = rng.permutation(
            [*rng.choice(words[name].split(), 3), *["the", "was", "and", "in", "a", "they", "had", "left"]]
        )
        text = f"{' '.join(said)} {i}."
        found.append(json.dumps({"prompt": "Go", "response": text, "concepts": [name] if name else []}))
    return found


def test_the_page_runs(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(asdict(example)) for example in toy_examples(48)]
    Path("examples.jsonl").write_text("\n".join(lines))
    Path("judge.jsonl").write_text("\n".join(labelled_lines()))
    page = (Path(__file__).parents[2] / "docs" / "flags.md").read_text(encoding="utf-8")
    page = page.replace("steps=400", "steps=40, lr=3e-3")
    page = page.replace(
        "max_new_tokens=16)",
        "max_new_tokens=3, neutral=[*'abcdefghijkl'], validation_prompts=4, dose=(0.5,), equal_kl=False)",
    )
    known: dict[str, Any] = {"model": tiny_llama, "original": tiny_llama, "more_examples": toy_examples(90, seed=7)}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(code, "flags.md", "exec"), known)
    said = capsys.readouterr().out
    assert "judge of 2 concepts: accuracy" in said
    assert "[[ True False]]" in said
    assert "2 flags in 8 dimensions, curriculum forced, 40 steps" in said
    assert " True\n" in said
    assert "Whether reliance emerges without forcing is not known: there is no auxiliary run" in said
    assert said.rstrip().split("\n")[-1].startswith("concept rate with the flag on minus off: ")
    assert known["own"].result.curriculum == "own"
    assert known["ids"].shape[1] > 20
    assert known["flags"] == known["trained"].flags
