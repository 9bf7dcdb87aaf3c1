"""The command line: cheap help, one line for a mistake, JSON on request, every command on a tiny model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import cli
from trimtab.errors import UserError
from trimtab.lm import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """A command for tests."""

    number: int = 1
    """A number."""


@dataclasses.dataclass(frozen=True)
class FakeResult:
    value: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "path": Path("a/b")}

    def render(self) -> str:
        return f"value {self.value} [/b] [bold]"


def command(monkeypatch: pytest.MonkeyPatch, run: Callable[[FakeConfig], Any], name: str = "fake") -> None:
    monkeypatch.setitem(cli.COMMANDS, name, lambda: cli.Job(FakeConfig, run))


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line on stderr of a command that must end with 2 and print nothing else."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("trimtab: error: ")
    return said.err.removeprefix("trimtab: error: ").strip()


def test_help_lists_every_command_and_loads_neither_torch_nor_the_parser():
    code = (
        "import sys; from trimtab.cli import main; status = main(['--help'])\n"
        "print([name for name in ('torch', 'transformers', 'tyro', 'rich', 'numpy') if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, last = done.stdout.splitlines()
    assert last == "[] 0"
    for name, job in cli.COMMANDS.items():
        assert any(line.split("  ")[1:2] == [name] and line.endswith(str(job.__doc__)) for line in shown), name


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: trimtab COMMAND" in capsys.readouterr().out


def test_a_group_shows_its_commands(capsys):
    assert cli.main(["models"]) == 0
    assert cli.main(["models", "--help"]) == 0
    assert capsys.readouterr().out.count("models pull") == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_of_every_command_has_a_help_text(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    job = cli.COMMANDS[name]()
    assert (job.config.__doc__ or "").split("\n")[0] in " ".join(shown.split())
    for field in dataclasses.fields(job.config):
        name = field.metadata.get("option", field.name)
        option = name.upper() if name in job.positional else f"-{name.replace('_', '-')}"
        assert option in shown
        at = shown.rindex(option) + len(option)
        assert any(letter.islower() for letter in shown[at : at + 200].split("(default")[0]), field.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """A command with switches."""

    on: bool = True
    """Do it."""
    off: bool = False
    """Do the other."""


def test_a_switch_that_is_on_has_its_help_beside_the_word_that_it_speaks_of(monkeypatch, capsys):
    seen: list[Any] = []
    monkeypatch.setitem(cli.COMMANDS, "fake", lambda: cli.Job(SwitchConfig, seen.append))
    with pytest.raises(SystemExit):
        cli.main(["fake", "--help"])
    help_text = capsys.readouterr().out
    lines = [" ".join(line.strip("│ ").split()) for line in help_text.splitlines()]
    assert "--on, --no-on Do it. (default: True)" in " ".join(lines)
    assert "--json Print the result" in " ".join(lines)
    for words in ([], ["--no-on", "--off"], ["--on", "--no-off"]):
        cli.main(["fake", *words])
    assert [(config.on, config.off) for config in seen] == [(True, False), (False, True), (True, False)]


def test_an_unknown_command_names_the_close_one(capsys):
    assert failure(capsys, ["rnak"]).endswith("did you mean rank?")
    line = failure(capsys, ["models", "pul", "x"])
    assert line == "unknown command 'models pul': there is list, pull, show, zoo; did you mean pull?"
    assert failure(capsys, ["policy", "report", "x"]).endswith("did you mean trimtab report?")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--numbr", "3"], "Unrecognized options: --numbr, 3 Perhaps you meant: --number INT"),
        (["--number", "x"], "Error parsing --number: invalid literal for int() with base 10: 'x'"),
        (["--number"], "--number"),
    ],
)
def test_an_unusable_option_is_one_line(words, says, monkeypatch, capsys):
    command(monkeypatch, FakeResult)
    assert says in failure(capsys, ["fake", *words])


def test_a_list_without_a_value_is_no_default(capsys):
    line = failure(capsys, ["evaluate", "ioi", "--cross-section", "--seed", "1"])
    assert line == "--cross-section: no value follows it; give one or more, or leave it out"
    assert "no value follows it" in failure(capsys, ["evaluate", "ioi", "--dictionary"])


def test_a_part_in_capitals_is_a_word_of_its_own_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "ioi", "--help"])
    assert "ioi-study options" in capsys.readouterr().out


def test_a_missing_argument_is_named(capsys):
    assert "Missing from trimtab models pull: NAME" in failure(capsys, ["models", "pull"])


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def run(config: FakeConfig) -> None:
        raise UserError(f"number {config.number}", "it is\ntoo large", "lower it")

    command(monkeypatch, run)
    assert failure(capsys, ["fake", "--number", "7"]) == "number 7: it is too large; lower it"


def test_a_config_that_refuses_a_value_is_one_line(capsys):
    assert failure(capsys, ["rank", "--limit", "0"]) == "limit 0: it must be at least 1; change it"


def test_a_bug_is_not_hidden(monkeypatch):
    def run(config: FakeConfig) -> None:
        raise ZeroDivisionError

    command(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_json_is_one_object_on_stdout(monkeypatch, capsys):
    command(monkeypatch, lambda config: FakeResult(float("nan")))
    assert cli.main(["fake", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"value": None, "path": "a/b"}
    assert said.err == ""
    assert cli.main(["fake"]) == 0
    assert capsys.readouterr().out == "value nan [/b] [bold]\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_output_that_its_encoding_lacks(monkeypatch, encoding):
    """Windows writes cp1252, a cluster with LC_ALL=POSIX perhaps ASCII, and file names may be no text at all."""
    from rich.table import Table

    written = "caf\xe9 \N{SLICE OF PIZZA} \N{DOUBLE VERTICAL LINE}\N{GREEK CAPITAL LETTER DELTA} \udce9"
    table = Table("text")
    table.add_row(written)

    @dataclasses.dataclass(frozen=True)
    class Shown:
        drawn: Any

        def to_json(self) -> dict[str, Any]:
            return {"text": written}

        def render(self) -> Any:
            return self.drawn

    for drawn, words in ((written, []), (table, []), (written, ["--json"])):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        command(monkeypatch, lambda config, shown=Shown(drawn): shown)
        assert cli.main(["fake", *words]) == 0  # mutation: leave out `reconfigure`
        out = raw.getvalue().decode(encoding)
        if words:
            assert json.loads(out) == {"text": written}  # mutation: ensure_ascii=False
        else:
            assert ("\N{SLICE OF PIZZA}" in out) == (encoding == "utf-8")
            assert ("\\U0001f355" in out) == (encoding != "utf-8")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n a total of 79 GiB."),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (MemoryError(), "no more can be had"),
    ],
)
def test_full_memory_is_said_in_one_line(error, said, monkeypatch, capsys):
    def run(config: FakeConfig) -> None:
        raise error

    command(monkeypatch, run)
    assert cli.main(["fake"]) == 2
    hint = "lower --batch-size, use a lower precision (--dtype bfloat16) or another --device"
    assert capsys.readouterr().err == f"trimtab: error: memory is full: {said}; {hint}\n"


def test_an_interrupt_says_what_the_same_command_does(monkeypatch, capsys):
    def run(config: FakeConfig) -> None:
        raise KeyboardInterrupt

    command(monkeypatch, run, "train")
    command(monkeypatch, run)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\ntrimtab: stopped; the same command again goes on from here\n"
    assert cli.main(["fake"]) == 130
    assert "starts anew" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "trimtab", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 0


OWN_TASK = """
from trimtab.tasks import Item, Outcome, Task, split_items

