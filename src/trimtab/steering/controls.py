"""Controls for every claim about chosen features: random features, the most active ones.

Each takes the dose that the claim uses, so that ‖Δ‖/‖x‖ and the number of edits agree; `equal_dose` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.errors import UserError, check_one_of
from trimtab.lm import DecodeStart, EditRequest, PositionRule, Site
from trimtab.runs import whole_number
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.doses import DEFAULT_DOSE, check_doses
from trimtab.steering.sources import Choice, DirectionSource, PerSite, SourceOptions, check_each_once, feature_ids

CONTROL_STREAM = 1000
"""Draws of slot k use stream CONTROL_STREAM + k, those of a second site go on from there; tokens and policies have
other streams."""


class RandomFeatureSource(DirectionSource):
    """Random live features at a given dose; every draw is keyed by (seed, sample, branch, position).

    Args:
        directions: a dictionary, or any table of directions; or one for each of several sites.
        dose: of every feature.
        site, options: as in `DirectionSource`.
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
        directions: PerSite[Dictionary | DirectionTable],
        dose: float = DEFAULT_DOSE,
        site: Site | str | None = None,
        *,
        k: int = 1,
        per: Literal["token", "row"] = "token",
        candidates: Sequence[int] | None = None,
        exclude: Sequence[int] = (),
        seed: int | None = None,
        **options: Unpack[SourceOptions],
    ) -> None:
        super().__init__(directions, site, **options)
        check_doses(dose)
        check_one_of("per", per, ("token", "row"))
        k = whole_number(k, "k")
        self.candidates: dict[Site, Tensor] = {}
        for at, table in self.tables.items():
            ids = table.live_ids() if candidates is None else feature_ids(candidates, table.n, 0)
            if candidates is not None and self.operation != "add":
                check_each_once(ids[None], table)
            ids = ids[~torch.isin(ids, feature_ids(exclude, table.n, 0))]
            if not 1 <= k <= len(ids):
                raise UserError(f"k = {k}", f"{len(ids)} features can be drawn", "choose k in that range")
            self.candidates[at] = ids
        self.dose, self.k, self.per, self.seed = dose, k, per, seed

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.candidates = {site: ids.to(start.device) for site, ids in self.candidates.items()}

    def join(self, start: DecodeStart) -> None:
        """Draws need nothing of a row but its keys, which every request holds."""
        self.where.check(start.prompts, start.n_inputs)

    def pick(self, request: EditRequest) -> Choice:
        candidates = self.candidates[request.site]
        first = CONTROL_STREAM + self.k * self.sites.index(request.site)
        if self.per == "row":
            request = request._replace(position=torch.full_like(request.position, -1))
        draws = torch.stack([request.uniform(first + slot, seed=self.seed) for slot in range(self.k)], dim=1)
        feature = candidates[draw_without_replacement(draws, len(candidates))]
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


class TopActiveSource(DirectionSource):
    """The most active features, read from the activation that is edited, or from the row so far.

    Activity is f_i·‖W_dec[i]‖, how far a feature moves the reconstruction. Slots without an active feature stay empty.

    Args:
        dictionary: encodes the activations; or one for each of several sites.
        dose: of every feature.
        site, options: as in `DirectionSource`.
        k: features per token.
        over: `token` reads the token's own activation; `context` takes the largest activity over all tokens of the row
            up to this one, prompt included.
    """

    def __init__(
        self,
        dictionary: PerSite[Dictionary],
        dose: float = DEFAULT_DOSE,
        site: Site | str | None = None,
        *,
        k: int = 1,
        over: Literal["token", "context"] = "token",
        **options: Unpack[SourceOptions],
    ) -> None:
        super().__init__(dictionary, site, **options)
        check_doses(dose)
        check_one_of("over", over, ("token", "context"))
        k = whole_number(k, "k")
        for table in self.tables.values():
            if not 1 <= k <= table.n:
                raise UserError(f"k = {k}", f"the dictionary has {table.n} features", "choose k in that range")
        self.dose, self.k, self.over = dose, k, over
        if over == "context":  # every position must be seen, also where nothing is edited
            self.positions = PositionRule("all")

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self._peak = {site: torch.zeros(0, table.n, device=start.device) for site, table in self.tables.items()}
        """`[rows, n]` largest activity of each row so far, at each site."""
        self.join(start)

    def join(self, start: DecodeStart) -> None:
        """Begin with no activity."""
        self.where.check(start.prompts, start.n_inputs)
        if self.over == "context":
            for site, peak in self._peak.items():
                missing = max(0, int(start.row.max()) + 1 - len(peak))
                self._peak[site] = torch.cat([peak, peak.new_zeros(missing, peak.shape[1])])
                self._peak[site][start.row] = 0

    def pick(self, request: EditRequest) -> Choice:
        table = self.tables[request.site]
        if self.over == "token":
            return self._top(table.all_strengths(request.x))
        peak = self._peak[request.site]
        selected = self.where.selects(request.position, request.prompt_length)
        feature = torch.full((len(request.row), self.k), -1, device=request.row.device)
        if len(request.row.unique()) == len(request.row):
            found = torch.maximum(peak[request.row], table.all_strengths(request.x))
            peak[request.shared] = found[:, None]
            feature[selected] = self._top(found[selected]).feature
        else:
            for row in request.row.unique().tolist():  # a prefill: several positions per row, in order
                mine = request.row == row
                found = torch.maximum(table.all_strengths(request.x[mine]).cummax(dim=0).values, peak[row])
                peak[request.shared[mine][0]] = found[-1]
                feature[mine & selected] = self._top(found[selected[mine]]).feature
        return Choice(feature, torch.full(feature.shape, self.dose, device=feature.device))

    def _top(self, strength: Float[Tensor, "R n"]) -> Choice:
        value, feature = strength.topk(self.k, dim=-1)
        return Choice(torch.where(value > 0, feature, -1), torch.full(feature.shape, self.dose, device=strength.device))
