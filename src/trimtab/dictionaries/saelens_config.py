"""SAELens's `cfg.json`, read and written.

Fields as in SAELens 6 (`sae_lens/saes/sae.py`, `SAEConfig`): d_in, d_sae, dtype, device, apply_b_dec_to_input,
normalize_activations, reshape_activations, metadata, architecture, and k and rescale_acts_by_decoder_norm for topk.
Files of SAELens before 6 keep the metadata at the top level and name the activation function; both are understood.
A field whose value asks for something that trimtab does not compute is an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trimtab import __version__
from trimtab.dictionaries.architectures import architecture_class
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError

SAELENS_VERSION = "6.54.12"
"""The release whose format is written; without a version SAELens takes a file for one of its older formats."""
DTYPES = ("float32", "float64", "float16", "bfloat16")

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn_q": "attn.hook_q",
    "attn_k": "attn.hook_k",
    "attn_v": "attn.hook_v",
    "attn_z": "attn.hook_z",
}
_KINDS = {hook: kind for kind, hook in _HOOKS.items()}
_OLD_TOP_LEVEL = ("model_name", "hook_name", "hook_point", "hook_head_index", "hook_point_head_index", "context_size")
_WRITTEN_AFRESH = ("model_name", "hook_name", "hook_head_index", "site")


class HookName(NamedTuple):
    """A place in TransformerLens's notation, which SAELens's files use."""

    name: str
    head: int | None


class ParsedConfig(NamedTuple):
    """What a `cfg.json` says, in trimtab's terms."""

    architecture: type[SAE]
    d_in: int
    d_sae: int
    settings: dict[str, Any]
    info: DictionaryInfo


def hook_from_site(site: str) -> HookName:
    """`resid_post.15` → `blocks.15.hook_resid_post`; a head (`attn_z.9.6`) becomes `hook_head_index`."""
    kind, layer, *head = site.split(".")
    return HookName(f"blocks.{layer}.{_HOOKS[kind]}", int(head[0]) if head else None)


def site_from_hook(name: str, head: int | None = None) -> str:
    """`blocks.15.hook_resid_post` → `resid_post.15`; empty for a place that trimtab has no name for."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\S+)", name)
    if not match or match[2] not in _KINDS:
        return ""
    return f"{_KINDS[match[2]]}.{match[1]}" + ("" if head is None else f".{head}")


def parse_config(cfg: Mapping[str, Any], source: str) -> ParsedConfig:
    """Understand a `cfg.json`.

    Args:
        cfg: the parsed JSON object.
        source: the file's name, for messages.

    Raises:
        UserError: a field is missing, malformed or asks for what trimtab does not compute; the message names it.
    """
    field = Fields(cfg, source)
    name = cfg.get("architecture", "standard" if _before_6(cfg) else None)
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":  # before version 6
        name, cfg = "topk", {"k": (cfg.get("activation_fn_kwargs") or {}).get("k"), **cfg}
        field = Fields(cfg, source)
    if name is None:
        raise field.error("architecture", "it is missing")
    architecture = architecture_class(name)
    _check_unsupported(field)
    d_in, d_sae = field.positive_integer("d_in"), field.positive_integer("d_sae")
    settings = architecture.read_settings(field, d_sae)
    return ParsedConfig(architecture, d_in, d_sae, settings, _info(cfg, field, architecture.architecture))


def write_config(dictionary: SAE) -> dict[str, Any]:
    """The `cfg.json` of a dictionary. The site stays in the metadata in trimtab's notation too."""
    info = dictionary.info
    metadata: dict[str, Any] = {
        "sae_lens_training_version": None,
        **info.metadata,
        "sae_lens_version": SAELENS_VERSION,
        "trimtab_version": __version__,
    }
    if info.model:
        metadata["model_name"] = info.model
    if info.site:
        hook = hook_from_site(info.site)
        metadata |= {"hook_name": hook.name, "hook_head_index": hook.head, "site": info.site}
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


def _info(cfg: Mapping[str, Any], field: Fields, architecture: str) -> DictionaryInfo:
    metadata = cfg.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise field.error("metadata", "it must be an object")
    metadata = {name: cfg[name] for name in _OLD_TOP_LEVEL if name in cfg} | (metadata or {})
    for old, new in (("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index")):
        if old in metadata:
            metadata.setdefault(new, metadata.pop(old))
    head = metadata.get("hook_head_index")
    site = metadata.get("site") or site_from_hook(str(metadata.get("hook_name")), head)
    if not (isinstance(site, str) and (not site or _is_site(site))):
        raise UserError(f"field metadata.site = {site!r} in {field.source}", "it is not a site", "correct the file")
    dropped = _WRITTEN_AFRESH if site else ("model_name",)
    return DictionaryInfo(
        architecture=architecture,
        model=str(metadata.get("model_name") or ""),
        site=site,
        metadata={name: value for name, value in metadata.items() if name not in dropped},
    )


def _is_site(text: str) -> bool:
    kind, _, rest = text.partition(".")
    has_heads = _HOOKS.get(kind, "").startswith("attn.")
    return kind in _HOOKS and re.fullmatch(r"\d+(\.\d+)?" if has_heads else r"\d+", rest) is not None
