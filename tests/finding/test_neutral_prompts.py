"""Neutral prompts: those that ship are apart, and files of one's own are refused in a line where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.finding.neutral import read_neutral_prompts


def test_shipped_prompts_are_apart() -> None:
    prompts = read_neutral_prompts(None)
    assert (len(prompts["validation"]), len(prompts["held_out"])) == (24, 48)
    assert not set(prompts["validation"]) & set(prompts["held_out"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as two lists of prompts"),
        ('{"validation": ["a"]}', "not readable as two lists of prompts"),
        ('{"validation": ["a"], "held_out": []}', "held_out must be a list of texts"),
        ('{"validation": ["a", "b"], "held_out": ["b"]}', "prompt 'b': it occurs twice"),
        ('{"validation": ["a", "b"], "held_out": ["c"]}', "held_out has one text"),
    ],
)
def test_bad_prompts_say_so(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_neutral_prompts(tmp_path / "prompts.json")
