"""A refused command is one line on stderr, and leaves nothing behind in the directory that it was called in."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from trimtab import cli
from trimtab.lm import LanguageModel
from trimtab.lm.zoo import build_tiny

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


NEEDS = {
    "steer Once --feature 1 --sae nowhere --model mamba --run run": "decoding with mamba",
    "find --want rain --sae nowhere --model mamba --run run": "decoding with mamba",
    "rank --sae nowhere --model mamba --run run": "scoring from a cached prefix with mamba",
    "rank --criterion max-activation --sae nowhere --model bert --run run": "final norm and the head with bert",
    "evaluate core --sae nowhere --model bert --run run": "final norm and the head with bert",
    "evaluate circuit --model mamba --run run": "scoring from a cached prefix with mamba",
    "policy headroom --task ioi --sae nowhere --model mamba --run run": "decoding with mamba",
    "policy train --task ioi --sae nowhere --model mamba --run run": "decoding with mamba",
    "demo --model mamba --run run": "decoding with mamba",
    "autointerp --sae nowhere --model rwkv --run run": "batches of texts of different lengths with rwkv",
    "flags train --model bert --concepts c.txt --data d.jsonl --dims 2 --run run": "site kind resid_mid of bert",
}
"""Commands that a model was found unfit for. No SAE is looked for: `nowhere` is not what the line names."""


@pytest.mark.parametrize("line", NEEDS)
def test_what_a_model_cannot_do_is_refused_before_any_work(
    line: str, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("sea: ships and tides\nwar\n")
    examples = [{"prompt": "Go", "response": f"on {n}", "concepts": ["sea"] if n % 2 else ["war"]} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, examples)))
    (name,) = (name for name in ("mamba", "bert", "rwkv") if name in line)
    model = build_tiny(name, tiny_llama.tokenizer)
    model.hf.save_pretrained(tmp_path / name)
    model.tokenizer.save_pretrained(tmp_path / name)
    capsys.readouterr()
    assert cli.main(shlex.split(line)) == 2
    said = capsys.readouterr()
    assert NEEDS[line] in said.err.splitlines()[-1]
    assert "nowhere" not in said.err
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", name, "c.txt", "d.jsonl"}
