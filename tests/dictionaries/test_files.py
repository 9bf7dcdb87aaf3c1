"""Saving and loading: round trips, the exact layout, precision, names, fit to a model."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trimtab.dictionaries import (
    ARCHITECTURES,
    DictionaryInfo,
    FeatureStats,
    load_dictionary,
    save_dictionary,
    shipped_names,
)
from trimtab.dictionaries.saelens_layout import hook_from_site, site_from_hook
from trimtab.errors import UserError
from trimtab.runs import shipped as shipped_files

INFO = DictionaryInfo(architecture="standard", model="tiny", site="resid_post.1", metadata={"tokens": 12, "note": "ü"})


def stats_of(n: int) -> FeatureStats:
    rng = np.random.default_rng(0)
    return FeatureStats(
        max_activation=rng.random(n, dtype=np.float32),
        mean_activation=rng.random(n, dtype=np.float32),
        firing_rate=rng.random(n),
        n_tokens=123,
        corpus_hash="abc",
        sink_filter="position 0",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
written_afresh = {"model_name", "hook_name", "hook_head_index", "site", "hook_point", "hook_point_head_index"}


def on_disk(path) -> dict[str, object]:
    """Everything that a saved dictionary's files say, comparable."""
    weights = load_file(path / "sae_weights.safetensors")
    stats = path / "feature_stats.parquet"
    return {
        "config": json.loads((path / "cfg.json").read_text()),
        "weights": {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in weights.items()},
        "stats": stats.read_bytes() if stats.exists() else None,
    }


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    d=st.integers(1, 12),
    n=st.integers(1, 12),
    seed=st.integers(0, 1000),
    apply_b_dec_to_input=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
    model=st.text(),
    site=st.sampled_from(["", "resid_pre.0", "resid_mid.3", "resid_post.15", "attn_out.2", "mlp_out.7", "attn_z.9.6"]),
    metadata=st.dictionaries(st.text().filter(lambda key: key not in written_afresh), json_values, max_size=4),
    with_stats=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_what_is_saved_comes_back(random_sae, tmp_path_factory, **case):
    path = tmp_path_factory.mktemp("case") / "sae"
    info = DictionaryInfo(
        architecture=case["architecture"], model=case["model"], site=case["site"], metadata=case["metadata"]
    )
    sae = random_sae(
        case["architecture"],
        d=case["d"],
        n=case["n"],
        seed=case["seed"],
        apply_b_dec_to_input=case["apply_b_dec_to_input"],
        info=info,
    )
    stats = stats_of(case["n"]) if case["with_stats"] else None
    assert save_dictionary(sae, path, stats, dtype=case["dtype"]) == path
    loaded = load_dictionary(path)

    assert type(loaded) is type(sae)
    assert loaded.settings == sae.settings
    for name in sae.shapes:
        weight = getattr(sae, name)
        expected = weight.half().float() if case["dtype"] == "float16" and weight.ndim == 2 else weight
        assert getattr(loaded, name).dtype == torch.float32
        assert torch.equal(getattr(loaded, name), expected), name
    assert (loaded.info.architecture, loaded.info.model, loaded.info.site) == (
        info.architecture,
        info.model,
        info.site,
    )
    afresh = {"trimtab_version", "sae_lens_version", "sae_lens_training_version"}
    kept = {key: value for key, value in info.metadata.items() if key not in afresh}
    assert {key: value for key, value in loaded.info.metadata.items() if key not in afresh} == kept
    if stats is None:
        assert loaded.feature_stats is None
    else:
        assert loaded.feature_stats is not None
        assert loaded.feature_stats.to_table().equals(stats.to_table(), check_metadata=True)
    first = on_disk(path)
    save_dictionary(loaded, path, dtype=case["dtype"])
    assert on_disk(path) == first
    assert load_dictionary(path).fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
    ],
)
def test_the_config_has_the_fields_that_saelens_6_writes(random_sae, tmp_path, architecture, own):
    save_dictionary(random_sae(architecture, info=INFO, apply_b_dec_to_input=False), tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    assert (
        cfg
        == {
            "d_in": 7,
            "d_sae": 20,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "architecture": architecture,
        }
        | own
    )
    assert metadata["model_name"] == "tiny"
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["hook_head_index"] is None
    assert metadata["site"] == "resid_post.1"
    assert metadata["tokens"] == 12
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6, "SAELens would read it as its old format"


@pytest.mark.parametrize(
    ("architecture", "tensors"),
    [
        ("standard", {"W_enc": [7, 20], "b_enc": [20], "W_dec": [20, 7], "b_dec": [7]}),
        ("topk", {"W_enc": [7, 20], "b_enc": [20], "W_dec": [20, 7], "b_dec": [7]}),
        ("jumprelu", {"W_enc": [7, 20], "b_enc": [20], "W_dec": [20, 7], "b_dec": [7], "threshold": [20]}),
        (
            "gated",
            {"W_enc": [7, 20], "b_gate": [20], "b_mag": [20], "r_mag": [20], "W_dec": [20, 7], "b_dec": [7]},
        ),
    ],
)
def test_the_weights_have_saelens_names_and_half_precision_is_for_matrices_only(
    random_sae, tmp_path, architecture, tensors
):
    save_dictionary(random_sae(architecture), tmp_path / "sae", dtype="float16")
    saved = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == tensors
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float16} == {"W_enc", "W_dec"}
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_all_files_get_the_umasks_mode(random_sae, tmp_path, umask, mode):
    sae = random_sae("topk", n=6)
    before = os.umask(umask)
    try:
        path = save_dictionary(sae, tmp_path / "sae", stats_of(6))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == dict.fromkeys(("cfg.json", "sae_weights.safetensors", "feature_stats.parquet"), mode)


