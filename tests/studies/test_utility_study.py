"""The study of utility on a tiny model: all stages, what is not done twice, what fails, and the page."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from trimtab.activations import Document
from trimtab.dictionaries.feature_examples import FeatureExamples
from trimtab.lm import LanguageModel
from trimtab.report import write_report
from trimtab.runs import Done, InProcess, Run, read_record, run_stage
from trimtab.studies.utility import command, stages
from trimtab.studies.utility.command import UtilityStudyConfig, run_utility_study
from trimtab.studies.utility.plan import read_study
from trimtab.studies.utility.result import UtilityStudy

STUDY = """
[study]
features = 12
criterion = ["delta-confidence", "firing-rate"]
factor = [0.5, 1.0]
n_instructions = 4
max_new_tokens = 4
dtype = "bfloat16"
resamples = 200
judge = "study_judges:ByText"

[[bank]]
model = {model}
text = [{text}]
site = "resid_post.1"
arch = ["topk", "batchtopk"]
l0 = [2, 3, 4]
n_features = 64
batch_size = 128
rows = 4000
context = 64
heldout_rows = 500
"""


@pytest.fixture(scope="module")
def config(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> UtilityStudyConfig:
    folder = tmp_path_factory.mktemp("utility")
    tiny_llama.hf.save_pretrained(folder / "model")
    tiny_llama.tokenizer.save_pretrained(folder / "model")
    draw = random.Random(5)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for number in range(120):
            words = ("".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(40))
            file.write(json.dumps({"id": str(number), "text": " ".join(words)}) + "\n")
    text = STUDY.format(model=json.dumps(str(folder / "model")), text=json.dumps(str(folder / "text.jsonl")))
    (folder / "study.toml").write_text(text, encoding="utf-8")
    return UtilityStudyConfig(study=folder / "study.toml", run=folder / "run")


@pytest.fixture(scope="module")
def done(config: UtilityStudyConfig) -> UtilityStudy:
    """One SAE fails at first; the same command does what is left."""
    with pytest.MonkeyPatch.context() as patch:
        real = stages.run_autointerp

        def fail_once(autointerp: Any) -> Any:
            if "batchtopk-n64-l0_3" in str(autointerp.run):
                raise RuntimeError("out of memory")
            return real(autointerp)

        patch.setattr(stages, "run_autointerp", fail_once)
        found = run_utility_study(config)
    (failed,) = found.failed
    assert "batchtopk-n64-l0_3" in failed.what
    assert (failed.stage, failed.reason) == (
        "interpret",
        "interpret: RuntimeError: out of memory; the traceback is above",
    )
    assert len(found.saes) == 5
    assert read_record(config.run)["status"] != "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train_bank", lambda *_: 1 / 0)  # what is done is not done again
        patch.setattr(stages, "examples_of_text", lambda *_: 1 / 0)
        return run_utility_study(config)


def test_every_sae_has_its_scores(done: UtilityStudy, config: UtilityStudyConfig) -> None:
    assert not done.failed
    assert {(sae.architecture, sae.sparsity) for sae in done.saes} == {
        (a, k) for a in ("topk", "batchtopk") for k in (2, 3, 4)
    }
    for sae in done.saes:
        assert set(sae.selected) == {"delta-confidence", "firing-rate"}
        assert len(sae.interpretability_parts) >= len(sae.utility_parts) >= 8
        assert sae.interpretability == pytest.approx(sum(sae.interpretability_parts) / len(sae.interpretability_parts))
        assert sae.utility == pytest.approx(sum(sae.utility_parts) / len(sae.utility_parts))
    assert len({sae.utility for sae in done.saes}) == 6
    assert done.agreement is not None
    assert done.agreement.of().n == 6
    assert ("interpretability shuffled", "utility shuffled") in {(s.score, s.against) for s in done.agreement.shuffled}
    assert [one.tables for one in done.lifts] == [6, 6]
    for row, name in zip(done.tables()["scores"].rows, ("interpretability", "utility"), strict=True):
        less = [getattr(sae, name) - getattr(sae, f"{name}_shuffled") for sae in done.saes]
        assert row["difference"].estimate == pytest.approx(sum(less) / 6)
    ((one, other),) = [(pair.criterion, pair.over) for pair in done.pairs]
    assert (one, other) == ("delta-confidence", "firing-rate")
    assert read_record(config.run)["status"] == "done"
    cell = next((config.run / "cells").iterdir())
    kinds = {stage: read_record(cell / stage)["config"]["dtype"] for stage in ("rank", "axbench")}
    assert kinds == {"rank": "float32", "axbench": "bfloat16"}  # ranks see small differences


def test_an_sae_that_is_trained_later_joins(config: UtilityStudyConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (bank,) = read_study(config.study, run).banks
    shard = stages.Bank(number=1, config=replace(bank, members=bank.members[:1]))
    stages.train(None, shard)
    first = stages.Trained(bank=shard, names=tuple(cell.name for cell in stages.cells_of(shard)))
    windows = stages.Windows(top=2, weighted=2, limit_tokens=2000, seed=0)
    run_stage(stages.collect, windows, [first], records=tmp_path / "stages")
    shard = stages.Bank(number=1, config=replace(bank, members=bank.members[:2]))
    stages.train(None, shard)
    later = stages.Trained(bank=shard, names=tuple(cell.name for cell in stages.cells_of(shard)))
    (done,) = run_stage(stages.collect, windows, [later], records=tmp_path / "stages")
    assert isinstance(done, Done)
    assert not done.skipped
    assert all(cell.examples(half).is_file() for cell in stages.cells_of(shard) for half in stages.HALVES)


def test_halves_share_no_document_and_few_neighbours() -> None:
    pieces = [Document(f"novel.txt#{i:04d}", "a", "novel.txt") for i in range(7)]
    records = [Document(str(i), "b", "rows") for i in range(4)]
    one, other = stages.halves([*pieces, *records])
    assert [d.id for d in one] == ["novel.txt#0000", "novel.txt#0001", "novel.txt#0002", "0", "2"]
    assert [d.id for d in other] == ["novel.txt#0003", "novel.txt#0004", "novel.txt#0005", "novel.txt#0006", "1", "3"]


def test_a_done_study_may_be_moved(done: UtilityStudy, config: UtilityStudyConfig, tmp_path: Path) -> None:
    copytree(config.run, tmp_path / "moved")
    assert run_utility_study(replace(config, run=tmp_path / "moved")).saes == done.saes


def test_windows_that_interpret_are_of_other_documents(done: UtilityStudy, config: UtilityStudyConfig) -> None:
    for cell in (config.run / "cells").iterdir():
        one, other = (FeatureExamples.read(cell / half / "feature_examples.parquet") for half in stages.HALVES)
        assert len(set(one.documents)) > 10
        assert not set(one.documents) & set(other.documents)


def test_a_done_study_is_read_back_and_has_a_page(done: UtilityStudy, config: UtilityStudyConfig) -> None:
    again = run_utility_study(config)
    assert again.to_json() == done.to_json()
    page = write_report(config.run).read_text(encoding="utf-8")
    assert "Interpretability against utility" in page
    assert page.count("data:image/svg+xml") == 2
    assert "delta-confidence" in page


def test_scores_that_are_all_equal_are_shown_without_a_rank(
    done: UtilityStudy, config: UtilityStudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.scored_sae
    monkeypatch.setattr(command, "scored_sae", lambda cell: replace(real(cell), utility=0.0))
    study = read_study(config.study, config.run.absolute(), {"device": "cpu"})
    with Run.open(tmp_path / "other", "study utility", {}) as run:
        (tmp_path / "other" / "stages").symlink_to(config.run / "stages")
        found = command.Study(study, run, InProcess()).result()
    assert found.agreement is None
    assert found.headline().startswith("Not ranked: before selection: all 6 values are 0.")
    assert set(found.tables()) == {"scores", "SAEs", "lifts", "pairs"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra scale)")
def test_on_a_ray_cluster(
    done: UtilityStudy, config: UtilityStudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one that is there for all stages, whose workers import torch once."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = run_utility_study(replace(config, run=tmp_path / "run", executor="ray"))
    finally:
        ray.shutdown()
    assert not found.failed
    assert [sae.utility for sae in found.saes] == pytest.approx([sae.utility for sae in done.saes], abs=1e-6)
