"""Scores of explanations out of tables and runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from trimtab.dictionaries import DictionaryInfo, Standard, load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.runs import Run
from trimtab.selection import ExplanationScore, RankConfig, rank, run_rank

SCORES = {7: 0.5, 2: 0.8125, 4: 12 / 14, 0: 10 / 14}


def table(path: Path, rows: Sequence[tuple[int, float | None]] = tuple(SCORES.items())) -> Path:
    frame = pd.DataFrame(rows, columns=["feature", "score"]).assign(explanation="about the sea")
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def check(model: LanguageModel, dictionary: Any, given: Path) -> None:
    found = rank(model, dictionary, ExplanationScore(explanations=str(given)), features=[0, 2, 4, 7])
    assert found.feature.tolist() == [4, 2, 0, 7]
    assert found.score.tolist() == [12 / 14, 0.8125, 10 / 14, 0.5]
    two = rank(model, dictionary, ExplanationScore(explanations=str(given)), features=[7, 2])
    assert two.feature.tolist() == [2, 7]


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet", "autointerp.parquet"])
def test_features_are_ranked_by_the_table(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    path = table(tmp_path / name)
    given = tmp_path if name == "autointerp.parquet" else path  # of a run, the run may be named
    check(tiny_llama, make_rows(9), given)


def test_mutation_scores_in_the_order_of_the_table(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "scores.csv")
    monkeypatch.setattr(ExplanationScore, "scores", lambda _self, target: torch.tensor(list(SCORES.values())))
    with pytest.raises(AssertionError):
        check(tiny_llama, make_rows(9), path)


@pytest.fixture
def on_disk(tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    unit = make_rows(9).directions
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    sae = Standard(unit.T.contiguous(), unit.new_zeros(9), unit, unit.new_zeros(32), info=info)
    save_dictionary(sae, tmp_path / "sae", make_rows(9).feature_stats)
    return {"model": str(tmp_path / "model"), "sae": str(tmp_path / "sae"), "run": tmp_path / "run"}


def judged(path: Path, fingerprint: str) -> str:
    """A finished run that has scores."""
    with Run.open(path, "autointerp", {"judge": "rules"}) as run:
        run.record(hashes={"dictionary resid_post.1": fingerprint})
        table(run.file("autointerp.parquet"))
        run.finish({})
    return str(path)


def test_the_command_ranks_those_that_have_a_score_beside_what_steers(on_disk: dict[str, Any], tmp_path: Path) -> None:
    explanations = judged(tmp_path / "judged", load_dictionary(on_disk["sae"]).fingerprint)
    config = RankConfig(**on_disk, criterion=("delta-confidence", "explanation-score"), explanations=explanations)
    result = run_rank(config)
    frame = result.to_frame()
    label = f"explanation-score(explanations={explanations})"
    assert dict(zip(frame.feature.tolist(), frame[label].tolist(), strict=True)) == SCORES
    table(tmp_path / "judged" / "autointerp.parquet", [(7, 0.9), (2, 0.5)])
    with pytest.raises(UserError, match="its explanations had hash"):  # not the old ranking as if it were the new one
        run_rank(config)


def test_scores_of_another_sae(on_disk: dict[str, Any], tmp_path: Path) -> None:
    explanations = judged(tmp_path / "judged", "0123456789abcdef")
    with pytest.raises(UserError, match=r"explanations .*judged: they are of another SAE's features"):
        run_rank(RankConfig(**on_disk, criterion=("explanation-score",), explanations=explanations))


def test_features_without_a_score(tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path) -> None:
    """Left out of the table, or a gap in it, which is no 0."""
    path = table(tmp_path / "scores.csv", [(0, 0.5), (1, None), (2, 0.75)])
    criterion = ExplanationScore(explanations=str(path))
    with pytest.raises(UserError, match=r"they have no score of feature 1 and 1 others; rank only features that they"):
        rank(tiny_llama, make_rows(9), criterion, features=[0, 1, 2, 8])
    with pytest.raises(UserError, match=r"they have no score of feature 8; "):
        rank(tiny_llama, make_rows(9), criterion, features=[8, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"explanations .*: no such file; give a run of `trimtab autointerp`, or a Parquet or CSV"),
        ("feature,accuracy\n1,0.5\n", r"not readable as scores of features"),
        ("feature,score\nsea,0.5\n", r"not readable as scores of features"),
        ("feature,score\n1,0.5\n3,0.5\n1,0.75\n", r"feature 1 has 2 rows; keep one row per feature"),
    ],
)
def test_bad_tables(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        rank(tiny_llama, make_rows(9), ExplanationScore(explanations=str(path)), features=[1])


def test_no_table_is_named(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"criterion explanation-score: .*: --explanations RUN"):
        rank(tiny_llama, make_rows(9), "explanation-score")
