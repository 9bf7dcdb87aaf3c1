"""A CPU taken for a card: what is captured is computed again at each replay, into the same place, as a graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from trimtab.lm.captured import Captured


class StandIn:
    """Does the work that was captured, into the place of its result then. Unlike a graph it reads anew what a function
    holds otherwise."""

    def __init__(self, function: Callable[[], Tensor | None]) -> None:
        self.function, self.replays = function, 0
        held = [one for one in vars(getattr(function, "__self__", self)).values() if isinstance(one, Tensor)]
        before = [one.clone() for one in held]
        self.found = function()
        for mine, one in zip(held, before, strict=True):  # what is captured is not done yet
            mine.copy_(one)

    def replay(self) -> None:
        self.replays += 1
        found = self.function()
        if self.found is not None:
            assert found is not None
            self.found.copy_(found)


def stand_in_for_graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The graphs that are captured from now on."""
    made, init = list[StandIn](), Captured.__init__

    def on_a_card(self: Captured, *args: Any) -> None:
        init(self, *args)
        self.captures = True

    def capture(self: Captured, function: Callable[[], Tensor | None]) -> None:
        made.append(StandIn(function))
        self._graph, self._found = made[-1], made[-1].found

    monkeypatch.setattr(Captured, "__init__", on_a_card)
    monkeypatch.setattr(Captured, "_capture", capture)
    return made
