"""Refuses whatever would make the host wait for a device, so that what asks it nothing can be told on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AsksError(Exception):
    pass


class NothingAsked(TorchDispatchMode):
    """Refuses what makes the host wait for a device, gives tensors of sizes that are in others, or brings numbers of
    Python's to the device (`torch.tensor`, which a graph would do once)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}
        """What was computed, and so is on the device."""

    REFUSED = (
        "_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal", "is_nonzero", "bincount",
        "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1] if one is not None
        )
        copied = name == "index_put_" and args[2].ndim == 0
        copied = copied and id(args[2]) not in self.made  # a number of the host's
        if boolean or copied or any(one in name for one in self.REFUSED):
            raise AsksError(str(func))
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.made[id(found)] = found
        return found
