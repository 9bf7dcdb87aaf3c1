"""Files of SAEs that were damaged at random: one line that says so, or codes that are what the files say.

What the files say is computed here once more, from each format's own formulas, by code that shares nothing with the
readers. `MUTATED` seeds are for the full sweep (marked slow), a few of them for every day.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_tensors import LINEAR, PLAIN, TENSORS, D, K, N, codes, draw
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab import cli
from trimtab.dictionaries import ARCHITECTURES, FeatureStats, load_dictionary, save_dictionary

MUTATED, EVERY_DAY = 300, 24
X = draw(16, D, seed=9).double() * 2
JUNK: list[Any] = [None, True, False, -1, 0, 1, 3, 2.5, 1e999, "", "none", "a", "1", [], [1], {}, {"a": 1}, 10**30]

# ---------------------------------------------------------------- files as they should be


def saelens(path: Path, **fields: Any) -> None:
    kind = fields.get("architecture", "standard")
    tensors = dict(PLAIN)
    if kind == "jumprelu":
        tensors["threshold"] = draw(N, seed=8).abs()
    if kind == "gated":
        del tensors["b_enc"]
        tensors |= {name: draw(N, seed=i) / 3 for i, name in enumerate(("b_gate", "b_mag", "r_mag"), 5)}
    about = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre"}
    cfg = {
        "architecture": kind, "d_in": D, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", **fields,
        "metadata": about | fields.get("metadata", {}),
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")


def learned(path: Path, dict_class: str) -> None:
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "k": K, "layer": 3, "lm_name": "m"}
    trainer |= {"submodule_name": "resid_post_layer_3"}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    torch.save(TENSORS[dict_class], path / "ae.pt")


def sparsify(path: Path) -> None:
    cfg = {"activation": "topk", "num_latents": N, "k": K, "d_in": D, "transcode": False, "expansion_factor": 32}
    (path / "cfg.json").write_text(json.dumps(cfg))
    weights = {"encoder.weight": LINEAR["encoder.weight"], "encoder.bias": LINEAR["encoder.bias"]}
    save_file(weights | {"W_dec": PLAIN["W_dec"], "b_dec": PLAIN["b_dec"]}, path / "sae.safetensors")


def gemma_scope(path: Path) -> None:
    np.savez(path / "params.npz", **{name: w.numpy() for name, w in (PLAIN | {"threshold": draw(N, seed=8)}).items()})


def gemma_scope_2(path: Path) -> None:
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.3.output"}
    (path / "config.json").write_text(json.dumps(config))
    lower = {name.lower() if name.startswith("W") else name: w for name, w in PLAIN.items()}
    save_file(lower | {"threshold": draw(N, seed=8)}, path / "params.safetensors")


def llama_scope(path: Path) -> None:
    config = {
        "act_fn": "jumprelu", "d_model": D, "d_sae": N, "dataset_average_activation_norm": {"in": 4.0, "out": 4.0},
        "jump_relu_threshold": 0.3, "hook_point_in": "blocks.3.hook_resid_post", "use_decoder_bias": True,
        "sparsity_include_decoder_norm": False,
    }  # fmt: skip
    (path / "hyperparams.json").write_text(json.dumps(config))
    (path / "checkpoints").mkdir()
    save_file(LINEAR | {"decoder.bias": draw(D, seed=4)}, path / "checkpoints" / "final.safetensors")


def own(path: Path) -> None:
    sae = ARCHITECTURES["jumprelu"](**PLAIN, threshold=draw(N, seed=8).abs())
    ones = {name: np.ones(N, np.float32) for name in ("max_activation", "mean_activation", "firing_rate")}
    save_dictionary(sae, path, FeatureStats(**ones, n_tokens=100))


WRITERS: dict[str, Callable[[Path], None]] = {
    "own": own,
    "standard": lambda path: saelens(path),
    "gated": lambda path: saelens(path, architecture="gated"),
    "jumprelu": lambda path: saelens(path, architecture="jumprelu", apply_b_dec_to_input=False),
    "topk": lambda path: saelens(path, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
    "rescaled": lambda path: saelens(path, normalize_activations="constant_norm_rescale"),
    "centred": lambda path: saelens(
        path, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    ),
    **{name: lambda path, name=name: learned(path, name) for name in TENSORS},
    "sparsify": sparsify,
    "gemma scope": gemma_scope,
    "gemma scope 2": gemma_scope_2,
    "llama scope": llama_scope,
}  # fmt: skip

# ---------------------------------------------------------------- what files say


def top(h: Tensor, k: int) -> Tensor:
    order = h.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(h).scatter(1, order, h.gather(1, order)).clamp_min(0)


def jump(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(z > threshold, z, 0.0).clamp_min(0)


def said_by(path: Path) -> Tensor:
    """Codes of `X` by a directory's files."""
    if (path / "sae_weights.safetensors").exists():
        return said_by_saelens(path)
    if (path / "ae.pt").exists():
        t = torch.load(path / "ae.pt", weights_only=True)
        trainer = json.loads((path / "config.json").read_text())["trainer"]
        named = trainer.get("dict_class") or next(name for name in TENSORS if set(TENSORS[name]) == set(t))
        if "apply_b_dec_to_input" in trainer:
            pytest.skip("no formula for that")
        return codes(named, {name: w.double() if w.is_floating_point() else w for name, w in t.items()}, X)
    if (path / "sae.safetensors").exists():
        t = {name: w.double() for name, w in load_file(path / "sae.safetensors").items()}
        z = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
        return top(z, json.loads((path / "cfg.json").read_text())["k"])
    if (path / "params.npz").exists():
        t = {name: torch.from_numpy(w).double() for name, w in np.load(path / "params.npz").items()}
        return jump(X @ t["W_enc"] + t["b_enc"], t["threshold"])
    if (path / "params.safetensors").exists():
        t = {name: w.double() for name, w in load_file(path / "params.safetensors").items()}
        return jump(X @ t["w_enc"] + t["b_enc"], t["threshold"])
    cfg = json.loads((path / "hyperparams.json").read_text())
    t = {name: w.double() for name, w in load_file(path / "checkpoints" / "final.safetensors").items()}
    scale = D**0.5 / cfg["dataset_average_activation_norm"]["in"]
    x = scale * X - t["decoder.bias"] * cfg.get("apply_decoder_bias_to_pre_encoder", False) / scale
    norms = t["decoder.weight"].norm(dim=0) if cfg.get("sparsity_include_decoder_norm", False) else torch.ones(N)
    return jump(x @ t["encoder.weight"].T + t["encoder.bias"], cfg["jump_relu_threshold"] * scale / norms)


