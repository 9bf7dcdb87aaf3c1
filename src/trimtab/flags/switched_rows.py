"""Flags of many rows at once, each row under switches of its own: what comparisons decode in one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import Switch, strengths
from trimtab.lm import Edit
from trimtab.steering import Choice, DirectionTable, StaticSource


class SwitchedRows(StaticSource):
    """What `FlagSource` does, for rows that differ in their switches, and without a log of the edits.

    Args:
        flags: the model's.
        rows: switches of each row that is decoded, or of all rows alike if there is one. A row may leave all free.

    Attributes:
        relative_dose: mean ‖Δ‖/‖x‖ over the places and sites at which anything was set so far; NaN before.

    Raises:
        UserError: as `strengths` says; while decoding, if the flags do not fit the model.
    """

    keep_log = False

    def __init__(self, flags: FlagSpec, rows: Sequence[Mapping[str, Switch]]) -> None:
        dims = flags.flat_dims
        strength = torch.full((len(rows), len(dims)), torch.nan)
        for row, switches in zip(strength, rows, strict=True):
            for dim, value in strengths(flags, switches).items():
                row[dims.index(dim)] = value
        feature = torch.where(strength.isnan(), -1, torch.arange(len(dims)))
        doses = {site: strength.nan_to_num(0) * flags.targets[str(site)] for site in flags.sites}
        table = DirectionTable.axes(flags.d_model, dims)
        super().__init__(
            dict.fromkeys(doses, table), dict.fromkeys(doses, feature), doses,
            operation="overwrite", unit="absolute", positions="all",
        )  # fmt: skip
        self._dims = torch.tensor(dims)
        self._sum, self._places = 0.0, 0

    @property
    def relative_dose(self) -> float:
        return self._sum / self._places if self._places else float("nan")

    def edit(self, x: Float[Tensor, "R d"], choice: Choice, table: DirectionTable) -> Edit:
        """What `overwrite` gives, which along axes is a difference of coordinates."""
        feature, dose = choice
        filled = feature >= 0
        held = x.index_select(1, self._dims.to(x.device)).to(dose.dtype)
        change = torch.where(filled, dose - held, 0)
        some = filled.any(dim=1)
        self._sum += float((change.norm(dim=1) / x.float().norm(dim=1).clamp_min(1e-30))[some].sum())
        self._places += int(some.sum())
        return Edit(feature, change, torch.where(filled, dose, 0), target=torch.where(filled, dose, torch.nan))


class DisplacedRows(StaticSource):
    """A control of equal size: what flags would hold is added along dimensions that are no flag's.

    A flag that is on holds t at each site instead of about 0; here the dimensions hold t more than they would. What was
    added at one site is still there at the next, where only the difference of the two t is added.

    Args:
        flags: the dimensions, and t at each site.
        switches: strength of each concept whose dimensions are moved.

    Attributes:
        relative_dose: as of `SwitchedRows`.

    Raises:
        UserError: as `strengths` says, or nothing is moved.
    """

    keep_log = False

    def __init__(self, flags: FlagSpec, switches: Mapping[str, Switch]) -> None:
        moved = strengths(flags, switches)
        targets = [0.0, *flags.targets.values()]
        steps = {site: now - before for site, before, now in zip(flags.sites, targets, targets[1:], strict=False)}
        strength = torch.tensor(list(moved.values()))
        super().__init__(
            dict.fromkeys(steps, DirectionTable.axes(flags.d_model, list(moved))),
            dict.fromkeys(steps, range(len(moved))),
            {site: step * strength for site, step in steps.items()},
            operation="add", unit="absolute", positions="all",
        )  # fmt: skip
        self._sum, self._places = 0.0, 0

    @property
    def relative_dose(self) -> float:
        return self._sum / self._places if self._places else float("nan")

    def edit(self, x: Float[Tensor, "R d"], choice: Choice, table: DirectionTable) -> Edit:
        change = super().edit(x, choice, table)
        self._sum += float((change.coefficient.norm(dim=1) / x.float().norm(dim=1).clamp_min(1e-30)).sum())
        self._places += len(x)
        return change
