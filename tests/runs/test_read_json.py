"""Reading back what `write_json` wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.runs import read_json, write_json


def test_what_was_written_is_read_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, 2.5]})
    assert read_json(path) == {"a": [1, 2.5]}
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"found.json: it is not JSON; write it again with the command that made it"):
        read_json(path)
