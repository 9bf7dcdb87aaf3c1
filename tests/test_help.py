"""What `--help` shows: the options that everybody needs first, headings, an example, whole sentences, no `{None}`."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.cli.options import parse


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "129")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    return capsys.readouterr().out


def headings(shown: str) -> dict[str, list[str]]:
    """The options under each heading of a help, in order."""
    found: dict[str, list[str]] = {"": []}
    for line in shown.splitlines():
        if heading := re.match(r"\W*([a-z-]+ )?options\b", line):
            found[(heading[1] or "").strip()] = options = []
        elif option := re.match(r"\W*--([a-z][a-z0-9.-]*)", line):
            options.append(option[1])
    return found


def test_help_of_training_begins_with_what_everybody_needs(capsys, monkeypatch):
    shown = headings(help_of("train", capsys, monkeypatch))
    first = ["model", "text", "activations", "site", "arch", "n-features", "l0", "k", "rows", "run", "json"]
    assert shown[""] == first
    assert list(shown) == ["", "train", "rows", "text", "model", "recipe", "architecture"]
    assert shown["text"] == ["text-field", "normalise", "document-characters", "bad-records", "limit-tokens"]
    assert {"penalty", "k-aux", "p-end"} <= set(shown["architecture"])


def test_options_of_a_part_stand_under_its_name_in_every_command(capsys, monkeypatch):
    for command in ("rank", "steer", "evaluate core"):
        assert headings(help_of(command, capsys, monkeypatch))["model"] == ["dtype", "device", "allow", "any-model"]
    policy = headings(help_of("policy train", capsys, monkeypatch))
    assert policy["task"][:2] == ["data", "task-option"]
    assert policy["ppo"][0] == "ppo.lr"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_an_example_that_can_be_given(command, capsys, monkeypatch):
    job = cli.COMMANDS[command]()
    shown = help_of(command, capsys, monkeypatch)
    monkeypatch.setattr("trimtab.dictionaries.files.trained_on", lambda sae: "a-model")
    assert f"\n  trimtab {command} {job.example}".rstrip() in shown
    as_json, config = parse(command, job, shlex.split(job.example))
    assert isinstance(config, job.config)
    assert not as_json


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_help_says_none(command, capsys, monkeypatch):
    shown = " ".join(help_of(command, capsys, monkeypatch).split())
    assert not re.search(r"\{None|default: None\)|default: *\)|None\}", shown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig:
    """A command of which some values may be left out,
    described in two lines."""

    path: Path | None = None
    """A sentence that goes on in the next line.
    Another one."""
    count: int | None = 3
    """None for all."""
    switch: bool | None = None
    """On or off."""


def test_values_that_may_be_left_out(capsys, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setitem(cli.COMMANDS, "odd", lambda: cli.Job(OddConfig, seen.append, example="--count 1"))
    shown = help_of("odd", capsys, monkeypatch)
    assert "A command of which some values may be left out, described in two lines." in shown
    assert re.search(r"--path PATH +A sentence that goes on in the next line. Another one. \(not set\)", shown)
    assert re.search(r"--count INT\|None +None for all. \(default: 3\)", shown)
    cli.main(["odd", "--count", "None", "--no-switch", "--path", "a"])
    cli.main(["odd"])
    assert seen == [OddConfig(path=Path("a"), count=None, switch=False), OddConfig()]


def test_help_loads_no_model_classes():
    """They take two seconds, more than everything else that a command's config needs."""
    code = "import sys\nfrom trimtab.cli import main\ntry:\n main(['rank', '--help'])\nexcept SystemExit:\n pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('transformers.modeling_utils' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False"
