"""Edits as data: what a source decides for some activations, and the log of all of them.

An edit is a sum of coefficients times unit directions, or an activation that takes the old one's place. Adding a
feature, ablating it, clamping it and overwriting a coordinate differ only in how the coefficient is computed, so one
mechanism applies, logs and replays them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.taps import RowDelta


class Edit(NamedTuple):
    """What a source answers, for R rows with up to K features each."""

    feature: Tensor  # [R, K] row of `directions(site)`; -1 for no edit in this slot
    coefficient: Tensor  # [R, K] in model units, along the unit direction
    requested: Tensor | None = None  # [R, K] the dose asked for, in the source's unit
    action_logp: Tensor | None = None  # [R] log-probability of the choice
    n_allowed: Tensor | None = None  # [R] features that could have been chosen
    value: Tensor | None = None  # [R] the critic's value
    target: Tensor | None = None  # [R, K] what x is to be, bit for bit, along a direction that is an axis; NaN for none
    replacement: Tensor | None = None  # [R, d] what takes x's place, before directions are added; NaN for none

    def change(self, directions: Float[Tensor, "n d"], batch: Int[Tensor, " R"], time: Int[Tensor, " R"]) -> RowDelta:
        """The edit as a change of an activation `[B, T, d]` at the places that hold its rows."""
        base, coefficient = self.replacement, self.coefficient
        if self.target is not None:
            known = ~self.target.isnan() & (self.feature >= 0)
            values = _coordinates(directions, self.feature, self.target, known)
            base = values if base is None else torch.where(values.isnan(), base, values)
            coefficient = torch.where(known, 0, coefficient)
            if bool((known | (self.feature < 0)).all()):
                return RowDelta(batch, time, torch.zeros_like(values), base)
        return RowDelta(batch, time, edit_delta(directions, self._replace(coefficient=coefficient)), base)


def not_kept() -> UserError:
    """What a replay says of replaced activations that it does not have."""
    return UserError(
        "replaced activations",
        "the log holds their hashes, not their values",
        "decode again with a source that was given keep_replacements=True",
    )


NAN = float("nan")
NOTHING: Mapping[str, float] = {
    "feature": -1, "coefficient": 0, "requested": 0, "action_logp": NAN, "n_allowed": -1, "value": NAN, "target": NAN,
    "replacement": NAN,
}  # fmt: skip
"""What each field of an edit holds where nothing is edited."""


def edit_delta(directions: Float[Tensor, "n d"], edit: Edit) -> Float[Tensor, "R d"]:
    """Δ = Σ_k coefficient[:, k] · directions[feature[:, k]]; slots with feature −1 add nothing."""
    coefficient = torch.where(edit.feature >= 0, edit.coefficient, 0).to(directions.dtype)
    rows = directions[edit.feature.clamp_min(0)]
    if rows.shape[1] == 1:
        return rows[:, 0] * coefficient
    # Not a matrix product: its rounding may depend on R and K, and a replay must give the same bits.
    return (rows * coefficient[..., None]).sum(dim=1)


def _coordinates(
    directions: Float[Tensor, "n d"],
    feature: Int[Tensor, "R K"],
    target: Float[Tensor, "R K"],
    known: Bool[Tensor, "R K"],
) -> Float[Tensor, "R d"]:
    """What the coordinates along axes are to be; NaN for all that are not set."""
    used, slot = feature.clamp_min(0).unique(return_inverse=True)
    axes, (rows, width) = directions[used], (len(feature), directions.shape[1])
    dims, signs = axes.abs().argmax(dim=1), axes.sign().sum(dim=1)
    place = torch.where(known, dims[slot], width)  # what is not set goes into a column that is dropped
    values = signs[slot] * target.to(directions)
    return torch.full((rows, width + 1), NAN, dtype=directions.dtype, device=directions.device).scatter_(
        1, place, values
    )[:, :-1]


def activation_hash(row: Float[Tensor, " d"]) -> int:
    """The first eight bytes of the SHA-256 of an activation's bytes, as a signed number that is never 0."""
    data = row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True) or 1


