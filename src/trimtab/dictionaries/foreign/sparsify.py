"""SAEs of sparsify (github.com/EleutherAI/sparsify): `cfg.json` beside `sae.safetensors`.

A TopK SAE: ReLU of (x − b_dec) W_encᵀ + b_enc, of which a row keeps the k largest. The directory is named after the
module whose output it reads, and the run's directory above it holds the model's name. `normalize_decoder` and
`multi_topk` concern its training only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trimtab.dictionaries.architectures.topk import TopK
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.foreign.module_paths import site_of_module
from trimtab.dictionaries.reading import FoundSAE, Stated, check_tensors, read_json, read_safetensors
from trimtab.dictionaries.sae import check_shapes

WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
_WRITER = "sparsify"
_SHAPES = {"encoder.weight": "n d", "encoder.bias": "n", "W_dec": "n d", "b_dec": "d"}
_WITHOUT_EFFECT = (
    "d_in",
    "activation",
    "expansion_factor",
    "num_latents",
    "k",
    "normalize_decoder",
    "multi_topk",
    "lookup_max_order",
)
"""Fields that are read, or that only a field that is refused gives a meaning; any other must be off."""
_REFUSED = {
    "transcode": "trimtab reads SAEs, which rebuild what they read",
    "skip_connection": "trimtab reads SAEs without a linear path beside the features",
    "signed": "trimtab reads SAEs whose codes are not negative",
}


def read(path: Path) -> FoundSAE:
    """Read a directory that sparsify saved.

    Raises:
        UserError: a file is missing or damaged, a field asks for what trimtab does not compute, or the weights do not
            fit the config; the message names the file and the field or tensor.
    """
    cfg = read_json(path / CONFIG_FILE, writers=_WRITER)
    field = Fields(cfg, str(path / CONFIG_FILE))
    if cfg.get("activation") not in (None, "topk"):
        raise field.error("activation", "trimtab reads SAEs whose rows keep their k largest codes (topk)")
    for name, value in cfg.items():
        if value and name not in _WITHOUT_EFFECT:
            raise field.error(name, _REFUSED.get(name, "trimtab does not know what it changes"))
    d = field.positive_integer("d_in")
    n = field.positive_integer("num_latents" if cfg.get("num_latents") else "expansion_factor")
    n = n if cfg.get("num_latents") else n * d
    settings = TopK.read_settings(field, n)
    file = path / WEIGHTS_FILE
    tensors = read_safetensors(file).tensors
    check_tensors(tensors, file, Stated("activation", "topk", CONFIG_FILE), needed=_SHAPES)
    check_shapes(_SHAPES, tensors, n=n, d=d, source=str(file))
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return FoundSAE(TopK, weights, settings, _info(path, cfg))


def _info(path: Path, cfg: dict[str, Any]) -> DictionaryInfo:
    path = path.absolute()
    module = path.parent if re.fullmatch(r"seed\d+", path.name) else path
    run = _run_config(module)
    return DictionaryInfo(
        architecture=TopK.architecture,
        model=str(run.get("model") or ""),
        site=site_of_module(module.name),
        metadata={"read_from": _WRITER, _WRITER: {"hookpoint": module.name, "sae": cfg, "run": run}},
    )


def _run_config(module: Path) -> dict[str, Any]:
    """The run's `config.json`, above the module's directory; empty if there is none that can be read."""
    try:
        run = json.loads((module.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(run, dict) or "sae" not in run:
        return {}
    return {name: value for name, value in run.items() if name != "hf_token"}
