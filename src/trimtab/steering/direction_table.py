"""What a source steers with: unit directions, how far each ever moved an activation, and how to read it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary, check_is_dictionary
from trimtab.errors import UserError
from trimtab.runs import known_arguments, whole_number, whole_numbers


@known_arguments
class DirectionTable:
    """Unit rows that edits index, from a dictionary or from any vectors.

    Args:
        rows: `[n, d]` directions of any length; a zero row stays zero.
        max_activation: `[n]` largest activation of each along its unit direction, in model units, if known.
        live: `[n]` which rows a control may draw; all by default.
        keep_length: `absolute` doses count in multiples of each row's own length instead of in model units.

    Attributes:
        length: `[n]` what an `absolute` dose of 1 comes to, where rows keep their length.

    Raises:
        UserError: rows are not `[n, d]`, or not finite.
    """

    def __init__(
        self,
        rows: Float[Tensor, "n d"],
        *,
        max_activation: Float[Tensor, " n"] | None = None,
        live: Tensor | None = None,
        keep_length: bool = False,
    ) -> None:
        rows = as_vector(rows)
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise UserError(f"directions of shape {tuple(rows.shape)}", "rows of one width are needed", "give [n, d]")
        if not bool(torch.isfinite(rows).all()):
            raise UserError("directions", "some values are not finite", "give finite numbers")
        length = rows.detach().norm(dim=-1)
        self.rows = rows.detach() / length.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
        self.max_activation, self.live = max_activation, live
        self.length = length if keep_length else None
        data = self.rows.cpu().float().contiguous().numpy().tobytes()
        self.hash = hashlib.sha256(str(tuple(rows.shape)).encode() + data).hexdigest()[:16]
        """Names the rows in traces."""
        self.dictionary: Dictionary | None = None

    @classmethod
    def of(cls, dictionary: Dictionary) -> DirectionTable:
        """The unit decoder rows of a dictionary, with its statistics if it has them."""
        check_is_dictionary(dictionary)
        stats = dictionary.feature_stats
        table = cls.__new__(cls)
        table.rows = dictionary.directions
        table.max_activation = None if stats is None else torch.as_tensor(stats.max_activation)
        table.live = None if stats is None else torch.as_tensor(stats.live)
        table.length = None
        table.hash = dictionary.fingerprint
        table.dictionary = dictionary
        return table

    @classmethod
    def axes(cls, d: int, dims: Sequence[int]) -> DirectionTable:
        """Some of the d axes of a site: feature i is dimension `dims[i]`.

        Raises:
            UserError: the site has no such dimension, or one is named twice.
        """
        d, dims = whole_number(d, "width", 1), whole_numbers(dims, "dimension")
        for dim in dims:
            if not 0 <= dim < d:
                raise UserError(f"dimension {dim}", f"the site has dimensions 0 to {d - 1}", "choose one of them")
        if len(set(dims)) < len(dims):
            raise UserError(f"dimensions {', '.join(map(str, dims))}", "one is named twice", "name each once")
        return cls(torch.eye(d)[dims])

    def with_rows(self, rows: Float[Tensor, "m d"]) -> DirectionTable:
        """The same with further directions behind its own, which have no codes and no statistics."""
        table = copy.copy(self)
        table.rows = torch.cat([self.rows, DirectionTable(rows.to(self.rows)).rows])
        unknown = torch.full((len(rows),), torch.nan)
        if self.length is not None:
            table.length = torch.cat([self.length, rows.to(self.length).norm(dim=-1)])
        if self.max_activation is not None:
            table.max_activation = torch.cat([self.max_activation, unknown.to(self.max_activation)])
        if self.live is not None:
            table.live = torch.cat([self.live, torch.zeros(len(rows), dtype=torch.bool, device=self.live.device)])
        return table

    def __repr__(self) -> str:
        return f"<DirectionTable: {self.n:,} directions of width {self.width}>"

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
        self.length = None if self.length is None else self.length.to(device)

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
        """How far x lies along each slot's feature: f_i(x)·‖W_dec[i]‖, or `projections` without a dictionary."""
        if self.dictionary is None:
            return self.projections(x, feature)
        ids, slot = torch.unique(feature.clamp_min(0), return_inverse=True)
        lengths = self.dictionary.decoder_norms.to(x.device)[ids] * self.dictionary.code_unit(x)
        return (self.dictionary.encode_features(x, ids) * lengths).gather(1, slot)

    def projections(self, x: Float[Tensor, "R d"], feature: Int[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """x·v̂ of each slot's direction; exact along axes."""
        rows = self.rows[feature.clamp_min(0)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x[:, None].to(dtype) * rows.to(dtype)).sum(-1)

    def are_axes(self, feature: Int[Tensor, "R K"]) -> Bool[Tensor, "R 1"]:
        """Whether all directions of a row's filled slots have one coordinate that is not 0."""
        axis = (self.rows[feature.clamp_min(0)] != 0).sum(-1) == 1
        return (axis | (feature < 0)).all(dim=1, keepdim=True)

    def all_strengths(self, x: Float[Tensor, "R d"]) -> Float[Tensor, "R n"]:
        """f(x)·‖W_dec‖ of every feature."""
        assert self.dictionary is not None
        return self.dictionary.encode(x) * self.dictionary.decoder_norms.to(x.device) * self.dictionary.code_unit(x)


def as_vector(given: Any) -> Tensor:
    """What is given as a vector, as a tensor.

    Raises:
        UserError: it is no array of numbers.
    """
    try:
        values = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        what = f"the {type(given).__name__} that is to steer"
        hint = "give what trimtab.load_sae returns, a vector, several, one of these by site, or a source"
        raise UserError(what, "it is neither a dictionary nor numbers", hint) from None
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())
