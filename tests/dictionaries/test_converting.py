"""`trimtab sae convert` and `trimtab sae info`: what is written, what is said, and every mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trimtab.cli import main
from trimtab.dictionaries import DictionaryInfo, FeatureStats, load_dictionary, save_dictionary

INFO = DictionaryInfo(
    architecture="jumprelu",
    model="tiny",
    site="resid_post.1",
    metadata={"lr": 0.001, "training": {"architecture": "batchtopk", "k": 5}, "calibration": None},
)


def stats_of(n: int) -> FeatureStats:
    rate = np.zeros(n)
    rate[:4] = [0.5, 0.25, 0.1, 0.05]
    ones = np.ones(n, dtype=np.float32)
    return FeatureStats(max_activation=ones, mean_activation=ones, firing_rate=rate, n_tokens=1000)


@pytest.fixture
def gemma(random_sae, tmp_path):
    """A directory in Gemma Scope's format, and the SAE that it holds."""
    sae = random_sae("jumprelu", apply_b_dec_to_input=False)
    path = tmp_path / "params" / "layer_2"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **{name: getattr(sae, name).numpy() for name in sae.shapes})
    return path, sae


def run(capsys, *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def mistake(capsys, *words: object) -> str:
    assert main([*map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_converted_computes_the_same(capsys, tmp_path, gemma, dtype):
    path, sae = gemma
    result = run(capsys, "sae", "convert", path, tmp_path / "out", "--dtype", dtype)
    weights = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert weights["W_dec"].dtype == getattr(torch, dtype)
    written = load_dictionary(tmp_path / "out")
    assert written.settings == sae.settings
    for name in sae.shapes:
        weight = getattr(sae, name)
        kept = weight.half().float() if dtype == "float16" and weight.ndim == 2 else weight
        assert torch.equal(getattr(written, name), kept), name
    assert result == {
        "source": str(path),
        "destination": str(tmp_path / "out"),
        "made_by": "Gemma Scope",
        "architecture": "jumprelu",
        "n_features": 20,
        "d_in": 7,
        "model": "",
        "site": "",
        "fingerprint": written.fingerprint,
        "has_stats": False,
    }


def test_model_site_and_statistics_can_be_given(capsys, tmp_path, gemma):
    stats_of(20).write(tmp_path / "stats" / "feature_stats.parquet")
    words = ["sae", "convert", gemma[0], tmp_path / "out", "--model", "gemma-2-2b", "--site", "resid_post.2"]
    result = run(capsys, *words, "--stats", tmp_path / "stats")
    assert (result["model"], result["site"], result["has_stats"]) == ("gemma-2-2b", "resid_post.2", True)
    written = load_dictionary(tmp_path / "out")
    assert (written.info.model, written.info.site) == ("gemma-2-2b", "resid_post.2")
    assert written.feature_stats is not None
    assert written.feature_stats.firing_rate[0] == 0.5


def test_statistics_that_lie_beside_a_foreign_sae_go_with_it(capsys, tmp_path, gemma):
    stats_of(20).write(gemma[0] / "feature_stats.parquet")
    assert run(capsys, "sae", "info", gemma[0])["firing"]["live"] == 4
    assert run(capsys, "sae", "convert", gemma[0], tmp_path / "out")["has_stats"]


def test_what_the_source_does_not_say_is_asked_for(capsys, tmp_path, gemma):
    assert main(["sae", "convert", str(gemma[0]), str(tmp_path / "out")]) == 0
    assert "does not say its model and site; --model --site would" in " ".join(capsys.readouterr().out.split())
    assert main(["sae", "convert", str(gemma[0]), str(tmp_path / "b"), "--model", "m", "--site", "mlp_out.2"]) == 0
    out = capsys.readouterr().out
    assert "mlp_out.2 of m" in out
    assert "does not say" not in out


def test_mistakes_are_named_and_leave_nothing(capsys, tmp_path, gemma):
    path, _ = gemma
    out = tmp_path / "out"
    assert "site 'resid.2': a site is KIND.LAYER" in mistake(capsys, "sae", "convert", path, out, "--site", "resid.2")
    assert "no such file" in mistake(capsys, "sae", "convert", path, out, "--stats", tmp_path / "none")
    stats_of(5).write(tmp_path / "stats.parquet")
    assert "5 features, not 20" in mistake(capsys, "sae", "convert", path, out, "--stats", tmp_path / "stats.parquet")
    assert "no such directory" in mistake(capsys, "sae", "convert", tmp_path / "nowhere", out)
    assert "Missing from trimtab sae convert: DESTINATION" in mistake(capsys, "sae", "convert", path)
    assert not out.exists()


def test_nothing_is_overwritten(capsys, gemma):
    path, _ = gemma
    before = (path / "params.npz").read_bytes()
    assert "it holds files already" in mistake(capsys, "sae", "convert", path, path)
    assert [(file.name, file.read_bytes()) for file in path.iterdir()] == [("params.npz", before)]


def test_a_description_says_what_files_and_weights_say(capsys, random_sae, tmp_path):
    sae = random_sae("jumprelu", n=20, info=INFO)
    save_dictionary(sae, tmp_path / "sae", stats_of(20))
    told = run(capsys, "sae", "info", tmp_path / "sae")
    norms = sae.W_dec.double().norm(dim=1).sort().values
    assert told["decoder_norms"]["lowest"] == pytest.approx(float(norms[0]))
    assert told["decoder_norms"]["highest"] == pytest.approx(float(norms[-1]))
    threshold = sae.threshold.double().sort().values
    assert told["threshold"] == pytest.approx(
        {"lowest": float(threshold[0]), "median": float(threshold[9]), "highest": float(threshold[-1])}
    )
    assert told["firing"] == pytest.approx({"n_tokens": 1000, "l0": 0.9, "live": 4, "dense": 2})
    assert told["made_by"].startswith("trimtab ")
    assert told["fingerprint"] == load_dictionary(tmp_path / "sae").fingerprint
    assert told["metadata"] == INFO.metadata
    assert (told["model"], told["site"], told["architecture"]) == ("tiny", "resid_post.1", "jumprelu")
    assert (told["n_features"], told["d_in"], told["settings"]) == (20, 7, {"apply_b_dec_to_input": True})


def test_a_description_can_be_read(capsys, random_sae, tmp_path):
    save_dictionary(random_sae("jumprelu", info=INFO, unit_rows=True), tmp_path / "sae", stats_of(20))
    assert main(["sae", "info", str(tmp_path / "sae")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "size 20 features of width 7",
        "model tiny",
        "site resid_post.1",
        "settings apply_b_dec_to_input yes",
        "decoder norms 1",
        "L0 0.9 over 1,000 tokens",
        "features 4 live, 2 of them dense (> 10%)",
        "training.k = 5",
        "calibration = none",
    ):
        assert line in lines, lines


def test_a_description_of_little_says_what_is_unknown(capsys, gemma):
    assert main(["sae", "info", str(gemma[0])]) == 0
    out = capsys.readouterr().out
    assert "made by        Gemma Scope" in out
    assert "model          not said" in out
    assert "no statistics" in out
    told = run(capsys, "sae", "info", gemma[0])
    assert (told["firing"], told["model"], told["metadata"]["gemma_scope"]) == (None, "", {"layer": 2})


def test_every_architecture_is_described(capsys, random_sae, tmp_path):
    for architecture in ("standard", "gated", "topk"):
        save_dictionary(random_sae(architecture), tmp_path / architecture)
        told = run(capsys, "sae", "info", tmp_path / architecture)
        assert (told["architecture"], told["threshold"]) == (architecture, None)
    assert told["settings"]["k"] == 5
    assert "there is no such directory" in mistake(capsys, "sae", "info", tmp_path / "nowhere")
