"""Dictionaries of any format that is known, on disk or an object of another library; written in SAELens's layout.

`cfg.json` and `sae_weights.safetensors` are as SAELens 6 reads and writes them, `feature_stats.parquet` and, where
somebody made it, `feature_examples.parquet` lie beside them. Nothing is ever unpickled. A dictionary appears whole: it
is written beside its place and moved there.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.dictionaries.base import check_is_dictionary
from trimtab.dictionaries.checked_weights import PICKLES, FoundSAE, pickle_error
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.folding import fold_norms
from trimtab.dictionaries.foreign import FORMATS, directories, format_of
from trimtab.dictionaries.foreign.objects import check_same, found_in_object
from trimtab.dictionaries.foreign.saelens_registry import PREFIX, read_from_registry
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.saelens_layout import CONFIG_FILE, DIGEST, WEIGHTS_FILE, digest, write_config
from trimtab.dictionaries.shipped import shipped_dictionary, shipped_names
from trimtab.errors import UserError, check_one_of, did_you_mean
from trimtab.lm import LanguageModel, Site, site_width
from trimtab.lm.model import check_is_model
from trimtab.runs import as_path, atomic_path

STATS_FILE = "feature_stats.parquet"
EXAMPLES_FILE = "feature_examples.parquet"


def load_dictionary(
    path_or_name: str | Path | Any,
    *,
    site: str = "",
    model: LanguageModel | None = None,
    any_model: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Load an SAE that trimtab or another library saved, or take one of another library that is in memory.

    A TopK SAE that rescales by decoder norms, and an `AutoEncoder` of dictionary_learning, come with the norms folded
    into the encoder: the same function, with unit rows. Every other SAE keeps its rows as they are.

    Args:
        path_or_name: one of
            a directory that trimtab or SAELens saved (`cfg.json`, `sae_weights.safetensors`);
            one of dictionary_learning (`config.json`, `ae.pt`), sparsify (`cfg.json`, `sae.safetensors`) or Gemma Scope
            (`params.npz`);
            the name of a dictionary that ships with trimtab ("default", "smollm2-135m-instruct/resid_post.15");
            one of Gemma Scope 2 (`params.safetensors`) or Llama Scope (`hyperparams.json`, `checkpoints/`);
            `saelens:RELEASE/SAE_ID`, any id of SAELens's registry, with the extra `saelens`;
            an SAE object of SAELens or dictionary_learning, whose weights are copied.
        site: where it reads, if it does not say so itself.
        model: a model that the dictionary must fit in width, site and name; no check without it.
        any_model: accept a dictionary trained on a model of another name or fingerprint (a fine-tune's base, say).
        device: where the weights go.
        dtype: precision of the weights in memory, whatever the file's is.

    Raises:
        UserError: nothing there, a damaged or foreign file, a config that asks for what trimtab does not compute, or a
            dictionary that does not fit the model. The message names the file and the field or tensor.
    """
    if isinstance(model, str | Path):
        check_is_model(model)
    if not isinstance(path_or_name, str | Path):
        sae, place = _built(found_in_object(path_or_name)), None
        check_same(sae, path_or_name)
        path_or_name = f"{type(path_or_name).__name__} in memory"
    else:
        sae, from_registry = _built(_found(path_or_name)), str(path_or_name).startswith(PREFIX)
        place = None if from_registry else _locate(path_or_name)
    sae = sae.to(device, dtype)
    sae.name = str(path_or_name)
    if site:
        name = str(Site.parse(site))
        sae.check_model(sae.d_in, sae.info.model, name)
        sae.info = replace(sae.info, site=name)
    if place is not None and (place / STATS_FILE).exists():
        sae.feature_stats = FeatureStats.read(place / STATS_FILE, n_features=sae.n_features)
    if place is not None and (place / EXAMPLES_FILE).exists():
        sae.examples_file = place / EXAMPLES_FILE
    if model is not None:
        check_fit(sae, model, any_model=any_model)
    return sae


def save_dictionary(
    dictionary: SAE,
    path: str | Path,
    stats: FeatureStats | None = None,
    *,
    dtype: Literal["float32", "float16"] = "float32",
) -> Path:
    """Save an SAE so that trimtab and SAELens can open it (supervised codes: trimtab alone).

    Args:
        dictionary: in model units (`folding.fold_scale` brings a trained one there).
        path: a directory, made if need be. A dictionary that is there already is replaced.
        stats: written beside the weights; by default the dictionary's own `feature_stats`.
        dtype: precision of encoder and decoder on disk; biases and thresholds stay in float32. Readers upcast.

    Returns:
        The directory.

    Raises:
        UserError: a weight is not finite or does not fit `dtype`, or the disk refuses. Nothing is left half-written.
    """
    check_one_of("dtype", dtype, ("float32", "float16"))
    check_is_dictionary(dictionary)
    path, stats = as_path(path, "the directory"), stats or dictionary.feature_stats
    if stats is not None and stats.n_features != dictionary.n_features:
        raise UserError(
            f"statistics of {stats.n_features} features",
            f"the dictionary has {dictionary.n_features}",
            "compute them from this dictionary",
        )
    config = json.dumps(write_config(dictionary), indent=2)
    weights = {name: _for_disk(name, getattr(dictionary, name), dtype) for name in dictionary.shapes}
    new = not path.exists()
    try:
        with ExitStack() as stack:  # files take their places in the reverse order, the config last
            names = (CONFIG_FILE, *[STATS_FILE] * (stats is not None), WEIGHTS_FILE)
            partial = {name: stack.enter_context(atomic_path(path / name)) for name in names}
            save_file(weights, partial[WEIGHTS_FILE], metadata={"format": "pt", DIGEST: digest(weights)})
            _sort_header(partial[WEIGHTS_FILE])
            partial[CONFIG_FILE].write_text(config)
            if stats is not None:
                stats.write(partial[STATS_FILE])
            else:  # those of a dictionary that was there
                (path / STATS_FILE).unlink(missing_ok=True)
            (path / EXAMPLES_FILE).unlink(missing_ok=True)
    except UserError:
        with suppress(OSError):
            if new:
                path.rmdir()
        raise
    return path


