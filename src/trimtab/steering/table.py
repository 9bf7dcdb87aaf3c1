"""What a source steers with: unit directions, how far each ever moved an activation, and how to read it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.dictionaries.base import Dictionary


class DirectionTable:
    """Unit rows that edits index, from a dictionary or from any vectors.

    Args:
        rows: `[n, d]` directions of any length; a zero row stays zero.
        max_activation: `[n]` largest activation of each along its unit direction, in model units, if known.
        live: `[n]` which rows a control may draw; all by default.
        hash: names the rows in traces; computed from them by default.
    """

    def __init__(
        self,
        rows: Float[Tensor, "n d"],
        *,
        max_activation: Float[Tensor, " n"] | None = None,
        live: Tensor | None = None,
        hash: str = "",
    ) -> None:
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise UserError(f"directions of shape {tuple(rows.shape)}", "rows of one width are needed", "give [n, d]")
        if not bool(torch.isfinite(rows).all()):
            raise UserError("directions", "some values are not finite", "give finite numbers")
        rows = rows.detach()
        self.rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        self.max_activation, self.live = max_activation, live
        self.hash = hash or _hash(self.rows)
        self.dictionary: Dictionary | None = None

    @classmethod
    def of(cls, dictionary: Dictionary) -> DirectionTable:
        """The unit decoder rows of a dictionary, with its statistics if it has them."""
        stats = dictionary.feature_stats
        table = cls.__new__(cls)
        table.rows = dictionary.directions
        table.max_activation = None if stats is None else torch.as_tensor(stats.max_activation)
        table.live = None if stats is None else torch.as_tensor(stats.live)
        table.hash = dictionary.fingerprint
        table.dictionary = dictionary
        return table

    @property
    def n(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def to(self, device: torch.device) -> None:
        """Move everything to a device, the dictionary itself included."""
        if self.dictionary is not None and self.dictionary.W_dec.device != device:
            self.dictionary.to(device)
        self.rows = self.rows.to(device)
        self.max_activation = None if self.max_activation is None else self.max_activation.to(device)
        self.live = None if self.live is None else self.live.to(device)

    def live_ids(self) -> Int[Tensor, " m"]:
        """Rows that a control may draw.

        Raises:
            UserError: no feature ever fired.
        """
        ids = torch.arange(self.n) if self.live is None else self.live.nonzero()[:, 0].cpu()
        if len(ids) == 0:
            raise UserError("the dictionary", "none of its features ever fired", "use another dictionary")
        return ids

    def most_active(self, feature: Int[Tensor, "R K"]) -> Float[Tensor, "R K"] | None:
        """m of every slot's feature; None without statistics."""
        return None if self.max_activation is None else self.max_activation[feature.clamp_min(0)]

    def strengths(self, x: Float[Tensor, "R d"], feature: Int[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """f_i(x)·‖W_dec[i]‖ of every slot's own feature: how far x lies along it, in the dictionary's eyes."""
        assert self.dictionary is not None
        ids, slot = torch.unique(feature.clamp_min(0), return_inverse=True)
        codes = self.dictionary.encode_features(x, ids) * self.dictionary.decoder_norms.to(x.device)[ids]
        return codes.gather(1, slot)

    def all_strengths(self, x: Float[Tensor, "R d"]) -> Float[Tensor, "R n"]:
        """f(x)·‖W_dec‖ of every feature."""
        assert self.dictionary is not None
        return self.dictionary.encode(x) * self.dictionary.decoder_norms.to(x.device)


def _hash(rows: Tensor) -> str:
    data = rows.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(rows.shape)).encode() + data).hexdigest()[:16]
