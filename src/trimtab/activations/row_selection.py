"""Which activations are worth training on: no attention sinks, no special tokens, no outliers.

The first position of a sequence and a few others gather enormous norms whatever the text is; a dictionary would spend
its features on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from trimtab.activations.packing import SequenceBatch
from trimtab.lm import LanguageModel, Site, TokenBatch, capture, not_finite_error
from trimtab.lm.transfers import to_device


class Candidates(NamedTuple):
    """The tokens of a batch of sequences that may become rows, in the order of the text."""

    keep: Bool[ndarray, "B T"]
    first: int
    """Tokens left out as first of their sequence."""
    special: int
    """Further tokens left out as special."""


def candidates(batch: SequenceBatch, special_ids: Sequence[int]) -> Candidates:
    """Leave out position 0 of every sequence and the given special tokens."""
    keep = ~np.isin(batch.tokens, np.asarray(special_ids, dtype=np.int32))
    special = int((~keep[:, 1:]).sum())
    keep[:, 0] = False
    return Candidates(keep, batch.tokens.shape[0], special)


def capture_rows(
    model: LanguageModel, batch: SequenceBatch, sites: Sequence[Site], *, autocast: bool = False
) -> dict[Site, Float[Tensor, "BT width"]]:
    """Activations at all tokens, sequence after sequence, on the model's device; heads side by side in one row.

    With `autocast` matrix products run in bfloat16; the residual stream stays in the model's dtype.
    """
    ids = to_device(torch.from_numpy(batch.tokens), model.device).long()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        found = capture(model, TokenBatch.full(ids), sites)
    return {site: found[site].reshape(ids.numel(), -1) for site in sites}


def check_finite(
    model: LanguageModel, batch: SequenceBatch, place: Int[Tensor, " K"], norms: Float[Tensor, " K"], site: Site | str
) -> None:
    """Raise a `UserError` that names the first site and token at which an activation is not finite.

    Args:
        place: some of the batch's B·T tokens, on the CPU like the norms.
        norms: of their activations at the site.
    """
    bad = (~norms.isfinite()).nonzero()
    if len(bad):
        row, slot = divmod(int(place[int(bad[0])]), batch.tokens.shape[1])
        raise not_finite_error(model, batch.tokens[row, : slot + 1].tolist(), f"activations at {site}")


def norms(rows: Tensor) -> Float[Tensor, " R"]:
    """Euclidean norms in float32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
