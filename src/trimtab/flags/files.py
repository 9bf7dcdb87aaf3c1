"""`flags.json` beside a model's own files: what its flags are, and whose weights they were trained into.

The model is saved by `save_pretrained` and stays an ordinary one for everybody who does not read the file.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.errors import UserError
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.lm.layouts import find_layout, text_config
from trimtab.runs import json_safe, read_json, read_typed, write_json

NAME = "flags.json"
FORMAT = 1
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""Those in which a saved model may be loaded again; its weights are rounded then, and their hash is another."""
SAMPLE = 4096
"""Values of each weight that the hash is over, evenly spaced."""


def weight_hash(hf: transformers.PreTrainedModel, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and a fixed sample of the values of all weights, rounded to a precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLE)]
        values = values.to(dtype).float() if values.is_floating_point() else values
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_flags(flags: FlagSpec, hf: transformers.PreTrainedModel, path: Path | str, about: Any = None) -> None:
    """Write a model's `flags.json` into the directory that the model is saved in.

    Args:
        flags: the model's.
        hf: the model, in the precision that it is saved in.
        path: the directory.
        about: anything else that is to be known of them, such as how they were trained.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in PRECISIONS]
    weights = {name: weight_hash(hf, dtype) for name, dtype in zip(names, PRECISIONS, strict=True)}
    fields = {"format": FORMAT, "flags": json_safe(flags), "weights": weights, "about": json_safe(about)}
    write_json(Path(path) / NAME, fields)


def save_flags(model: LanguageModel, flags: FlagSpec, path: Path | str, about: Any = None) -> Path:
    """Save a model, its tokenizer and its flags in a new directory, which appears whole.

    Args:
        model: the model with flags.
        flags: its flags.
        path: the directory; it must be absent.
        about: see `write_flags`.

    Raises:
        UserError: there is something at the path, or it cannot be written.
    """
    final = Path(path)
    if final.exists():
        raise UserError(f"directory {final}", "it is there already", "choose another one")
    partial = final.with_name(f"{final.name}.saving")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.hf.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        write_flags(flags, model.hf, partial, about)
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {final}", str(error.strerror or error).lower(), "write elsewhere") from error
    return final


def load_flags(path: Path | str, model: LanguageModel | transformers.PreTrainedModel | None = None) -> FlagSpec:
    """The flags of a saved model.

    Args:
        path: its directory, or the file in it.
        model: the loaded model, if it is to be checked that the flags are its own.

    Raises:
        UserError: there is no `flags.json`, it is damaged, or it is another model's.
    """
    file = Path(path)
    file = file if file.name == NAME else file / NAME
    fields = read_json(file)
    if fields is None:
        hint = f"give a directory with a {NAME}, such as one that save_flags wrote"
        raise UserError(str(file), "there is no such file", hint)
    if fields.get("format") != FORMAT:
        raise UserError(str(file), f"its format is {fields.get('format')}, not {FORMAT}", "write it again")
    flags = read_typed(FlagSpec, fields.get("flags"), f"{file}, flags")
    if model is not None:
        hf = model.hf if isinstance(model, LanguageModel) else model
        name = model.name if isinstance(model, LanguageModel) else model.name_or_path or type(hf).__name__
        flags.check_fits(find_layout(hf), int(text_config(hf).hidden_size), name)
        known = (fields.get("weights") or {}).get(str(hf.dtype).removeprefix("torch."))
        if known != weight_hash(hf, hf.dtype):
            why = f"it is another model's: {name} has other weights than those that the flags were trained into"
            raise UserError(str(file), why, "load the model that was saved beside it, in float32, bfloat16 or float16")
    return flags
