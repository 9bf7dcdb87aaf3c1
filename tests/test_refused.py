"""A refused command is one line on stderr, and leaves nothing behind in the directory that it was called in."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from trimtab import cli
from trimtab.lm import LanguageModel

REFUSED = {
    "harvest --text missing.jsonl --model {model} --run run": "missing.jsonl",
    "harvest --text text.txt --model {model} --site resid_post.9 --run run": "resid_post.9",
    "train --text missing.jsonl --model {model} --site resid_post.1 --run run": "missing.jsonl",
    "train --text text.txt --model ./no-model --site resid_post.1": "no-model",
    "train --text text.txt --model {model} --site resid_post.1 --holdout 0 --context 4000 --run run": "one sequence",
    "train --text text.txt --model {model} --holdout 0 --context 4000 --run a/b --site resid_pre.1 attn_out.2": "fill",
    "train --activations nowhere --run run": "nowhere",
    "rank --sae nowhere --run run": "nowhere",
    "rank --model ./no-model --run run": "no-model",
    "steer Once --feature 1 --model ./no-model --run run": "no-model",
    "steer Once --replay nowhere": "prompt with --replay",
    "steer --replay nowhere": "nowhere",
    "evaluate core --sae nowhere --run run": "nowhere",
    "evaluate ground-truth --arch topc --run run": "topc",
    "sae stats nowhere": "nowhere",
    "flags import --text missing.csv --concepts nowhere --run run": "nowhere",
    "flags data --concepts nowhere --run run": "nowhere",
    "flags judge --judge-data text.txt --concepts nowhere --save judge.npz": "nowhere",
    "flags judge --judge-data text.txt --concepts nowhere --save judge.pkl": "judge.pkl",
    "demo --model ./no-model --run run": "no-model",
    "report nowhere": "nowhere",
    "policy headroom --task nonsense --run run": "nonsense",
    "policy train --task nonsense --run run": "nonsense",
    "policy train --task ioi --model ./no-model": "no-model",
    "policy evaluate nowhere --run run": "nowhere",
    "policy analyze nowhere": "nowhere",
}
"""Commands, and what the one line names."""


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_command_leaves_nothing_behind(
    line: str, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    model, here = tmp_path / "model", tmp_path / "here"
    tiny_llama.hf.save_pretrained(model)
    tiny_llama.tokenizer.save_pretrained(model)
    here.mkdir()
    (here / "text.txt").write_text("the cat sat in the warm rain, and then another one came by\n\n" * 20)
    monkeypatch.chdir(here)
    capsys.readouterr()
    assert cli.main(shlex.split(line.format(model=model))) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("trimtab: error: ")
    assert REFUSED[line] in last
    assert said.out == ""
    assert sorted(path.name for path in here.rglob("*")) == ["text.txt"]


def test_a_replay_names_the_option_that_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["steer", "--replay", "nowhere", "--sae", "smollm2-135m-instruct/resid_post.15"]) == 2
    assert capsys.readouterr().err.startswith("trimtab: error: --sae with --replay: a replay takes it from the run")
