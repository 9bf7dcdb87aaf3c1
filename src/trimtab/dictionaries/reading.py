"""What every reader of a dictionary's files checks, whoever wrote them: fields, tensors, damage, pickles."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
GET_AGAIN = "get the dictionary again"
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


class FoundSAE(NamedTuple):
    """An SAE as its files hold it, in trimtab's names and in the files' precision; shapes are checked."""

    architecture: type[SAE]
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    info: DictionaryInfo
    unit_rows: bool = False
    """Whether its library opens it with the norms of decoder rows folded into the codes."""


def read_json(path: Path, *, writers: str = "SAELens or trimtab") -> dict[str, Any]:
    """A config, which must be an object. Raises a `UserError` that names the file, and who writes such directories."""
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"dictionary {path.parent}", f"it has no {path.name}", f"give a directory that {writers} saved"
        ) from None
    except OSError as error:
        raise UserError(str(path), f"not readable ({error.strerror})", "check the file's permissions") from error
    except ValueError as error:
        raise UserError(str(path), f"not valid JSON ({error})", GET_AGAIN) from error
    if not isinstance(cfg, dict):
        raise UserError(str(path), f"a JSON object was expected, not {type(cfg).__name__}", GET_AGAIN)
    return cfg


class StoredTensors(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> StoredTensors:
    """All tensors of a file. Raises a `UserError` if it is missing, damaged or a pickle, which is not opened."""
    if not path.exists():
        raise UserError(f"dictionary {path.parent}", f"it has no {path.name}", GET_AGAIN)
    with path.open("rb") as file:
        start = file.read(2)
    if start in _PICKLE_STARTS:
        raise pickle_error(path)
    with damage_named(path, "safetensors"), safe_open(path, framework="pt") as file:
        return StoredTensors(
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            file.metadata() or {},
        )


@contextmanager
def damage_named(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library raises over a damaged file into a `UserError` that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, *errors) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), f"damaged or no {kind} file ({reason})", GET_AGAIN) from error


class Stated(NamedTuple):
    """The field of a config that decides which tensors there must be, for messages."""

    field: str
    value: str
    file: str

    def __str__(self) -> str:
        return f"{self.field} {self.value}"


def check_tensors(
    tensors: Mapping[str, Tensor],
    path: Path | str,
    stated: Stated,
    *,
    needed: Collection[str],
    optional: Collection[str] = (),
) -> None:
    """Raise a `UserError` unless a file holds the tensors of its architecture, finite and in floating point.

    Args:
        tensors: what the file holds.
        path: the file, for messages.
        stated: what its config says it is.
        needed: names that must be there.
        optional: names that may be there; their types are not checked.
    """
    for name in needed:
        if name not in tensors:
            raise UserError(f"tensor {name}", f"{path} lacks it, and the {stated.field} is {stated.value}", GET_AGAIN)
    for name, tensor in tensors.items():
        if name in needed:
            if tensor.dtype not in _DTYPES:
                raise UserError(
                    f"tensor {name} in {path}", f"its type is {tensor.dtype}, not a floating-point one", GET_AGAIN
                )
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"tensor {name} in {path}", "it holds values that are not finite", GET_AGAIN)
        elif name not in optional:
            raise UserError(
                f"tensor {name} in {path}",
                f"the {stated} has no such weight",
                f"correct the field {stated.field} in {stated.file}, or use another dictionary",
            )


def pickle_error(path: Path) -> UserError:
    """The refusal to open a pickle."""
    return UserError(
        str(path),
        "it is a pickle, which can run any code when read; trimtab reads safetensors only",
        "open it where you trust it and save it again (in SAELens: sae.save_model)",
    )
