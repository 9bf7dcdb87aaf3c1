"""SAEs of other libraries: each must compute what its own library's documented formula says, in its own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_tensors import LINEAR, PLAIN, TENSORS, D, K, N, Tensors, codes, draw, rebuilt, scaled_rows, top
from safetensors.torch import save_file
from torch import Tensor

from trimtab.dictionaries import load_dictionary, save_dictionary
from trimtab.dictionaries.foreign.dictionary_learning import CLASSES
from trimtab.errors import UserError


def write_dictionary_learning(
    path: Path, dict_class: str, tensors: Any = None, *, named: bool = True, **trainer: Any
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "trainer_class": "Trainer",
        "dict_class": dict_class if named else MISSING,
        "activation_dim": D,
        "dict_size": N,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
    }
    fields |= {"k": K} if "k" in TENSORS.get(dict_class, {}) else {}
    config = {"trainer": without(fields | trainer), "buffer": {"io": "out", "ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(config))
    torch.save(TENSORS[dict_class] if tensors is None else tensors, path / "ae.pt")
    return path


MISSING = "(missing)"


def without(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not MISSING}


def assert_computes(path: Path, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
    x = draw(300, D, seed=9).double() * 2
    expected = encode(x)
    assert (expected > 0).any(0).float().mean() > 0.5
    assert ((expected == 0).any(0)).all()
    sae = load_dictionary(path, dtype=torch.float64)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(sae.encode(x) > 0, expected > 0)
    torch.testing.assert_close(sae(x), decode(expected), rtol=1e-6, atol=1e-6)


def refused(path: Path | str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dictionary(path)
    for part in parts:
        assert part in caught.value.line, caught.value.line
    assert caught.value.hint


class TestDictionaryLearning:
    def test_every_class_that_is_read_is_tested(self):
        assert set(CLASSES) == set(TENSORS)

    @pytest.mark.parametrize("dict_class", TENSORS)
    def test_it_computes_what_the_library_computes(self, tmp_path, dict_class):
        path = write_dictionary_learning(tmp_path / "trainer_0", dict_class)
        t = TENSORS[dict_class]
        assert_computes(path, lambda x: codes(dict_class, t, x), lambda f: rebuilt(dict_class, t, f))

    @pytest.mark.parametrize("dict_class", TENSORS)
    def test_what_is_saved_again_computes_the_same(self, tmp_path, dict_class):
        sae = load_dictionary(write_dictionary_learning(tmp_path / "theirs", dict_class))
        again = load_dictionary(save_dictionary(sae, tmp_path / "ours"))
        assert again.fingerprint == sae.fingerprint
        assert (again.architecture, again.info.model, again.info.site) == (
            sae.architecture,
            sae.info.model,
            sae.info.site,
        )
        assert again.info.metadata.items() >= sae.info.metadata.items()

    def test_where_it_comes_from_is_kept(self, tmp_path):
        path = write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", lr=2e-4)
        info = load_dictionary(path).info
        assert (info.architecture, info.model, info.site) == (
            "jumprelu",
            "EleutherAI/pythia-70m-deduped",
            "resid_post.3",
        )
        assert info.metadata["read_from"] == "dictionary_learning"
        assert info.metadata["dictionary_learning"]["trainer"]["lr"] == 2e-4

    @pytest.mark.parametrize(
        ("submodule", "layer", "site"),
        [
            ("resid_post_layer_3", 3, "resid_post.3"),
            ("resid_pre", 3, "resid_pre.3"),
            ("mlp_out_layer_3", 3, "mlp_out.3"),
            ("gpt_neox.layers.3", 3, "resid_post.3"),
            ("model.layers.3.mlp", 3, ""),
            ("resid_post_layer_4", 3, ""),
            ("somewhere", 3, ""),
            (None, 3, ""),
            ("resid_post", None, ""),
        ],
    )
    def test_a_site_is_taken_only_where_it_is_certain(self, tmp_path, submodule, layer, site):
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoderNew", submodule_name=submodule, layer=layer)
        assert load_dictionary(path).info.site == site

    def test_an_input_of_a_module_is_not_taken_for_its_output(self, tmp_path):
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoderNew")
        config = json.loads((path / "config.json").read_text())
        config["buffer"]["io"] = "in"
        (path / "config.json").write_text(json.dumps(config))
        assert load_dictionary(path).info.site == ""

    def test_rows_that_are_unit_already_are_kept_to_the_bit(self, tmp_path):
        w = scaled_rows(3)
        unit = (w / w.norm(dim=1, keepdim=True)).T.contiguous()
        tensors = TENSORS["AutoEncoder"] | {"decoder.weight": unit}
        sae = load_dictionary(write_dictionary_learning(tmp_path / "a", "AutoEncoder", tensors))
        assert torch.equal(sae.W_dec, unit.T)
        assert torch.equal(sae.W_enc, tensors["encoder.weight"].T)

    @pytest.mark.parametrize(
        ("dict_class", "trainer_class"),
        [(name, "") for name in TENSORS if name not in ("AutoEncoderTopK", "BatchTopKSAE")]
        + [
            ("AutoEncoderTopK", "TrainerTopK"),
            ("BatchTopKSAE", "BatchTopKTrainer"),
            ("AutoEncoder", "StandardTrainer"),
        ],
    )
    def test_an_older_config_that_does_not_name_the_class(self, tmp_path, dict_class, trainer_class):
        path = write_dictionary_learning(tmp_path / "a", dict_class, named=False, trainer_class=trainer_class)
        sae = load_dictionary(path, dtype=torch.float64)
        x = draw(300, D, seed=9).double()
        torch.testing.assert_close(sae.encode(x), codes(dict_class, TENSORS[dict_class], x), rtol=1e-6, atol=1e-6)

    def test_an_older_topk_config_without_a_threshold_can_be_nothing_else(self, tmp_path):
        tensors = {name: tensor for name, tensor in TENSORS["AutoEncoderTopK"].items() if name != "threshold"}
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoderTopK", tensors, named=False)
        assert load_dictionary(path).architecture == "topk"

    def test_a_class_that_cannot_be_told_is_refused(self, tmp_path):
        path = write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", named=False)
        refused(path, "trainer.dict_class", "missing", "trainer_class")

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
    def test_names_of_a_wrapped_module_are_understood(self, tmp_path, prefix):
        tensors = {prefix + name: tensor for name, tensor in TENSORS["BatchTopKSAE"].items()}
        sae = load_dictionary(write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", tensors))
        plain = load_dictionary(write_dictionary_learning(tmp_path / "b", "BatchTopKSAE"))
        assert sae.fingerprint == plain.fingerprint

    def test_a_threshold_that_was_never_set_lets_every_positive_code_through_and_says_so(self, tmp_path):
        tensors = TENSORS["BatchTopKSAE"] | {"threshold": torch.tensor(-1.0)}
        path = write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", tensors)
        with pytest.warns(UserWarning, match="its threshold was never set"):
            sae = load_dictionary(path, dtype=torch.float64)
        x = draw(50, D, seed=9).double()
        torch.testing.assert_close(sae.encode(x), codes("BatchTopKSAE", tensors, x))

    def test_an_older_topk_file_without_a_threshold_is_read(self, tmp_path):
        tensors = {name: tensor for name, tensor in TENSORS["AutoEncoderTopK"].items() if name != "threshold"}
        assert load_dictionary(write_dictionary_learning(tmp_path / "a", "AutoEncoderTopK", tensors)).settings["k"] == K

    def test_the_weights_file_stands_for_its_directory(self, tmp_path):
        path = write_dictionary_learning(tmp_path / "a", "GatedAutoEncoder")
        assert load_dictionary(path / "ae.pt").architecture == "gated"

    @pytest.mark.parametrize(
        ("fields", "parts"),
        [
            ({"dict_class": "CrossCoder"}, ["trainer.dict_class = 'CrossCoder'", "trimtab reads AutoEncoder"]),
            ({"dict_class": 3}, ["trainer.dict_class = 3"]),
            ({"dict_size": MISSING}, ["trainer.dict_size", "missing"]),
            ({"activation_dim": 6.5}, ["trainer.activation_dim = 6.5", "positive integer"]),
            ({"activation_dim": 7}, ["encoder.weight of shape [16, 6]", "[16, 7]", "ae.pt"]),
            ({"k": MISSING}, ["trainer.k", "missing"]),
            ({"k": 5}, ["trainer.k = 5", "ae.pt says 4"]),
            ({"k": 17}, ["trainer.k = 17", "16 features"]),
            ({"dict_class": "AutoEncoder"}, ["tensor bias", "trainer.dict_class is AutoEncoder"]),
            ({"dict_class": "GatedAutoEncoder"}, ["tensor gate_bias", "lacks it"]),
        ],
        ids=str,
    )
    def test_a_config_that_does_not_fit_names_the_field(self, tmp_path, fields, parts):
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoderTopK")
        config = json.loads((path / "config.json").read_text())
        config["trainer"] = without(config["trainer"] | fields)
        (path / "config.json").write_text(json.dumps(config))
        refused(path, *parts)

    @pytest.mark.parametrize(
        ("tensors", "parts"),
        [
            ({"extra": torch.ones(2)}, ["tensor extra", "no such weight"]),
            ({"b_dec": torch.full((D,), float("nan"))}, ["tensor b_dec", "not finite"]),
            ({"b_dec": torch.ones(D, dtype=torch.int64)}, ["tensor b_dec", "int64"]),
            ({"decoder.weight": torch.ones(N, D)}, ["tensor decoder.weight of shape [16, 6]", "[6, 16]"]),
            ({"threshold": torch.ones(2)}, ["tensor threshold", "one finite number"]),
            ({"threshold": torch.tensor(float("nan"))}, ["tensor threshold", "one finite number"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_tensors_that_do_not_fit_are_named(self, tmp_path, tensors, parts):
        refused(write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", TENSORS["BatchTopKSAE"] | tensors), *parts)

    def test_a_batch_topk_file_without_a_threshold_is_refused(self, tmp_path):
        tensors = {name: tensor for name, tensor in TENSORS["BatchTopKSAE"].items() if name != "threshold"}
        path = write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", tensors)
        refused(path, "tensor threshold", "missing", "other rows of a batch")

    def test_a_whole_pickled_object_is_never_opened(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoder", {"bias": Bomb()})
        refused(path, "ae.pt", "would have to be unpickled", "state_dict")
        assert not Path("exploded").exists()

    def test_another_object_than_a_state_dict_is_refused(self, tmp_path):
        refused(write_dictionary_learning(tmp_path / "a", "AutoEncoder", [torch.ones(2)]), "ae.pt", "state_dict")
        refused(write_dictionary_learning(tmp_path / "a", "AutoEncoder", {"bias": 3}), "ae.pt", "state_dict")

    @pytest.mark.parametrize("keep", [0, 1, 50, 0.5, -1])
    def test_truncated_weights_are_refused(self, tmp_path, keep):
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoder")
        data = (path / "ae.pt").read_bytes()
        (path / "ae.pt").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        refused(path, "ae.pt")

    def test_a_missing_or_bad_config_is_named(self, tmp_path):
        path = write_dictionary_learning(tmp_path / "a", "AutoEncoder")
        (path / "config.json").write_text('{"trainer": 3}')
        refused(path, "field trainer = 3", "config.json")
        (path / "config.json").write_text("{")
        refused(path, "config.json", "not valid JSON")
        (path / "config.json").unlink()
        refused(path, "it has no config.json", "dictionary_learning")

    @pytest.mark.parametrize("above", [".", "resid_post.15", "members/resid_post.15"])
    def test_a_directory_above_several_names_one(self, tmp_path, above):
        write_dictionary_learning(tmp_path / above / "trainer_0", "AutoEncoder")
        write_dictionary_learning(tmp_path / above / "trainer_1", "AutoEncoder")
        refused(tmp_path, "holds no dictionary itself, but 2 below it", str(tmp_path / above / "trainer_0"))


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


SPARSIFY = {
    "encoder.weight": LINEAR["encoder.weight"],
    "encoder.bias": LINEAR["encoder.bias"],
    "W_dec": scaled_rows(3),
    "b_dec": draw(D, seed=4),
}


def write_sparsify(path: Path, tensors: Tensors | None = None, **fields: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    cfg = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": N,
        "k": K,
        "multi_topk": True,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    }
    (path / "cfg.json").write_text(json.dumps(without(cfg | fields)))
    save_file(SPARSIFY | (tensors or {}), path / "sae.safetensors")
    return path


class TestSparsify:
    def test_it_computes_what_the_library_computes(self, tmp_path):
        t = {name: tensor.double() for name, tensor in SPARSIFY.items()}
        assert_computes(
            write_sparsify(tmp_path / "layers.3"),
            lambda x: top(((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).clamp_min(0)),
            lambda f: f @ t["W_dec"] + t["b_dec"],
        )

    @pytest.mark.parametrize(
        ("name", "site"),
        [
            ("layers.3", "resid_post.3"),
            ("h.11", "resid_post.11"),
            ("layers.3/seed1", "resid_post.3"),
            ("layers.3.mlp", ""),
            ("embed_tokens", ""),
        ],
    )
    def test_model_and_site_come_from_the_directories(self, tmp_path, name, site):
        path = write_sparsify(tmp_path / "run" / name)
        run = {"model": "EleutherAI/pythia-70m", "sae": {"k": K}, "hf_token": "secret", "lr": None}
        (tmp_path / "run" / "config.json").write_text(json.dumps(run))
        info = load_dictionary(path).info
        assert (info.model, info.site) == ("EleutherAI/pythia-70m", site)
        assert info.metadata["sparsify"]["run"] == {"model": "EleutherAI/pythia-70m", "sae": {"k": K}, "lr": None}
        assert info.metadata["sparsify"]["hookpoint"] == name.split("/")[0]

    def test_without_the_runs_config_the_model_is_unknown(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama", "model": 3}')
        assert load_dictionary(write_sparsify(tmp_path / "layers.3")).info.model == ""

    def test_the_number_of_features_may_follow_from_the_expansion_factor(self, tmp_path):
        tensors = {
            "encoder.weight": torch.ones(2 * D, D),
            "encoder.bias": torch.ones(2 * D),
            "W_dec": torch.ones(2 * D, D),
        }
        for number in (0, MISSING):
            path = write_sparsify(tmp_path / f"a{number}", tensors, num_latents=number, expansion_factor=2)
            assert load_dictionary(path).n_features == 2 * D

    @pytest.mark.parametrize(
        ("fields", "parts"),
        [
            ({"transcode": True}, ["transcode = True", "rebuild what they read"]),
            ({"skip_connection": True}, ["skip_connection = True", "linear path"]),
            ({"signed": True}, ["signed = True", "not negative"]),
            ({"gram_lookup": True}, ["gram_lookup = True", "does not know"]),
            ({"activation": "groupmax"}, ["activation = 'groupmax'", "topk"]),
            ({"k": MISSING}, ["field k", "missing"]),
            ({"k": 17}, ["k = 17", "16 features"]),
            ({"d_in": MISSING}, ["field d_in", "missing"]),
            ({"num_latents": MISSING, "expansion_factor": MISSING}, ["expansion_factor", "missing"]),
            ({"num_latents": 17}, ["encoder.weight of shape [16, 6]", "[17, 6]"]),
            ({"num_latents": MISSING}, ["encoder.weight of shape [16, 6]", "[192, 6]"]),
        ],
        ids=str,
    )
    def test_a_config_that_asks_for_something_else_names_the_field(self, tmp_path, fields, parts):
        refused(write_sparsify(tmp_path / "layers.3", **fields), *parts, str(tmp_path))

    def test_a_tensor_too_many_is_named(self, tmp_path):
        refused(write_sparsify(tmp_path / "a", {"W_skip": torch.ones(D, D)}), "tensor W_skip", "no such weight")

    def test_truncated_weights_are_refused(self, tmp_path):
        path = write_sparsify(tmp_path / "a")
        (path / "sae.safetensors").write_bytes((path / "sae.safetensors").read_bytes()[:-1])
        refused(path, "sae.safetensors", "damaged")

    def test_the_weights_of_a_directory_with_both_layouts_are_saelens_own(self, random_sae, tmp_path):
        path = save_dictionary(random_sae("gated", d=D, n=N), tmp_path / "a")
        save_file(SPARSIFY, path / "sae.safetensors")
        assert load_dictionary(path).architecture == "gated"


GEMMA = {name: tensor.numpy() for name, tensor in (PLAIN | {"threshold": draw(N, seed=8).abs()}).items()}
PUBLISHED = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def write_gemma_scope(path: Path, **arrays: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / "params.npz", **without(GEMMA | arrays))
    return path


class TestGemmaScope:
    def test_it_computes_what_the_paper_says(self, tmp_path):
        """JumpReLU of x W_enc + b_enc: b_dec is not subtracted from the input."""
        t = {name: torch.from_numpy(array).double() for name, array in GEMMA.items()}

        def encode(x: Tensor) -> Tensor:
            h = x @ t["W_enc"] + t["b_enc"]
            return torch.where(h > t["threshold"], h, 0.0).clamp_min(0)

        assert_computes(write_gemma_scope(tmp_path / "a"), encode, lambda f: f @ t["W_dec"] + t["b_dec"])

    @pytest.mark.parametrize(
        ("path", "model", "site"),
        [
            (PUBLISHED, "google/gemma-2-2b", "resid_post.20"),
            (
                f"models--google--{PUBLISHED.replace('res/', 'res/snapshots/f00/')}",
                "google/gemma-2-2b",
                "resid_post.20",
            ),
            ("gemma-scope-9b-it-res/layer_9/width_131k/canonical", "google/gemma-2-9b-it", "resid_post.9"),
            ("gemma-scope-27b-pt-mlp/layer_0/width_65k/average_l0_5", "google/gemma-2-27b", "mlp_out.0"),
            ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "google/gemma-2-2b", "resid_pre.0"),
            ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_6", "google/gemma-2-2b", "attn_z.3"),
            ("layer_20/width_16k/average_l0_71", "", ""),
            ("mine", "", ""),
        ],
    )
    def test_model_and_site_come_from_the_published_path(self, tmp_path, path, model, site):
        info = load_dictionary(write_gemma_scope(tmp_path / path)).info
        assert (info.model, info.site) == (model, site)

    def test_layer_width_and_l0_are_kept(self, tmp_path):
        info = load_dictionary(write_gemma_scope(tmp_path / PUBLISHED) / "params.npz").info
        assert info.metadata["gemma_scope"] == {"layer": 20, "width": "16k", "average_l0": 71}

    def test_an_embedding_is_read_before_it_is_scaled(self, tmp_path):
        path = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6")
        sae, plain = (load_dictionary(p, dtype=torch.float64) for p in (path, write_gemma_scope(tmp_path / "a")))
        e = draw(200, D, seed=9).double()
        torch.testing.assert_close(sae.encode(e * D**0.5), plain.encode(e), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(e * D**0.5), plain(e) * D**0.5, rtol=1e-5, atol=1e-5)

    def test_paths_of_transcoders_are_refused(self, tmp_path):
        path = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3")
        refused(path, "one site to another", "gemma-scope-2b-pt-transcoders")

    @pytest.mark.parametrize(
        ("arrays", "parts"),
        [
            ({"threshold": MISSING}, ["tensor threshold", "lacks it", "Gemma Scope"]),
            ({"more": np.ones(2)}, ["tensor more", "no such weight"]),
            ({"threshold": np.ones(3)}, ["tensor threshold of shape [3]", "needs [16]"]),
            ({"W_dec": np.ones(N)}, ["tensor W_dec of shape [16]", "[features, width]"]),
            ({"b_enc": np.full(N, np.inf)}, ["tensor b_enc", "not finite"]),
            ({"b_enc": np.ones(N, dtype=np.int32)}, ["tensor b_enc", "int32"]),
            ({"b_enc": np.array([Bomb()] * N, dtype=object)}, ["params.npz", "damaged or no NumPy file"]),
            ({"b_enc": np.array(["a"] * N)}, ["params.npz", "damaged or no NumPy file"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arrays_that_do_not_fit_are_named(self, tmp_path, monkeypatch, arrays, parts):
        monkeypatch.chdir(tmp_path)
        refused(write_gemma_scope(tmp_path / "a", **arrays), "params.npz", *parts)
        assert not Path("exploded").exists()

    @pytest.mark.parametrize("keep", [0, 3, 700, -1])
    def test_a_truncated_file_is_refused(self, tmp_path, keep):
        path = write_gemma_scope(tmp_path / "a")
        (path / "params.npz").write_bytes((path / "params.npz").read_bytes()[:keep])
        refused(path, "params.npz", "damaged or no NumPy file")

    def test_a_damaged_array_is_refused(self, tmp_path):
        path = write_gemma_scope(tmp_path / "a")
        data = bytearray((path / "params.npz").read_bytes())
        data[400] ^= 1
        (path / "params.npz").write_bytes(data)
        refused(path, "params.npz", "damaged or no NumPy file")


GEMMA_2 = {"w_enc": PLAIN["W_enc"], "w_dec": PLAIN["W_dec"], "b_enc": PLAIN["b_enc"], "b_dec": PLAIN["b_dec"]}
GEMMA_2 |= {"threshold": draw(N, seed=8).abs()}


def write_gemma_scope_2(path: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    save_file(GEMMA_2 | tensors, path / "params.safetensors")
    return path


def jumprelu(x: Tensor, t: Tensors, threshold: Tensor) -> Tensor:
    h = x @ t["W_enc"].double() + t["b_enc"].double()
    return torch.where(h > threshold.double(), h, 0.0).clamp_min(0)


class TestGemmaScope2:
    def test_it_computes_what_saelens_computes(self, tmp_path):
        assert_computes(
            write_gemma_scope_2(tmp_path / "a"),
            lambda x: jumprelu(x, PLAIN, GEMMA_2["threshold"]),
            lambda f: f @ PLAIN["W_dec"].double() + PLAIN["b_dec"].double(),
        )

    @pytest.mark.parametrize(
        ("path", "config", "model", "site"),
        [
            (
                "gemma-scope-2-1b-pt/resid_post/layer_12_width_16k_l0_medium",
                {"model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.12.output"},
                "google/gemma-3-1b-pt",
                "resid_post.12",
            ),
            (
                "gemma-scope-2-270m-pt/resid_post_all/layer_5_width_16k_l0_small",
                None,
                "google/gemma-3-270m",
                "resid_post.5",
            ),
            (
                "attn_out/layer_5_width_16k_l0_small",
                {"model_name": "google/gemma-3-4b-it", "hf_hook_point_in": "model.layers.5.self_attn.o_proj.input"},
                "google/gemma-3-4b-it",
                "attn_z.5",
            ),
            (
                "mine",
                {"hf_hook_point_in": "model.layers.5.post_feedforward_layernorm.output", "l0": 10},
                "",
                "mlp_out.5",
            ),
            ("mine", None, "", ""),
        ],
    )
    def test_model_and_site_come_from_the_config_or_the_path(self, tmp_path, path, config, model, site):
        info = load_dictionary(
            write_gemma_scope_2(tmp_path / path, config and {"architecture": "jump_relu"} | config)
        ).info
        assert (info.model, info.site) == (model, site)

    @pytest.mark.parametrize(
        ("path", "config", "tensors", "parts"),
        [
            ("transcoder/layer_5_width_16k_l0_small", None, {}, ["one site to another"]),
            ("clt/width_262k_l0_small", None, {}, ["one site to another"]),
            (
                "a",
                {"hf_hook_point_in": "model.layers.5.x", "hf_hook_point_out": "model.layers.5.y"},
                {},
                ["to another"],
            ),
            ("a", None, {"affine_skip_connection": torch.ones(D, D)}, ["one site to another"]),
            ("a", None, {"w_dec": torch.ones(N, 3, D)}, ["w_dec of shape [16, 3, 6]"]),
            ("a", {"architecture": "topk"}, {}, ["architecture = 'topk'"]),
            ("a", None, {"more": torch.ones(3)}, ["tensor more"]),
            ("resid_post/layer_5_l0_small", {"hf_hook_point_in": "model.layers.6.output"}, {}, ["the path says"]),
        ],
    )
    def test_what_is_no_sae_or_contradicts_itself_is_refused(self, tmp_path, path, config, tensors, parts):
        refused(write_gemma_scope_2(tmp_path / path, config, **tensors), *parts)


LLAMA = {
    "act_fn": "jumprelu", "d_model": D, "d_sae": N, "dataset_average_activation_norm": {"in": 4.0, "out": 4.0},
    "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False,
    "use_decoder_bias": True, "use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False,
    "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
}  # fmt: skip


def write_llama_scope(path: Path, **fields: Any) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "hyperparams.json").write_text(json.dumps(without(LLAMA | fields)))
    save_file(LINEAR | {"decoder.bias": draw(D, seed=4)}, path / "checkpoints" / "final.safetensors")
    return path


class TestLlamaScope:
    @pytest.mark.parametrize("by_norm", [True, False])
    def test_it_computes_what_saelens_computes(self, tmp_path, by_norm):
        """Weights of scaled activations, a threshold of unscaled ones; by norm, a code counts with its row's length."""
        scale, w = D**0.5 / 4, LINEAR["decoder.weight"].T.double()
        threshold = 0.3 * scale / (w.norm(dim=1) if by_norm else torch.ones(N))
        t = {"W_enc": LINEAR["encoder.weight"].T, "b_enc": LINEAR["encoder.bias"]}
        assert_computes(
            write_llama_scope(tmp_path / "Llama3_1-8B-Base-L15R-8x", sparsity_include_decoder_norm=by_norm),
            lambda x: jumprelu(scale * x, t, threshold),
            lambda f: (f @ w + draw(D, seed=4).double()) / scale,
        )
        info = load_dictionary(tmp_path / "Llama3_1-8B-Base-L15R-8x").info
        assert (info.model, info.site) == ("meta-llama/Llama-3.1-8B", "resid_post.15")

    def test_it_is_found_and_saved_again(self, tmp_path):
        write_llama_scope(tmp_path / "all" / "one")
        refused(tmp_path / "all", "holds no dictionary itself, but 1 below it", str(tmp_path / "all" / "one"))
        sae = load_dictionary(tmp_path / "all" / "one")
        assert load_dictionary(save_dictionary(sae, tmp_path / "ours")).fingerprint == sae.fingerprint

    @pytest.mark.parametrize(
        ("fields", "parts"),
        [
            ({"act_fn": "topk"}, ["act_fn = 'topk'"]),
            ({"norm_activation": "token-wise"}, ["norm_activation = 'token-wise'"]),
            ({"use_glu_encoder": True}, ["use_glu_encoder = True"]),
            ({"hook_point_out": "blocks.15.hook_mlp_out"}, ["it is a transcoder"]),
            ({"jump_relu_threshold": MISSING}, ["jump_relu_threshold", "missing"]),
            ({"dataset_average_activation_norm": {"in": 0}}, ["dataset_average_activation_norm.in = 0", "positive"]),
            ({"dataset_average_activation_norm": MISSING}, ["dataset_average_activation_norm", "missing"]),
            ({"d_sae": N + 1}, ["encoder.weight of shape [16, 6]"]),
        ],
        ids=str,
    )
    def test_a_config_that_asks_for_something_else_names_the_field(self, tmp_path, fields, parts):
        refused(write_llama_scope(tmp_path / "a", **fields), *parts)
