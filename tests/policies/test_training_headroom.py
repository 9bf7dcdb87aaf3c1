"""A training that is asked to measure headroom first keeps its lines, and learns the same as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from first_letter import FirstLetter

from trimtab.dictionaries.standard import Standard
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies import training_headroom as module
from trimtab.policies.config import PolicyConfig
from trimtab.policies.headroom import headroom, headroom_table
from trimtab.policies.setup import Setup
from trimtab.policies.train import TrainedPolicy, fit
from trimtab.runs import Run


def small(run: Path, **settings: object) -> PolicyConfig:
    values: dict[str, object] = {
        "task": "first-letter", "run": run, "mask": "current", "dose": 2.0, "options_only": True, "iterations": 1,
        "items_per_iteration": 6, "repeats": 2, "hidden": (16,), "validate_every": 1,
    }  # fmt: skip
    return PolicyConfig(**(values | settings))  # pyright: ignore[reportArgumentType]


def train(model: LanguageModel, sae: Standard, config: PolicyConfig) -> TrainedPolicy:
    assert config.run is not None
    with Run.open(config.run, "policy train", config) as run:
        return fit(Setup.with_parts(config, model, sae, FirstLetter.load()), run)


def test_lines_are_those_of_validation_items_and_change_nothing(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path
) -> None:
    plain = train(tiny_llama, sae, small(tmp_path / "plain"))
    config = small(tmp_path / "run", headroom_items=5)
    measured = train(tiny_llama, sae, config)
    for name, tensor in plain.policy.state_dict().items():
        assert torch.equal(tensor, measured.policy.state_dict()[name]), name
    assert not (tmp_path / "plain/headroom.json").exists()
    (line,) = json.loads((tmp_path / "run/headroom.json").read_text())["lines"]
    setup = Setup.with_parts(config, tiny_llama, sae, FirstLetter.load())
    table = headroom_table(
        tiny_llama, sae, setup.episodes("validation", 5), site=setup.site, dose=2.0, mask=setup.mask()
    )
    found = headroom(table, site=str(setup.site), dose=2.0, unit="relative", mask="current")
    assert line["items"] == 5
    for name in ("unsteered", "ceiling", "random_ceiling", "static", "most_active", "readout"):
        assert line[name]["estimate"] == getattr(found, name).estimate, name


def test_lines_are_measured_once_and_their_warnings_are_kept(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", headroom_items=2)
    with Run.open(tmp_path / "run", "policy train", config) as run:
        (run.path / "headroom.json").write_text(json.dumps({"lines": [{"warnings": ["nothing to learn: so"]}]}))
        monkeypatch.setattr(module, "headroom_table", lambda *_a, **_k: pytest.fail("measured again"))
        done = fit(Setup.with_parts(config, tiny_llama, sae, FirstLetter.load()), run)
        assert run.record_dict["hides_text"] is False
    assert "nothing to learn: so" in done.warnings


def test_longer_answers_are_said_not_to_be_measured(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> None:
    done = train(tiny_llama, sae, small(tmp_path / "run", headroom_items=2, max_new_tokens=2, options_only=False))
    assert "headroom was not measured: answers take up to 2 tokens, not one" in done.warnings


def test_one_item_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="headroom_items 1: there is too little to compare; use 0, or 2 and more"):
        small(tmp_path, headroom_items=1)