@dataclass(frozen=True, eq=False)
class EditLog:
    """Every edit of a decode call, in columns. R rows (token, site), K slots."""

    site: Int[Tensor, " R"]  # index into the source's sites
    row: Int[Tensor, " R"]
    position: Int[Tensor, " R"]
    feature: Int[Tensor, "R K"]
    coefficient: Float[Tensor, "R K"]
    requested: Float[Tensor, "R K"]
    x_norm: Float[Tensor, " R"]  # ‖x‖ before the edit
    delta_norm: Float[Tensor, " R"]  # ‖Δ‖ as applied
    action_logp: Float[Tensor, " R"]
    n_allowed: Int[Tensor, " R"]
    value: Float[Tensor, " R"]
    target: Float[Tensor, "R K"]  # coordinate that was set bit for bit; NaN where the coefficient was added
    replaced: Int[Tensor, " R"]  # `activation_hash` of what took the activation's place; 0 for none
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """What took activations' places, by hash, on the CPU; empty unless the source has `keep_replacements`."""

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def __repr__(self) -> str:
        return f"<EditLog: {len(self):,} edits>"

    @property
    def columns(self) -> dict[str, Tensor]:
        """Every column by name."""
        return {name: getattr(self, name) for name in _COLUMNS}

    @property
    def relative_dose(self) -> Float[Tensor, " R"]:
        """Realised ‖Δ‖/‖x‖ of each edit."""
        return self.delta_norm / self.x_norm.clamp_min(torch.finfo(self.x_norm.dtype).tiny)

    @classmethod
    def empty(cls, width: int = 1) -> EditLog:
        """No edits, of a given number of slots."""
        long, real = torch.empty(0, dtype=torch.long), torch.empty(0)
        ids, slots = long.reshape(0, 1).expand(0, width), real.reshape(0, 1).expand(0, width)
        return cls(long, long, long, ids, slots, slots, real, real, real, long, real, slots, long)

    @classmethod
    def cat(cls, parts: Sequence[EditLog]) -> EditLog:
        """Logs one behind the other; narrower ones get empty slots."""
        width = max(part.feature.shape[1] for part in parts)
        columns: dict[str, Tensor] = {}
        for name in _COLUMNS:
            values = [getattr(part, name) for part in parts]
            if values[0].ndim == 2 and any(v.shape[1] < width for v in values):
                values = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=NOTHING[name]) for v in values]
            columns[name] = torch.cat(values)
        return cls(**columns, kept={key: row for part in parts for key, row in part.kept.items()})

    def to(self, device: torch.device | str) -> EditLog:
        """The log on another device."""
        return replace(self, **{name: column.to(device) for name, column in self.columns.items()})

    def take(self, index: Tensor | slice) -> EditLog:
        """Some of the edits, by index, mask or range, with what of `kept` they need."""
        return self._part({name: column[index] for name, column in self.columns.items()})

    def split(self, sizes: Sequence[int]) -> list[EditLog]:
        """All edits as logs of so many each, one behind the other."""
        parts = zip(*(column.split(list(sizes)) for column in self.columns.values()), strict=True)
        return [self._part(dict(zip(_COLUMNS, columns, strict=True))) for columns in parts]

    def _part(self, columns: dict[str, Tensor]) -> EditLog:
        needed = set(columns["replaced"].tolist()) if self.kept else ()
        return EditLog(**columns, kept={key: row for key, row in self.kept.items() if key in needed})

    def sorted(self) -> EditLog:
        """Ordered by row, position and site."""
        order = torch.argsort(self.site, stable=True)
        for key in (self.position, self.row):
            order = order[torch.argsort(key[order], stable=True)]
        return self.take(order)

    def edit(self) -> Edit:
        """Edits of one site as a source would answer them.

        Raises:
            UserError: activations were replaced, and what took their place was not kept.
        """
        return Edit(
            self.feature,
            self.coefficient,
            self.requested,
            self.action_logp,
            self.n_allowed,
            self.value,
            None if bool(self.target.isnan().all()) else self.target,
            self._replacement(),
        )

    def _replacement(self) -> Float[Tensor, "R d"] | None:
        keys, place = self.replaced.unique(return_inverse=True)
        known = [key for key in keys.tolist() if key]
        if not known:
            return None
        if not self.kept.keys() >= set(known):
            raise not_kept()
        nothing = torch.full_like(self.kept[known[0]], NAN)
        rows = torch.stack([self.kept[key] if key else nothing for key in keys.tolist()])
        return rows.to(place.device)[place]


_COLUMNS = tuple(column.name for column in fields(EditLog) if column.name != "kept")
