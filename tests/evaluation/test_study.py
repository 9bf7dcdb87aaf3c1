"""`trimtab study ioi` whole, on the model built by hand; it goes on where it stopped, and its page shows all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trimtab import cli
from trimtab.evaluation.circuits.command import CircuitConfig
from trimtab.evaluation.supervised.command import IOIConfig
from trimtab.lm import LanguageModel
from trimtab.stats import interval_of, number_text
from trimtab.studies import ioi as study

SMALL = study.Sizes(
    circuit=CircuitConfig(n_prompts=12, n_test=12, n_random=2),
    contenders=IOIConfig(
        contender=("codes", "task-saes", "pca"), arch=("topk", "relu"), l0=(2.0,), n_features=(24,),
        n_train=150, n_heldout=40, n_test=24, epochs=20, k=(1, 2),
    ),
    more=60,
    seeds=(0, 1),
    alphas=(0.0, 1.0),
)  # fmt: skip


def test_the_study_of_a_known_model(
    built: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built.hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(study.PRESETS, "quick", SMALL)
    fast = {"occlusion_toy": {"ratios": (1.0, 4.0), "l0": (2.0,), "n_values": 12, "d": 16, "n_features": 32}}
    toy = study.occlusion_toy
    monkeypatch.setattr(
        study, "occlusion_toy", lambda **given: toy(**given, **fast["occlusion_toy"], epochs=2, heldout=40)
    )
    monkeypatch.setattr(study, "splitting_toy", lambda: study.SplittingToy(losses=()))
    run = tmp_path / "run"
    words = ["study", "ioi", "--model", str(tmp_path / "model"), "--run", str(run)]
    assert cli.main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {(head["role"], head["layer"], head["head"]) for head in printed["circuit"]["circuit"]["heads"]} == {
        ("name mover", 1, 2), ("S-inhibition", 0, 1),
    }  # fmt: skip
    scores = {(one["cross_section"], one["contender"]): one for one in printed["contenders"]["scores"]}
    codes = scores["name-mover outputs", "supervised, mse"]
    assert codes["approximation"]["normalised_sufficiency"]["estimate"] == pytest.approx(1, abs=0.02)
    assert {edit["result"]["success"]["estimate"] for edit in codes["edits"] if edit["attribute"] == "IO"} == {1.0}
    contenders = {contender for _, contender in scores}
    assert {"no edit", "mean", "relu-n24-l0_2", "principal components"} <= contenders
    assert {one["contender"] for one in printed["attention"]["scores"]} == {
        "supervised, mse", "relu-n24-l0_2", "topk-n24-l0_2",
    }  # fmt: skip
    assert set(printed["seconds"]) == {
        "circuit", "contenders", "attention", "occlusion", "splitting", "occlusion-toy", "splitting-toy",
    }  # fmt: skip

    page = (run / "report.html").read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split()).replace("−", "-")
    for title in ("The circuit", "Dictionaries beside supervised codes", "Occlusion", "Over-splitting"):
        assert title in text
    share = number_text(interval_of(codes["approximation"]["normalised_sufficiency"]), ".2f")
    assert f"supervised, mse {share}" in text
    assert page.count("data:image/svg+xml") >= 5
    assert "<script" not in page

    # What is left of an interrupted study is done, and nothing else.
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "results": None}))
    (run / "part-splitting.json").unlink()
    monkeypatch.setattr(study, "run_circuit", None)
    monkeypatch.setattr(study, "run_ioi", None)
    monkeypatch.setattr(study, "occlusion", None)
    assert cli.main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    changing = {"seconds": None, "peak_gib": None}
    assert again | changing == printed | changing
    assert {name: s for name, s in again["seconds"].items() if name != "splitting"} == {
        name: s for name, s in printed["seconds"].items() if name != "splitting"
    }
    assert cli.main([*words, "--templates", "wang"]) == 2
    assert "templates" in capsys.readouterr().err
