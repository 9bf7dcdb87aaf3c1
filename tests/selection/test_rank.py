"""Ranking from names to a Parquet table, and the table itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from trimtab.dictionaries import DictionaryInfo, Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.lm.logit_lens import logit_lens, token_texts
from trimtab.selection import (
    DeltaConfidence,
    FeatureTable,
    RankConfig,
    RankResult,
    rank,
    rank_by,
    read_feature_tables,
    run_rank,
    side_by_side,
    write_feature_tables,
)


@pytest.fixture
def on_disk(tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    """A tiny model and an SAE of 20 features, two of them dead, as `RankConfig` takes them."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = make_rows(20)
    stats = rows.feature_stats
    stats.max_activation[[3, 11]] = stats.mean_activation[[3, 11]] = stats.firing_rate[[3, 11]] = 0
    unit = rows.directions
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    sae = Standard(unit.T.contiguous(), torch.zeros(20), unit, torch.zeros(32), info=info)
    save_dictionary(sae, tmp_path / "sae", stats)
    return {"model": str(tmp_path / "model"), "sae": str(tmp_path / "sae"), "run": tmp_path / "run"}


def test_rank_command_writes_what_it_prints(on_disk: dict[str, Any]) -> None:
    config = RankConfig(**on_disk, criterion=("delta-confidence", "max-activation"), confidence_k=2, limit=4)
    result = run_rank(config)
    assert [table.criterion for table in result.rankings] == ["delta-confidence(k=2)", "max-activation"]
    rows = pq.read_table(result.table_path).to_pylist()
    assert len(rows) == 2 * 18  # without the dead
    assert not {3, 11} & {row["feature"] for row in rows}
    for criterion in ("delta-confidence(k=2)", "max-activation"):
        mine = [row for row in rows if row["criterion"] == criterion]
        assert [row["rank"] for row in mine] == list(range(18))
        assert [row["score"] for row in mine] == sorted((row["score"] for row in mine), reverse=True)
    first = rows[0]
    assert first["direction"] == ("up" if first["score"] >= 0 else "down")
    assert len(first["top_tokens"]) == 10
    assert first["relative_dose"] > 0
    assert rows[-1]["relative_dose"] is None
    about = result.to_json()
    json.dumps(about)
    assert about["criteria"]["delta-confidence(k=2)"]["top"][0]["feature"] == first["feature"]
    assert len(about["criteria"]["max-activation"]["bottom"]) == 4
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    printed = console.export_text()
    assert "delta-confidence(k=2), smallest first" in printed
    assert "max-activation, largest first" in printed
    assert "max-activation, smallest first" not in printed
    assert f" {first['feature']} " in printed


def test_a_ranking_is_a_frame_and_a_figure(on_disk: dict[str, Any]) -> None:
    result = run_rank(RankConfig(**on_disk, limit=3))
    (ranking,) = result.rankings
    frame, file = ranking.to_frame(), pq.read_table(result.table_path).to_pandas()
    pd.testing.assert_frame_equal(frame, file)
    assert ranking.to_frame("smallest").feature.tolist() == frame.feature.tolist()[:-11:-1]
    assert result.to_frame("delta-confidence, largest first").score.tolist() == frame.score.tolist()[:3]
    scores = [line.get_ydata() for line in ranking.plot(Figure().add_subplot()).lines if len(line.get_ydata()) > 2]
    assert [values.tolist() for values in scores] == [frame.score.tolist()]
    assert repr(ranking) == "<FeatureTable: 18 features by delta-confidence>"
    assert list(ranking.tables()) == ["largest", "smallest"]
    few = ranking.bottom(3)
    assert list(few.tables()) == ["features"]  # not both ends of the same three
    assert few.to_frame("features").feature.tolist() == frame.feature.tolist()[:-4:-1]


def check_one_table(result: RankResult) -> None:
    """Every criterion's score of every feature, read off the file."""
    frame, file = result.to_frame(), pq.read_table(result.table_path).to_pylist()
    labels = [table.criterion for table in result.rankings]
    assert list(frame.columns) == ["feature", *labels, "firing_rate", "max_activation", "top_tokens"]
    assert len(frame) == 18
    assert frame.feature.tolist() == result.rankings[0].feature.tolist()
    for row in file:
        (mine,) = frame[frame.feature == row["feature"]].to_dict("records")
        assert mine[row["criterion"]] == row["score"]
        assert list(mine["top_tokens"]) == row["top_tokens"]


