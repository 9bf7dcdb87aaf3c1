"""Files that list concepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.flags import read_concepts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "sea: the sea, ships\n\n# a comment\nwar\n  # of armies\nC#: programming\n",
            {"sea": "the sea, ships", "war": "war", "C#": "programming"},
        ),
    ],
)
def test_reads_lines(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    path = tmp_path / "concepts"
    path.write_text(text, encoding="utf-8")
    assert list(read_concepts(path).items()) == list(found.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "it names no concept"),
        ("sea\nwar\nsea\n", "'sea': it is named twice"),
        (": no name\n", "it is empty or no text; give it a name"),
    ],
)
def test_refuses_what_is_no_list_of_concepts(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "concepts"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_concepts(path)