def test_every_site_has_a_hook_name_and_comes_back():
    hooks = {
        "resid_pre.0": ("blocks.0.hook_resid_pre", None),
        "resid_mid.3": ("blocks.3.hook_resid_mid", None),
        "resid_post.15": ("blocks.15.hook_resid_post", None),
        "attn_out.2": ("blocks.2.hook_attn_out", None),
        "mlp_out.7": ("blocks.7.hook_mlp_out", None),
        "attn_q.1.0": ("blocks.1.attn.hook_q", 0),
        "attn_k.1": ("blocks.1.attn.hook_k", None),
        "attn_v.1.2": ("blocks.1.attn.hook_v", 2),
        "attn_z.9.6": ("blocks.9.attn.hook_z", 6),
    }
    for site, hook in hooks.items():
        assert tuple(hook_from_site(site)) == hook
        assert site_from_hook(*hook) == site
    assert site_from_hook("blocks.5.ln2.hook_normalized") == ""


def foreign(path, weights, **cfg):
    path.mkdir()
    save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def weights_of(sae, dtype=torch.float32):
    return {name: getattr(sae, name).to(dtype) for name in sae.shapes}


def test_a_site_that_trimtab_has_no_name_for_is_kept(random_sae, tmp_path):
    metadata = {"hook_name": "blocks.5.ln2.hook_normalized", "model_name": "gpt2-small", "sae_lens_version": "6.1.0"}
    path = foreign(
        tmp_path / "a", weights_of(random_sae("standard")), architecture="standard", d_in=7, d_sae=20, metadata=metadata
    )
    sae = load_dictionary(path)
    assert sae.info.site == ""
    save_dictionary(sae, tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert saved["hook_name"] == "blocks.5.ln2.hook_normalized"
    assert saved["model_name"] == "gpt2-small"


def test_a_file_of_saelens_before_6_is_understood(random_sae, tmp_path):
    topk = random_sae("topk", k=3)
    path = foreign(
        tmp_path / "sae",
        weights_of(topk) | {"scaling_factor": torch.ones(20)},
        architecture="standard",
        d_in=7,
        d_sae=20,
        dtype="torch.float32",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 3},
        normalize_activations=False,
        finetuning_scaling_factor=False,
        model_name="gpt2-small",
        hook_point="blocks.8.hook_resid_pre",
        sae_lens_version="3.2.1",
    )
    sae = load_dictionary(path)
    assert (sae.architecture, sae.info.model, sae.info.site) == ("topk", "gpt2-small", "resid_pre.8")
    assert sae.settings == topk.settings
    x = torch.randn(10, 7)
    assert torch.equal(sae.encode(x), topk.encode(x))


