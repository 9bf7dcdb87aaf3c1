"""Say what a model is: sizes, sites, what works, chat template, licence, and where it lies.

Its weights are read, if they are here, unless it is large: what works may depend on them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file

from trimtab.errors import UserError
from trimtab.lm.capabilities import CAPABILITIES, USES, Capabilities
from trimtab.lm.catalogue import cached_path, check_is_given, find_entry, unknown_model
from trimtab.lm.gguf_files import first_line
from trimtab.lm.layouts import head_count
from trimtab.lm.loading import check_dtype, load_model
from trimtab.lm.model import LanguageModel
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.sites import HEAD_KINDS, RESIDUAL_KINDS, Site
from trimtab.runs import json_safe
from trimtab.runs.tables import named_values

WORKS = "works"
MOST_PARAMETERS = 2_000_000_000
"""A larger model is not loaded only to be described."""


@dataclass(frozen=True, kw_only=True)
class ModelDetails:
    """What is known about a model. Sites and config are there only if its files are here."""

    name: str
    path: Path | None
    """Its directory, in the cache or the user's; None if it has not been fetched."""
    parameters: int
    n_layers: int
    d_model: int
    vocab_size: int
    licence: str
    """Empty if unknown."""
    source: str
    sites: tuple[str, ...]
    """Patterns such as `resid_post.0-29` and `attn_z.0-29.0-8`."""
    capabilities: dict[str, str]
    """Of `trimtab.lm.CAPABILITIES`, `works` or the reason why not; empty if the model has not been run here."""
    unsure: dict[str, str]
    """Of those that work, what could not be told for certain, and why."""
    unchecked: str
    """Why nothing could be checked, though the model has been run; empty if it could."""
    chat_template: str | None
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return json_safe(self)

    def render(self) -> str:
        elsewhere = "the hub's local cache" if self.config else f"not fetched (trimtab models pull {self.name})"
        said = {
            "model": self.name,
            "source": self.source,
            "path": str(self.path or elsewhere),
            "licence": self.licence or "not stated",
            "parameters": f"{self.parameters:,}",
            "layers": f"{self.n_layers}, width {self.d_model}, vocabulary {self.vocab_size:,}",
        }
        if self.config:
            said["sites"] = "  ".join(self.sites)
            said["works"] = ", ".join(name for name in USES if self.capabilities.get(name) == WORKS)
            if not self.capabilities:
                said["works"] = f"not checked: {self.unchecked}" if self.unchecked else "checked when it is loaded"
            reasons = {name: why for name, why in self.capabilities.items() if why != WORKS}
            said |= {f"off: {name}": why for name, why in reasons.items()}
            said |= {f"unsure: {name}": why for name, why in self.unsure.items()}
            said["chat template"] = "no" if self.chat_template is None else "yes"
            said["architecture"] = ", ".join(self.config.get("architectures") or ["not stated"])
        return named_values(said)


def show(name_or_path: str | os.PathLike[str], dtype: str | torch.dtype = "float32") -> ModelDetails:
    """Describe a catalogue model, a model directory, or a hub model that is in the hub's local cache.

    Args:
        name_or_path: the model.
        dtype: what works depends on it; as for `load_model`.

    Raises:
        UserError: the model is not here, its config cannot be read, or there is no such dtype.
    """
    name = os.fspath(name_or_path)
    check_dtype(dtype)
    check_is_given(name)
    entry = find_entry(name)
    directory = cached_path(entry) if entry else None
    if entry and directory is None:
        known = ("parameters", "n_layers", "d_model", "vocab_size", "licence", "source")
        said: dict[str, Any] = {field: getattr(entry, field) for field in known}
        nothing: dict[str, Any] = {"sites": (), "capabilities": {}, "unsure": {}, "unchecked": ""}
        nothing |= {"chat_template": None, "config": {}}
        return ModelDetails(name=name, path=None, **nothing, **said)
    path = directory or Path(name).expanduser()
    source = path if path.is_dir() else name
    if path.is_file():
        raise UserError(f"model file {name}", "only catalogue names, directories and hub ids are shown", "load it")
    try:
        with transformers_silenced(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
            hf = transformers.AutoModelForCausalLM.from_config(config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not path.is_dir():
            raise unknown_model(name, "it is not in the catalogue, nor in the hub's local cache") from error
        raise UserError(
            f"model directory {path}",
            f"its config could not be read ({type(error).__name__}: {first_line(error)})",
            "fetch or save it again",
        ) from error
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # a tokenizer may have several
        template = template.get("default") or next(iter(template.values()), None)
    model = LanguageModel(hf, tokenizer, name)
    parameters = sum(p.numel() for p in hf.parameters())
    found = None
    if parameters <= MOST_PARAMETERS:
        with suppress(UserError, OSError):  # without its weights, say
            found = load_model(path if path.is_dir() else _in_hub_cache(name), dtype=dtype).capabilities
    able = found or Capabilities()
    works = {name: WORKS if name in able else able.why(name) for name in CAPABILITIES}
    unsure = dict(able.unsure)
    if model.turning_length:
        unsure["decode"] = f"refused where a text grows beyond {model.turning_length} tokens (longrope)"
    return ModelDetails(
        name=name,
        path=path if path.is_dir() else None,
        parameters=parameters,
        n_layers=model.n_layers,
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        licence=entry.licence if entry else "",
        source=entry.source if entry else "a local directory" if path.is_dir() else "the hub",
        sites=_site_patterns(model, able),
        capabilities={} if found is None or able.unchecked else works,
        unsure=unsure,
        unchecked=able.unchecked,
        chat_template=template or None,
        config=config.to_diff_dict(),
    )


def _in_hub_cache(name: str) -> Path:
    """The directory of a hub model whose config is there; nothing is downloaded for a description."""
    config = cached_file(name, "config.json", local_files_only=True)
    assert config is not None, name
    return Path(config).parent


def _site_patterns(model: LanguageModel, able: Capabilities) -> tuple[str, ...]:
    found = []
    for kind in (*RESIDUAL_KINDS, *HEAD_KINDS):
        if kind not in able:
            continue
        with suppress(UserError):
            site = model.site(Site(kind, 0))
            heads = head_count(model.layout.layers[0], site) if kind in HEAD_KINDS else 0
            numbers = f".0-{heads - 1}" if heads > 1 else ".0" * heads
            found.append(f"{kind}.0-{model.n_layers - 1}{numbers}")
    return tuple(found)
