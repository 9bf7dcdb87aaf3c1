"""SAEs of dictionary_learning (github.com/saprmarks/dictionary_learning): `ae.pt` beside `config.json`.

The config's `trainer.dict_class` names one of seven classes; each has its own tensor names, and encoders are kept
transposed where the class uses `nn.Linear`. An `AutoEncoder` is opened with unit decoder rows, as that library opens
it; batch-TopK classes use their running threshold, one for all features, at inference. Activations that were scaled
for training need nothing here: that library scales the biases back before it saves.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.dictionaries.architectures.gated import Gated
from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.architectures.standard import Standard
from trimtab.dictionaries.architectures.topk import TopK
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.foreign.module_paths import site_of_submodule
from trimtab.dictionaries.reading import (
    GET_AGAIN,
    FoundSAE,
    Stated,
    check_tensors,
    damage_named,
    read_json,
)
from trimtab.dictionaries.sae import SAE, check_shapes
from trimtab.errors import UserError

WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"
_WRITER = "dictionary_learning"


class Stored(NamedTuple):
    """How a file keeps one of our weights."""

    name: str
    shape: str
    """In our notation; "d n" for ours of "n d" means that it is kept transposed."""


class DictClass(NamedTuple):
    """A class of that library: what it is here, and where its weights are."""

    architecture: type[SAE]
    weights: dict[str, Stored]
    subtracts_b_dec: bool = True
    buffers: tuple[str, ...] = ()
    """Tensors that are no weights: k, the running threshold, the sizes of Matryoshka's groups."""
    unit_rows: bool = False


_LINEAR = {
    "W_enc": Stored("encoder.weight", "n d"),
    "b_enc": Stored("encoder.bias", "n"),
    "W_dec": Stored("decoder.weight", "d n"),
}
_PLAIN = {name: Stored(name, shape) for name, shape in Standard.shapes.items()}
_B_DEC = {"b_dec": Stored("b_dec", "d")}

CLASSES: dict[str, DictClass] = {
    "AutoEncoder": DictClass(Standard, _LINEAR | {"b_dec": Stored("bias", "d")}, unit_rows=True),
    "AutoEncoderNew": DictClass(Standard, _LINEAR | {"b_dec": Stored("decoder.bias", "d")}, subtracts_b_dec=False),
    "GatedAutoEncoder": DictClass(
        Gated,
        {
            "W_enc": _LINEAR["W_enc"],
            "b_gate": Stored("gate_bias", "n"),
            "b_mag": Stored("mag_bias", "n"),
            "r_mag": Stored("r_mag", "n"),
            "W_dec": _LINEAR["W_dec"],
            "b_dec": Stored("decoder_bias", "d"),
        },
    ),
    "JumpReluAutoEncoder": DictClass(JumpReLU, _PLAIN | {"threshold": Stored("threshold", "n")}, subtracts_b_dec=False),
    "AutoEncoderTopK": DictClass(TopK, _LINEAR | _B_DEC, buffers=("k", "threshold")),
    "BatchTopKSAE": DictClass(JumpReLU, _LINEAR | _B_DEC, buffers=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": DictClass(JumpReLU, _PLAIN, buffers=("k", "threshold", "group_sizes")),
}
"""Every class that its trainers save."""


def read(path: Path) -> FoundSAE:
    """Read a directory that dictionary_learning's `trainSAE` wrote.

    Raises:
        UserError: a file is missing, damaged or would have to be unpickled, or the config does not fit the weights; the
            message names the file and the field or tensor.
    """
    config = Fields(read_json(path / CONFIG_FILE, writers=_WRITER), str(path / CONFIG_FILE))
    trainer = config.part("trainer")
    name = trainer.cfg.get("dict_class")
    if not isinstance(name, str) or name not in CLASSES:
        why = f"trimtab reads {', '.join(CLASSES)}" if "dict_class" in trainer.cfg else "it is missing"
        raise trainer.error("dict_class", why, "use a dictionary of another class")
    known = CLASSES[name]
    n, d = trainer.positive_integer("dict_size"), trainer.positive_integer("activation_dim")
    file = path / WEIGHTS_FILE
    tensors = _load(file)
    stored = {weight.name: weight.shape for weight in known.weights.values()}
    check_tensors(tensors, file, Stated("trainer.dict_class", name, CONFIG_FILE), needed=stored, optional=known.buffers)
    check_shapes(stored, tensors, n=n, d=d, source=str(file))
    weights = {
        ours: tensors[kept.name].T if known.architecture.shapes[ours] != kept.shape else tensors[kept.name]
        for ours, kept in known.weights.items()
    }
    settings: dict[str, Any] = {"apply_b_dec_to_input": known.subtracts_b_dec}
    if known.architecture is TopK:
        settings["k"] = _k(trainer, tensors, n)
    if known.architecture is JumpReLU and "threshold" not in weights:
        weights["threshold"] = _threshold(tensors, file, name).expand(n).clone()
    return FoundSAE(known.architecture, weights, settings, _info(config, trainer, known), known.unit_rows)


def _load(file: Path) -> dict[str, Tensor]:
    with damage_named(file, "torch", RuntimeError, EOFError, KeyError):
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                str(file),
                "it holds more than tensors and would have to be unpickled, which can run any code; trimtab does not",
                "where you trust it, save its state_dict() alone: torch.save(ae.state_dict(), 'ae.pt')",
            ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(str(file), "it is not a state_dict, tensors by name", GET_AGAIN)
    return {str(name): tensor for name, tensor in loaded.items()}


def _k(trainer: Fields, tensors: Mapping[str, Tensor], n: int) -> int:
    k = trainer.positive_integer("k")
    if k > n:
        raise trainer.error("k", f"there are {n} features")
    if "k" in tensors and (tensors["k"].numel() != 1 or int(tensors["k"]) != k):
        raise trainer.error("k", f"{WEIGHTS_FILE} says {tensors['k'].tolist()}")
    return k


def _threshold(tensors: Mapping[str, Tensor], file: Path, name: str) -> Tensor:
    threshold = tensors.get("threshold")
    if threshold is None or threshold.numel() != 1 or not bool(torch.isfinite(threshold).all()):
        raise UserError(
            f"tensor threshold in {file}",
            "it is missing" if threshold is None else f"it must be one finite number, not {threshold.tolist()}",
            f"without it a {name} depends on the other rows of a batch; use another dictionary",
        )
    if float(threshold) < 0:
        warnings.warn(
            f"{file}: its threshold was never set (training ended before threshold_start_step), "
            "so that every positive code counts, as dictionary_learning itself computes it",
            stacklevel=2,
        )
    return threshold.reshape(()).float().clamp_min(0)


def _info(config: Fields, trainer: Fields, known: DictClass) -> DictionaryInfo:
    buffer = config.cfg.get("buffer")
    reads_output = not isinstance(buffer, dict) or buffer.get("io") in (None, "out")
    submodule, layer = trainer.cfg.get("submodule_name"), trainer.cfg.get("layer")
    return DictionaryInfo(
        architecture=known.architecture.architecture,
        model=str(trainer.cfg.get("lm_name") or ""),
        site=site_of_submodule(submodule, layer) if isinstance(submodule, str) and reads_output else "",
        metadata={"read_from": _WRITER, _WRITER: dict(config.cfg)},
    )
