"""A directory in SAELens's layout: `cfg.json` beside `sae_weights.safetensors`; the config is read and written here.

What each feature means, where that is known, is a list in the metadata (`feature_names`), which SAELens keeps and
ignores. Supervised codes are written in the same layout, but SAELens has no such architecture and refuses them.

Fields as in SAELens 6 (`sae_lens/saes/sae.py`, `SAEConfig`): d_in, d_sae, dtype, device, apply_b_dec_to_input,
normalize_activations, reshape_activations, metadata, architecture, and k and rescale_acts_by_decoder_norm for topk.
Files of SAELens before 6 keep the metadata at the top level and name the activation function; both are understood.
A field whose value asks for something that trimtab does not compute is an error, never ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.dictionaries.architectures import architecture_class
from trimtab.dictionaries.base import DictionaryInfo, check_feature_names
from trimtab.dictionaries.checked_weights import PICKLES, FoundSAE, pickle_error, read_safetensors, take_weights
from trimtab.dictionaries.config_fields import GET_AGAIN, Fields
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError
from trimtab.lm.sites import HEAD_KINDS, RESIDUAL_KINDS, Site
from trimtab.version import __version__

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
DIGEST = "trimtab.sha256"
"""Where a weights file that trimtab wrote keeps its checksum, in the header."""
SAELENS_VERSION = "6.54.12"
"""The release whose format is written; without a version SAELens takes a file for one of its older formats."""
SAELENS_READS = ("standard", "gated", "topk", "jumprelu")
"""Architectures of files here that SAELens opens, too."""
DTYPES = ("float32", "float64", "float16", "bfloat16")

_HOOKS = {kind: f"hook_{kind}" for kind in RESIDUAL_KINDS} | {kind: f"attn.hook_{kind[-1]}" for kind in HEAD_KINDS}
_KINDS = {hook: kind for kind, hook in _HOOKS.items()}
_OLD_TOP_LEVEL = ("model_name", "hook_name", "hook_point", "hook_head_index", "hook_point_head_index", "context_size")
_WRITTEN_AFRESH = ("model_name", "hook_name", "hook_head_index", "site")


def read(path: Path) -> FoundSAE:
    """Read a directory that SAELens or trimtab saved. Raises a `UserError` that names file and field or tensor."""
    field = Fields.read(path / CONFIG_FILE, "SAELens or trimtab")
    weights = path / WEIGHTS_FILE
    if not weights.exists():
        pickle = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        if pickle:
            raise pickle_error(pickle)
    tensors, about = read_safetensors(weights)
    if DIGEST in about and about[DIGEST] != digest(tensors):
        raise UserError(str(weights), "its values do not match the checksum they were saved with", GET_AGAIN)
    return found_in_saelens(field, tensors, str(weights))


def found_in_saelens(field: Fields, tensors: Mapping[str, Tensor], weights: str) -> FoundSAE:
    """Understand a config and tensors of SAELens, wherever they come from.

    Raises:
        UserError: a field is missing, malformed or asks for what trimtab does not compute, or a tensor does not fit
            (`weights` is where it is from); the message names it.
    """
    cfg = field.cfg
    name = cfg.get("architecture", "standard" if _before_6(cfg) else None)
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":  # before version 6
        k = (cfg.get("activation_fn_kwargs") or {}).get("k")
        name, field = "topk", field._replace(cfg={"k": k, **cfg})
    if name is None:
        raise field.error("architecture", "it is missing")
    architecture = architecture_class(name)
    _check_unsupported(field)
    d, n = field.positive_integer("d_in"), field.positive_integer("d_sae")
    settings = architecture.read_settings(field, n)
    info = _info(field, architecture.architecture)
    check_feature_names(info.metadata, n, field.source)
    tensors = dict(tensors)
    scaling = tensors.pop("scaling_factor", None)  # SAELens before 6 wrote ones that it never used
    if scaling is not None and not bool((scaling == 1).all()):
        what = f"tensor scaling_factor in {weights}"
        raise UserError(what, "trimtab reads SAEs without one", "use another dictionary")
    stated = ("architecture", architecture.architecture)
    return FoundSAE(architecture, take_weights(tensors, weights, architecture, n=n, d=d, stated=stated), settings, info)


def write_config(dictionary: SAE) -> dict[str, Any]:
    """The `cfg.json` of a dictionary. The site stays in the metadata in trimtab's notation too."""
    info = dictionary.info
    check_feature_names(info.metadata, dictionary.n_features, "the dictionary's info")
    metadata: dict[str, Any] = {
        "sae_lens_training_version": None,
        **info.metadata,
        "sae_lens_version": SAELENS_VERSION,
        "trimtab_version": __version__,
    }
    if info.model:
        metadata["model_name"] = info.model
    if info.site:
        hook, head = hook_from_site(info.site)
        metadata |= {"hook_name": hook, "hook_head_index": head, "site": info.site}
    return {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **dictionary.settings,
        "metadata": metadata,
        "architecture": dictionary.architecture,
    }


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    result = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        result.update(f"{name} {weight.dtype} {list(weight.shape)};".encode())
        result.update(weight.contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


def hook_from_site(site: str) -> tuple[str, int | None]:
    """TransformerLens's name of a site, and its head: `resid_post.15` → `blocks.15.hook_resid_post`."""
    kind, layer, head = Site.parse(site)
    return f"blocks.{layer}.{_HOOKS[kind]}", head


def site_from_hook(name: str, head: int | None = None) -> str:
    """`blocks.15.hook_resid_post` → `resid_post.15`; empty for a place that trimtab has no name for."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\S+)", name)
    return str(Site(_KINDS[match[2]], int(match[1]), head)) if match and match[2] in _KINDS else ""


def _before_6(cfg: Mapping[str, Any]) -> bool:
    metadata = cfg.get("metadata")
    stated = cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    return not stated or int(re.match(r"\d*", str(stated))[0] or 0) < 6  # pyright: ignore[reportOptionalSubscript]


def _check_unsupported(field: Fields) -> None:
    cfg = field.cfg
    if cfg.get("normalize_activations") not in (None, False, "none"):
        raise field.error(
            "normalize_activations",
            "trimtab reads SAEs of unscaled activations",
            "fold the scale into the weights in SAELens (fold_activation_norm_scaling_factor) and save again",
        )
    reshape = cfg.get("reshape_activations")
    if reshape not in (None, "none") or (reshape is None and _before_6(cfg) and "hook_z" in str(cfg.get("hook_name"))):
        raise UserError(
            f"field reshape_activations = {reshape or 'hook_z'!r} in {field.source}",
            "trimtab reads SAEs whose input is one vector, not all heads joined",
            "use a dictionary of the residual stream or of one head",
        )
    for name in ("activation_fn", "activation_fn_str"):
        if cfg.get(name) not in (None, "relu", "topk"):
            raise field.error(name, "the activation function must be relu or topk")
    if cfg.get("finetuning_scaling_factor") not in (None, False):
        raise field.error("finetuning_scaling_factor", "trimtab reads SAEs without one")
    if cfg.get("dtype") is not None and str(cfg["dtype"]).removeprefix("torch.") not in DTYPES:
        raise field.error("dtype", f"it must be one of {', '.join(DTYPES)}")


def _info(field: Fields, architecture: str) -> DictionaryInfo:
    cfg, metadata = field.cfg, field.cfg.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise field.error("metadata", "it must be an object")
    metadata = {name: cfg[name] for name in _OLD_TOP_LEVEL if name in cfg} | (metadata or {})
    for old, new in (("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index")):
        if old in metadata:
            metadata.setdefault(new, metadata.pop(old))
    site = metadata.get("site") or site_from_hook(str(metadata.get("hook_name")), metadata.get("hook_head_index"))
    try:
        site = site and str(Site.parse(str(site)))
    except UserError as error:
        what = f"field metadata.site = {site!r} in {field.source}"
        raise UserError(what, "it is not a site", "correct the file") from error
    dropped = _WRITTEN_AFRESH if site else ("model_name",)
    return DictionaryInfo(
        architecture=architecture,
        model=str(metadata.get("model_name") or ""),
        site=site,
        metadata={name: value for name, value in metadata.items() if name not in dropped},
    )
