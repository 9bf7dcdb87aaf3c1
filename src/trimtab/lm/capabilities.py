"""What a model can do here, by name, and where the answer is kept: what `self_check` found by running it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.errors import UserError, check_one_of
from trimtab.lm.catalogue import cache_dir
from trimtab.lm.sites import KINDS
from trimtab.runs import read_json, write_json

USES = {
    "padding": "batches of texts of different lengths",
    "prefix": "scoring from a cached prefix",
    "decode": "decoding",
    "logit-lens": "reading residuals with the final norm and the head",
    "resume": "running from a layer up",
    "positions": "positions of tokens that are given",
}
"""What is checked beside sites, and what needs it. Without `resume` the whole model runs instead, which is slower;
without `positions` a model counts them itself."""

CAPABILITIES = (*USES, *KINDS)

SOME_ROWS, MOST_BYTES = 4, 1 << 16
"""Of a weight, what tells checkpoints apart: so many rows, and no more of them than this."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What of a model is right, checked against its own plain forward passes."""

    off: dict[str, str] = field(default_factory=dict)
    """What is not, by its name among `CAPABILITIES`, each with the reason."""
    differs: dict[str, float] = field(default_factory=dict)
    """By how much, as a share of what is compared, where a difference was measured; the rest is missing or fails."""
    unsure: dict[str, str] = field(default_factory=dict)
    """What counts as working, though numbers differ: rounding by itself makes the model's own differ as much."""
    allowed: dict[str, str] = field(default_factory=dict)
    """What is used though it was found to be off, because somebody asked for it, each with the reason."""
    unchecked: str = ""
    """Why nothing could be compared, so that all counts as working; empty if it could."""

    def __contains__(self, name: str) -> bool:
        return name not in self.off

    def why(self, name: str) -> str:
        """The reason why something is off, with what was measured."""
        return self.off[name] + (f" (by {percent(self.differs[name])})" if name in self.differs else "")

    def require(self, name: str, model: str) -> None:
        """Refuse what a model fails.

        Args:
            name: one of `CAPABILITIES`.
            model: its name, for the message.

        Raises:
            UserError: it is off.
        """
        assert name in CAPABILITIES, name
        if name in self:
            return
        if name in KINDS:
            what, hint = f"site kind {name} of {model}", f"use another site: `trimtab models show {model}` lists them"
        else:
            what, hint = f"{USES[name]} with {model}", "use another model"
        if name in self.differs:
            hint += f", or allow {name} (--allow {name}, allow=[{name!r}]) if you know that it is right"
        raise UserError(what, self.why(name), hint)

    def allowing(self, names: Iterable[str], model: str) -> Capabilities:
        """The same with some of what is off used nevertheless.

        Args:
            names: of `CAPABILITIES`; what works anyway stays as it is.
            model: its name, for the message.

        Raises:
            UserError: there is no such name, or nothing is there that could be used.
        """
        for name in names:
            check_one_of("allow", name, CAPABILITIES)
            if name in self.off and name not in self.differs:
                raise UserError(f"allow {name} with {model}", self.off[name], "there is nothing to use; leave it out")
        allowed = {name: self.why(name) for name in names if name in self.off}
        off = {name: why for name, why in self.off.items() if name not in allowed}
        return replace(self, off=off, allowed=self.allowed | allowed)


def percent(share: float) -> str:
    """A share in percent, to two digits."""
    return f"{100 * share:.2g} %"


def check_key(hf: transformers.PreTrainedModel, device: str, products: str) -> str:
    """Digest of all that a check's result depends on: config, modules, some weights, precision of weights and products,
    type of device, versions."""
    config = hf.config.get_text_config()
    said: list[Any] = [
        _without_places(hf.config.to_dict()),
        str(hf.dtype),
        device,
        products,
        _versions(),
        _some_weights(hf),
    ]
    said.append(getattr(config, "_attn_implementation", None))
    said.extend(f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in hf.named_modules())
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).hexdigest()[:24]


def _some_weights(hf: torch.nn.Module) -> str:
    """Digest of vectors and of a few rows of each matrix: another checkpoint may fail where this one is right, as norms
    and biases that were never trained hide what is taken for another."""
    digest = hashlib.sha256()
    for name, weight in (*hf.named_parameters(), *hf.named_buffers()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.numel() or weight.device.type == "meta":  # it is elsewhere, on a disk say
            continue
        rows = weight.detach().reshape(1, -1) if weight.ndim < 2 else weight.detach().reshape(-1, weight.shape[-1])
        rows = rows[:: max(1, len(rows) // SOME_ROWS)][:SOME_ROWS]
        some = rows[:, : MOST_BYTES // (len(rows) * rows.element_size())]
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_places(config: Any) -> Any:
    """A config without where it was read from, what wrote it, and the precision that it was saved in."""
    if not isinstance(config, dict):
        return config
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return {str(name): _without_places(value) for name, value in config.items() if name not in left_out}


@cache
def _versions() -> str:
    """Of the libraries, and of this room's code, which may change between releases."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    names = ("torch", "transformers")
    return " ".join([*(importlib.metadata.version(name) for name in names), digest.hexdigest()[:16]])


def kept_capabilities(key: str) -> Capabilities | None:
    """What an earlier process found; None if that is not known."""
    try:
        kept = read_json(_path(key)) or {}
        off = {str(name): str(why) for name, why in dict(kept["off"]).items() if name in CAPABILITIES}
        differs = {str(name): float(by) for name, by in dict(kept["differs"]).items() if name in off}
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return Capabilities(off=off, differs=differs)


def keep_capabilities(key: str, found: Capabilities) -> None:
    """Keep it for later processes, where the cache can be written."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"off": found.off, "differs": found.differs})
    except OSError:
        pass  # it is checked again


def _path(key: str) -> Path:
    return cache_dir() / "checks" / f"{key}.json"
