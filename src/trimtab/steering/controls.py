"""Controls that every claim about chosen features stands beside: random features, the most active.

Each takes the dose that the claim uses, so that ‖Δ‖/‖x‖ and the number of edits agree; `equal_dose` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeStart, EditRequest, PositionRule, Site
from trimtab.lm.sampling import uniform
from trimtab.steering.doses import DEFAULT_DOSE, check_doses
from trimtab.steering.sources import Choice, DirectionSource, PerSite, SourceOptions, check_features
from trimtab.steering.table import DirectionTable

if TYPE_CHECKING:
    from trimtab.dictionaries.base import Dictionary

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
        if per not in ("token", "row"):
            raise UserError(f"per {per!r}", "allowed are token, row", "choose one of them")
        self.candidates: dict[Site, Tensor] = {}
        for at, table in self.tables.items():
            ids = table.live_ids() if candidates is None else torch.as_tensor(candidates, dtype=torch.long)
            check_features(ids, table.n)
            ids = ids[~torch.isin(ids, torch.as_tensor(exclude, dtype=torch.long))]
            if not 1 <= k <= len(ids):
                raise UserError(f"k = {k}", f"{len(ids)} features can be drawn", "choose k in that range")
            self.candidates[at] = ids
        self.dose, self.k, self.per, self.seed = dose, k, per, seed

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        self.candidates = {site: ids.to(start.device) for site, ids in self.candidates.items()}

    def pick(self, request: EditRequest) -> Choice:
        start, candidates = self.begun, self.candidates[request.site]
        first = CONTROL_STREAM + self.k * self.sites.index(request.site)
        position = request.position if self.per == "token" else torch.full_like(request.position, -1)
        draws = torch.stack(
            [
                uniform(
                    start.seed if self.seed is None else self.seed,
                    start.sample[request.row],
                    start.branch[request.row],
                    position,
                    first + slot,
                )
                for slot in range(self.k)
            ],
            dim=1,
        )
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
        if over not in ("token", "context"):
            raise UserError(f"over {over!r}", "allowed are token, context", "choose one of them")
        for table in self.tables.values():
            if not 1 <= k <= table.n:
                raise UserError(f"k = {k}", f"the dictionary has {table.n} features", "choose k in that range")
        self.dose, self.k, self.over = dose, k, over
        self.where = self.positions
        if over == "context":  # every position must be seen, also where nothing is edited
            self.positions = PositionRule("all")

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        if self.over == "context":
            rows, device = len(start.prompts), start.device
            self._context = {
                site: _Context(
                    torch.zeros(rows, table.n, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
                )
                for site, table in self.tables.items()
            }
            self._prompt_length = torch.tensor([len(p) for p in start.prompts], device=device)
            # Copies of a prompt share the prefill of the first row with the same sample.
            sample = start.sample.tolist()
            self._first = torch.tensor([sample.index(s) for s in sample], device=device)

    def pick(self, request: EditRequest) -> Choice:
        table = self.tables[request.site]
        if self.over == "token":
            return self._top(table.all_strengths(request.x))
        peak, seen = self._context[request.site]
        selected = self.where.selects(request.position, self._prompt_length[request.row])
        feature = torch.full((len(request.row), self.k), -1, device=request.row.device)
        if len(request.row.unique()) == len(request.row):
            fresh = request.row[~seen[request.row]]
            peak[fresh] = peak[self._first[fresh]]
            seen[request.row] = True
            found = torch.maximum(peak[request.row], table.all_strengths(request.x))
            peak[request.row] = found
            feature[selected] = self._top(found[selected]).feature
        else:
            for row in request.row.unique().tolist():  # a prefill: several positions per row, in order
                mine = request.row == row
                found = torch.maximum(table.all_strengths(request.x[mine]).cummax(dim=0).values, peak[row])
                peak[row], seen[row] = found[-1], True
                feature[mine & selected] = self._top(found[selected[mine]]).feature
        return Choice(feature, torch.full(feature.shape, self.dose, device=feature.device))

    def _top(self, strength: Float[Tensor, "R n"]) -> Choice:
        value, feature = strength.topk(self.k, dim=-1)
        return Choice(torch.where(value > 0, feature, -1), torch.full(feature.shape, self.dose, device=strength.device))


class _Context(NamedTuple):
    """What a row has shown so far at one site."""

    peak: Float[Tensor, "N n"]
    seen: Bool[Tensor, " N"]
