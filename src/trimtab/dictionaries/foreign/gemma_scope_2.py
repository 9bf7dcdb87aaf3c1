"""Gemma Scope 2: JumpReLU SAEs of Gemma 3, `params.safetensors` beside `config.json`.

The tensors are w_enc [d, n], b_enc, w_dec [n, d], b_dec and threshold; the encoder sees x itself, not x − b_dec. The
config names the model and the module read (`model.layers.12.output`); where it is missing, the published path says as
much: google/gemma-scope-2-1b-pt/resid_post/layer_12_width_16k_l0_medium. `attn_out` there is what the output projection
of attention reads, all heads joined.
"""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.checked_weights import FoundSAE, read_safetensors, take_weights, without_wrappers
from trimtab.dictionaries.config_fields import GET_AGAIN, Fields
from trimtab.dictionaries.module_paths import site_of_module
from trimtab.errors import UserError

WEIGHTS_FILE = "params.safetensors"
CONFIG_FILE = "config.json"
_NAMES = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
_SITES = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}
_ANOTHER_SITE = r"(?:^|/)(transcoder|clt|crosscoder)"


def read(path: Path) -> FoundSAE:
    """Read a directory of Gemma Scope 2. Raises a `UserError` that names the file and the field or tensor, also if it
    is a transcoder or crosscoder."""
    file = path / WEIGHTS_FILE
    exists = (path / CONFIG_FILE).exists()
    field = Fields.read(path / CONFIG_FILE, "Gemma Scope 2") if exists else Fields({}, str(path / CONFIG_FILE))
    if field.cfg.get("architecture") not in (None, "jump_relu"):
        raise field.error("architecture", "the SAEs of Gemma Scope 2 are of the architecture jump_relu")
    info = _info(path, field)
    tensors = without_wrappers(read_safetensors(file)[0])
    if "affine_skip_connection" in tensors:
        raise _transcoder(path)
    if "w_dec" in tensors and tensors["w_dec"].ndim != 2:
        what = f"tensor w_dec of shape {list(tensors['w_dec'].shape)} in {file}"
        raise UserError(what, "it must be [features, width]", GET_AGAIN)
    n, d = tensors["w_dec"].shape if "w_dec" in tensors else (0, 0)
    weights = take_weights(tensors, file, JumpReLU, n=n, d=d, stated=("format", "Gemma Scope 2"), names=_NAMES)
    return FoundSAE(JumpReLU, weights, {"apply_b_dec_to_input": False}, info)


def _info(path: Path, field: Fields) -> DictionaryInfo:
    text = path.absolute().as_posix()
    source, target = (field.cfg.get(f"hf_hook_point_{end}") for end in ("in", "out"))
    place = "/".join(path.absolute().parts[-2:])
    if re.search(_ANOTHER_SITE, place) or target not in (None, source) or field.cfg.get("affine_connection"):
        raise _transcoder(path)
    stated = site_of_module(str(source)) if source else ""
    match = re.search(r"(resid_post|attn_out|mlp_out)(?:_all)?/(?:.*_)?layer_(\d+)(?=_|/|$)", place)
    published = f"{_SITES[match[1]]}.{match[2]}" if match else ""
    if stated and published and stated != published:
        raise field.error("hf_hook_point_in", f"the path says {published}", "move the directory to where it was")
    return DictionaryInfo(
        architecture=JumpReLU.architecture,
        model=_model(str(field.cfg.get("model_name") or ""), text),
        site=stated or published,
        metadata={"read_from": "Gemma Scope 2", "gemma_scope_2": dict(field.cfg)},
    )


def _model(stated: str, path: str) -> str:
    """The model's name on the hub; configs write `gemma-v3-1b-pt`, and the smallest pretrained one has no suffix."""
    if not stated:
        found = re.findall(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", path)
        stated = "gemma-3-{}-{}".format(*found[-1]) if found else ""
    name = stated.replace("gemma-v3-", "gemma-3-").replace("gemma-3-270m-pt", "gemma-3-270m")
    return f"google/{name}" if name.startswith("gemma-3-") else name


def _transcoder(path: Path) -> UserError:
    return UserError(f"dictionary {path}", "it maps one site to another", "use one of resid_post, attn_out or mlp_out")
