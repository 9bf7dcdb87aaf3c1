"""Controls that every claim about chosen features stands beside: random features, random directions, the most active.

Each takes the dose that the claim uses, so that ‖Δ‖/‖x‖ and the number of edits agree; `equal_dose` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeStart, EditRequest, PositionRule, Site
from trimtab.lm.sampling import uniform
from trimtab.steering.doses import DEFAULT_DOSE, DEFAULT_UNIT, check_doses
from trimtab.steering.sources import Choice, DirectionSource, check_features
from trimtab.steering.table import DirectionTable

if TYPE_CHECKING:
    from trimtab.dictionaries.base import Dictionary

CONTROL_STREAM = 1000
"""Draws of slot k use stream CONTROL_STREAM + k, apart from those of tokens and policies."""


class RandomFeatureSource(DirectionSource):
    """Random live features at a given dose; every draw is keyed by (seed, sample, branch, position).

    Args:
        directions: a dictionary, or any table of directions.
        dose: of every feature.
        site, unit, positions, combine: as in `DirectionSource`.
        k: different features per token.
        per: draw anew at every `token`, or once per `row`.
        candidates: draw from these; every live feature by default.
        exclude: never draw these, such as the features under test.
        seed: of the draws; the decode call's by default.

    Raises:
        UserError: also if there are fewer than `k` candidates.
    """

    def __init__(
        self,
        directions: Dictionary | DirectionTable,
        dose: float = DEFAULT_DOSE,
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        positions: PositionRule | str = "generated",
        combine: str = "each",
        k: int = 1,
        per: Literal["token", "row"] = "token",
        candidates: Sequence[int] | None = None,
        exclude: Sequence[int] = (),
        seed: int | None = None,
    ) -> None:
        super().__init__(directions, site, unit=unit, positions=positions, combine=combine)
        check_doses(dose)
        if per not in ("token", "row"):
            raise UserError(f"per {per!r}", "allowed are token, row", "choose one of them")
        ids = self.table.live_ids() if candidates is None else torch.as_tensor(candidates, dtype=torch.long)
        check_features(ids, self.table.n)
        self.candidates = ids[~torch.isin(ids, torch.as_tensor(exclude, dtype=torch.long))]
        if not 1 <= k <= len(self.candidates):
            raise UserError(f"k = {k}", f"{len(self.candidates)} features can be drawn", "choose k in that range")
        self.dose, self.k, self.per, self.seed = dose, k, per, seed

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.candidates = self.candidates.to(start.device)

    def pick(self, request: EditRequest) -> Choice:
        start = self.begun
        position = request.position if self.per == "token" else torch.full_like(request.position, -1)
        draws = torch.stack(
            [
                uniform(
                    start.seed if self.seed is None else self.seed,
                    start.sample[request.row],
                    start.branch[request.row],
                    position,
                    CONTROL_STREAM + slot,
                )
                for slot in range(self.k)
            ],
            dim=1,
        )
        feature = self.candidates[draw_without_replacement(draws, len(self.candidates))]
        return Choice(feature, torch.full(feature.shape, self.dose, device=feature.device))


def draw_without_replacement(u: Float[Tensor, "R K"], n: int) -> Int[Tensor, "R K"]:
    """K different indices below n per row, each uniform over those left, from K uniform draws."""
    drawn = torch.empty(u.shape[0], 0, dtype=torch.long, device=u.device)
    for slot in range(u.shape[1]):
        left = n - slot
        index = (u[:, slot] * left).long().clamp_max(left - 1)
        for earlier in drawn.sort(dim=1).values.unbind(1):  # step over those taken, smallest first
            index = index + (index >= earlier)
        drawn = torch.cat([drawn, index[:, None]], dim=1)
    return drawn


class RandomDirectionSource(RandomFeatureSource):
    """Random directions, uniform on the sphere, at a given dose. `unit` is `relative` or `absolute`.

    Args:
        width: of the site.
        site: where to steer.
        dose, unit, positions, per: as in `RandomFeatureSource`.
        n: directions in the table that draws choose from.
        seed: of the table and of the draws.
    """

    def __init__(
        self,
        width: int,
        site: Site | str,
        dose: float = DEFAULT_DOSE,
        *,
        unit: str = DEFAULT_UNIT,
        positions: PositionRule | str = "generated",
        per: Literal["token", "row"] = "token",
        n: int = 1024,
        seed: int = 0,
    ) -> None:
        rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
        super().__init__(DirectionTable(rows), dose, site, unit=unit, positions=positions, per=per, seed=seed)


class TopActiveSource(DirectionSource):
    """The most active features, read from the activation that is edited, or from the row so far.

    Activity is f_i·‖W_dec[i]‖, how far a feature moves the reconstruction. Slots without an active feature stay empty.

    Args:
        dictionary: encodes the activations.
        dose: of every feature.
        site, unit, positions, combine: as in `DirectionSource`.
        k: features per token.
        over: `token` reads the token's own activation; `context` takes the largest activity over all tokens of the row
            up to this one, prompt included.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        dose: float = DEFAULT_DOSE,
        site: Site | str | None = None,
        *,
        unit: str = DEFAULT_UNIT,
        positions: PositionRule | str = "generated",
        combine: str = "each",
        k: int = 1,
        over: Literal["token", "context"] = "token",
    ) -> None:
        super().__init__(dictionary, site, unit=unit, positions=positions, combine=combine)
        check_doses(dose)
        if over not in ("token", "context"):
            raise UserError(f"over {over!r}", "allowed are token, context", "choose one of them")
        if not 1 <= k <= self.table.n:
            raise UserError(f"k = {k}", f"the dictionary has {self.table.n} features", "choose k in that range")
        self.dose, self.k, self.over = dose, k, over
        self.where = self.positions
        if over == "context":  # every position must be seen, also where nothing is edited
            self.positions = PositionRule("all")

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        if self.over == "context":
            rows = len(start.prompts)
            self._peak = torch.zeros(rows, self.table.n, device=start.device)
            self._seen = torch.zeros(rows, dtype=torch.bool, device=start.device)
            self._prompt_length = torch.tensor([len(p) for p in start.prompts], device=start.device)
            # Copies of a prompt share the prefill of the first row with the same sample.
            sample = start.sample.tolist()
            self._first = torch.tensor([sample.index(s) for s in sample], device=start.device)

    def pick(self, request: EditRequest) -> Choice:
        if self.over == "token":
            return self._top(self.table.all_strengths(request.x))
        selected = self.where.selects(request.position, self._prompt_length[request.row])
        feature = torch.full((len(request.row), self.k), -1, device=request.row.device)
        if len(request.row.unique()) == len(request.row):
            self._inherit(request.row)
            peak = torch.maximum(self._peak[request.row], self.table.all_strengths(request.x))
            self._peak[request.row] = peak
            feature[selected] = self._top(peak[selected]).feature
        else:
            for row in request.row.unique().tolist():  # a prefill: several positions per row, in order
                mine = request.row == row
                peak = self.table.all_strengths(request.x[mine]).cummax(dim=0).values
                peak = torch.maximum(peak, self._peak[row])
                self._peak[row], self._seen[row] = peak[-1], True
                feature[mine & selected] = self._top(peak[selected[mine]]).feature
        return Choice(feature, torch.full(feature.shape, self.dose, device=feature.device))

    def _inherit(self, row: Tensor) -> None:
        fresh = row[~self._seen[row]]
        self._peak[fresh] = self._peak[self._first[fresh]]
        self._seen[row] = True

    def _top(self, strength: Float[Tensor, "R n"]) -> Choice:
        value, feature = strength.topk(self.k, dim=-1)
        return Choice(torch.where(value > 0, feature, -1), torch.full(feature.shape, self.dose, device=strength.device))
