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
from trimtab.dictionaries.checked_weights import FoundSAE, damage_named, take_weights, without_wrappers
from trimtab.dictionaries.config_fields import GET_AGAIN, Fields
from trimtab.dictionaries.module_paths import site_of_submodule
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError

WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"
_WRITER = "dictionary_learning"
_TORCH_ERRORS = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, AssertionError, NotImplementedError)
"""What torch raises over a damaged file."""


class DictClass(NamedTuple):
    """A class of that library: what it is here, and where its weights are."""

    architecture: type[SAE]
    names: dict[str, str]
    """Of its weights in the file, by ours."""
    subtracts_b_dec: bool = True
    buffers: tuple[str, ...] = ()
    """Tensors that are no weights: k, the running threshold, the sizes of Matryoshka's groups."""
    unit_rows: bool = False


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_GATED = {"W_enc": "encoder.weight", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_PLAIN = {name: name for name in Standard.shapes}

CLASSES: dict[str, DictClass] = {
    "AutoEncoder": DictClass(Standard, _LINEAR | {"b_dec": "bias"}, unit_rows=True),
    "AutoEncoderNew": DictClass(Standard, _LINEAR | {"b_dec": "decoder.bias"}, subtracts_b_dec=False),
    "GatedAutoEncoder": DictClass(Gated, _GATED | {"W_dec": "decoder.weight", "b_dec": "decoder_bias"}),
    "JumpReluAutoEncoder": DictClass(JumpReLU, _PLAIN | {"threshold": "threshold"}, subtracts_b_dec=False),
    "AutoEncoderTopK": DictClass(TopK, _LINEAR | {"b_dec": "b_dec"}, buffers=("k", "threshold")),
    "BatchTopKSAE": DictClass(JumpReLU, _LINEAR | {"b_dec": "b_dec"}, buffers=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": DictClass(JumpReLU, _PLAIN, buffers=("k", "threshold", "group_sizes")),
}
"""Every class that its trainers save."""


def read(path: Path) -> FoundSAE:
    """Read a directory that dictionary_learning's `trainSAE` wrote. Raises a `UserError` that names the file and the
    field or tensor."""
    config = Fields.read(path / CONFIG_FILE, _WRITER)
    trainer = config.part("trainer")
    found = found_in_trainer(trainer, _load(path / WEIGHTS_FILE), path / WEIGHTS_FILE)
    return found._replace(info=_info(config, trainer, found.architecture))


def found_in_trainer(trainer: Fields, tensors: Mapping[str, Tensor], file: Path | str) -> FoundSAE:
    """Understand what a trainer's config says of a dictionary, and its tensors, wherever they come from.

    Raises:
        UserError: a field is missing or of a kind that trimtab does not compute, or a tensor does not fit (`file` is
            where it is from); the message names it.
    """
    tensors = without_wrappers(tensors)
    name = trainer.cfg.get("dict_class", _class_of(trainer, tensors))
    if not isinstance(name, str) or name not in CLASSES:
        why = f"trimtab reads {', '.join(CLASSES)}"
        if "dict_class" not in trainer.cfg:
            why = "it is missing, and neither trainer_class nor the tensors say which it is"
        raise trainer.error("dict_class", why, "use a dictionary of another class")
    known = CLASSES[name]
    n, d = trainer.positive_integer("dict_size"), trainer.positive_integer("activation_dim")
    weights = take_weights(
        tensors, file, known.architecture, n=n, d=d, stated=("trainer.dict_class", name), names=known.names,
        optional=known.buffers,
    )  # fmt: skip
    subtracts = trainer.boolean("apply_b_dec_to_input", known.subtracts_b_dec)
    settings: dict[str, Any] = {"apply_b_dec_to_input": subtracts}
    if known.architecture is TopK:
        settings["k"] = k = trainer.positive_integer("k")
        if k > n:
            raise trainer.error("k", f"there are {n} features")
        if "k" in tensors and (tensors["k"].numel() != 1 or int(tensors["k"]) != k):
            raise trainer.error("k", f"{WEIGHTS_FILE} says {tensors['k'].tolist()}")
    if known.architecture is JumpReLU and "threshold" not in weights:
        weights["threshold"] = _threshold(tensors, file, name).expand(n).clone()
    info = DictionaryInfo(architecture=known.architecture.architecture)
    return FoundSAE(known.architecture, weights, settings, info, known.unit_rows)


def _class_of(trainer: Fields, tensors: Mapping[str, Tensor]) -> str:
    """The class that an older config, which does not name it, belongs to: the one that the tensors fit, and among two
    that they fit the one that the trainer saves; empty if that leaves none or several."""
    trained_by = str(trainer.cfg.get("trainer_class") or "").lower()
    fitting = [
        name
        for name, known in CLASSES.items()
        if (needed := _needed(known)) <= set(tensors) <= needed | set(known.buffers)
    ]
    if len(fitting) > 1:
        batched = "batchtopk" in trained_by
        fitting = [name for name in fitting if "topk" in trained_by and ("BatchTopK" in name) == batched]
    return fitting[0] if len(fitting) == 1 else ""


def _needed(known: DictClass) -> set[str]:
    """The tensors without which it is not that class."""
    running = {"threshold"} if known.architecture is JumpReLU else set[str]()
    return set(known.names.values()) | ((running | {"group_sizes"}) & set(known.buffers))


def _load(file: Path) -> dict[str, Tensor]:
    with damage_named(file, "torch", *_TORCH_ERRORS):
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


def _threshold(tensors: Mapping[str, Tensor], file: Path | str, name: str) -> Tensor:
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


def _info(config: Fields, trainer: Fields, architecture: type[SAE]) -> DictionaryInfo:
    buffer = config.cfg.get("buffer")
    reads_output = not isinstance(buffer, dict) or buffer.get("io") in (None, "out")
    submodule, layer = trainer.cfg.get("submodule_name"), trainer.cfg.get("layer")
    return DictionaryInfo(
        architecture=architecture.architecture,
        model=str(trainer.cfg.get("lm_name") or ""),
        site=site_of_submodule(submodule, layer) if isinstance(submodule, str) and reads_output else "",
        metadata={"read_from": _WRITER, _WRITER: dict(config.cfg)},
    )
