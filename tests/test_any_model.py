"""`--any-model` on every command that opens an SAE: refused without it, and the same run with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import cli
from trimtab.dictionaries import DictionaryInfo, FeatureStats, Standard, save_dictionary
from trimtab.lm import LanguageModel


@pytest.fixture
def names(tiny_llama: LanguageModel, tmp_path: Path) -> list[str]:
    """A model on disk and an SAE of its width that was trained on another one."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    info = DictionaryInfo(architecture="standard", model="org/base", site="resid_post.1")
    sae = Standard(rows.T, torch.zeros(20), rows, torch.zeros(32), info=info)
    ones = np.ones(20, dtype=np.float32)
    stats = FeatureStats(max_activation=ones, mean_activation=ones, firing_rate=np.full(20, 0.1), n_tokens=100)
    save_dictionary(sae, tmp_path / "sae", stats)
    return ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae")]


def run(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def commands(tmp_path: Path) -> dict[str, list[str]]:
    text = tmp_path / "text.jsonl"
    words = "the cat and the hen ran in and over then under the inn and there they sat"
    text.write_text("\n".join(json.dumps({"id": str(i), "text": f"{words[i:]} {i} " * 4}) for i in range(20)))
    dose = ["--feature", "3", "--dose", "0.3", "--unit", "relative", "--max-new-tokens", "4"]
    return {
        "rank": ["rank", "--criterion", "max-activation", "--run", str(tmp_path / "rank")],
        "steer": ["steer", "the cat", *dose, "--run", str(tmp_path / "steer")],
        "evaluate core": ["evaluate", "core", "--text", str(text), "--context", "32", "--n-resamples", "10"],
    }


@pytest.mark.parametrize("command", ["rank", "steer", "evaluate core"])
def test_an_sae_of_another_model_is_used_only_if_allowed(capsys, tmp_path, names, command):
    words = [*commands(tmp_path)[command], *names]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "dictionary trained on org/base" in said
    assert "--any-model" in said
    result = run(capsys, [*words, "--any-model"])
    if command == "steer":
        assert len(result["arms"]) == 2
        assert run(capsys, ["steer", "--replay", str(tmp_path / "steer")])["exact"]
    else:
        assert result["site"] == "resid_post.1"
