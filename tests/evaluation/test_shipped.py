"""The SAE that ships with trimtab, on the default model: its size, its figures, and a newcomer's first commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.activations import sample_text
from trimtab.cli import main
from trimtab.dictionaries import load_dictionary
from trimtab.evaluation import CoreConfig, run_core
from trimtab.lm import LanguageModel

pytestmark = pytest.mark.real

ASSET = Path(sample_text()).parent / "smollm2-135m-instruct--resid_post.15"


def test_it_fits_and_is_small(real_model: LanguageModel):
    sae = load_dictionary("default", model=real_model)
    assert sae.info.metadata["model_fingerprint"] == real_model.fingerprint
    sizes = {file.name: file.stat().st_size for file in ASSET.iterdir()}
    assert sizes.pop("feature_examples.parquet") <= 3_000_000
    assert sum(sizes.values()) <= 12_000_000
    assert json.loads((ASSET / "cfg.json").read_text())["dtype"] == "float32"
    assert sae.feature_stats is not None
    assert sae.feature_stats.live.mean() > 0.99


def test_it_reaches_what_it_was_trained_for():
    """On held-out novels, the hardest of the sample's kinds."""
    result = run_core(CoreConfig(text=(str(Path(sample_text()) / "novels.jsonl"),), n_resamples=100))
    assert result["explained_variance"].estimate >= 0.84
    assert result["ce_increase"].estimate <= 0.25
    assert result["l0"].estimate <= 42  # set to 39 on all held-out text; a kind of text may be above


def test_rank_steer_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ids = [str(i) for i in range(64)]
    assert main(["rank", "--feature", *ids, "--run", str(tmp_path / "rank"), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["criteria"]["delta-confidence"]["top"][0]["feature"]
    run = str(tmp_path / "steer")
    words = ["steer", "Yesterday I went to the", "--feature", str(best), "--dose", "0.4", "--max-new-tokens", "8"]
    assert main([*words, "--run", run, "--json"]) == 0
    unsteered, steered = json.loads(capsys.readouterr().out)["arms"]
    assert unsteered["realised"]["n_edits"] == 0
    assert steered["realised"]["relative"] == pytest.approx(0.4, rel=1e-3)
    assert main(["steer", "--replay", run, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_tokens"] == report["matches"] > 0