def said_by_saelens(path: Path) -> Tensor:
    cfg = json.loads((path / "cfg.json").read_text())
    t = {name: w.double() for name, w in load_file(path / "sae_weights.safetensors").items()}
    metadata, x = cfg.get("metadata") or {}, X
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        x = x - x.mean(1, keepdim=True)
    if cfg.get("normalize_activations") == "constant_norm_rescale":
        x = x * D**0.5 / x.norm(dim=1, keepdim=True)
    if cfg.get("normalize_activations") == "layer_norm":
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    kind = cfg.get("architecture", "standard")
    p = (x - t["b_dec"] * cfg.get("apply_b_dec_to_input", True)) @ t["W_enc"]
    if kind == "gated":
        return torch.where(p + t["b_gate"] > 0, (p * t["r_mag"].exp() + t["b_mag"]).clamp_min(0), 0.0)
    z = p + t["b_enc"]
    if kind == "topk" or cfg.get("activation_fn") == "topk":
        z = z * t["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else z
        return top(z, cfg["k"])
    return jump(z, t["threshold"]) if kind == "jumprelu" else z.clamp_min(0)


# ---------------------------------------------------------------- damage

Rng = np.random.Generator


def some_file(path: Path, rng: Rng) -> Path:
    return rng.choice(np.array(sorted(file for file in path.rglob("*") if file.is_file()), dtype=object))


def truncate(path: Path, rng: Rng) -> None:
    file = some_file(path, rng)
    data = file.read_bytes()
    file.write_bytes(data[: int(rng.integers(len(data)))])


def flip(path: Path, rng: Rng) -> None:
    file = some_file(path, rng)
    data = bytearray(file.read_bytes())
    for place in rng.integers(len(data), size=int(rng.integers(1, 4))):
        data[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def rename_or_remove(path: Path, rng: Rng) -> None:
    file = some_file(path, rng)
    if rng.random() < 0.5:
        file.unlink()
    else:
        names = [
            "cfg.json",
            "config.json",
            "sae.safetensors",
            "sae_weights.safetensors",
            "ae.pt",
            "params.npz",
            "a.bin",
        ]
        file.rename(file.with_name(str(rng.choice(names))))


def junk_in_config(path: Path, rng: Rng) -> None:
    files = [file for file in sorted(path.rglob("*.json"))]
    if not files:
        return truncate(path, rng)
    cfg = json.loads(files[0].read_text())
    inner = [cfg, *(value for value in cfg.values() if isinstance(value, dict))]
    part = inner[int(rng.integers(len(inner)))]
    name = str(rng.choice(sorted(part))) if part else "architecture"
    done = rng.random()
    if done < 0.25:
        part.pop(name, None)
    elif done < 0.4:
        part[name + "_"] = part.pop(name, None)
    else:
        part[name] = JUNK[int(rng.integers(len(JUNK)))]
    files[0].write_text(json.dumps(cfg))
    return None


def other_tensors(path: Path, rng: Rng) -> None:
    """A tensor gone, renamed, reshaped, of another type, or with numbers that are none."""
    file = next(file for file in sorted(path.rglob("*")) if file.suffix in (".safetensors", ".pt", ".npz"))
    if file.suffix == ".npz":
        tensors = {name: torch.from_numpy(w) for name, w in np.load(file).items()}
    else:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    name = str(rng.choice(sorted(tensors)))
    tensor = tensors.pop(name)
    flat = tensor.flatten().clone()
    changed = {
        0: {}, 1: {name + "_": tensor}, 2: {name: flat[:-1].contiguous()}, 3: {name: flat.reshape(1, -1)},
        4: {name: (10 * tensor).to(torch.int32)}, 5: {name: tensor.half()}, 6: {name: tensor.double()},
        7: {name: torch.where(torch.arange(flat.numel()) == 0, math.nan, flat.float()).reshape(tensor.shape)},
        8: {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor + 1}, 9: {name: tensor, "more": torch.ones(2)},
    }  # fmt: skip
    tensors |= changed[int(rng.integers(len(changed)))]
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{key: w.numpy() for key, w in tensors.items()})


def lie_in_header(path: Path, rng: Rng) -> None:
    """A safetensors header with another length, or with offsets that lie."""
    files = [file for file in sorted(path.rglob("*.safetensors"))]
    if not files:
        return flip(path, rng)
    data = files[0].read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        files[0].write_bytes(struct.pack("<Q", int(rng.choice([0, 2, size - 1, size + 1, 2**40, 2**63]))) + data[8:])
    else:
        header = json.loads(data[8 : 8 + size])
        name = str(rng.choice([key for key in header if key != "__metadata__"]))
        field = str(rng.choice(["shape", "dtype", "data_offsets"]))
        header[name][field] = JUNK[int(rng.integers(len(JUNK)))]
        text = json.dumps(header).encode()
        files[0].write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return None


DAMAGES = [truncate, flip, rename_or_remove, junk_in_config, junk_in_config, other_tensors, lie_in_header]

# ---------------------------------------------------------------- the test


def check(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    rng = np.random.default_rng([7, seed])
    name = list(WRITERS)[seed % len(WRITERS)]
    source, home = tmp_path / "source", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    WRITERS[name](source)
    damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
    damage(source, rng)
    status = cli.main(["sae", "convert", str(source), str(home / "sae")])
    err = capsys.readouterr().err
    about = f"seed {seed}, {name}, {damage.__name__}: {err}"
    assert "Traceback" not in err, about
    if status:
        assert status == 2, about
        assert err.splitlines()[-1].startswith("trimtab: error: "), about
        assert sum(line.startswith("trimtab: error") for line in err.splitlines()) == 1, about
        assert list(home.iterdir()) == [], about
        return "refused"
    found = load_dictionary(home / "sae", dtype=torch.float64).encode(X)
    torch.testing.assert_close(found, said_by(source).double(), rtol=1e-4, atol=1e-4, msg=about)
    return "right"


@pytest.mark.parametrize("seed", range(EVERY_DAY))
def test_damaged_files_are_refused_in_one_line_or_read_rightly(seed: int, tmp_path: Path, capsys) -> None:
    check(seed, tmp_path, capsys)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(EVERY_DAY, MUTATED))
@pytest.mark.filterwarnings("ignore")
def test_many_more_damaged_files(seed: int, tmp_path: Path, capsys) -> None:
    check(seed, tmp_path, capsys)


@pytest.mark.parametrize("name", WRITERS)
def test_undamaged_files_are_read_rightly(name: str, tmp_path: Path) -> None:
    """Or the sweep would compare nothing."""
    WRITERS[name](tmp_path)
    found = load_dictionary(tmp_path, dtype=torch.float64).encode(X)
    assert (found > 0).any(0).float().mean() > 0.5
    torch.testing.assert_close(found, said_by(tmp_path).double(), rtol=1e-5, atol=1e-5)
