"""`flags.json` beside a model's own files: what its flags are, and whose weights they were trained into.

All weights are saved by `save_pretrained` of `transformers`, an adapter by that of PEFT, and both stay ordinary ones
for everybody who does not read the file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trimtab.errors import UserError, did_you_mean
from trimtab.flags.adapters import (
    ADAPTER_FILE,
    ADDED,
    base_of,
    has_adapter,
    load_adapter,
    load_base,
    save_adapter,
    unwrapped,
)
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel, load_model
from trimtab.lm.layouts import find_layout, text_config
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.weight_hashes import precision_name, weight_hash, weight_hashes
from trimtab.runs import (
    atomic_directory,
    json_safe,
    read_json,
    read_record,
    read_typed,
    shipped_directory,
    shipped_names,
    write_json,
)

NAME = "flags.json"
FORMAT = 1
MODEL, SNAPSHOTS = "model", "snapshots"
"""Directories of a run: the model with flags, and those on the way to it."""


def _weights(hf: transformers.PreTrainedModel, *, base: bool = False) -> dict[str, Tensor]:
    """A model's weights by name, an adapter's included, whatever the adapter is called; with `base` without them."""
    named = {_plain_name(name): tensor for name, tensor in hf.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if not (base and ADDED in name)}


def _plain_name(name: str) -> str:
    return re.sub(rf"({re.escape(ADDED)}[A-Z])\.[^.]+", r"\1", name.replace(".base_layer.", "."))


def write_flags(
    flags: FlagSpec, hf: transformers.PreTrainedModel, path: Path | str, about: Any = None, *, base: str = ""
) -> None:
    """Write a model's `flags.json` into the directory that the model is saved in.

    Args:
        flags: the model's.
        hf: the model, in the precision that it is saved in.
        path: the directory.
        about: anything else that is to be known of them, such as how they were trained.
        base: what the model that an adapter was trained on is loaded by.
    """
    fields = {
        "format": FORMAT,
        "flags": json_safe(flags),
        "weights": weight_hashes(_weights(hf)),
        "about": json_safe(about),
    }
    if has_adapter(hf):
        fields["base"] = {"name": base, "weights": weight_hashes(_weights(hf, base=True))}
    write_json(Path(path) / NAME, fields)


def save_flags(
    model: LanguageModel,
    flags: FlagSpec,
    path: Path | str,
    about: Any = None,
    *,
    adapter: Any = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save a model, its tokenizer and its flags in a new directory, which appears whole; or an adapter and its flags.

    Args:
        model: the model with flags.
        flags: its flags.
        path: the directory; it must be absent.
        about: see `write_flags`.
        adapter: the `PeftModel` around the model, if only the adapter is to be saved.
        dtype: precision of the files; the model's own by default.

    Raises:
        UserError: there is something at the path, or it cannot be written.
    """
    final = Path(path)
    if final.exists():
        raise UserError(f"directory {final}", "it is there already", "choose another one")
    with atomic_directory(final) as partial:
        if adapter is not None:
            save_adapter(adapter, partial, dtype or model.dtype)
            write_flags(flags, model.hf, partial, about, base=base_of(adapter))
        else:
            hf = model.hf if dtype in (None, model.dtype) else copy.deepcopy(model.hf).to(dtype)  # type: ignore[arg-type]
            with transformers_silenced():
                hf.save_pretrained(partial)
                model.tokenizer.save_pretrained(partial)
            write_flags(flags, hf, partial, about)
    return final


def found_directory(path: Path | str) -> Path:
    """A directory; or that of an adapter that ships with trimtab, by its name (MODEL/NAME), where there is no such."""
    shipped = shipped_directory(str(path), NAME)
    return shipped if shipped and not Path(path).exists() else Path(path)


def _file(path: Path | str) -> Path:
    found = found_directory(path)
    return found if found.name == NAME else found / NAME


def _fields(path: Path | str) -> dict[str, Any]:
    """What the `flags.json` of a directory says, or one that is named."""
    file = _file(path)
    fields = read_json(file)
    if fields is None:
        hint = f"give a directory with a {NAME}, such as one that save_flags wrote"
        hint = did_you_mean(str(path), shipped_names(NAME), hint)
        raise UserError(str(file), "there is no such file", hint)
    if fields.get("format") != FORMAT:
        raise UserError(str(file), f"its format is {fields.get('format')}, not {FORMAT}", "write it again")
    return fields


