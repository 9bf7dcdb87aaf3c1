"""Which input positions of a row are edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from trimtab.errors import UserError
from trimtab.runs import whole_numbers


@dataclass(frozen=True)
class PositionRule:
    """Which input positions of a row are edited; positions are absolute and exclude padding.

    `generated` is every position whose logits choose a token: the last prompt token and each generated token but the
    last. `prompt` is every prompt position, `all` both, `span` the half-open range from `start` to `stop`, `list` the
    positions in `places`, negative ones counted from the prompt's end (−1 is its last token).
    """

    kind: Literal["generated", "prompt", "all", "span", "list"] = "generated"
    start: int = 0
    stop: int = 0
    places: tuple[int, ...] = ()

    @classmethod
    def parse(cls, positions: PositionRule | str | int | Sequence[int]) -> PositionRule:
        """Read `generated`, `prompt`, `all`, `START:STOP`, or positions: one, a list, or text like `3,7`.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(positions, PositionRule):
            return positions
        if not isinstance(positions, str):
            places = whole_numbers(positions, "position")
            if not places:
                raise UserError("positions", "the list is empty", "name at least one")
            return cls("list", places=tuple(sorted(set(places))))
        if positions in ("generated", "prompt", "all"):
            return cls(positions)  # type: ignore[arg-type]
        start, colon, stop = positions.partition(":")
        if colon and start.isdigit() and stop.isdigit() and int(start) < int(stop):
            return cls("span", int(start), int(stop))
        if re.fullmatch(r"-?\d+(,-?\d+)*", positions):
            return cls.parse([int(place) for place in positions.split(",")])
        raise UserError(
            f"positions {positions!r}",
            "allowed are generated, prompt, all or START:STOP, or positions like 3,7",
            "choose one of them",
        )

    @property
    def needs_prompt(self) -> bool:
        """Whether it depends on where a row's prompt ends."""
        return self.kind in ("generated", "prompt") or any(place < 0 for place in self.places)

    def __str__(self) -> str:
        if self.kind == "list":
            return ",".join(map(str, self.places))
        return f"{self.start}:{self.stop}" if self.kind == "span" else self.kind

    def check(
        self, prompts: Sequence[Sequence[int]], n_inputs: Sequence[int], each: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Refuse positions of a list or span that a row cannot have.

        Args:
            prompts: of each row.
            n_inputs: the most tokens that each row can have as inputs; none if that is not known.
            each: the listed positions of each row, if they differ.

        Raises:
            UserError: a position is before a row's first input, or behind its last.
        """
        places = (self.start, self.stop - 1) if self.kind == "span" else self.places
        for row, (prompt, n) in enumerate(zip(prompts, n_inputs, strict=False)):
            for place in places if each is None else each[row]:
                if not -len(prompt) <= place < n:
                    raise UserError(
                        f"position {place} of row {row}",
                        f"the row has positions 0 to {n - 1}, and {len(prompt)} prompt tokens to count back over",
                        "choose one of them",
                    )

    def selects(self, position: Tensor, prompt_length: Tensor) -> Bool[Tensor, "*shape"]:
        """Whether each position is edited. Shapes broadcast."""
        if self.kind == "generated":
            return position >= prompt_length - 1
        if self.kind == "prompt":
            return position < prompt_length
        if self.kind == "span":
            return (position >= self.start) & (position < self.stop)
        if self.kind == "list":
            places = torch.tensor(self.places, device=position.device)
            at = torch.where(places < 0, prompt_length[..., None] + places, places)
            return (position[..., None] == at).any(-1)
        return torch.ones_like(position, dtype=torch.bool)
