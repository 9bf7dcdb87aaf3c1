"""Dictionaries on disk: read from any format that is known, written in SAELens's layout.

`cfg.json` and `sae_weights.safetensors` are as SAELens 6 reads and writes them, `feature_stats.parquet` lies beside
them. Nothing is ever unpickled. A dictionary appears whole: it is written beside its place and moved there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.folding import fold_norms
from trimtab.dictionaries.foreign import FORMATS, format_of, is_weights_file
from trimtab.dictionaries.foreign.saelens_registry import PREFIX, read_from_registry
from trimtab.dictionaries.reading import PICKLES, FoundSAE, pickle_error
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.saelens_config import write_config
from trimtab.dictionaries.saelens_layout import CONFIG_FILE, DIGEST, WEIGHTS_FILE, digest
from trimtab.dictionaries.shipped import shipped_dictionary, shipped_names
from trimtab.errors import UserError

STATS_FILE = "feature_stats.parquet"


class FitsModel(Protocol):
    """What `load_dictionary` asks of a model: its width and its name (and layers and fingerprint, if it has them)."""

    @property
    def d_model(self) -> int: ...
    @property
    def name(self) -> str: ...


def load_dictionary(
    path_or_name: str | Path,
    *,
    model: FitsModel | None = None,
    any_model: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Load an SAE that trimtab or another library saved.

    A TopK SAE that rescales by decoder norms, and an `AutoEncoder` of dictionary_learning, come with the norms folded
    into the encoder: the same function, with unit rows. Every other SAE keeps its rows as they are.

    Args:
        path_or_name: one of
            a directory that trimtab or SAELens saved (`cfg.json`, `sae_weights.safetensors`);
            one of dictionary_learning (`config.json`, `ae.pt`), sparsify (`cfg.json`, `sae.safetensors`) or Gemma Scope
            (`params.npz`);
            the name of a dictionary that ships with trimtab ("default", "smollm2-135m-instruct/resid_post.15");
            `saelens:RELEASE/SAE_ID`, any id of SAELens's registry, with the extra `saelens`.
        model: a model that the dictionary must fit in width, site and name; no check without it.
        any_model: accept a dictionary trained on a model of another name or fingerprint (a fine-tune's base, say).
        device: where the weights go.
        dtype: precision of the weights in memory, whatever the file's is.

    Raises:
        UserError: nothing there, a damaged or foreign file, a config that asks for what trimtab does not compute, or a
            dictionary that does not fit the model. The message names the file and the field or tensor.
    """
    if str(path_or_name).startswith(PREFIX):
        sae, stats = _built(read_from_registry(str(path_or_name))), None
    else:
        path = _locate(path_or_name)
        sae, stats = _built(format_of(path).read(path)), path / STATS_FILE
    sae = sae.to(device, dtype)
    sae.name = str(path_or_name)
    if stats is not None and stats.exists():
        sae.feature_stats = FeatureStats.read(stats, n_features=sae.n_features)
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
    """Save an SAE so that trimtab and SAELens can open it.

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
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype {dtype!r}", "weights are saved as float32 or float16", "choose one of them")
    path, stats = Path(path), stats or dictionary.feature_stats
    if stats is not None and stats.n_features != dictionary.n_features:
        raise UserError(
            f"statistics of {stats.n_features} features",
            f"the dictionary has {dictionary.n_features}",
            "compute them from this dictionary",
        )
    config = json.dumps(write_config(dictionary), indent=2)
    weights = {name: _for_disk(name, getattr(dictionary, name), dtype) for name in dictionary.shapes}
    with _appears_whole(path) as folder:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", DIGEST: digest(weights)})
        if stats is not None:
            stats.write(folder / STATS_FILE)
        (folder / CONFIG_FILE).write_text(config)
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors gives its files to the owner alone
    return path


def check_fit(sae: SAE, model: Any, *, any_model: bool = False) -> None:
    """Raise a `UserError` unless the dictionary fits a model's width and, where the file says them, site and name."""
    width = model.d_model
    if sae.info.site and hasattr(model, "layout"):
        from trimtab.lm import site_width

        try:
            site = model.site(sae.info.site)
        except UserError as error:
            raise UserError(
                f"dictionary for {error.what}", error.why, "choose a dictionary trained on this model"
            ) from None
        width = site_width(model, site)
    sae.check_model(width, model.name)
    if not any_model:
        sae.check_same_model(model.name, getattr(model, "fingerprint", ""))


def fold_rescaling(sae: SAE) -> SAE:
    """A TopK SAE that rescales by decoder norms with the norms folded in; any other SAE as it is."""
    return fold_norms(sae) if sae.settings.get("rescale_acts_by_decoder_norm") else sae


def _built(found: FoundSAE) -> SAE:
    """The SAE of what was read, in float32 or better, its norms folded where its library folds them."""
    weights = {name: _widened(weight) for name, weight in found.weights.items()}
    sae = found.architecture.build(weights, found.settings, found.info)
    if found.unit_rows and not torch.allclose(sae.decoder_norms, torch.ones_like(sae.decoder_norms)):
        return fold_norms(sae)
    return fold_rescaling(sae)


def _widened(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _locate(path_or_name: str | Path) -> Path:
    """The directory meant by a path or a shipped name."""
    shipped = shipped_dictionary(str(path_or_name))
    path = Path(path_or_name).expanduser()
    if path_or_name == "default" or (shipped and not path.exists()):
        path = shipped or path
    if not path.exists():
        names = ", ".join(shipped_names()) or "none"
        files = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        raise UserError(
            f"dictionary {str(path_or_name)!r}",
            "there is no such directory, and none of that name ships with trimtab",
            f"give a directory with {files}, a shipped name ({names}) or {PREFIX}RELEASE/SAE_ID",
        )
    if path.is_dir():
        _check_not_above(path)
        return path
    if is_weights_file(path):
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
    files = [known.weights for known in FORMATS]
    if any((path / name).exists() for name in (*files, CONFIG_FILE)):
        return
    below = sorted({file.parent for name in files for depth in ("*", "*/*") for file in path.glob(f"{depth}/{name}")})
    if below:
        raise UserError(
            f"dictionary {path}",
            f"it holds no dictionary itself, but {len(below)} below it",
            f"give one of them, such as {below[0]}",
        )


def _for_disk(name: str, weight: Tensor, dtype: str) -> Tensor:
    weight = weight.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"tensor {name}", "it holds values that are not finite", "the training diverged; train again")
    if dtype == "float16" and weight.ndim > 1:
        weight = weight.half()
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {name}", "it holds values beyond float16's 65504", "save it as float32")
    return weight.contiguous()


@contextmanager
def _appears_whole(path: Path) -> Iterator[Path]:
    """A fresh directory that becomes `path` on leaving, or vanishes if anything goes wrong.

    If `path` exists, its files of a dictionary are replaced, the config last, and all others are kept.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"dictionary {path}", "a file of that name is in the way", "choose another path")
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        staging.mkdir()
        yield staging
        for file in staging.iterdir():
            _flush(file)
        if not path.exists():
            staging.replace(path)
        else:
            if not (staging / STATS_FILE).exists():
                (path / STATS_FILE).unlink(missing_ok=True)
            for name in (WEIGHTS_FILE, STATS_FILE, CONFIG_FILE):
                if (staging / name).exists():
                    (staging / name).replace(path / name)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"dictionary {path}", f"it could not be written ({reason})", "free some space or choose another path"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
