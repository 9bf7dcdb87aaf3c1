"""Every way in which a dictionary's files can be wrong, and the message that says so."""

from __future__ import annotations

import errno
import json
import pickle
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.dictionaries import FeatureStats, load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.runs import atomic

MISSING = object()


@pytest.fixture
def saved(random_sae, tmp_path) -> Path:
    return save_dictionary(random_sae("jumprelu"), tmp_path / "sae")


def edit(path: Path, **fields: object) -> Path:
    cfg = json.loads((path / "cfg.json").read_text())
    for name, value in fields.items():
        cfg.pop(name, None)
        if value is not MISSING:
            cfg[name] = value
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def edit_weights(path: Path, **tensors: torch.Tensor | None) -> Path:
    weights = load_file(path / "sae_weights.safetensors") | tensors
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, path / "sae_weights.safetensors")
    return path


def refused(path: Path | str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dictionary(path)
    for part in parts:
        assert part in caught.value.line, caught.value.line
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"architecture": "crosscoder"}, ["architecture 'crosscoder'", "trimtab reads", "jumprelu"]),
        ({"architecture": "batchtopk"}, ["architecture 'batchtopk'", "saved for inference"]),
        ({"architecture": 3}, ["architecture 3"]),
        ({"architecture": MISSING}, ["field architecture", "missing"]),
        (
            {"normalize_activations": "covariance_whitening"},
            ["covariance_whitening", "trimtab computes", "fold"],
        ),
        ({"normalize_activations": 2}, ["normalize_activations = 2", "layer_norm"]),
        ({"reshape_activations": "heads"}, ["reshape_activations = 'heads'", "hook_z"]),
        ({"metadata": {"hook_head_index": "3", "sae_lens_version": "6.0.0"}}, ["hook_head_index", "whole number"]),
        ({"activation_fn": "tanh-relu"}, ["activation_fn = 'tanh-relu'"]),
        ({"finetuning_scaling_factor": True}, ["finetuning_scaling_factor = True"]),
        ({"apply_b_dec_to_input": "yes"}, ["apply_b_dec_to_input = 'yes'", "true or false"]),
        ({"d_in": MISSING}, ["field d_in", "missing"]),
        ({"d_sae": 20.5}, ["d_sae = 20.5", "positive integer"]),
        ({"d_in": True}, ["d_in = True", "positive integer"]),
        ({"d_sae": 0}, ["d_sae = 0"]),
        ({"dtype": "int8"}, ["dtype = 'int8'", "float32"]),
        ({"metadata": [1]}, ["metadata = [1]", "object"]),
        ({"metadata": {"site": "resid.9", "sae_lens_version": "6.0.0"}}, ["metadata.site = 'resid.9'"]),
        ({"metadata": {"site": "attn_out.9.1", "sae_lens_version": "6.0.0"}}, ["metadata.site = 'attn_out.9.1'"]),
        ({"architecture": "topk"}, ["field k", "missing"]),
        ({"architecture": "topk", "k": 0}, ["k = 0", "positive integer"]),
        ({"architecture": "topk", "k": 21}, ["k = 21", "20 features"]),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": 1}, ["rescale_acts_by_decoder_norm = 1"]),
        ({"d_in": 8}, ["tensor W_enc of shape [7, 20]", "width 8", "[8, 20]"]),
        ({"d_sae": 19}, ["tensor W_enc of shape [7, 20]", "19 features"]),
        ({"architecture": "standard"}, ["tensor threshold", "no such weight", "field architecture"]),
        ({"architecture": "gated"}, ["tensor b_gate", "lacks it", "gated"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_asks_for_something_else_names_the_field(saved, fields, parts):
    refused(edit(saved, **fields), *parts, str(saved) if "architecture" not in fields else "")


def test_an_old_file_of_joined_heads_is_read(saved):
    edit(saved, metadata=MISSING, reshape_activations=MISSING, hook_name="blocks.4.attn.hook_z")
    assert load_dictionary(saved).info.site == "attn_z.4"


def test_a_missing_tensor_is_named(saved):
    refused(edit_weights(saved, threshold=None), "tensor threshold", "lacks it", "jumprelu")


def test_a_tensor_of_another_shape_is_named(saved):
    refused(edit_weights(saved, threshold=torch.ones(1)), "tensor threshold of shape [1]", "needs [20]")
    refused(edit_weights(saved, threshold=torch.ones(20), W_dec=torch.ones(7, 20)), "tensor W_dec of shape [7, 20]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(saved, value):
    weight = torch.ones(20)
    weight[3] = value
    refused(edit_weights(saved, b_enc=weight), "tensor b_enc", "not finite")


def test_integer_weights_are_named(saved):
    refused(edit_weights(saved, b_enc=torch.ones(20, dtype=torch.int64)), "tensor b_enc", "int64")


def test_a_scaling_factor_that_was_used_is_refused_and_one_that_was_not_is_ignored(saved):
    load_dictionary(edit_weights(saved, scaling_factor=torch.ones(20)))
    refused(edit_weights(saved, scaling_factor=2 * torch.ones(20)), "scaling_factor")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(saved, "sae_weights.safetensors", "damaged or no safetensors file")


def test_a_damaged_header_is_refused(saved):
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:8] + b"garbage" + weights.read_bytes()[15:])
    refused(saved, "sae_weights.safetensors", "damaged or no safetensors file")


def test_one_flipped_bit_is_noticed(saved):
    weights = saved / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    refused(saved, "sae_weights.safetensors", "checksum")


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_in_place_of_the_weights_is_never_opened(saved, protocol, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (saved / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
    refused(saved, "sae_weights.safetensors", "pickle", "safetensors only")
    assert not Path("exploded").exists()


def test_a_torch_file_is_never_opened(saved):
    torch.save({"W_enc": torch.ones(2)}, saved / "sae_weights.safetensors")
    refused(saved, "pickle")
    (saved / "sae_weights.safetensors").rename(saved / "ae.pt")
    refused(saved, "ae.pt", "pickle")
    refused(saved / "ae.pt", "ae.pt", "pickle")


def test_a_file_is_not_a_directory(saved):
    refused(saved / "cfg.json", "cfg.json", "not a directory")


def test_missing_files_are_named(saved):
    (saved / "sae_weights.safetensors").unlink()
    refused(saved, "no sae_weights.safetensors")
    (saved / "cfg.json").unlink()
    refused(saved, "no cfg.json")


def test_a_missing_directory_lists_what_ships(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such directory", "shipped name")


@pytest.mark.parametrize("text", ["{", "", "\x00\xff", '{"d_in": 7,}'])
def test_invalid_json_is_named(saved, text):
    (saved / "cfg.json").write_bytes(text.encode("latin-1"))
    refused(saved, "cfg.json", "not valid JSON")


def test_json_of_another_kind_is_named(saved):
    (saved / "cfg.json").write_text("[1]")
    refused(saved, "cfg.json", "object was expected, not list")


def test_statistics_of_another_dictionary_are_named(random_sae, saved, tmp_path):
    sae = random_sae("standard", n=5)
    stats = FeatureStats(
        **{name: torch.ones(5).numpy() for name in ("max_activation", "mean_activation", "firing_rate")}, n_tokens=1
    )
    save_dictionary(sae, tmp_path / "other", stats)
    (tmp_path / "other" / "feature_stats.parquet").rename(saved / "feature_stats.parquet")
    refused(saved, "feature_stats.parquet", "5 features, not 20")
    with pytest.raises(UserError, match="statistics of 5 features: the dictionary has 20"):
        save_dictionary(random_sae("standard"), tmp_path / "third", stats)
    assert not (tmp_path / "third").exists()


def test_weights_that_are_not_finite_are_not_saved(random_sae, tmp_path):
    sae = random_sae("gated")
    sae.r_mag.data[0] = float("nan")
    with pytest.raises(UserError, match="tensor r_mag: it holds values that are not finite"):
        save_dictionary(sae, tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_half_precision_are_not_saved_in_it(random_sae, tmp_path):
    sae = random_sae("standard")
    sae.W_enc.data[0, 0] = 70_000
    with pytest.raises(UserError, match="tensor W_enc: it holds values beyond float16's 65504; save it as float32"):
        save_dictionary(sae, tmp_path / "sae", dtype="float16")
    save_dictionary(sae, tmp_path / "sae")


def test_no_other_precision_is_saved(random_sae, tmp_path):
    with pytest.raises(UserError, match="dtype 'bfloat16': allowed are float32, float16"):
        save_dictionary(random_sae("standard"), tmp_path / "sae", dtype="bfloat16")


def test_a_file_in_the_way_is_named(random_sae, tmp_path):
    (tmp_path / "sae").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*sae.*; choose a writable path"):
        save_dictionary(random_sae("standard"), tmp_path / "sae")
    assert (tmp_path / "sae").read_text() == "mine"


@pytest.mark.parametrize("there_before", [False, True])
def test_a_disk_that_fills_up_leaves_what_was_there(random_sae, tmp_path, there_before):
    """The limit on file sizes makes the kernel refuse the write, wherever it is made."""
    path = tmp_path / "runs" / "sae"
    if there_before:
        save_dictionary(random_sae("standard"), path)
    before = sorted((p.name, p.read_bytes()) for p in path.iterdir()) if there_before else []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: it grew too large; free some space"):
            save_dictionary(random_sae("standard", n=500), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if there_before:
        assert sorted((p.name, p.read_bytes()) for p in path.iterdir()) == before
    assert [p.name for p in path.parent.iterdir()] == (["sae"] if there_before else [])


def test_a_failure_after_the_weights_leaves_what_was_there(random_sae, tmp_path, monkeypatch):
    path = save_dictionary(random_sae("standard"), tmp_path / "sae")
    before = load_dictionary(path).fingerprint

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", full)
    message = re.escape(f"cannot write {path / 'sae_weights.safetensors'}: the disk is full; free some space")
    with pytest.raises(UserError, match=message):
        save_dictionary(random_sae("standard", seed=1), path)
    assert load_dictionary(path).fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
