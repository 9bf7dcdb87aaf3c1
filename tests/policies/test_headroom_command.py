"""`trimtab policy headroom` as a command: which way a task is tried, what is said beforehand, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_choice import Letters, choice_sae
from rich.console import Console

from trimtab.dictionaries import Standard
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies.headroom import command as module
from trimtab.policies.headroom.command import HeadroomConfig, run_headroom
from trimtab.policies.headroom.result import HeadroomResult


@pytest.fixture
def sae(choice: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Standard:
    """Features 0 and 63 never fire, by the statistics; the command is given this SAE, the model and the task."""
    sae = choice_sae(choice)
    rate = np.full(64, 0.1)
    rate[[0, 63]] = 0
    most = np.where(rate > 0, 1.0, 0).astype(np.float32)
    sae.feature_stats = FeatureStats(max_activation=most, mean_activation=most, firing_rate=rate, n_tokens=100)
    monkeypatch.setattr(HeadroomConfig, "load_model", lambda _: choice)
    monkeypatch.setattr(module, "load_dictionary", lambda *_a, **_k: sae)
    monkeypatch.setattr(HeadroomConfig, "read_task", lambda _: None)  # its name is not registered
    monkeypatch.setattr(HeadroomConfig, "load_task", lambda *_: Letters.load())
    return sae


def config(**settings: object) -> HeadroomConfig:
    values: dict[str, object] = {
        "task": "letters", "options_only": True, "max_new_tokens": 4, "items": 6, "dose": (-3.0,), "mask": ("none",),
    }  # fmt: skip
    return HeadroomConfig(**(values | settings))  # pyright: ignore[reportArgumentType]


def printed(result: HeadroomResult) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(result.render())
    return " ".join(capture.get().split())


def test_long_answers_are_decoded_with_some_features_and_say_so(
    sae: Standard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del sae
    run = tmp_path / "run"
    result = run_headroom(config(n_candidates=20, candidates="random", dose=(-3.0, 0.1), run=run))
    error = capsys.readouterr().err
    assert (
        "trimtab: headroom at resid_post.3: up to 1,968 tokens will be decoded: 492 answers of up to 4 tokens" in error
    )
    assert "with 20 features and with 20 random directions, at 2 doses)" in error
    strong, weak = json.loads((run / "headroom.json").read_text())["lines"]
    for line in (strong, weak):
        assert (line["features"], line["of_features"], line["candidates"]) == (20, 64, "random")
        assert line["scheme"] == "every answer token"
        assert line["ceiling_is_lower_bound"] is True
        assert line["allowed_per_item"] == 20
    assert strong["ceiling"]["estimate"] == strong["static"]["estimate"] == 1
    assert strong["warnings"] == [
        "nothing to learn: the best static feature reaches the ceiling of the 20 features tried"
    ]
    text = printed(result)
    assert "one feature held over the whole answer" in text
    assert "among 20 tried of 64 (candidates: random), a lower bound on the ceiling over all" in text
    again = run_headroom(config(n_candidates=20, candidates="random", dose=(-3.0, 0.1)))
    assert again.lines == result.lines


def test_one_token_answers_are_tried_with_every_feature(sae: Standard, capsys: pytest.CaptureFixture[str]) -> None:
    del sae
    result = run_headroom(config(max_new_tokens=None))
    (line,) = result.lines
    assert (line.features, line.of_features, line.candidates) == (64, 64, "all")
    assert line.scheme == "last prompt token"
    assert result.to_json()["lines"][0]["ceiling_is_lower_bound"] is False
    assert "one edit at the last prompt token" in printed(result)
    assert "lower bound" not in printed(result)
    assert "decoded" not in capsys.readouterr().err


def test_masks_share_what_is_decoded_and_keep_to_their_own_candidates(
    sae: Standard, choice: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_headroom(config(n_candidates=10, mask=("none", "current", "top-confidence"), mask_features=4))
    none, current, top = result.lines
    assert (none.features, current.features, top.features) == (10, 10, 4)
    assert none.allowed_per_item == 10
    assert top.allowed_per_item == 4
    assert 0 < current.allowed_per_item < 10  # the tiny SAE's features fire on half of all items
    for line in result.lines:
        assert line.random_per_item == line.allowed_per_item
        assert f"{line.mask} ({line.allowed_per_item:.0f})" in printed(result)
    said = int(capsys.readouterr().err.split("with ")[1].split()[0])
    assert 10 <= said <= 20
    assert choice.name == "choice"
    assert sae.n_features == 64


def test_all_features_leave_no_lower_bound(sae: Standard) -> None:
    rate = np.full(64, 0.1)
    sae.feature_stats = FeatureStats(
        max_activation=np.ones(64, np.float32), mean_activation=np.ones(64, np.float32), firing_rate=rate, n_tokens=1
    )
    (line,) = run_headroom(config(n_candidates=64, candidates="random")).lines
    assert not line.ceiling_is_lower_bound
    (line,) = run_headroom(config(candidates="random")).lines
    assert line.features == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_candidates": 0}, "n_candidates 0: it must be at least 1; change it"),
        ({"n_candidates": 65}, "features 65: the SAE has 64; give at most 64"),
        ({"n_candidates": 5, "max_new_tokens": 1},
         "n_candidates 5: answers of letters are one token, and every feature is tried; leave it out"),
        ({"candidates": "best"}, "candidates 'best': it is one of top-confidence, random; choose one"),
        ({"mask_features": 0}, "mask_features 0: it must be at least 1; change it"),
        ({"mask": ()}, r"mask \(\): there is too little to compare; give more"),
        ({"token_limit": 100, "n_candidates": 2},
         "headroom of letters: up to 120 tokens would be decoded, more than the limit of 100; lower --items, "
         "--n-candidates, --max-new-tokens, --dose or --mask, or raise --token-limit"),
        ({"site": "resid_post.2"}, "site resid_post.2: the dictionary reads resid_post.3; use --site resid_post.3"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(sae: Standard, settings: dict[str, object], message: str) -> None:
    del sae
    with pytest.raises(UserError, match=message):
        run_headroom(config(**settings))


def test_an_sae_for_a_site_that_the_model_lacks_is_refused(sae: Standard) -> None:
    sae.info = dataclasses.replace(sae.info, site="resid_post.17")
    with pytest.raises(UserError, match=r"site resid_post\.17.*layers 0 to 3"):
        run_headroom(config())


def test_an_sae_of_another_width_is_refused(
    choice: LanguageModel, sae: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Standard(torch.ones(8, 4), torch.zeros(4), torch.ones(4, 8), torch.zeros(8), info=sae.info)
    monkeypatch.setattr(module, "load_dictionary", lambda *_a, **_k: narrow)
    with pytest.raises(UserError, match=rf"dictionary of width 8: choice has width {choice.d_model}.*; choose a dict"):
        run_headroom(config())


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("mask", ["current", "accumulated"])
def test_a_mask_that_allows_nothing_is_refused_before_anything_is_tried(
    sae: Standard, tokens: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae.b_enc.data.fill_(-1e6)
    monkeypatch.setattr(module, "try_features", lambda *_a, **_k: pytest.fail("tried"))
    with pytest.raises(UserError, match=f"mask {mask}: it allows no live feature at resid_post.3.*any of 6"):
        run_headroom(config(max_new_tokens=tokens, mask=("none", mask)))
