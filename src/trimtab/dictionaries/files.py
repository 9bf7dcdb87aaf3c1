"""Dictionaries on disk: a directory in SAELens's layout.

`cfg.json` and `sae_weights.safetensors` are as SAELens 6 reads and writes them, `feature_stats.parquet` lies beside
them. Nothing is ever unpickled. A dictionary appears whole: it is written beside its place and moved there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.folding import fold_norms
from trimtab.dictionaries.sae import SAE, check_shapes
from trimtab.dictionaries.saelens_config import parse_config, write_config
from trimtab.dictionaries.shipped import shipped_dictionary, shipped_names
from trimtab.errors import UserError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
STATS_FILE = "feature_stats.parquet"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_DIGEST = "trimtab.sha256"
_READ_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


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
    """Load an SAE that trimtab or SAELens saved.

    A TopK SAE that rescales by decoder norms comes with the norms folded into its encoder: the same function, with unit
    rows. Every other SAE keeps its rows as they are.

    Args:
        path_or_name: a directory with `cfg.json` and `sae_weights.safetensors`, or the name of a dictionary that ships
            with trimtab ("default", "smollm2-135m-instruct/resid_post.15").
        model: a model that the dictionary must fit in width, site and name; no check without it.
        any_model: accept a dictionary trained on a model of another name or fingerprint (a fine-tune's base, say).
        device: where the weights go.
        dtype: precision of the weights in memory, whatever the file's is.

    Raises:
        UserError: nothing there, a damaged or foreign file, a config that asks for what trimtab does not compute, or a
            dictionary that does not fit the model. The message names the file and the field or tensor.
    """
    path = _locate(path_or_name)
    config = parse_config(_read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))
    weights = _read_weights(path / WEIGHTS_FILE, config.architecture)
    check_shapes(config.architecture.shapes, weights, n=config.d_sae, d=config.d_in, source=str(path / WEIGHTS_FILE))
    weights = {name: weight.to(torch.promote_types(weight.dtype, torch.float32)) for name, weight in weights.items()}
    sae = fold_rescaling(config.architecture.build(weights, config.settings, config.info)).to(device, dtype)
    if (path / STATS_FILE).exists():
        sae.feature_stats = FeatureStats.read(path / STATS_FILE, n_features=sae.n_features)
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
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", _DIGEST: _digest(weights)})
        if stats is not None:
            stats.write(folder / STATS_FILE)
        (folder / CONFIG_FILE).write_text(config)
    return path


def check_fit(sae: SAE, model: Any, *, any_model: bool = False) -> None:
    """Raise a `UserError` unless the dictionary fits a model's width and, where the file says them, site and name."""
    width = model.d_model
    if sae.info.site and hasattr(model, "layout"):
        from trimtab.lm.sites import Site, check_site, site_width

        site = Site.parse(sae.info.site)
        try:
            check_site(model, site)
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


def _locate(path_or_name: str | Path) -> Path:
    """The directory meant by a path or a shipped name."""
    shipped = shipped_dictionary(str(path_or_name))
    path = Path(path_or_name).expanduser()
    if path_or_name == "default" or (shipped and not path.exists()):
        path = shipped or path
    if not path.exists():
        names = ", ".join(shipped_names()) or "none"
        raise UserError(
            f"dictionary {str(path_or_name)!r}",
            "there is no such directory, and none of that name ships with trimtab",
            f"give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, or a shipped name ({names})",
        )
    if not path.is_dir():
        if path.suffix in _PICKLES:
            raise _pickle_error(path)
        raise UserError(
            f"dictionary {path}",
            "it is not a directory",
            f"give the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"dictionary {path.parent}", f"it has no {path.name}", "give a directory that SAELens or trimtab saved"
        ) from None
    except OSError as error:
        raise UserError(str(path), f"not readable ({error.strerror})", "check the file's permissions") from error
    except ValueError as error:
        raise UserError(str(path), f"not valid JSON ({error})", "get the dictionary again") from error
    if not isinstance(cfg, dict):
        raise UserError(str(path), f"a JSON object was expected, not {type(cfg).__name__}", "get the dictionary again")
    return cfg


def _read_weights(path: Path, architecture: type[SAE]) -> dict[str, Tensor]:
    mend = "get the dictionary again"
    if not path.exists():
        pickle = next((p for p in sorted(path.parent.iterdir()) if p.suffix in _PICKLES), None)
        if pickle:
            raise _pickle_error(pickle)
        raise UserError(f"dictionary {path.parent}", f"it has no {path.name}", mend)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise _pickle_error(path)
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get(_DIGEST)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(str(path), f"damaged or no safetensors file ({error})", mend) from error
    if digest is not None and digest != _digest(weights):
        raise UserError(str(path), "its values do not match the checksum they were saved with", mend)
    scaling = weights.pop("scaling_factor", None)  # SAELens before 6 wrote ones that it never used
    if scaling is not None and not bool((scaling == 1).all()):
        raise UserError(f"tensor scaling_factor in {path}", "trimtab reads SAEs without one", "use another dictionary")
    for name in architecture.shapes:
        if name not in weights:
            raise UserError(
                f"tensor {name}", f"{path} lacks it, and the architecture is {architecture.architecture}", mend
            )
    for name, weight in weights.items():
        if name not in architecture.shapes:
            raise UserError(
                f"tensor {name} in {path}",
                f"the architecture {architecture.architecture} has no such weight",
                f"correct the field architecture in {CONFIG_FILE}, or use another dictionary",
            )
        if weight.dtype not in _READ_DTYPES:
            raise UserError(f"tensor {name} in {path}", f"its type is {weight.dtype}, not a floating-point one", mend)
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {name} in {path}", "it holds values that are not finite", mend)
    return weights


def _pickle_error(path: Path) -> UserError:
    return UserError(
        str(path),
        "it is a pickle, which can run any code when read; trimtab reads safetensors only",
        "open it where you trust it and save it again (in SAELens: sae.save_model)",
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


def _digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)};".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