def was_trained_in_chat(path: Path | str) -> bool:
    """Whether a saved model was finetuned in its chat template; False where its `flags.json` does not say.

    Raises:
        UserError: there is no `flags.json`, or it is damaged.
    """
    about = _fields(path).get("about")
    return bool(isinstance(about, dict) and about.get("chat"))


def load_flags(path: Path | str, model: object = None) -> FlagSpec:
    """The flags of a saved model.

    Args:
        path: its directory, or the file in it.
        model: the loaded model, if it is to be checked that the flags are its own: a `LanguageModel`, or one of
            `transformers` or PEFT.

    Raises:
        UserError: there is no `flags.json`, it is damaged, or it is another model's.
    """
    file, fields = _file(path), _fields(path)
    flags = read_typed(FlagSpec, fields.get("flags"), f"{file}, flags")
    if model is not None:
        hf = unwrapped(model)
        if hf is None:
            hint = "give one of transformers, of PEFT or of load_model"
            raise UserError(f"the {type(model).__name__} whose flags are loaded", "it is no language model", hint)
        name = model.name if isinstance(model, LanguageModel) else hf.name_or_path or type(hf).__name__
        flags.check_fits(find_layout(hf), int(text_config(hf).hidden_size), name)
        known = (fields.get("weights") or {}).get(precision_name(hf.dtype))
        if known != weight_hash(_weights(hf), hf.dtype):
            why = f"it is another model's: {name} has other weights than those that the flags were trained into"
            beside = "load the model that was saved beside it, in float32, bfloat16 or float16"
            hint = "put the adapter that lies beside it on its model, unmerged" if fields.get("base") else beside
            raise UserError(str(file), why, hint)
    return flags


def load_flagged(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    base: LanguageModel | None = None,
    allow: Sequence[str] = (),
) -> tuple[LanguageModel, FlagSpec]:
    """A saved model with its flags, whether all its weights were saved or an adapter.

    Args:
        path: the directory, with a `flags.json` in it; or the name of an adapter that ships with trimtab.
        device, dtype: as `load_model` takes them.
        base: the model that the adapter was trained on; by default it is loaded by the name that it was loaded by then.
        allow: as `load_model` takes it; by default what the base allows, if one is given.

    Raises:
        UserError: there is no `flags.json`, the model cannot be loaded, an adapter belongs to another model, or the
            flags to other weights.
    """
    directory = found_directory(path)
    fields = _fields(directory / NAME)
    if (directory / ADAPTER_FILE).is_file():
        of = fields.get("base") or {}
        hint = f"give that one, {of.get('name')}, as base"
        if base is None:
            base = load_base(str(of.get("name")), directory, device=device, dtype=dtype, allow=allow)
            hint = "put that one there, or give it as base to load_flagged"
        else:
            base = LanguageModel.from_hf(copy.deepcopy(base.hf), base.tokenizer, base.name, base.allow)
        if (of.get("weights") or {}).get(precision_name(base.dtype)) != weight_hash(_weights(base.hf), base.dtype):
            why = f"{base.name} has other weights than the model that it was trained on"
            raise UserError(f"adapter {directory}", why, hint)
        model, _ = load_adapter(base, directory)
    else:
        allow = allow or (() if base is None else base.allow)
        model = load_model(str(directory), device=device, dtype=dtype, allow=allow)
    return model, load_flags(directory, model)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model that was kept while it was trained."""

    step: int
    tokens: int
    """Of the examples that it had been trained on by then, prompts included."""
    path: Path
    """What `load_flagged` loads."""


def snapshot_path(run: Path, step: int) -> Path:
    """Where the snapshot of a step lies in a run."""
    return run / SNAPSHOTS / f"step-{step:09d}"


def snapshots(run: Path | str) -> list[Snapshot]:
    """The models that a run of `flags train` kept, the earliest first; the result of a finished run is the last.

    Raises:
        UserError: there is no run, or a file is damaged.
    """
    run = Path(run)
    record = read_record(run)
    paths = [path for path in sorted((run / SNAPSHOTS).glob("step-*")) if (path / NAME).is_file()]
    if record["status"] == "done" and (run / MODEL / NAME).is_file():
        paths.append(run / MODEL)
    found = [(_fields(path)["about"], path) for path in paths]
    return [
        Snapshot(step=about.get("step", about.get("steps")), tokens=about["tokens"], path=path) for about, path in found
    ]
