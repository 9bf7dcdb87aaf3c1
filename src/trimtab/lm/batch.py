"""A batch of token sequences, padded on the left, with masks and positions from lengths alone.

Masks never come from `ids != pad`: SmolLM's pad token is also its end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """Token ids `[B, T]`, padded on the left to the longest row."""

    ids: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    padded: bool
    """False if every row fills the batch; then no mask is needed."""

    @classmethod
    def pad(cls, rows: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | str = "cpu") -> TokenBatch:
        """Left-pad rows of token ids.

        Raises:
            UserError: there is no row, or one is empty.
        """
        if not rows or any(len(row) == 0 for row in rows):
            where = f"prompt {next(i for i, r in enumerate(rows) if len(r) == 0)}" if rows else "the prompts"
            raise UserError(where, "it is empty: there is no token to predict from", "give at least one token")
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        return cls(ids.to(device), lengths.to(device), any(len(row) != longest for row in rows))

    @classmethod
    def full(cls, ids: Int[Tensor, "B T"]) -> TokenBatch:
        """A packed batch without padding."""
        return cls(ids, torch.full((ids.shape[0],), ids.shape[1], device=ids.device), False)

    @property
    def attention_mask(self) -> Int[Tensor, "B T"]:
        """1 where there is a token, 0 where there is padding."""
        return self.real.long()

    @property
    def real(self) -> Bool[Tensor, "B T"]:
        """Whether a place holds a token."""
        start = self.ids.shape[1] - self.lengths
        return torch.arange(self.ids.shape[1], device=self.ids.device) >= start[:, None]

    @property
    def position_ids(self) -> Int[Tensor, "B T"]:
        """Absolute positions, 0 at each row's first token (and on padding)."""
        start = self.ids.shape[1] - self.lengths
        return (torch.arange(self.ids.shape[1], device=self.ids.device) - start[:, None]).clamp_min(0)
