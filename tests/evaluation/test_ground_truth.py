"""The ground-truth benchmark: planted features are found, architectures are ranked with intervals, runs resume."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from trimtab.activations import SyntheticConfig, SyntheticSource
from trimtab.cli import main
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.errors import UserError
from trimtab.evaluation import GroundTruthConfig, GroundTruthResult, Scored, run_ground_truth, score
from trimtab.evaluation.ground_truth_scores import LABELS, RANDOM, TRUE, TRUE_ENCODED, GroundTruthScores, controls
from trimtab.stats import student_mean

TINY: dict[str, Any] = {
    "d": 16, "n_true": 16, "true_l0": 2.0, "n_parents": 1, "n_children": 2, "n_features": 20,
    "rows": 1_280, "heldout_rows": 1_024, "batch_size": 128, "data_sets": 2,
}  # fmt: skip


def test_topk_finds_what_was_planted():
    """Without families or correlations a TopK SAE of the true L0 finds nearly all features, on each of three seeds."""
    result = run_ground_truth(
        GroundTruthConfig(
            arch=("topk",),
            d=32,
            n_true=32,
            true_l0=2.0,
            n_parents=0,
            n_features=48,
            rows=60_000,
            heldout_rows=4_000,
            batch_size=256,
            lr=4e-3,
            data_sets=3,
        )
    )
    trained = [one for one in result.scored if one.kind == "trained"]
    assert [one.data_seed for one in trained] == [0, 1, 2]
    for one in trained:
        assert one.scores["recovered"] >= 0.85, one
        assert one.scores["true_to_learned"] >= 0.93, one
        assert one.scores["l0"] == pytest.approx(2, rel=0.05), one
        assert one.scores["absorption"] is None
    chance = next(one for one in result.scored if one.dictionary == RANDOM)
    assert chance.scores["recovered"] <= 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroundTruthConfig, GroundTruthResult]:
    directory = tmp_path_factory.mktemp("ground_truth") / "run"
    config = GroundTruthConfig(**TINY, arch=("topk", "batchtopk"), l0=(1, 2), run=directory)
    return config, run_ground_truth(config)


def test_every_architecture_and_control_is_scored_on_every_data_set(run):
    _, result = run
    found = {(one.dictionary, one.kind, one.l0_target, one.data_seed) for one in result.scored}
    assert len(found) == len(result.scored) == 2 * 2 * (2 + 4)
    assert {name for name, kind, *_ in found if kind == "trained"} == {"topk", "batchtopk"}
    assert all(set(one.scores) == set(GroundTruthScores._fields) == set(LABELS) for one in result.scored)


def test_all_architectures_by_default():
    members = GroundTruthConfig(**TINY).members(0)
    assert {member.values["arch"] for member in members} == set(TRAINABLE)


def test_the_run_holds_saes_and_scores(run):
    config, result = run
    table = pq.read_table(config.run / "ground_truth.parquet").to_pylist()
    assert len(table) == len(result.scored)
    for row, one in zip(table, result.scored, strict=True):
        assert row["dictionary"] == one.dictionary
        assert row["f1"] == one.scores["f1"]
    assert len(list(config.run.glob("data*/members/*/sae/sae_weights.safetensors"))) == 8


def test_the_same_command_again_reads_the_run(run):
    config, result = run
    again = run_ground_truth(config)
    assert again.resumed
    assert again.scored == result.scored
    fewer = run_ground_truth(dataclasses.replace(config, data_sets=1))
    assert fewer.resumed
    assert {one.data_seed for one in fewer.scored} == {0}
    with pytest.raises(UserError, match="rows"):
        run_ground_truth(dataclasses.replace(config, rows=2_560))


def test_a_run_grows_by_data_sets(tmp_path: Path):
    config = GroundTruthConfig(**{**TINY, "data_sets": 1}, arch=("topk",), run=tmp_path / "run")
    first = run_ground_truth(config)
    both = run_ground_truth(dataclasses.replace(config, data_sets=2))
    assert not both.resumed
    assert both.scored[: len(first.scored)] == first.scored
    assert both.entries(2)[0].scores["f1"].n == 2
    assert pq.read_table(config.run / "ground_truth.parquet").num_rows == len(both.scored)  # type: ignore[operator]


def test_json_and_text(run):
    _, result = run
    restored = json.loads(json.dumps(result.to_json()))
    assert list(restored["ranking"]) == ["1", "2"]
    first = restored["ranking"]["2"][0]
    assert first["kind"] == "trained"
    assert first["scores"]["f1"]["n"] == 2
    text = result.render()
    assert "L0 2, ranked by F1 of firing" in text
    assert "1. " in text
    assert TRUE in text
    assert str(result.run) in text


def scored(name: str, values: list[float | None], l0: float = 4) -> list[Scored]:
    return [
        Scored(dictionary=name, kind="trained", l0_target=l0, data_seed=seed, scores={"f1": value, "l0": 4.0})
        for seed, value in enumerate(values)
    ]


def result_of(*parts: list[Scored]) -> GroundTruthResult:
    return GroundTruthResult(
        description="some data", rank_by="f1", threshold=0.8, scored=tuple(one for part in parts for one in part)
    )


def test_ranking_is_by_the_mean_and_compares_within_data_sets():
    worse, better = [0.5, 0.6, 0.8], [0.55, 0.7, 0.83]
    first, second = result_of(scored("worse", worse), scored("better", better)).entries(4)
    assert (first.dictionary, second.dictionary) == ("better", "worse")
    assert first.behind is None
    assert first.scores["f1"] == student_mean(better)
    assert second.behind == student_mean(np.subtract(better, worse))


def trained_with(name: str, l0: float, recovered: float, target: float = 4, kind: Any = "trained") -> list[Scored]:
    scores: dict[str, float | None] = {"f1": 0.5, "l0": l0, "recovered": recovered}
    return [Scored(dictionary=name, kind=kind, l0_target=target, data_seed=seed, scores=scores) for seed in (0, 1)]


def test_rows_off_the_target_are_marked_and_the_mark_is_explained():
    control = trained_with("true", 8.0, 1.0, kind="control")
    near = [*trained_with("low", 3.61, 0.2), *trained_with("high", 4.39, 0.2)]
    text = result_of(near, control).render()
    assert "≠" not in text
    result = result_of(near, trained_with("far", 4.41, 0.2), trained_with("farther", 3.59, 0.2), control)
    text = result.render()
    marked = {line.split()[1] for line in text.splitlines() if " ≠ " in line and line[0].isdigit()}
    assert marked == {"far", "farther"}
    assert "≠: its L0 is more than 10% off the one asked for, so that it is not ranked at equal L0." in text
    ranking = result.to_json()["ranking"]["4"]
    assert {entry["dictionary"] for entry in ranking if entry["missed_l0"]} == {"far", "farther"}


def test_a_setting_in_which_nothing_is_recovered_is_called_too_small():
    control = trained_with("true", 4.0, 1.0, kind="control")
    lost, found = trained_with("a", 4.0, 0.0004), trained_with("b", 4.0, 0.001)
    said = "No architecture recovered a true feature: the setting is too small to rank."
    assert said in result_of(lost, control).render()
    assert said not in result_of(lost, found, control).render()
    assert said not in result_of(control).render()
    both = result_of(lost, found, trained_with("a", 8.0, 0.0, target=8)).render()
    assert both.count(said) == 1
    assert both.index(said) > both.index("L0 8, ranked")


def test_a_score_that_does_not_exist_is_left_out():
    (entry,) = result_of(scored("a", [0.4, None, 0.6])).entries(4)
    assert entry.scores["f1"].estimate == pytest.approx(0.5)
    assert entry.scores["f1"].n == 2


def test_a_failure_is_shown_and_ranks_nothing():
    failed = Scored(dictionary="b", kind="trained", l0_target=4, data_seed=1, scores={}, error="loss nan at step 3")
    result = result_of(scored("a", [0.4, 0.5]), scored("b", [0.6]), [failed])
    assert [entry.dictionary for entry in result.entries(4)] == ["b", "a"]
    assert "failed: b, L0 4, data set 1: loss nan at step 3" in result.render()


def test_each_l0_is_ranked_by_itself():
    result = result_of(scored("a", [0.4], 2), scored("a", [0.9], 8), scored("b", [0.5], 2), scored("b", [0.6], 8))
    assert result.l0_targets == [2, 8]
    assert [entry.dictionary for entry in result.entries(2)] == ["b", "a"]
    assert [entry.dictionary for entry in result.entries(8)] == ["a", "b"]


def test_controls_have_the_l0_they_are_asked_for():
    source = SyntheticSource(SyntheticConfig(d=32, n_true=64, true_l0=3.0))
    rows = source.labelled(4_096)
    found = {
        name: score(control.dictionary, rows, source.features, threshold=0.8, codes=control.codes)
        for name, control in controls(source.features, source.sample(4_096), 80, 3.0).items()
    }
    for name, scores in found.items():
        assert scores.l0 == pytest.approx(3, abs=0.1), name
    true = found[TRUE]
    assert true.f1 == true.recovered == 1
    assert true.explained_variance == pytest.approx(1 - 0.01, abs=0.002)  # what is left is the noise
    assert found[TRUE_ENCODED].recovered == 1
    assert found[RANDOM].f1 < found[TRUE_ENCODED].f1 < 1


def test_scores_fall_as_weights_are_disturbed():
    source = SyntheticSource(SyntheticConfig(d=32, n_true=40, true_l0=2.0, n_parents=2))
    rows = source.labelled(4_096)
    found = []
    for size in (0.0, 0.05, 0.2):
        sae = controls(source.features, source.sample(4_096), 40, 2.0)[TRUE_ENCODED].dictionary
        for weight in (sae.W_enc, sae.W_dec):
            weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        found.append(score(sae, rows, source.features, threshold=0.8))
    for name in ("f1", "true_to_learned", "matched_cosine", "explained_variance"):
        values = [getattr(scores, name) for scores in found]
        assert values == sorted(values, reverse=True), name
        assert values[0] - values[-1] > 0.1, name


def test_unknown_architecture_names_the_list():
    with pytest.raises(UserError, match=rf"arch 'topkk': it is one of {', '.join(sorted(TRAINABLE))}.*topk"):
        GroundTruthConfig(arch=("topk", "topkk"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_sets": 0}, "data_sets 0: it must be at least 1"),
        ({"rows": 100}, "rows 100: it must be at least batch_size"),
        ({"match_cosine": 0.0}, r"match_cosine 0\.0: it must be above 0"),
        ({"n_features": 2, "l0": (3.0,), "arch": ("topk",)}, "l0 3: it must be from 1"),
        ({"true_l0": 100.0}, "true_l0 100"),
    ],
)
def test_impossible_configs_say_so(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        GroundTruthConfig(**changes)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "data_sets": 1}.items()]
    assert main(["evaluate", "ground-truth", *words, "--arch", "topk", "--run", str(tmp_path / "r"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (trained,) = (entry for entry in found["ranking"]["2"] if entry["kind"] == "trained")
    assert math.isfinite(trained["scores"]["f1"]["estimate"])
    assert trained["scores"]["f1"]["low"] is None
    assert main(["evaluate", "ground-truth", "--arch", "nope"]) == 2
    assert "arch 'nope': it is one of" in capsys.readouterr().err
