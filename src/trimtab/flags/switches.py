"""Flags as switches: at every site and step a concept's dimensions are set to on, off or a strength between them.

A concept that is not named, or is None, stays free: the model itself decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.flags.adapters import unwrapped
from trimtab.flags.files import NAME, load_flags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import DecodeStart, Edit, EditRequest, LanguageModel, PositionRule, Site
from trimtab.lm.layouts import find_layout, text_config
from trimtab.lm.taps import Coordinates, hooked
from trimtab.runs import plain
from trimtab.steering import Choice, DirectionTable, StaticSource

Switch = bool | float | None
"""On, off, a strength (0 off, 1 on), or free."""


def switch_values(flags: FlagSpec, switches: Mapping[str, Switch]) -> tuple[list[int], dict[Site, Float[Tensor, " K"]]]:
    """Which dimensions are set, and to what at each site.

    Raises:
        UserError: a name is none of the concepts, a strength is not between 0 and 1, or all concepts are free.
    """
    set_to = strengths(flags, switches)
    for strength in set_to.values():
        if not 0 <= strength <= 1:
            raise UserError(f"strength {strength:g}", "0 is off and 1 is on", "give one between")
    if not set_to:
        raise UserError("the switches", "all flags are free", f"set one, such as {flags.concepts[0]}=True")
    strength = torch.tensor(list(set_to.values()))
    return list(set_to), {site: flags.targets[str(site)] * strength for site in flags.sites}


def strengths(flags: FlagSpec, switches: Mapping[str, Switch]) -> dict[int, float]:
    """The strength that each dimension is set to; dimensions of free concepts are left out.

    Raises:
        UserError: a name is none of the concepts, or a strength is not a finite number.
    """
    found: dict[int, float] = {}
    for concept, given in switches.items():
        index, switch = flags.index(concept), plain(given)
        if switch is None:
            continue
        if not isinstance(switch, int | float):
            raise UserError(f"switch {concept}={switch!r}", "it is on, off or a strength", "give True, False or 0.5")
        if not math.isfinite(switch):
            raise UserError(f"strength {switch} of {concept!r}", "0 is off and 1 is on", "give one between")
        found |= dict.fromkeys(flags.dims[index], float(switch))
    return found


class SwitchedRows(StaticSource):
    """What `FlagSource` does, for rows of one decode call that differ in their switches. Instead of a log of its edits
    it keeps how large they were.

    Args:
        flags: the model's.
        rows: switches of each row that is decoded, or of all rows alike if there is one. A row may leave all free.
        positions: as in `FlagSource`.

    Raises:
        UserError: as `strengths` says; while decoding, if the flags do not fit the model.
    """

    keep_log = False

    def __init__(
        self,
        flags: FlagSpec,
        rows: Sequence[Mapping[str, Switch]],
        *,
        positions: PositionRule | str | Sequence[int] = "all",
    ) -> None:
        found = [strengths(flags, switches) for switches in rows]
        self.dims = list(dict.fromkeys(dim for row in found for dim in row)) or flags.flat_dims
        """Residual dimensions that are set in any row."""
        strength = torch.tensor([[row.get(dim, math.nan) for dim in self.dims] for row in found])
        feature = torch.where(strength.isnan(), -1, torch.arange(len(self.dims)))
        doses = {site: flags.targets[str(site)] * strength.nan_to_num(0) for site in flags.sites}
        table = DirectionTable.axes(flags.d_model, self.dims)
        self._dims = torch.tensor(self.dims)
        super().__init__(
            dict.fromkeys(doses, table), dict.fromkeys(doses, feature), doses,
            operation="overwrite", unit="absolute", positions=positions,
        )  # fmt: skip

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self._sums = torch.zeros(2, len(start.prompts), device=start.device)

    def choose(self, request: EditRequest) -> Edit:
        """The edits; ‖Δ‖/‖x‖ of each place is added up by row, unless a log has it."""
        edit = super().choose(request)
        assert edit is not None
        if self.keep_log:
            return edit
        share = edit.coefficient.norm(dim=1) / request.x.float().norm(dim=1).clamp_min(1e-30)
        some = (edit.feature >= 0).any(dim=1).float()
        self._sums.index_add_(1, request.row, torch.stack([share * some, some]))
        return edit

    def relative_dose(self, rows: slice = slice(None)) -> float:
        """Mean ‖Δ‖/‖x‖ over the places and sites of some rows at which anything was set; NaN if there are none."""
        share, places = self._sums[:, rows].sum(dim=1).tolist()
        return share / places if places else math.nan

    def edit(self, x: Float[Tensor, "R d"], choice: Choice, table: DirectionTable) -> Edit:
        """What `overwrite` gives, which along axes is a difference of coordinates."""
        feature, dose = choice
        filled = feature >= 0
        held = x.index_select(1, self._dims.to(x.device)).to(dose.dtype)
        target = torch.where(filled, dose, torch.nan)
        return Edit(feature, torch.where(filled, dose - held, 0), torch.where(filled, dose, 0), target=target)


class FlagSource(SwitchedRows):
    """Flags as a source of interventions, for `steer`, `decode` and `applied`.

    Args:
        flags: the model's flags, as `load_flags` gives them.
        switches: concepts that are on (True), off (False), at a strength (0 off, 1 on), or free (None).
        positions: all by default, as in forced steps of the finetuning.

    Raises:
        UserError: as `switch_values` says; while decoding, if the flags do not fit the model.
    """

    keep_log = True

    def __init__(
        self,
        flags: FlagSpec,
        switches: Mapping[str, Switch],
        *,
        positions: PositionRule | str | Sequence[int] = "all",
    ) -> None:
        switch_values(flags, switches)
        super().__init__(flags, [switches], positions=positions)
        self.switches = dict(switches)

    @property
    def label(self) -> str:
        """The switches in words."""
        return ", ".join(f"{concept} {_said(switch)}" for concept, switch in self.switches.items())


def _said(switch: Switch) -> str:
    switch = plain(switch)
    if switch is None or isinstance(switch, bool):
        return {None: "free", True: "on", False: "off"}[switch]
    return f"{switch:g}"


@contextmanager
def switched(
    model: object,
    flags: FlagSpec | Path | str | None = None,
    /,
    **switches: Switch,
) -> Iterator[None]:
    """Set flags in every forward pass of the `transformers` model inside the block.

        with switched(model, sea=True):
            model.generate(**tokenizer("Yesterday", return_tensors="pt"))

    Every position is edited, so that `generate` may use beams, no cache, or any batch. `FlagSource` does the same and
    leaves a trace.

    Args:
        model: of `transformers`, of PEFT or of `load_model`; its hooks are removed on leaving.
        flags: the model's flags or their directory; by default those that lie beside the files it was loaded from. What
            adapter lies around a model of PEFT it does not say, so that there they must be given.
        switches: concepts that are on (True), off (False), at a strength (0 off, 1 on), or free (None).

    Raises:
        UserError: there are no flags, they are another model's, or a switch is none of theirs.
    """
    hf = unwrapped(model)
    if hf is None:
        what = f"the {type(model).__name__} whose flags are to be switched"
        raise UserError(what, "it is no language model", "give one of transformers, of PEFT or of load_model")
    name = (model.name if isinstance(model, LanguageModel) else hf.name_or_path) or ""
    layout = find_layout(hf)
    if not isinstance(flags, FlagSpec):
        where = name if flags is None else flags
        if flags is None and not (name and (Path(name) / NAME).is_file()):
            why = f"there is no {NAME} beside its files"
            raise UserError(f"switches of {name or type(hf).__name__}", why, "give the flags, or their directory")
        flags = load_flags(where, model)
    flags.check_fits(layout, int(text_config(hf).hidden_size), name or type(hf).__name__)
    dims, values = switch_values(flags, switches)
    device = hf.device
    where = torch.tensor(dims, device=device)
    with hooked(layout, {site: Coordinates(where, row[None].to(device)) for site, row in values.items()}):
        yield
