"""A directory in SAELens's layout: `cfg.json` beside `sae_weights.safetensors`; the config is read and written here.

What each feature means, where that is known, is a list in the metadata (`feature_names`), which SAELens keeps and
ignores. Supervised codes are written in the same layout, but SAELens has no such architecture and refuses them.

Fields as in SAELens 6 (`sae_lens/saes/sae.py`, `SAEConfig`): d_in, d_sae, dtype, device, apply_b_dec_to_input,
normalize_activations, reshape_activations, metadata, architecture, and k and rescale_acts_by_decoder_norm for topk.
Files of SAELens before 6 keep the metadata at the top level and name the activation function; both are understood.
A field whose value asks for something that trimtab does not compute is an error, never ignored.

Settings that say what activations go through first are obeyed: normalisations by token (`normalising`), a fixed scale
that a file states or a checkpoint of SAELens keeps beside it (`activation_scaler.json`), a model that TransformerLens
centred (`saelens_model`), and all heads of `attn.hook_z` as one vector.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.dictionaries.architectures import architecture_class
from trimtab.dictionaries.base import DictionaryInfo, check_feature_names
from trimtab.dictionaries.checked_weights import (
    PICKLES,
    FoundSAE,
    pickle_error,
    read_safetensors,
    take_weights,
    without_wrappers,
)
from trimtab.dictionaries.config_fields import GET_AGAIN, Fields
from trimtab.dictionaries.module_paths import site_of_module
from trimtab.dictionaries.normalising import NORMALISATIONS, fold_input_scale, fold_mean
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.saelens_model import check_model_arguments
from trimtab.errors import UserError
from trimtab.lm.sites import HEAD_KINDS, RESIDUAL_KINDS, Site
from trimtab.version import __version__

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"
"""Where SAELens keeps a fixed input scale that it has not yet folded into the weights: in its checkpoints."""
DIGEST = "trimtab.sha256"
"""Where a weights file that trimtab wrote keeps its checksum, in the header."""
SAELENS_VERSION = "6.54.12"
"""The release whose format is written; without a version SAELens takes a file for one of its older formats."""
SAELENS_READS = ("standard", "gated", "topk", "jumprelu")
"""Architectures of files here that SAELens opens, too."""
DTYPES = ("float32", "float64", "float16", "bfloat16")

_HOOKS = {kind: f"hook_{kind}" for kind in RESIDUAL_KINDS} | {kind: f"attn.hook_{kind[-1]}" for kind in HEAD_KINDS}
_JOINED = "attn.hook_z"
"""The hook whose activation SAELens flattens for an SAE of all heads."""
_KINDS = {hook: kind for kind, hook in _HOOKS.items()}
_OLD_TOP_LEVEL = (
    *("model_name", "hook_name", "hook_point", "hook_head_index", "hook_point_head_index", "context_size"),
    *("model_from_pretrained_kwargs", "hook_name_out", "hf_hook_name", "norm_scaling_factor"),
)
_FIXED_SCALE = "expected_average_only_in"
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
    scaler = path / SCALER_FILE
    scale = Fields.read(scaler, "SAELens").cfg.get("scaling_factor") if scaler.exists() else None
    if scale is not None and _is_scaled(field):
        field = field._replace(cfg={**field.cfg, "norm_scaling_factor": scale})
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
    _check_is_sae(field, name)
    architecture = architecture_class(name)
    _check_unsupported(field)
    d, n = field.positive_integer("d_in"), field.positive_integer("d_sae")
    settings = architecture.read_settings(field, n)
    info = _info(field, architecture.architecture)
    check_feature_names(info.metadata, n, field.source)
    tensors = dict(without_wrappers(tensors))
    scaling = tensors.pop("scaling_factor", None)  # SAELens before 6 wrote ones that it never used
    if scaling is not None and not bool((scaling == 1).all()):
        what = f"tensor scaling_factor in {weights}"
        raise UserError(what, "trimtab reads SAEs without one", "use another dictionary")
    stated = ("architecture", architecture.architecture)
    taken = take_weights(tensors, weights, architecture, n=n, d=d, stated=stated)
    if _is_scaled(field):
        taken = _with_scale(field, taken, {**cfg, **(cfg.get("metadata") or {})}.get("norm_scaling_factor"))
    check_model_arguments(field, info)
    if info.is_centred:
        biases = tuple(bias for bias in ("b_enc", "b_gate", "b_mag") if bias in architecture.shapes)
        taken = fold_mean(taken, biases, subtracts_b_dec=settings["apply_b_dec_to_input"])
    return FoundSAE(architecture, taken, settings, info)


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
    head = None
    if info.site:
        hook, head = hook_from_site(info.site)
        metadata |= {"hook_name": hook, "hook_head_index": head, "site": info.site}
    joined = head is None and str(metadata.get("hook_name")).endswith(_JOINED)
    return {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if joined else "none",
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
    """`blocks.15.hook_resid_post` → `resid_post.15`, and so for a module of transformers (`model.layers.15`), whose
    output SAELens then reads; empty for a place that trimtab has no name for."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\S+)", name)
    if not match:
        return site_of_module(name)
    return str(Site(_KINDS[match[2]], int(match[1]), head)) if match[2] in _KINDS else ""


