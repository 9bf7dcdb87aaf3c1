"""What a training step needs to be replayed as a graph (`lm.captured`), which repeats its tensors' work without Python.

So whatever Python goes by in a step must be known: while it is the same, one graph does; where it is not, as while k
shrinks, steps are taken plainly or by another graph. `python_values` takes all that an SAE holds, whether or not its
steps go by it, so that no architecture can forget a part.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.dictionaries.trainable import TrainableSAE

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""What torch keeps in a module; parameters and buffers are taken one by one."""
_PLAIN = (type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device)


class UnknownValueError(Exception):
    """An attribute may hold anything."""


class BatchPlaces:
    """Where the graphs of trainings that take turns read their batches."""

    def __init__(self) -> None:
        self._places: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def placed(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """The rows at the address that is kept for their shape, until others are put there."""
        key = x.shape, x.dtype, x.device
        if key not in self._places:
            self._places[key] = torch.empty_like(x)
        return self._places[key].copy_(x)


def python_values(sae: TrainableSAE) -> tuple[tuple[str, Hashable], ...]:
    """All that an SAE's step may go by but for numbers on the device: attributes, buffers that are `on_host`, and the
    addresses and shapes of tensors.

    Raises an `UnknownValueError` with the name of an attribute that holds something else.
    """
    found: list[tuple[str, Hashable]] = []
    for module in sae.modules():
        named = (vars(kind).get("not_in_step", ()) for kind in type(module).__mro__)
        left_out = _OF_EVERY_MODULE.union(*named)
        held = {name: value for name, value in vars(module).items() if name not in left_out}
        for name, value in {**held, **module._parameters, **module._buffers}.items():
            on_host = name in getattr(module, "on_host", ())
            try:
                found.append((name, float(value) if on_host else _known(value, sae.b_dec.device)))
            except UnknownValueError as error:
                raise UnknownValueError(f"{type(module).__name__}.{name}") from error
    return tuple(found)


def _known(value: Any, device: torch.device) -> Hashable:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor) and value.device == device:
        return id(value), value.data_ptr(), value.shape, value.dtype
    if isinstance(value, tuple | list):
        return tuple(_known(one, device) for one in value)
    if isinstance(value, Mapping):
        return tuple((key, _known(one, device)) for key, one in value.items())
    if is_dataclass(value) and hasattr(value, "__dict__"):
        return _known(vars(value), device)
    raise UnknownValueError