def test_a_rescaling_topk_sae_loads_as_the_same_function_with_unit_rows(random_sae, tmp_path):
    original = random_sae("topk", rescale_acts_by_decoder_norm=True)
    save_dictionary(original, tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is True
    loaded, x = load_dictionary(tmp_path / "sae"), torch.randn(50, 7)
    torch.testing.assert_close(loaded.decoder_norms, torch.ones(20))
    torch.testing.assert_close(loaded.encode(x), original.encode(x))
    torch.testing.assert_close(loaded(x), original(x))


def test_a_topk_sae_with_free_norms_keeps_its_rows(random_sae, tmp_path):
    original = random_sae("topk", rescale_acts_by_decoder_norm=False)
    save_dictionary(original, tmp_path / "sae")
    assert torch.equal(load_dictionary(tmp_path / "sae").W_dec, original.W_dec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_precision_become_float32(random_sae, tmp_path, dtype):
    weights = weights_of(random_sae("jumprelu"), dtype)
    cfg = {"architecture": "jumprelu", "d_in": 7, "d_sae": 20, "dtype": str(dtype).removeprefix("torch.")}
    sae = load_dictionary(foreign(tmp_path / "sae", weights, **cfg))
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    assert torch.equal(sae.W_enc, weights["W_enc"].float())
    wide = load_dictionary(tmp_path / "sae", dtype=torch.float64)
    assert torch.equal(wide.W_enc, weights["W_enc"].double())


def test_the_dictionarys_own_statistics_are_saved_and_stale_ones_removed(random_sae, tmp_path):
    sae = random_sae("standard")
    sae.feature_stats = stats_of(20)
    save_dictionary(sae, tmp_path / "sae")
    assert load_dictionary(tmp_path / "sae").feature_stats is not None
    (tmp_path / "sae" / "notes.txt").write_text("mine")
    save_dictionary(random_sae("standard", seed=1), tmp_path / "sae")
    assert load_dictionary(tmp_path / "sae").feature_stats is None
    assert (tmp_path / "sae" / "notes.txt").read_text() == "mine"


def test_shipped_dictionaries_go_by_name(random_sae, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_files, "ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert shipped_names() == []
    with pytest.raises(UserError, match=r"none of that name ships with trimtab; .* a shipped name \(none\)"):
        load_dictionary("default")
    save_dictionary(random_sae("topk"), tmp_path / "smollm2-135m-instruct--resid_post.15")
    save_dictionary(random_sae("standard"), tmp_path / "gemma-3-270m--resid_post.9")
    assert shipped_names() == ["gemma-3-270m/resid_post.9", "smollm2-135m-instruct/resid_post.15"]
    assert load_dictionary("default").architecture == "topk"
    assert load_dictionary("smollm2-135m-instruct/resid_post.15").architecture == "topk"
    assert load_dictionary("gemma-3-270m/resid_post.9").architecture == "standard"
    with pytest.raises(
        UserError, match=r"dictionary 'smollm2/x': .*\(gemma-3-270m/resid_post.9, smollm2-135m-instruct/"
    ):
        load_dictionary("smollm2/x")


def model(**attributes):
    return SimpleNamespace(**{"d_model": 7, "name": "tiny", "fingerprint": "f00"} | attributes)


@pytest.fixture
def saved(random_sae, tmp_path):
    info = DictionaryInfo(architecture="standard", model="Org/Tiny", site="", metadata={"model_fingerprint": "f00"})
    return save_dictionary(random_sae("standard", info=info), tmp_path / "sae")


def test_a_model_of_the_same_name_or_fingerprint_fits(saved):
    load_dictionary(saved, model=model())
    load_dictionary(saved, model=model(name="/models/tiny/", fingerprint="other"))
    load_dictionary(saved, model=model(name="renamed"))


def test_a_model_of_another_width_is_refused(saved):
    with pytest.raises(
        UserError, match=r"dictionary of width 7: tiny has width 8 \(it was trained on Org/Tiny\); choose"
    ):
        load_dictionary(saved, model=model(d_model=8))


def test_another_model_of_the_same_width_is_refused_unless_allowed(saved):
    other = model(name="other", fingerprint="bad")
    with pytest.raises(UserError, match=r"dictionary trained on Org/Tiny: the model is other; .* allow any model"):
        load_dictionary(saved, model=other)
    load_dictionary(saved, model=other, any_model=True)


@pytest.mark.parametrize(("site", "d"), [("resid_post.3", 32), ("attn_z.1.3", 8), ("attn_z.1", 32), ("attn_k.0", 16)])
def test_a_site_of_the_model_with_that_width_fits(random_sae, tiny_llama, tmp_path, site, d):
    sae = random_sae("standard", d=d, info=DictionaryInfo(architecture="standard", model="tiny-llama", site=site))
    load_dictionary(save_dictionary(sae, tmp_path / "sae"), model=tiny_llama)


@pytest.mark.parametrize(
    ("site", "d", "message"),
    [
        ("resid_post.4", 32, r"dictionary for site resid_post.4: tiny-llama has layers 0 to 3; choose a dictionary"),
        ("attn_z.1.4", 8, r"dictionary for site attn_z.1.4: attn_z has heads 0 to 3; choose a dictionary"),
        ("attn_z.1.3", 32, r"dictionary of width 32: .* width 8"),
        ("resid_post.3", 8, r"dictionary of width 8: tiny-llama has width 32"),
    ],
)
def test_a_site_that_the_model_lacks_is_refused(random_sae, tiny_llama, tmp_path, site, d, message):
    sae = random_sae("standard", d=d, info=DictionaryInfo(architecture="standard", model="tiny-llama", site=site))
    save_dictionary(sae, tmp_path / "sae")
    with pytest.raises(UserError, match=message):
        load_dictionary(tmp_path / "sae", model=tiny_llama)


def test_the_same_dictionary_is_saved_as_the_same_bytes(random_sae, tmp_path):
    """The header of safetensors is written in the order of a hash map that is another at each call."""
    sae = random_sae("topk", n=6)
    saved = [save_dictionary(sae, tmp_path / str(i), stats_of(6)) for i in range(12)]
    for name in ("cfg.json", "sae_weights.safetensors", "feature_stats.parquet"):
        assert len({(path / name).read_bytes() for path in saved}) == 1, name
