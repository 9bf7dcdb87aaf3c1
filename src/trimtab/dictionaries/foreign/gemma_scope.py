"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU SAEs of Gemma 2, one `params.npz` each.

The arrays are W_enc [d, n], b_enc, W_dec [n, d], b_dec and threshold; the encoder sees x itself, not x − b_dec. The
file does not say what it belongs to; the published path does: gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.
Those of `att` read all heads joined, those of `embedding` the embedding before Gemma multiplies it by √d, which makes
it `resid_pre.0`: their weights take up the factor.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.checked_weights import FoundSAE, damage_named, take_weights
from trimtab.dictionaries.config_fields import GET_AGAIN
from trimtab.dictionaries.normalising import fold_input_scale
from trimtab.errors import UserError

WEIGHTS_FILE = "params.npz"
CONFIG_FILE = ""
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, NotImplementedError, RuntimeError)
"""What a damaged archive raises, among others for a version, a compression or a password that it only seems to have."""
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def read(path: Path) -> FoundSAE:
    """Read a directory with `params.npz`. Raises a `UserError` that names the file and the array, also if the path says
    that it is a transcoder."""
    info = _info(path)
    file = path / WEIGHTS_FILE
    tensors = _load(file)
    if "W_dec" in tensors and tensors["W_dec"].ndim != 2:
        what = f"tensor W_dec of shape {list(tensors['W_dec'].shape)} in {file}"
        raise UserError(what, "it must be [features, width]", GET_AGAIN)
    n, d = tensors["W_dec"].shape if "W_dec" in tensors else (0, 0)
    weights = take_weights(tensors, file, JumpReLU, n=n, d=d, stated=("format", "Gemma Scope"))
    if info.site == "resid_pre.0":
        weights = fold_input_scale(weights, d**-0.5)
    return FoundSAE(JumpReLU, weights, {"apply_b_dec_to_input": False}, info)


def _load(file: Path) -> dict[str, Tensor]:
    with damage_named(file, "NumPy", *_ZIP_ERRORS):
        with np.load(file, allow_pickle=False) as arrays:
            loaded = {name: np.asarray(arrays[name]) for name in arrays.files}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in loaded.items()}


def _info(path: Path) -> DictionaryInfo:
    """What the path says; matched from its end, so that a parent directory of another name does no harm."""
    text = path.absolute().as_posix()
    release = _last(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)", text)
    about = {
        "layer": int(layer[1]) if (layer := _last(r"/layer_(\d+)(?=/|$)", text)) else None,
        "width": width[1] if (width := _last(r"/width_(\w+)(?=/|$)", text)) else None,
        "average_l0": int(l0[1]) if (l0 := _last(r"/average_l0_(\d+)(?=/|$)", text)) else None,
    }
    model = site = ""
    if release:
        size, tuning, kind = release.groups()
        model = f"google/gemma-2-{size}" + "-it" * (tuning == "it")
        if kind not in _SITES:
            hint = "use one of the residual stream, of an MLP or of attention (res, mlp, att)"
            raise UserError(f"dictionary {path}", f"it maps one site to another ({release[0]})", hint)
        if "/embedding/" in text[release.end() :]:
            site = "resid_pre.0"
        if about["layer"] is not None:
            site = f"{_SITES[kind]}.{about['layer']}"
    return DictionaryInfo(
        architecture=JumpReLU.architecture,
        model=model,
        site=site,
        metadata={
            "read_from": "Gemma Scope",
            "gemma_scope": {name: value for name, value in about.items() if value is not None},
        },
    )


def _last(pattern: str, text: str) -> re.Match[str] | None:
    return next(reversed([*re.finditer(pattern, text)]), None)
