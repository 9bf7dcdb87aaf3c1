"""Training on texts in memory: the SAE that the command trains, with a run or without one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from trimtab.activations import HarvestOptions
from trimtab.dictionaries import load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.training import TrainedSAE, TrainTextConfig, train_sae, train_text

WORDS = "the cat and the hen ran in and over then under the inn and there they sat"
TEXTS = [f"{WORDS[i % 30 :]} {i} " * 4 for i in range(60)]
SMALL = {"n_features": 64, "l0": 4, "batch_size": 64, "epochs": 2.0, "log_every": 5, "sample_rows": 512}
ROWS = HarvestOptions(context=32, holdout=0.2)


@pytest.fixture(scope="module")
def trained(tiny_llama: LanguageModel) -> TrainedSAE:
    return train_sae(tiny_llama, TEXTS, "resid_post.1", harvest_options=ROWS, **SMALL)


def test_it_is_what_the_command_trains(trained: TrainedSAE, data: list[str], tmp_path: Path) -> None:
    """On the same texts in a file, up to the ids of documents, which decide what is held out: here nothing is."""
    named = dict(zip(data[::2], data[1::2], strict=True))
    shared = {"site": "resid_post.1", "context": 32, "holdout": 0.0, **SMALL}
    config = TrainTextConfig(model=named["--model"], text=(named["--text"],), run=tmp_path / "run", **shared)
    command = train_text(config)
    assert command is not None
    model = config.load_model()
    rows = HarvestOptions(context=32, holdout=0.0)
    here = train_sae(model, TEXTS, "resid_post.1", harvest_options=rows, **SMALL)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(here.sae, name), getattr(command.sae, name))
    assert here.result.explained_variance == command.result.explained_variance
    assert here.metrics[-1]["loss"] == command.metrics[-1]["loss"]


def test_too_short_texts_to_hold_any_out_are_told(tiny_llama: LanguageModel) -> None:
    texts = [f"{WORDS[:20]} {i}" for i in range(60)]
    with pytest.warns(UserWarning, match="no document is held out") as told:
        found = train_sae(tiny_llama, texts, "resid_post.1", **SMALL)
    (said,) = told
    assert str(said.message).endswith("or hold out a larger share: harvest_options=HarvestOptions(holdout=0.3)")
    assert said.filename == __file__
    assert "training rows" in repr(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for holdout, measured in ((0.4, "held-out rows"), (0.0, "training rows")):
            rows = HarvestOptions(holdout=holdout)
            assert measured in repr(train_sae(tiny_llama, texts, "resid_post.1", harvest_options=rows, **SMALL))


def test_nothing_is_kept_unless_asked_for(
    trained: TrainedSAE, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for options, message in (({"n_features": 0}, "n_features"), ({}, "does not fill one sequence")):
        with pytest.raises(UserError, match=message):
            train_sae(tiny_llama, ["an inn"], "resid_post.1", **(SMALL | options))
    with pytest.raises(UserError, match=r"site resid_post\.9"):
        train_sae(tiny_llama, TEXTS, "resid_post.9", **SMALL)
    made = train_sae(tiny_llama, TEXTS, "resid_post.1", harvest_options=ROWS, **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert made.run is None
    assert made.sae.name == "topk SAE of 64 features"
    assert "next" not in str(made.render())
    save_dictionary(made.sae, tmp_path / "mine")
    again = load_dictionary(tmp_path / "mine", model=tiny_llama)
    assert torch.equal(again.W_dec, trained.sae.W_dec)
    assert again.feature_stats is not None


def test_a_run_is_kept_and_gone_on_with(trained: TrainedSAE, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train_sae(tiny_llama, TEXTS, "resid_post.1", harvest_options=ROWS, run=run, **SMALL)
    again = train_sae(tiny_llama, TEXTS, "resid_post.1", harvest_options=ROWS, run=run, **SMALL)
    assert (first.resumed, again.resumed) == (False, True)
    assert torch.equal(again.sae.W_dec, trained.sae.W_dec)
    assert (run / "sae").is_dir()
    with pytest.raises(UserError, match="its corpus had hash"):
        train_sae(tiny_llama, TEXTS[1:], "resid_post.1", harvest_options=ROWS, run=run, **SMALL)
    with pytest.raises(UserError, match=r"l0 was 4(\.0)? and is now 5"):
        train_sae(tiny_llama, TEXTS, "resid_post.1", harvest_options=ROWS, run=run, **(SMALL | {"l0": 5}))


def test_it_is_a_frame_a_figure_and_a_line(trained: TrainedSAE) -> None:
    frame = trained.to_frame()
    assert frame.explained_variance.tolist() == [line["explained_variance"] for line in trained.metrics]
    assert trained.to_frame("result").l0.tolist() == [trained.result.l0]
    (line,) = trained.plot(Figure().add_subplot()).lines
    pd.testing.assert_series_equal(
        pd.Series(line.get_ydata()), frame.explained_variance, check_names=False, check_dtype=False
    )
    assert repr(trained).startswith("<TrainedSAE: explained variance 0.")
    assert repr(trained.sae) == "<TopK: 64 features of width 32, resid_post.1 of tiny-llama>"
    assert trained.result.heldout
