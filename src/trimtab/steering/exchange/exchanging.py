"""Export and import of steerings, by the ends of files' names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UserError, did_you_mean
from trimtab.lm import LanguageModel, PositionRule
from trimtab.lm.model import check_is_model
from trimtab.runs import as_path
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, Column, Table
from trimtab.steering.exchange import gguf_file, torch_file
from trimtab.steering.exchange.layer_vectors import POSITIONS, AddedVectors, added_vectors, plain_name
from trimtab.steering.saved_steering import Steering

WRITERS = {".gguf": gguf_file.write, ".pt": torch_file.write}
USED_BY = {
    ".gguf": "llama-cli --control-vector {path}, at scale 1",
    ".pt": "SteeringVector(**torch.load({path!r})) of steering-vectors",
}
READ = (".gguf", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class ExportedLayer:
    """A vector as it was written."""

    layer: int
    length: float
    """‖Δ‖ of every edit, in model units."""
    norm: float | None
    """The ‖x‖ by which a relative dose became that length; None where doses were no multiples of it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Exported(Result):
    """A file for another tool."""

    path: str
    label: str
    used_by: str
    """How the other tool takes it."""
    layers: tuple[ExportedLayer, ...]

    def headline(self) -> str:
        return f"{self.label} in {self.path}, added at every token; for {self.used_by}"

    def tables(self) -> Mapping[str, Table]:
        columns = [
            Column("layer", "layer", "d"), Column("‖Δ‖", "length", NUMBER), Column("at typical ‖x‖", "norm", NUMBER),
        ]  # fmt: skip
        return {"layers": Table(columns=columns, rows=self.layers, caption="lengths in model units")}


def export_steering(
    steering: Steering,
    path: Path | str,
    *,
    positions: str | None = None,
    norms: float | Mapping[str, float] | None = None,
) -> Exported:
    """Write a steering for llama.cpp (`.gguf`) or steering-vectors (`.pt`).

    Args:
        steering: adds directions at the outputs of layers.
        path: the file; its name's end says for which tool.
        positions: `all`, to let it steer at every token where it does so at some alone.
        norms: typical ‖x‖, at all sites or by site, by which relative doses become lengths; where the steering states
            them, they are known.

    Raises:
        UserError: the name ends in nothing known, there is such a file, or the file cannot hold what the steering does.
    """
    if not isinstance(steering, Steering):
        hint = "give what trimtab.steering.load or Steering.of returns"
        raise UserError(f"the {type(steering).__name__} that is exported", "it is no Steering", hint)
    path = as_path(path, "the file")
    write = WRITERS.get(path.suffix)
    if write is None:
        hint = f"end it in {' (llama.cpp) or '.join(WRITERS)} (steering-vectors)"
        raise UserError(f"file {path}", "its name does not say for which tool it is", hint)
    if path.exists():
        raise UserError(f"file {path}", "it is there already", "choose another name")
    vectors = added_vectors(steering, positions=positions, norms=norms)
    layers = tuple(
        ExportedLayer(layer=layer, length=float(row.norm()), norm=vectors.norms.get(layer))
        for layer, row in sorted(vectors.layers.items())
    )
    write(vectors, path, f"{steering.label} of {steering.model.name}, by {steering.made_by}")
    return Exported(
        path=os.fspath(path), label=steering.label, used_by=USED_BY[path.suffix].format(path=os.fspath(path)),
        layers=layers,
    )  # fmt: skip


def import_steering(
    path: Path | str,
    model: LanguageModel,
    *,
    site: str | None = None,
    positions: str = POSITIONS,
    any_model: bool = False,
) -> Steering:
    """A steering of another tool's file: vectors that are added at their own lengths.

    Args:
        path: a control vector of llama.cpp or repeng (`.gguf`), or tensors (`.pt`, `.safetensors`): see `torch_file`.
        model: the model that it is for.
        site: where a single vector steers (`resid_post.15`).
        positions: where it steers; everywhere by default, as it does in other tools.
        any_model: accept a file that says it is for another architecture.

    Raises:
        UserError: the file is damaged, holds something else, or does not fit the model.
    """
    check_is_model(model)
    path = as_path(path, "the file")
    if not path.is_file():
        raise UserError(f"file {path}", "there is none", "give a file of another tool")
    if path.suffix not in READ:
        hint = did_you_mean(path.suffix, READ, f"give one that ends in {', '.join(READ)}")
        raise UserError(f"file {path}", "its name does not say what it is", hint)
    PositionRule.parse(positions)
    if path.suffix == ".gguf":
        if site is not None:
            raise UserError(f"--site {site}", "a control vector says for which layers it is", "leave it out")
        vectors: AddedVectors = gguf_file.read(path)
    else:
        vectors = torch_file.read(path, site)
    own = plain_name(str(model.hf.config.model_type))
    if vectors.architecture and plain_name(vectors.architecture) != own and not any_model:
        why = f"it is for a model of the architecture {vectors.architecture}, and {model.name} is {own}"
        raise UserError(str(path), why, "give its model (--model), or allow any (--any-model)")
    return vectors.steering(model, positions=positions, about=path.name, made_by=f"imported from {path.name}")