class Sums(Task):
    name = "sums"
    needs_tokenizer = False

    @classmethod
    def load(cls, data=None, tokenizer=None, *, largest=9):
        items = [Item(id=str(a), prompt=f"What is {a} + 1?", answer=str(a + 1)) for a in range(largest + 1)]
        print("largest", items[-1].answer)
        return cls({"train": items})

    def parse(self, item, text, permutation=0):
        return Outcome(reward=0.0, correct=False)
"""


def test_the_installed_script_finds_a_task_in_the_current_directory(tmp_path):
    """Unlike `python -m trimtab`, a console script does not have that directory on its path."""
    (tmp_path / "my_sums.py").write_text(OWN_TASK)
    script = Path(sys.executable).parent / "trimtab"
    words = [script, "policy", "headroom", "--items", "4", "--task", "my_sums:Sums", "--model", "./no-such-model"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "largest 10\n", done.stderr
    assert "no-such-model" in done.stderr
    assert done.returncode == 2


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trimtab 0.")


def run_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert cli.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_text_to_a_steered_and_replayed_run(tiny_llama: LanguageModel, tmp_path: Path, capsys):
    model = tmp_path / "model"
    tiny_llama.hf.save_pretrained(model)
    tiny_llama.tokenizer.save_pretrained(model)
    words = "the cat and the hen ran in and over then under the inn and there they sat"
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"id": str(i), "text": f"{words[i % 30 :]} {i} " * 4}) for i in range(60)]
    text.write_text("\n".join(lines))

    sizes = ["--n-features", 64, "--k", 4, "--batch-size", 128, "--context", 32, "--heldout-rows", 512]
    run = tmp_path / "run"
    train = ["train", "--model", model, "--site", "resid_post.1", "--text", text, *sizes, "--run", run]
    trained = run_json(capsys, *train)
    assert trained["sae"] == str(run / "sae")
    assert not trained["resumed"]
    assert run_json(capsys, *train)["resumed"]
    assert "run" in failure(capsys, [*map(str, train), "--lr", "0.1"])

    both = ["--model", model, "--sae", run / "sae"]
    ranked = run_json(capsys, "rank", *both, "--criterion", "delta-confidence", "random", "--run", tmp_path / "rank")
    assert set(ranked["criteria"]) == {"delta-confidence", "random"}
    feature = ranked["criteria"]["delta-confidence"]["top"][0]["feature"]

    steered = ["steer", *both, "--feature", feature, "--dose", -0.4, "--max-new-tokens", 8, "--run", tmp_path / "steer"]
    result = run_json(capsys, *steered, "--unit", "relative", "the cat")
    assert [arm["name"] for arm in result["arms"]] == ["unsteered", "dose -0.4"]
    assert run_json(capsys, "steer", "--replay", tmp_path / "steer")["exact"]
    assert "features 0 to 63" in failure(capsys, [*map(str, ["steer", *both, "--feature", 64]), "the cat"])

    core = run_json(capsys, "evaluate", "core", *both, "--text", text, "--context", 32)
    assert core["site"] == "resid_post.1"

    harvested = run_json(
        capsys, "harvest", "--model", model, "--site", "resid_post.1", "--text", text, "--context", 32,
        "--run", tmp_path / "shards",
    )  # fmt: skip
    assert harvested["train_rows"] > 0

    shown = run_json(capsys, "models", "show", model)
    assert (shown["n_layers"], shown["d_model"], shown["saes"]) == (4, 32, [])
    assert "attn_k.0-3.0-1" in shown["sites"]


def test_training_on_nothing_says_what_to_give(capsys):
    says = "--text and --activations: neither is given; give text to harvest, or finished harvests"
    assert failure(capsys, ["train"]) == says
