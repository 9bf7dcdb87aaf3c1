"""What a file of SAELens says of its input is obeyed: against SAELens's formulas, written here as loops and sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo, FeatureStatsAccumulator, load_dictionary, save_dictionary
from trimtab.dictionaries import saelens_layout as layout
from trimtab.errors import UserError
from trimtab.evaluation.supervised.control import edit_by_meaning
from trimtab.evaluation.supervised.parts import split_dictionary
from trimtab.lm import EditRequest, Site, TokenBatch, capture
from trimtab.selection import rank
from trimtab.selection.delta_confidence import DeltaConfidence
from trimtab.steering import DirectionTable, ReconstructionSource, StaticSource

D, N = 8, 24
HOOK = "blocks.1.hook_resid_pre"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {
    "W_enc": draw(D, N, seed=1) / 2,
    "b_enc": 0.3 * draw(N, seed=2),
    "W_dec": draw(N, D, seed=3),
    "b_dec": draw(D, seed=4) + 1,
}
X = 3 * draw(50, D, seed=5) + 2


def write(path: Path, metadata: dict[str, Any] | None = None, tensors: Any = None, **fields: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    known = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": HOOK}
    cfg = {
        "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": known | (metadata or {}), **fields,
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(cfg))
    weights = WEIGHTS if tensors is None else tensors
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "sae_weights.safetensors")
    return path


def codes(z: Tensor, w: dict[str, Tensor] | None = None, *, subtract: bool = True) -> Tensor:
    w = w or WEIGHTS
    return ((z - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]).clamp_min(0)


def rebuilt(f: Tensor) -> Tensor:
    return f @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"]


def load(path: Path, **options: Any) -> Any:
    return load_dictionary(path, dtype=torch.float64, **options)


def refused(path: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_dictionary(path, **options)
    for part in parts:
        assert part in caught.value.line, caught.value.line
    return caught.value.hint


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


class TestCentredModel:
    @pytest.mark.parametrize("subtract", [True, False])
    def test_codes_are_those_of_activations_without_their_mean(self, tmp_path, subtract):
        sae = load(write(tmp_path / "a", CENTRED, apply_b_dec_to_input=subtract))
        mean = X.mean(-1, keepdim=True)
        expected = codes(X - mean, subtract=subtract)
        torch.testing.assert_close(sae.encode(X), expected)
        torch.testing.assert_close(sae.encode(X - mean), expected)
        torch.testing.assert_close(sae(X), rebuilt(expected) + mean)
        assert (codes(X, subtract=subtract) - expected).abs().max() > 1  # or this test could not fail

    def test_gated_biases_take_up_what_the_encoder_no_longer_sees(self, tmp_path):
        gated = {"b_gate": draw(N, seed=6) / 3, "b_mag": draw(N, seed=7) / 3, "r_mag": draw(N, seed=8) / 3}
        tensors = {name: WEIGHTS[name] for name in ("W_enc", "W_dec", "b_dec")} | gated
        sae = load(write(tmp_path / "a", CENTRED, tensors, architecture="gated"))
        p = (X - X.mean(-1, keepdim=True) - WEIGHTS["b_dec"]) @ WEIGHTS["W_enc"]
        magnitude = (p * gated["r_mag"].exp() + gated["b_mag"]).clamp_min(0)
        torch.testing.assert_close(sae.encode(X), magnitude * (p + gated["b_gate"] > 0))

    def test_saved_and_read_again_it_is_the_same(self, tmp_path):
        sae = load_dictionary(write(tmp_path / "a", CENTRED))
        again = load_dictionary(save_dictionary(sae, tmp_path / "b"))
        assert again.info.is_centred
        torch.testing.assert_close(again.encode(X.float()), sae.encode(X.float()), rtol=1e-5, atol=1e-5)

    def test_mutation_the_setting_is_passed_over(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a", CENTRED)
        monkeypatch.setattr(layout, "fold_mean", lambda weights, biases, subtracts_b_dec: weights)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(load(path).encode(X), codes(X - X.mean(-1, keepdim=True)))

    def test_heads_read_the_same_in_a_centred_model(self, tmp_path):
        path = write(tmp_path / "a", CENTRED | {"hook_name": "blocks.1.attn.hook_z"}, reshape_activations="hook_z")
        torch.testing.assert_close(load(path).encode(X), codes(X))

    def test_where_the_site_is_unknown_it_is_refused_and_the_hint_helps(self, tmp_path):
        hint = refused(
            write(tmp_path / "a", CENTRED | {"hook_name": "hook_embed"}), "center_writing_weights", "hook_embed"
        )
        assert "site: resid_pre.8" in hint
        load_dictionary(write(tmp_path / "a", CENTRED | {"hook_name": "hook_embed", "site": "resid_pre.8"}))

    def test_a_model_with_rmsnorm_is_refused_and_the_hint_helps(self, tmp_path, tiny_llama):
        wide = {name: draw(*(32 if size == D else size for size in w.shape), seed=1) for name, w in WEIGHTS.items()}
        about = CENTRED | {"model_name": "tiny-llama"}
        hint = refused(write(tmp_path / "a", about, wide, d_in=32), "RMSNorm", model=tiny_llama)
        assert "take center_writing_weights out" in hint
        load_dictionary(write(tmp_path / "a", {"model_name": "tiny-llama"}, wide, d_in=32), model=tiny_llama)


@pytest.mark.parametrize(
    ("arguments", "hook", "parts"),
    [
        ({"fold_value_biases": True}, "attn.hook_z", ["fold_value_biases = True", "attn_z.1"]),
        ({"refactor_factored_attn_matrices": True}, "attn.hook_q", ["refactor_factored", "attn_q.1"]),
        ({"revolve_weights": True}, "hook_resid_pre", ["revolve_weights = True", "does not know"]),
        ({"center_writing_weights": 1}, "hook_resid_pre", ["center_writing_weights = 1", "true or false"]),
        ([1], "hook_resid_pre", ["model_from_pretrained_kwargs", "object"]),
    ],
    ids=str,
)
def test_what_changes_the_model_otherwise_is_refused(tmp_path, arguments, hook, parts):
    path = write(tmp_path / "a", {"model_from_pretrained_kwargs": arguments, "hook_name": f"blocks.1.{hook}"})
    assert refused(path, *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        {"fold_ln": True, "center_unembed": True, "dtype": "bfloat16", "n_ctx": 512, "device_map": "auto"},
        {"fold_value_biases": True, "refactor_factored_attn_matrices": True, "center_writing_weights": False},
    ],
    ids=str,
)
def test_what_leaves_the_residual_stream_as_it_is_changes_nothing(tmp_path, arguments):
    sae = load(write(tmp_path / "a", {"model_from_pretrained_kwargs": arguments}))
    torch.testing.assert_close(sae.encode(X), codes(X))


def test_another_checkpoint_of_the_model_is_another_model(tmp_path, tiny_llama):
    wide = {name: draw(*(32 if size == D else size for size in w.shape), seed=1) for name, w in WEIGHTS.items()}
    about = {"model_name": "tiny-llama", "model_from_pretrained_kwargs": {"checkpoint_value": 1000}}
    path = write(tmp_path / "a", about, wide, d_in=32)
    assert "--any-model" in refused(path, "checkpoint_value 1000", model=tiny_llama)
    load_dictionary(path, model=tiny_llama, any_model=True)


def by_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unit = torch.stack([row.square().sum().sqrt() / len(row) ** 0.5 for row in x])[:, None]
    return x / unit, unit, torch.zeros_like(unit)


def by_deviation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.stack([row.sum() / len(row) for row in x])[:, None]
    unit = torch.stack([((row - row.mean()).square().sum() / (len(row) - 1)).sqrt() for row in x])[:, None]
    return (x - mean) / (unit + 1e-5), unit, mean


NORMALISED = {"constant_norm_rescale": by_norm, "layer_norm": by_deviation}


@pytest.mark.parametrize("kind", NORMALISED)
class TestNormalisedByToken:
    def test_codes_and_reconstructions_are_saelens_s(self, tmp_path, kind):
        sae = load(write(tmp_path / "a", normalize_activations=kind))
        z, unit, shift = NORMALISED[kind](X)
        torch.testing.assert_close(sae.encode(X), codes(z))
        torch.testing.assert_close(sae(X), rebuilt(codes(z)) * unit + shift)
        torch.testing.assert_close(sae.code_unit(X), unit)
        ids = torch.tensor([3, 7])
        torch.testing.assert_close(sae.encode_features(X, ids), codes(z)[:, ids])
        torch.testing.assert_close(sae.encode_pairs(X).value, codes(z)[codes(z) > 0])

    def test_topk_and_saving(self, tmp_path, kind):
        sae = load_dictionary(write(tmp_path / "a", architecture="topk", k=3, normalize_activations=kind))
        h = (NORMALISED[kind](X)[0] - WEIGHTS["b_dec"]) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]
        expected = torch.stack([torch.where(row >= row.sort(descending=True).values[2], row, 0) for row in h])
        torch.testing.assert_close(sae.encode(X.float()).double(), expected.clamp_min(0), rtol=1e-4, atol=1e-4)
        path = save_dictionary(sae, tmp_path / "b")
        assert json.loads((path / "cfg.json").read_text())["normalize_activations"] == kind
        assert load_dictionary(path).fingerprint == sae.fingerprint

    def test_codes_alone_cannot_be_decoded_and_the_hint_helps(self, tmp_path, kind):
        sae = load(write(tmp_path / "a", normalize_activations=kind))
        with pytest.raises(UserError, match=r"by its own norm .*give the activations, too: sae.rebuild\(codes, x\)"):
            sae.decode(sae.encode(X))
        torch.testing.assert_close(sae.rebuild(sae.encode(X), X), sae(X))

    @pytest.mark.parametrize("form", ["dense", "pairs"])
    def test_strengths_maxima_and_doses_are_in_model_units(self, tmp_path, kind, form):
        sae = load(write(tmp_path / "a", normalize_activations=kind))
        z, unit, _ = NORMALISED[kind](X)
        expected = codes(z) * unit * WEIGHTS["W_dec"].norm(dim=1)
        strengths = DirectionTable.of(sae).strengths(X, torch.full((len(X), 1), 5))
        torch.testing.assert_close(strengths, expected[:, 5:6])
        counted = FeatureStatsAccumulator(sae.decoder_norms)
        counted.update(sae.in_model_units(sae.encode(X) if form == "dense" else sae.encode_pairs(X), X))
        sae.feature_stats = counted.result()
        largest = torch.from_numpy(sae.feature_stats.max_activation).double()
        torch.testing.assert_close(largest, expected.amax(0), rtol=1e-6, atol=0)
        row = torch.arange(len(X))
        request = EditRequest(Site.parse("resid_pre.1"), X, row, row, row, *[0 * row] * 4, row[:, None])
        source = StaticSource(sae, 5, 0.4, unit="max_activation")
        torch.testing.assert_close(source.choose(request).coefficient.double(), 0.4 * largest[5].expand(len(X), 1))

    def test_ranking_amplifies_by_the_same_dose(self, tmp_path, kind, tiny_llama):
        wide = {name: draw(*(32 if size == D else size for size in w.shape), seed=1) / 4 for name, w in WEIGHTS.items()}
        about = {"model_name": "tiny-llama"}
        sae = load_dictionary(write(tmp_path / "a", about, wide, d_in=32, normalize_activations=kind))
        (x,) = capture(tiny_llama, TokenBatch.full(torch.arange(5, 45)[None]), ["resid_pre.1"]).values()
        z, unit, _ = NORMALISED[kind](x[0].double())
        counted = FeatureStatsAccumulator(sae.decoder_norms)
        counted.update(sae.in_model_units(sae.encode(x[0]), x[0]))
        sae.feature_stats = counted.result()
        table = rank(tiny_llama, sae, DeltaConfidence(dose=0.5, prefixes=("ab",)), features=[3, 7])
        prefix = TokenBatch.full(torch.tensor([tiny_llama.encode_text("ab")]))
        (at,) = capture(tiny_llama, prefix, ["resid_pre.1"]).values()
        moved = 0.5 * (codes(z, wide) * unit).amax(0) * wide["W_dec"].norm(dim=1)
        for feature, relative in zip(table.feature, table.relative_dose, strict=True):
            assert relative == pytest.approx(float(moved[feature] / at[0, -1].norm()), rel=1e-4)

    def test_codes_move_activations_by_what_they_come_to_there(self, tmp_path, kind):
        sae = load(write(tmp_path / "a", normalize_activations=kind))
        other, ones = X.flip(0) / 2, torch.ones(len(X), N)
        before, after = (codes(z) * unit for z, unit, _ in (NORMALISED[kind](X), NORMALISED[kind](other)))
        expected = X + (after - before) @ WEIGHTS["W_dec"]
        torch.testing.assert_close(edit_by_meaning(sae, X, other, ones, ones, N).x, expected)
        parts = split_dictionary(sae, X)
        torch.testing.assert_close(parts.vectors.sum(1) - parts.vectors[:, 1], sae(X))

    def test_splicing_puts_the_reconstruction_in_its_place(self, tmp_path, kind, tiny_llama):
        wide = {name: draw(*(32 if size == D else size for size in w.shape), seed=1) / 4 for name, w in WEIGHTS.items()}
        sae = load_dictionary(write(tmp_path / "a", None, wide, d_in=32, normalize_activations=kind))
        tokens = torch.randint(5, 60, (1, 9), generator=torch.Generator().manual_seed(0))
        (x,) = capture(tiny_llama, TokenBatch.full(tokens), ["resid_pre.1"]).values()
        z, unit, shift = NORMALISED[kind](x[0].double())
        expected = (codes(z, wide) @ wide["W_dec"] + wide["b_dec"]) * unit + shift
        row = torch.arange(9)
        request = EditRequest(Site.parse("resid_pre.1"), x[0], 0 * row, row, tokens[0], *[0 * row] * 4, row[:, None])
        source = ReconstructionSource(sae, "resid_pre.1")
        torch.testing.assert_close(source.replacement(request).double(), expected, rtol=1e-3, atol=1e-3)


class TestFixedScale:
    def test_a_scale_in_the_file_is_folded_as_saelens_folds_it(self, tmp_path):
        about = {"norm_scaling_factor": 0.37}
        sae = load(write(tmp_path / "a", about, normalize_activations="expected_average_only_in"))
        torch.testing.assert_close(sae.encode(X), codes(0.37 * X))
        torch.testing.assert_close(sae(X), rebuilt(codes(0.37 * X)) / 0.37)
        again = load(save_dictionary(sae, tmp_path / "b"))
        torch.testing.assert_close(again.encode(X), codes(0.37 * X), rtol=1e-5, atol=1e-5)

    def test_a_checkpoint_keeps_the_scale_beside_it(self, tmp_path):
        path = write(tmp_path / "a", normalize_activations="expected_average_only_in")
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5, "has_whitening": False}))
        torch.testing.assert_close(load(path).encode(X), codes(2.5 * X))

    @pytest.mark.parametrize("stated", ["expected_average_only_in", True])
    def test_without_a_scale_it_is_read_as_saelens_reads_it_and_says_so(self, tmp_path, stated):
        with pytest.warns(UserWarning, match="does not say by what factor.*norm_scaling_factor"):
            sae = load(write(tmp_path / "a", normalize_activations=stated))
        torch.testing.assert_close(sae.encode(X), codes(X))

    @pytest.mark.parametrize("scale", [0, -1.0, True, "2", [1]])
    def test_a_scale_that_is_none_is_refused(self, tmp_path, scale):
        fields = {"normalize_activations": "expected_average_only_in"}
        assert refused(
            write(tmp_path / "a", {"norm_scaling_factor": scale}, **fields), "norm_scaling_factor", "positive"
        )


class TestAllHeads:
    @pytest.mark.parametrize("version", ["6.54.12", "5.1.0"])
    def test_hook_z_of_all_heads_is_read_as_one_vector(self, tmp_path, version):
        about = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": None, "sae_lens_version": version}
        sae = load(write(tmp_path / "a", about, reshape_activations="hook_z"))
        assert sae.info.site == "attn_z.1"
        torch.testing.assert_close(sae.encode(X), codes(X))

    @pytest.mark.parametrize(
        ("site", "reshape"), [("attn_z.1", "hook_z"), ("attn_z.1.0", "none"), ("attn_q.1", "none")]
    )
    def test_what_is_written_says_how_saelens_must_shape_it(self, random_sae, tmp_path, site, reshape):
        sae = random_sae("standard", info=DictionaryInfo(architecture="standard", site=site))
        path = save_dictionary(sae, tmp_path / "a")
        cfg = json.loads((path / "cfg.json").read_text())
        assert cfg["reshape_activations"] == ("hook_z" if site == "attn_z.1" else "none")
        assert load_dictionary(path).info.site == site

    def test_another_hook_is_not_reshaped(self, tmp_path):
        assert refused(write(tmp_path / "a", reshape_activations="hook_z"), "reshape_activations", HOOK)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.15", "resid_post.15"),
        ("transformer.h.3", "resid_post.3"),
        ("gpt_neox.layers.2", "resid_post.2"),
        ("model.layers.4.self_attn", ""),
        ("model.layers.4.mlp", ""),
        ("model.norm", ""),
    ],
)
def test_a_module_s_path_is_a_site_where_it_is_certain(tmp_path, hook, site):
    about = {"hook_name": hook, "model_class_name": "AutoModelForCausalLM"}
    sae = load_dictionary(write(tmp_path / "a", about))
    assert sae.info.site == site
    saved = json.loads((save_dictionary(sae, tmp_path / "b") / "cfg.json").read_text())["metadata"]
    if site:  # SAELens looks for a hook of TransformerLens again
        assert saved["hook_name"] == f"blocks.{site.split('.')[1]}.hook_resid_post"
        assert "model_class_name" not in saved
    else:
        assert (saved["hook_name"], saved["model_class_name"]) == (hook, "AutoModelForCausalLM")


def test_an_old_name_that_leaves_its_layer_open(tmp_path):
    about = {"hook_name": "blocks.{layer}.hook_resid_pre"}
    assert load_dictionary(write(tmp_path / "a", about, hook_layer=6)).info.site == "resid_pre.6"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_wrapped_module_are_understood(tmp_path, prefix):
    tensors = {prefix + name: weight for name, weight in WEIGHTS.items()}
    torch.testing.assert_close(load(write(tmp_path / "a", None, tensors)).encode(X), codes(X))
    path = write(tmp_path / "b", None, tensors | {"other": torch.ones(2)})
    assert refused(path, "tensor W_enc", "lacks it")
    assert set(load_file(path / "sae_weights.safetensors")) > set(tensors)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"architecture": "transcoder", "d_out": D},
            ["architecture 'transcoder'", "it reads blocks.1"],
        ),
        ({"architecture": "jumprelu_skip_transcoder"}, ["it is a transcoder"]),
        ({"d_out": D + 1}, ["it is a transcoder"]),
        ({}, ["it is a transcoder", "writes blocks.2.hook_mlp_out"]),
    ],
    ids=str,
)
def test_a_transcoder_is_refused_as_one(tmp_path, fields, parts):
    assert "SAE" in refused(write(tmp_path / "a", {"hook_name_out": "blocks.2.hook_mlp_out"}, **fields), *parts)
