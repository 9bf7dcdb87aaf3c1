"""Choosing the next token among a few given ones, such as the letters of a question's options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.sampling import choose_token


class AllowedTokens:
    """The tokens among which each row chooses. Ties go to the smaller id, as over the whole vocabulary."""

    def __init__(self, tokens: Int[Tensor, "R A"], given: list[list[int]]) -> None:
        self._tokens = tokens
        """Ascending; shorter rows are filled with their last token, whose copies are never chosen."""
        self._given = given
        self._copies = torch.zeros_like(tokens, dtype=torch.bool)
        self._copies[:, 1:] = tokens[:, 1:] == tokens[:, :-1]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> AllowedTokens:
        """Check and pack allowed tokens, one sequence per row.

        Raises:
            UserError: a row allows no token, or one outside the vocabulary.
        """
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise UserError(f"allowed tokens of row {i}", "there is none", "allow at least one")
            for token in row:
                if not 0 <= token < vocab_size:
                    raise UserError(
                        f"allowed token {token} of row {i}",
                        f"the model has tokens 0 to {vocab_size - 1}",
                        "take ids from this model's tokenizer",
                    )
        ordered = [sorted(set(row)) for row in rows]
        width = max(map(len, ordered))
        packed = torch.tensor([row + [row[-1]] * (width - len(row)) for row in ordered], device=device)
        return cls(packed, [list(row) for row in rows])

    def choose(
        self,
        rows: Int[Tensor, " B"],
        logits: Float[Tensor, "B V"],
        temperature: float,
        top_p: float,
        u: Float[Tensor, " B"] | None,
    ) -> Int[Tensor, " B"]:
        """`choose_token` over the allowed tokens of these rows, every other logit taken as −∞."""
        tokens = self._tokens[rows]
        kept = logits.gather(1, tokens).masked_fill(self._copies[rows], -torch.inf)
        return tokens.gather(1, choose_token(kept, temperature, top_p, u)[:, None])[:, 0]

    def log_probabilities(
        self, rows: Int[Tensor, " B"], logits: Float[Tensor, "B V"], total: Float[Tensor, " B"]
    ) -> list[list[float]]:
        """Log-probability of each allowed token, in the order given.

        Args:
            rows: which rows the logits belong to.
            logits: over the whole vocabulary.
            total: log of the sum of the logits' exponentials.
        """
        tokens = self._tokens[rows]
        values = (logits.gather(1, tokens).float() - total[:, None]).tolist()
        result = []
        for row, ids, logps in zip(rows.tolist(), tokens.tolist(), values, strict=True):
            by_token = dict(zip(ids, logps, strict=True))
            result.append([by_token[token] for token in self._given[row]])
        return result
