"""What every reader of a dictionary's files checks, whoever wrote them: tensors, damage, pickles."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.config_fields import GET_AGAIN
from trimtab.dictionaries.sae import SAE, check_shapes
from trimtab.errors import UserError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_WRAPPERS = ("_orig_mod.", "module.")
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


class FoundSAE(NamedTuple):
    """An SAE as its files hold it, in trimtab's names and in the files' precision; shapes are checked."""

    architecture: type[SAE]
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    info: DictionaryInfo
    unit_rows: bool = False
    """Whether its library opens it with the norms of decoder rows folded into the codes."""


def read_safetensors(path: Path, what: str = "dictionary") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file of a dictionary, or of what else is named. Raises a `UserError` if it is
    missing, damaged or a pickle."""
    if not path.exists():
        raise UserError(f"{what} {path.parent}", f"it has no {path.name}", f"get the {what} again")
    with path.open("rb") as file:
        start = file.read(2)
    if start in _PICKLE_STARTS:
        raise pickle_error(path)
    with damage_named(path, "safetensors", what=what), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def damage_named(path: Path, kind: str, *errors: type[Exception], what: str = "dictionary") -> Iterator[None]:
    """Turn what a library raises over a damaged file into a `UserError` that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, *errors) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), f"damaged or no {kind} file ({reason})", f"get the {what} again") from error


def take_weights(
    tensors: Mapping[str, Tensor],
    path: Path | str,
    architecture: type[SAE],
    *,
    n: int,
    d: int,
    stated: tuple[str, str],
    names: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """The weights of an architecture out of a file's tensors, which must be these, finite and in floating point.

    Args:
        tensors: what the file holds.
        path: the file, for messages.
        architecture: whose weights are there.
        n, d: features and width, as the config says.
        stated: the field of the config that decides which tensors there must be, and its value, for messages.
        names: of the tensors by ours, where they differ. One that ends in ".weight" is that of an `nn.Linear`, which
            keeps ours transposed.
        optional: tensors that may be there and are no weights.

    Raises:
        UserError: a tensor is missing, unknown, or not as it must be; the message names it.
    """
    tensors = without_wrappers(tensors)
    names = names or {name: name for name in architecture.shapes}
    field, value = stated
    for name in names.values():
        if name not in tensors:
            raise UserError(f"tensor {name}", f"{path} lacks it, and the {field} is {value}", GET_AGAIN)
    for name, tensor in tensors.items():
        what = f"tensor {name} in {path}"
        if name in names.values():
            if tensor.dtype not in _DTYPES:
                raise UserError(what, f"its type is {tensor.dtype}, not a floating-point one", GET_AGAIN)
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(what, "it holds values that are not finite", GET_AGAIN)
        elif name not in optional:
            hint = f"correct the field {field}, or use another dictionary"
            raise UserError(what, f"the {field} {value} has no such weight", hint)
    transposed = {ours for ours, name in names.items() if name.endswith(".weight")}
    kept = {ours: architecture.shapes[ours][:: -1 if ours in transposed else 1] for ours in names}
    check_shapes({names[ours]: shape for ours, shape in kept.items()}, tensors, n=n, d=d, source=str(path))
    return {ours: tensors[name].T if ours in transposed else tensors[name] for ours, name in names.items()}


def without_wrappers(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors under the names that they have without what wrapped the module when it was saved: torch.compile puts
    `_orig_mod.` before all of them, DataParallel and DistributedDataParallel `module.`."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_wrappers({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def pickle_error(path: Path) -> UserError:
    """The refusal to open a pickle."""
    return UserError(
        str(path),
        "it is a pickle, which can run any code when read; trimtab reads safetensors only",
        "open it where you trust it and save it again (in SAELens: sae.save_model)",
    )
