"""Torch's operations of a decoding step, counted where nothing is captured: each is a launch on an accelerator."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = frozenset((
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "permute",
    "promote_types", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view", "_reshape_alias", "_unsafe_view",
))  # fmt: skip
"""Views, and memory that is asked for and not filled."""
MODEL = "model"
"""What is called so: operations in `transformers`, and those that stand for some of its own."""
IN_ITS_PLACE = frozenset(("attention.py", "cache.py", "products.py", "slotted_cache.py"))
"""Modules of trimtab that compute what the model would compute itself."""


class Operations(TorchDispatchMode):
    """Counts operations by the module of trimtab that asked for them, or `MODEL`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in NO_LAUNCH:
            self.counts[_asking(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _asking(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts or ("trimtab" in path.parts and path.name in IN_ITS_PLACE):
            return MODEL
        if "trimtab" in path.parts:
            return f"{path.parent.name}/{path.stem}"
        frame = frame.f_back
    return "elsewhere"


def of_a_step(run: Callable[[int], object], steps: int) -> dict[str, float]:
    """Operations of one more step of a run of so many, or twice as many, steps."""
    run(steps)  # tries the model, once
    found: list[Counter[str]] = []
    for times in (1, 2):
        with Operations() as operations:
            run(times * steps)
        found.append(operations.counts)
    once, twice = found
    each = {name: round((count - once[name]) / steps, 2) for name, count in twice.most_common()}
    return {name: count for name, count in each.items() if count}