def _sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order, which the library writes in that of a hash map, another each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        file.seek(8)
        file.write(json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def check_fit(sae: SAE, model: LanguageModel, *, any_model: bool = False) -> None:
    """Raise a `UserError` unless the dictionary fits a model's width and, where the file says them, site and name."""
    width = model.d_model
    if sae.info.site:
        try:
            width = site_width(model, model.site(sae.info.site))
        except UserError as error:
            raise UserError(
                f"dictionary for {error.what}",
                error.why,
                "choose a dictionary trained on this model" + f", or model {sae.info.model}" * bool(sae.info.model),
            ) from None
    sae.check_model(width, model.name)
    if sae.info.is_centred and "rms" in type(model.layout.final_norm).__name__.lower():
        raise UserError(
            f"dictionary of a {sae.info.model or 'model'} with centred writing weights",
            f"{model.name} has RMSNorm, which tells a mean, so that TransformerLens leaves such models as they are",
            "take center_writing_weights out of the file's metadata, if it is this model's",
        )
    if not any_model:
        sae.check_same_model(model.name, model.fingerprint)


def dictionaries_below(path: str | Path) -> list[Path]:
    """The dictionaries in a directory that holds none itself, at any depth, in order of their paths; none if it is no
    such directory."""
    path = Path(path).expanduser()
    if not path.is_dir() or _holds_one(path):
        return []
    return sorted(directories("**", path))


def trained_on(path_or_name: str | Path) -> str:
    """The model that an SAE's files name, as `load_model` takes it; empty if they name none.

    Raises:
        UserError: as `load_dictionary` does.
    """
    name = _found(path_or_name).info.model
    return "gpt2" if name == "gpt2-small" else name


def _found(path_or_name: str | Path) -> FoundSAE:
    """What an SAE's files hold."""
    if str(path_or_name).startswith(PREFIX):
        return read_from_registry(str(path_or_name))
    path = _locate(path_or_name)
    return format_of(path).read(path)


def _built(found: FoundSAE) -> SAE:
    """The SAE of what was read, in float32 or better, its norms folded where its library folds them."""
    weights = {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
        for name, weight in found.weights.items()
    }
    sae = found.architecture(**weights, **found.settings, info=found.info)
    norms = sae.decoder_norms
    unit_rows = found.unit_rows and not torch.allclose(norms, torch.ones_like(norms))
    return fold_norms(sae) if unit_rows or sae.settings.get("rescale_acts_by_decoder_norm") else sae


def _locate(path_or_name: str | Path) -> Path:
    """The directory meant by a path or a shipped name."""
    shipped = shipped_dictionary(str(path_or_name))
    path = as_path(path_or_name, "the dictionary").expanduser()
    if path_or_name == "default" or (shipped and not path.exists()):
        path = shipped or path
    if not path.exists():
        names = ", ".join(shipped_names()) or "none"
        files = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        raise UserError(
            f"dictionary {str(path_or_name)!r}",
            "there is no such directory, and none of that name ships with trimtab",
            did_you_mean(
                str(path_or_name),
                [*shipped_names(), *["default"] * bool(shipped_names())],
                f"give a directory with {files}, a shipped name ({names}) or {PREFIX}RELEASE/SAE_ID",
            ),
        )
    if path.is_dir():
        _check_not_above(path)
        return path
    if path.name == format_of(path.parent).WEIGHTS_FILE:
        return path.parent
    if path.suffix in PICKLES:
        raise pickle_error(path)
    raise UserError(
        f"dictionary {path}",
        "it is not a directory",
        f"give the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
    )


def _check_not_above(path: Path) -> None:
    """Raise a `UserError` that names some dictionaries below a directory that holds none itself."""
    if _holds_one(path):
        return
    below = sorted(set[Path]().union(*(directories(depth, path) for depth in ("*", "*/*", "*/*/*"))))
    if below:
        raise UserError(
            f"dictionary {path}",
            f"it holds no dictionary itself, but {len(below)} below it",
            f"give one of them, such as {below[0]}",
        )


def _holds_one(path: Path) -> bool:
    return any((path / name).exists() for name in (*(known.WEIGHTS_FILE for known in FORMATS), CONFIG_FILE))


def _for_disk(name: str, weight: Tensor, dtype: str) -> Tensor:
    weight = weight.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"tensor {name}", "it holds values that are not finite", "the training diverged; train again")
    if dtype == "float16" and weight.ndim > 1:
        weight = weight.half()
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {name}", "it holds values beyond float16's 65504", "save it as float32")
    return weight.contiguous()
