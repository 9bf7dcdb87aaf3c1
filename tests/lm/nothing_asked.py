"""Refuses whatever would make the host wait for a device, so that what asks it nothing can be told on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.lm import chosen, sampling, token_statistics


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


@contextmanager
def as_captured() -> Iterator[None]:
    """What `transformers` leaves out while a graph is captured is left out."""
    with mock.patch("transformers.utils.import_utils.is_cuda_stream_capturing", return_value=True):
        yield


def what_asks(run: Callable[[], object]) -> str:
    """Where code of a model asks the device for something, or brings it a number, as a graph is captured of a call:
    file, function and line, or nothing."""
    try:
        with torch.no_grad(), as_captured(), NothingAsked():
            run()
    except AsksError as error:
        places = traceback.extract_tb(error.__traceback__)
        place = [one for one in places if {"transformers", "trimtab"} & {*Path(one.filename).parts}][-1]
        return f"{Path(place.filename).name}, {place.name}: {place.line}"
    return ""


def take_a_cards_branches(patch: pytest.MonkeyPatch) -> None:
    """What is written otherwise for a CPU, where asking a tensor for its values costs nothing."""
    choose = sampling.choose_token

    def choose_token(logits: Tensor, temperature: float, *how: Any) -> Tensor:
        return logits.argmax(dim=-1) if temperature == 0 else choose(logits, temperature, *how)

    for module in (sampling, chosen):
        patch.setattr(module, "choose_token", choose_token)

    def weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
        return torch.linalg.vecdot(weights, values.masked_fill_(weights == 0, 0))

    patch.setattr(token_statistics, "_weighted_sums", weighted_sums)