def _before_6(cfg: Mapping[str, Any]) -> bool:
    metadata = cfg.get("metadata")
    stated = cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    return not stated or int(re.match(r"\d*", str(stated))[0] or 0) < 6  # pyright: ignore[reportOptionalSubscript]


def _check_is_sae(field: Fields, name: object) -> None:
    """Raise a `UserError` if the file is a transcoder, which reads one site and writes another."""
    metadata = field.cfg.get("metadata")
    about = {**field.cfg, **(metadata if isinstance(metadata, dict) else {})}
    source, target = about.get("hook_name"), about.get("hook_name_out")
    elsewhere = target not in (None, "", source) or about.get("d_out") not in (None, about.get("d_in"))
    if (isinstance(name, str) and name.endswith("transcoder")) or elsewhere:
        what = f"architecture {name!r} in {field.source}"
        why = f"it is a transcoder (it reads {source or 'one site'} and writes {target or 'another'})"
        raise UserError(what, why, "use an SAE, which rebuilds what it reads")


def _normalisation(field: Fields) -> str:
    """What the file says activations are scaled by; SAELens before 6 wrote whether, true or false."""
    value = field.cfg.get("normalize_activations")
    named = {None: "none", False: "none", True: _FIXED_SCALE}
    return named[value] if value is None or isinstance(value, bool) else str(value)


def _is_scaled(field: Fields) -> bool:
    return _normalisation(field) == _FIXED_SCALE


def _with_scale(field: Fields, weights: dict[str, Tensor], scale: object) -> dict[str, Tensor]:
    if scale is None:
        warnings.warn(
            f"{field.source}: its SAE was trained on activations scaled to a mean norm of √{field.cfg['d_in']}, and "
            "the file does not say by what factor, so that activations are read unscaled, as SAELens reads them; if "
            "codes look wrong, put norm_scaling_factor (√d over the mean norm of activations) into its metadata",
            stacklevel=2,
        )
        return weights
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        what = f"norm_scaling_factor {scale!r} of {field.source}"
        raise UserError(what, "it must be a positive number", "correct the file, or use another dictionary")
    return fold_input_scale(weights, scale)


def _check_unsupported(field: Fields) -> None:
    cfg = field.cfg
    if (kind := _normalisation(field)) not in (*NORMALISATIONS, _FIXED_SCALE):
        known = ", ".join((*NORMALISATIONS, _FIXED_SCALE))
        hint = "fold it into the weights in SAELens and save again, or use another dictionary"
        raise field.error("normalize_activations", f"trimtab computes {known}", hint)
    if kind not in ("none", _FIXED_SCALE) and cfg.get("architecture") == "supervised":
        raise field.error("normalize_activations", "supervised codes are of activations as they are")
    if cfg.get("reshape_activations") not in (None, "none", "hook_z"):
        raise field.error("reshape_activations", "trimtab reads none and hook_z, all heads as one vector")
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
    head = metadata.get("hook_head_index")
    if head is not None and type(head) is not int:
        raise field.error("metadata", f"its hook_head_index must be a whole number, not {head!r}")
    layer = cfg.get("hook_layer", cfg.get("hook_point_layer"))  # before version 3 a name could leave its layer open
    names = (str(metadata.get(name)).replace("{layer}", str(layer)) for name in ("hook_name", "hf_hook_name"))
    site = metadata.get("site") or next(filter(None, (site_from_hook(name, head) for name in names)), "")
    try:
        site = site and str(Site.parse(str(site)))
    except UserError as error:
        what = f"field metadata.site = {site!r} in {field.source}"
        raise UserError(what, "it is not a site", "correct the file") from error
    dropped = ["model_name", *(_WRITTEN_AFRESH if site else ()), *["norm_scaling_factor"] * _is_scaled(field)]
    if site and metadata.get("model_class_name") == "AutoModelForCausalLM":
        dropped += ["model_class_name"]  # TransformerLens's name of the site takes the place of the module's
    if cfg.get("reshape_activations") == "hook_z" and not str(metadata.get("hook_name") or "_z").endswith("_z"):
        raise field.error("reshape_activations", f"it does not fit the hook {metadata['hook_name']}")
    return DictionaryInfo(
        architecture=architecture,
        model=str(metadata.get("model_name") or ""),
        site=site,
        metadata={name: value for name, value in metadata.items() if name not in dropped},
    )