CRITERIA = ("delta-confidence", "entropy-change", "gradient-attribution", "lens-concentration", "max-activation")


def test_several_criteria_are_one_table(on_disk: dict[str, Any]) -> None:
    result = run_rank(RankConfig(**on_disk, criterion=CRITERIA, dose=0.5, limit=4))
    check_one_table(result)
    shown = result.to_frame("side by side")
    frame = result.to_frame()
    assert list(shown.columns) == ["feature", *(table.criterion for table in result.rankings)]
    assert shown.columns[1] == "delta-confidence(dose=0.5)"
    assert shown.feature.tolist() == [
        *frame.feature[:4],
        *frame.feature[-4:],
    ]  # the first is signed
    assert "side by side" not in run_rank(RankConfig(**{**on_disk, "run": on_disk["run"] / "one"})).tables()
    again = run_rank(RankConfig(**on_disk, criterion=CRITERIA, dose=0.5, limit=40))
    assert len(again.to_frame("side by side")) == 18  # no feature twice
    pd.testing.assert_frame_equal(again.to_frame(), frame)


def test_mutation_scores_side_by_side_in_orders_of_their_own(
    on_disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.selection.feature_table.np.searchsorted", lambda a, _v: np.arange(len(a)))
    result = run_rank(RankConfig(**on_disk, criterion=CRITERIA))
    with pytest.raises(AssertionError):
        check_one_table(result)


def test_rankings_that_do_not_fit_side_by_side(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    one, other = rank_by(tiny_llama, make_rows(5), ["random", "max-activation"])
    for given, message in (
        ([], "the rankings: there is none"),
        ([one, one], "the rankings: two are by one criterion"),
        ([one, other.top(3)], "the rankings by random and max-activation: they are of different features"),
    ):
        with pytest.raises(UserError, match=message):
            side_by_side(given)


def test_rank_command_again_reads_back(on_disk: dict[str, Any]) -> None:
    first = run_rank(RankConfig(**on_disk))
    written = first.table_path.stat().st_mtime_ns
    again = run_rank(RankConfig(**on_disk, limit=3))
    assert again.resumed
    assert not first.resumed
    assert again.table_path.stat().st_mtime_ns == written
    assert_same_table(first.rankings[0], again.rankings[0])


def test_rank_command_with_a_changed_config(on_disk: dict[str, Any]) -> None:
    run_rank(RankConfig(**on_disk))
    with pytest.raises(UserError, match=r"dose was None and is now 3\.0"):
        run_rank(RankConfig(**on_disk, dose=3.0))


def test_rank_command_after_the_sae_changed(on_disk: dict[str, Any]) -> None:
    run_rank(RankConfig(**on_disk))
    from trimtab.dictionaries import load_dictionary

    sae = load_dictionary(on_disk["sae"])
    sae.b_dec.data[0] = 1.0
    save_dictionary(sae, on_disk["sae"])
    with pytest.raises(UserError, match="has changed since this run was made of it"):
        run_rank(RankConfig(**on_disk))


def test_default_directory_depends_on_what_decides_the_result() -> None:
    assert RankConfig().directory() == RankConfig(limit=3, batch_size=7).directory()
    assert RankConfig().directory() != RankConfig(confidence_k=2).directory()
    assert RankConfig().directory().parent == Path("runs")


def test_a_failed_ranking_leaves_no_table(on_disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.selection import scorer

    def fail(*_args: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(scorer.Unembedding, "_project", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        run_rank(RankConfig(**on_disk))
    assert not list(on_disk["run"].glob("*.parquet"))
    monkeypatch.undo()
    assert not run_rank(RankConfig(**on_disk)).resumed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": ("sharpness",)}, r"criterion 'sharpness': there are"),
        ({"criterion": ("random",), "dose": 3.0}, r"setting dose: none of the criteria random has it"),
        ({"limit": 0}, r"limit 0: it must be at least 1"),
        ({"dose": float("inf")}, r"dose inf: a dose is a finite number"),
        ({"unit": "relative"}, r"unit relative: it has no usual dose; give one, like --dose 0\.4"),
        ({"prefix": ("",)}, r"a prefix: it is empty"),
    ],
)
def test_bad_config(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": (2, 20)}, r"feature 20: the dictionary has features 0 to 19"),
        ({"feature": (2, 2)}, r"the features: one is given twice"),
        ({"feature": (3, 11)}, r"the features: none of them ever fired"),
        ({"site": "resid_post.2"}, r"site resid_post\.2: the dictionary reads resid_post\.1"),
        ({"site": "resid_post.9"}, r"site resid_post\.9: .* has layers 0 to 3"),
        ({"top_tokens": 161}, r"161 tokens: there are 1 to 160"),
    ],
)
def test_bad_input_writes_nothing(on_disk: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_rank(RankConfig(**{**on_disk, **settings}))
    assert not list(on_disk["run"].glob("*.parquet"))


def test_rank_without_a_site(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary = make_rows(4, site="")
    with pytest.raises(UserError, match=r"--site: the SAE's file does not name the site"):
        rank(tiny_llama, dictionary)
    assert len(rank(tiny_llama, dictionary, site="resid_post.2")) == 4


def test_rank_without_statistics(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary = make_rows(4)
    dictionary.feature_stats = None
    table = rank(tiny_llama, dictionary, "random")
    assert len(table) == 4
    assert np.isnan(table.firing_rate).all()
    assert table.to_arrow()["max_activation"].null_count == 4


def test_rank_of_another_width(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"dictionary of width 31: tiny-llama has width 32"):
        rank(tiny_llama, make_rows(4, d=31))


def test_rank_of_some_features_keeps_their_scores(tiny_gemma3: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary = make_rows(30)
    everything = rank(tiny_gemma3, dictionary)
    some = rank(tiny_gemma3, dictionary, features=[17, 4, 9], top_tokens=3)
    assert sorted(some.feature.tolist()) == [4, 9, 17]
    scores = dict(zip(everything.feature.tolist(), everything.score.tolist(), strict=True))
    assert some.score.tolist() == pytest.approx([scores[i] for i in some.feature.tolist()], abs=1e-4)
    assert all(len(tokens) == 3 for tokens in some.top_tokens)


def test_tables_survive_the_disk(tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path) -> None:
    tables = rank_by(tiny_llama, make_rows(9), [DeltaConfidence(dose=2.0), "random"])
    write_feature_tables(tmp_path / "features.parquet", tables)
    for before, after in zip(tables, read_feature_tables(tmp_path / "features.parquet"), strict=True):
        assert_same_table(before, after)


def test_ends_of_a_table() -> None:
    table = FeatureTable.ranked(
        criterion="delta-confidence",
        signed=True,
        order_by=np.array([0.5, -2.0, 3.0, 0.5]),
        feature=np.arange(4, dtype=np.int32),
        relative_dose=np.ones(4, np.float32),
        firing_rate=np.ones(4),
        max_activation=np.ones(4, np.float32),
        top_tokens=tuple((str(i),) for i in range(4)),
    )
    assert table.feature.tolist() == [2, 0, 3, 1]
    assert table.top(2).top_tokens == (("2",), ("0",))
    assert table.bottom(2).feature.tolist() == [1, 3]
    assert table.direction.tolist() == ["up", "up", "up", "down"]
    assert len(table.top(10)) == 4


@pytest.mark.parametrize("content", [b"", b"PAR1 not a table", None])
def test_reading_what_is_no_table(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "features.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"no such file|not readable as a table of ranked features"):
        read_feature_tables(path)


def test_logit_lens_against_float64(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    """RMSNorm and the head written out."""
    rows = make_rows(40).W_dec.detach()
    found = logit_lens(tiny_llama, rows, 5)
    x = rows.double()
    hf: Any = tiny_llama.hf
    x = x / (x.pow(2).mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt() * hf.model.norm.weight.double()
    p = (x @ hf.lm_head.weight.double().T).softmax(-1)
    expected = p.sort(-1, descending=True)
    assert torch.equal(found.ids, expected.indices[:, :5])
    torch.testing.assert_close(found.probs.double(), expected.values[:, :5], rtol=1e-4, atol=1e-6)
    texts = token_texts(tiny_llama, found.ids)
    assert texts[0][0] == tiny_llama.tokenizer.decode([int(found.ids[0, 0])])


def test_logit_lens_bad_input(tiny_llama: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"width 31: tiny-llama has width 32"):
        logit_lens(tiny_llama, torch.ones(2, 31))
    with pytest.raises(UserError, match=r"0 tokens: there are 1 to 160"):
        logit_lens(tiny_llama, torch.ones(2, 32), 0)


def assert_same_table(a: FeatureTable, b: FeatureTable) -> None:
    assert (a.criterion, a.signed, a.top_tokens) == (b.criterion, b.signed, b.top_tokens)
    for name in ("feature", "score", "relative_dose", "firing_rate", "max_activation"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
