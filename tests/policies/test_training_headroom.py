"""A training that is asked to measure headroom first keeps its lines, and learns the same as without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from first_letter import FirstLetter
from first_letter_training import letter_config, train

from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.dictionaries import Standard
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies.config import PolicyConfig
from trimtab.policies.headroom import training as module
from trimtab.policies.headroom.candidates import TriedFeatures, candidate_order
from trimtab.policies.headroom.lines import headroom
from trimtab.policies.headroom.table import headroom_table
from trimtab.policies.setup import Setup
from trimtab.policies.train import CHECKPOINTS, fit
from trimtab.runs import Run
from trimtab.training.checkpoint import latest_checkpoint


def small(run: Path, **settings: object) -> PolicyConfig:
    values: dict[str, object] = {"mask": "current", "iterations": 1, "items_per_iteration": 6, "samples": 2}
    return letter_config(run, **(values | settings))


def firing(setup: Setup, prompts: TaskPrompts) -> np.ndarray:
    x = last_prompt_activations(setup.model, prompts, setup.site)
    return (setup.dictionary.encode(torch.from_numpy(x)) > 0).numpy()


def test_lines_are_those_of_validation_items_and_change_nothing(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path
) -> None:
    plain = train(tiny_llama, sae, small(tmp_path / "plain", headroom_items=0))
    config = small(tmp_path / "run", headroom_items=5)
    measured = train(tiny_llama, sae, config)
    for name, tensor in plain.policy.state_dict().items():
        assert torch.equal(tensor, measured.policy.state_dict()[name]), name
    assert not (tmp_path / "plain/headroom.json").exists()
    (line,) = json.loads((tmp_path / "run/headroom.json").read_text())["lines"]
    setup = Setup.with_parts(config, tiny_llama, sae, FirstLetter.load())
    few = setup.prompts("validation", 5)
    table = headroom_table(setup, few)
    found = headroom(
        table._replace(allowed=firing(setup, few)), site=str(setup.site), dose=2.0, unit="relative", mask="current"
    )
    assert line["items"] == 5
    for name in ("unsteered", "ceiling", "random_ceiling", "static", "most_active", "readout"):
        assert line[name]["estimate"] == getattr(found, name).estimate, name


@pytest.mark.parametrize(("tokens", "items"), [(1, 8), (2, None)])
def test_without_a_word_one_token_answers_are_measured_on_eight_items(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, tokens: int, items: int | None
) -> None:
    train(tiny_llama, sae, small(tmp_path / "run", max_new_tokens=tokens))
    path = tmp_path / "run/headroom.json"
    assert (json.loads(path.read_text())["lines"][0]["items"] if path.exists() else None) == items


def test_what_cannot_be_measured_stops_training_only_if_it_was_asked_for(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise UserError("layer 2", "it cannot be called alone", "use another model")

    monkeypatch.setattr(module, "own_headroom", refuse)
    done = train(tiny_llama, sae, small(tmp_path / "default"))
    assert "headroom was not measured: it cannot be called alone" in done.warnings
    with pytest.raises(UserError, match="layer 2: it cannot be called alone"):
        train(tiny_llama, sae, small(tmp_path / "asked", headroom_items=2))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_dose_that_changes_no_reward_is_warned_of(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """After the first iteration, once, whether or not headroom is measured; and it outlives an interruption."""
    done = train(tiny_llama, sae, small(tmp_path / "run", dose=1e-6, max_new_tokens=tokens, headroom_items=0))
    said = (
        "no effect: in the first iteration none of 12 rollouts of 6 items earned another reward than the unsteered "
        "model; try another dose, mask or site"
    )
    assert done.warnings == (said,)
    assert capsys.readouterr().err.count(f"trimtab: warning: {said}") == 1
    checkpoint = latest_checkpoint(tmp_path / "run" / CHECKPOINTS)
    assert checkpoint is not None
    assert checkpoint.facts["warnings"] == [said]


def test_a_dose_that_changes_rewards_is_not_warned_of(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> None:
    done = train(tiny_llama, sae, small(tmp_path / "run", mask="none", items_per_iteration=20, samples=8))
    assert not [warning for warning in done.warnings if warning.startswith("no effect")]


def test_nothing_flips_is_warned_of_without_a_word(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> None:
    done = train(tiny_llama, sae, small(tmp_path / "run", dose=1e-6))
    assert "no headroom: no feature at this dose makes any wrong item right" in done.warnings


def test_lines_are_measured_once_and_their_warnings_are_kept(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", headroom_items=2)
    with Run.open(tmp_path / "run", "policy train", config) as run:
        (run.path / "headroom.json").write_text(json.dumps({"lines": [{"warnings": ["nothing to learn: so"]}]}))
        monkeypatch.setattr(module, "own_headroom", lambda *_a, **_k: pytest.fail("measured again"))
        done = fit(Setup.with_parts(config, tiny_llama, sae, FirstLetter.load()), run)
        assert run.record_dict["hides_text"] is False
    assert "nothing to learn: so" in done.warnings


def test_longer_answers_are_decoded_with_some_features(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", headroom_items=3, max_new_tokens=2, mask="current")
    train(tiny_llama, sae, config)
    assert "trimtab: headroom at resid_post.1: up to " in capsys.readouterr().err
    (line,) = json.loads((tmp_path / "run/headroom.json").read_text())["lines"]
    setup = Setup.with_parts(config, tiny_llama, sae, FirstLetter.load())
    few = setup.prompts("validation", 3)
    fires = firing(setup, few)
    order = [feature for feature in candidate_order(setup, "random") if fires[:, feature].any()]
    candidates = TriedFeatures(tuple(order[:48]), 64, "random")
    table = headroom_table(setup, few, candidates)
    found = headroom(
        table._replace(allowed=fires[:, list(candidates.features)]),
        site=str(setup.site),
        dose=2.0,
        unit="relative",
        mask="current",
    )
    for name in ("unsteered", "ceiling", "random_ceiling", "static", "most_active", "readout"):
        assert line[name]["estimate"] == getattr(found, name).estimate, name
    assert (line["features"], line["of_features"], line["candidates"]) == (len(candidates.features), 64, "random")
    assert line["scheme"] == "every answer token"


def test_statistics_choose_the_features_highest_in_delta_confidence(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path
) -> None:
    rate = np.where(np.arange(64) < 10, 0.1, 0)
    most = np.ones(64, dtype=np.float32)
    sae.feature_stats = FeatureStats(max_activation=most, mean_activation=most, firing_rate=rate, n_tokens=100)
    train(tiny_llama, sae, small(tmp_path / "run", headroom_items=2, max_new_tokens=2, mask="none"))
    (line,) = json.loads((tmp_path / "run/headroom.json").read_text())["lines"]
    assert (line["features"], line["candidates"]) == (10, "top-confidence")
    assert line["ceiling_is_lower_bound"] is True


@pytest.mark.parametrize("mask", ["current", "accumulated"])
def test_a_mask_that_allows_nothing_is_refused_or_said(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, mask: str
) -> None:
    """With one token there is nothing to learn; in longer answers a feature may fire later."""
    sae.b_enc.data.fill_(-1e6)
    nothing = f"mask {mask}: it allows no live feature at resid_post.1, at the last prompt token of any of 8"
    with pytest.raises(UserError, match=nothing):
        train(tiny_llama, sae, small(tmp_path / "one", mask=mask))
    done = train(tiny_llama, sae, small(tmp_path / "two", mask=mask, max_new_tokens=2, headroom_items=2))
    assert done.warnings[-2].startswith(nothing)
    assert done.warnings[-1].startswith("headroom was not measured: it allows no live feature")
    assert not (tmp_path / "two/headroom.json").exists()


def test_an_sae_for_another_site_is_refused(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"site resid_post\.2: the dictionary reads resid_post\.1; use --site resid_po"):
        train(tiny_llama, sae, small(tmp_path / "run", site="resid_post.2"))


def test_one_item_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="headroom_items 1: there is too little to compare; use 0, or 2 and more"):
        small(tmp_path, headroom_items=1)
