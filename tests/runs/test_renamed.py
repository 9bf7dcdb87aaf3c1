"""Old names of fields: refused as options, understood in runs that hold them, and none of them still in use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.errors import UserError
from trimtab.runs import LEFT_OUT_AT_DEFAULT, Run, field_types, read_record
from trimtab.runs.renamed import RENAMED

NAMES = [(command, old, new) for command, names in RENAMED.items() for old, new in names.items()]


def names(config: type[Any], within: str = "") -> set[str]:
    """Of a config's fields, and of its parts' fields behind the part's name."""
    found: set[str] = set()
    for name, kind in field_types(config).items():
        found |= {within + name} | (names(kind, f"{name}.") if dataclasses.is_dataclass(kind) else set())
    return found


@pytest.mark.parametrize(("command", "old", "new"), NAMES)
def test_an_old_name_is_refused_in_one_line_that_says_the_new_one(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = names(cli.COMMANDS[command]().config)
    assert new in fields
    if old in fields:  # `policy evaluate` calls by it what was called --out
        assert old in RENAMED[command].values()
        return
    for words in ([f"--{old.replace('_', '-')}", "1"], [f"--{old.replace('_', '-')}=1"]):
        assert cli.main([*command.split(), *words]) == 2
        was, now = old.replace("_", "-"), new.replace("_", "-")
        assert capsys.readouterr().err == f"trimtab: error: --{was}: it has another name now; write --{now}\n"


@pytest.mark.parametrize("word", ["--write-stats", "--write-stats=True", "--no-write-stats"])
def test_an_option_that_is_a_command_now_names_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "core", word]) == 2
    said = f"{word.partition('=')[0]}: a command of its own does that now; run trimtab sae stats"
    assert capsys.readouterr().err == f"trimtab: error: {said}\n"
    assert "sae stats" in cli.COMMANDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedConfig:
    dose: float | None = 5.0
    feature: tuple[int, ...] = (1, 2)


def test_a_run_under_old_names_is_read_and_resumed(tmp_path: Path) -> None:
    with Run.open(tmp_path, "rank", {"alpha": 5.0, "features": [1, 2]}) as run:
        run.finish({"done": True})
    record: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    assert record["config"] == {"alpha": 5.0, "features": [1, 2]}
    assert read_record(tmp_path)["config"] == {"dose": 5.0, "feature": [1, 2]}
    with Run.open(tmp_path, "rank", RankedConfig()) as run:
        assert run.done
    with pytest.raises(UserError, match=r"dose was 5\.0 and is now 4\.0"):
        Run.open(tmp_path, "rank", RankedConfig(dose=4.0))
    record["command"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_record(tmp_path)["config"] == {"alpha": 5.0, "features": [1, 2]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    precision: str = dataclasses.field(default="auto", metadata=LEFT_OUT_AT_DEFAULT)


@pytest.mark.parametrize(("old", "new"), [(None, "auto"), ("float32", "fp32"), ("bfloat16", "bf16")])
def test_a_run_under_old_names_of_values_is_resumed(old: str | None, new: str, tmp_path: Path) -> None:
    with Run.open(tmp_path, "train", {"encoder_dtype": old}):
        pass
    with Run.open(tmp_path, "train", TrainedConfig(precision=new)) as run:
        assert run.resumed
    with pytest.raises(UserError, match=r"precision was .* and is now"):
        Run.open(tmp_path, "train", TrainedConfig(precision="tf32"))


def test_a_part_under_old_names_is_read(tmp_path: Path) -> None:
    with Run.open(tmp_path, "policy train", {"repeats": 4, "ppo": {"type": "PPOConfig", "learning_rate": 0.1}}):
        pass
    assert read_record(tmp_path)["config"] == {"samples": 4, "ppo": {"type": "PPOConfig", "lr": 0.1}}
