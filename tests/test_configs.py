"""The flags of every command with help and defaults, and what a run keeps of its config, as they were recorded.

A run resumes only under the config that it was begun with, and a default directory is named after its config, so no
key or default may change by accident. `python tests/test_configs.py` records them anew after a change that is meant.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.runs import config_dict

RECORDED = Path(__file__).with_suffix(".json")
GIVEN: dict[str, dict[str, Any]] = {
    "models list": {},
    "models pull": {"name": "a"},
    "models show": {"name": "a"},
    "harvest": {"text": ("a",), "run": Path("a")},
    "train": {},
    "rank": {},
    "examples": {},
    "feature": {"feature": ("1",)},
    "autointerp": {},
    "find": {"want": "a"},
    "steer": {},
    "steering show": {"steering": Path("a")},
    "steering export": {"steering": Path("a"), "file": Path("b.gguf")},
    "steering import": {"file": Path("b.gguf"), "steering": Path("a")},
    "evaluate core": {},
    "evaluate circuit": {},
    "evaluate judge": {"labelled": Path("a")},
    "evaluate ioi": {"circuit": Path("a")},
    "evaluate ground-truth": {},
    "study ioi": {},
    "sae info": {"sae": "a"},
    "sae stats": {"sae": "a"},
    "sae convert": {"source": "a", "destination": Path("a")},
    "demo": {},
    "flags train": {"concepts": Path("a"), "data": (Path("a"),)},
    "flags evaluate": {"trained": (Path("a"),)},
    "policy headroom": {"task": "a"},
    "policy train": {"task": "a"},
    "policy evaluate": {"policy": (Path("a"),)},
    "policy steer": {"policy": Path("a")},
    "policy analyze": {"run": (Path("a"),)},
    "policy compare": {"run": (Path("a"),)},
    "flags import": {"text": ("a",), "concepts": Path("a"), "run": Path("a")},
    "flags data": {"concepts": Path("a"), "run": Path("a")},
    "flags steer": {"model": "a"},
    "flags judge": {"judge_data": Path("a"), "concepts": Path("a")},
    "report": {"run": Path("a")},
}
"""Values without which a command's config cannot be made."""


def flags(command: str) -> dict[str, str]:
    """What `--help` says of each flag, by the flag with its values."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    found: dict[str, str] = {}
    flag = ""
    for line in said.getvalue().splitlines():
        if re.match(r"  (-h|--[a-z]|[A-Z]+ )", line):
            flag, *rest = re.split(r" {2,}", line.strip(), maxsplit=1)
            found[flag] = " ".join(rest)
        elif flag and line.startswith("     "):
            found[flag] = f"{found[flag]} {line.strip()}".strip()
        else:
            flag = ""
    return found


def configs() -> dict[str, Any]:
    """What runs keep of configs in which nothing else is given, and where they lie by default."""
    from trimtab.training import BankConfig, TrainTextConfig, expand

    found = {command: cli.COMMANDS[command]().config(**given) for command, given in GIVEN.items()}
    text = TrainTextConfig(text=("a",))
    bank = BankConfig(text=("a",), members=tuple(expand({"l0": [8.0, 16.0]})))
    plain = {command: config_dict(config) for command, config in found.items()}
    plain |= {
        "train, one": config_dict(text),
        "train, bank": bank.shared(),
        "member": config_dict(bank.members[0].config),
    }
    placed = {"rank": found["rank"], "policy train": found["policy train"], "train, one": text, "train, bank": bank}
    return {"kept": plain, "directories": {name: str(config.directory()) for name, config in placed.items()}}


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_flags_are_those_recorded(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "129")
    assert flags(command) == recorded()["flags"][command]


def test_runs_keep_what_was_recorded() -> None:
    found = configs()
    assert found["kept"] == recorded()["kept"]
    assert found["directories"] == recorded()["directories"]


if __name__ == "__main__":
    os.environ["COLUMNS"] = "129"
    everything = {"flags": {command: flags(command) for command in cli.COMMANDS}, **configs()}
    RECORDED.write_text(json.dumps(everything, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
