"""SAEs of sparsify (github.com/EleutherAI/sparsify): `cfg.json` beside `sae.safetensors`.

A TopK SAE: ReLU of (x − b_dec) W_encᵀ + b_enc, of which a row keeps the k largest. The directory is named after the
module whose output it reads, and the run's directory above it holds the model's name. `normalize_decoder` and
`multi_topk` concern its training only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.dictionaries.architectures.topk import TopK
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.checked_weights import FoundSAE, read_safetensors, take_weights
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.module_paths import site_of_module

WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
_WRITER = "sparsify"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
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
    """Read a directory that sparsify saved. Raises a `UserError` that names the file and the field or tensor."""
    field = Fields.read(path / CONFIG_FILE, _WRITER)
    cfg = field.cfg
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
    tensors, _ = read_safetensors(file)
    weights = take_weights(tensors, file, TopK, n=n, d=d, stated=("activation", "topk"), names=_NAMES)
    return FoundSAE(TopK, weights, settings, _info(path, cfg))


def _info(path: Path, cfg: Mapping[str, Any]) -> DictionaryInfo:
    path = path.absolute()
    module = path.parent if re.fullmatch(r"seed\d+", path.name) else path
    run = _run_config(module)
    return DictionaryInfo(
        architecture=TopK.architecture,
        model=str(run.get("model") or ""),
        site=site_of_module(module.name),
        metadata={"read_from": _WRITER, _WRITER: {"hookpoint": module.name, "sae": dict(cfg), "run": run}},
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
