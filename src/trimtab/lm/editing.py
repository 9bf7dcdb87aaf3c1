"""Editing while the model runs: what decides edits, and the one mechanism that asks it, applies them and logs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.lm.edits import Edit, EditLog, activation_hash
from trimtab.lm.model import LanguageModel
from trimtab.lm.positions import PositionRule
from trimtab.lm.sites import Site, site_order
from trimtab.lm.taps import RowDelta, tap


class EditRequest(NamedTuple):
    """What a source is shown: the selected rows of one forward pass, at one site."""

    site: Site
    x: Tensor  # [R, d] activations before the edit
    row: Tensor  # [R] index into the rows given to decode
    position: Tensor  # [R] absolute position, padding excluded
    token: Tensor  # [R] the input token there


class DecodeStart(NamedTuple):
    """What a source learns before the first token: all rows of a decode call."""

    prompts: list[list[int]]  # per row, teacher-forced continuation excluded
    sample: Tensor  # [N] sample ids, the key of random draws
    branch: Tensor  # [N]
    seed: int
    max_new_tokens: int
    device: torch.device


class InterventionSource(Protocol):
    """Anything that decides edits while tokens are decoded: a constant, a random draw, a log, a policy.

    It may also have `blocks(site)`, how a trace names its directions, and `keep_replacements`, which is whether the log
    keeps the activations that took others' places, so that it can be replayed.
    """

    sites: tuple[Site, ...]
    positions: PositionRule
    unit: str
    operation: str
    dictionary_hash: str

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        """Unit rows that an edit's features index; rows of zeros for edits that add nothing along a direction."""
        ...

    def start(self, start: DecodeStart) -> None:
        """Called once before decoding; allocate per-row state here."""
        ...

    def choose(self, request: EditRequest) -> Edit | None:
        """Edits for the rows of one forward pass at one site; None edits nothing and logs nothing."""
        ...


@contextmanager
def edited(model: LanguageModel, edits: Mapping[Site, Callable[[Tensor], RowDelta | None]]) -> Iterator[None]:
    """Apply edits in every forward pass inside the block.

    Args:
        model: the model; its hooks are removed on leaving.
        edits: per site a function from the activation `[B, T, width]` to the rows to change, or None.

    Raises:
        UserError: a site does not exist in the model.
    """
    handles = []
    try:
        # In the order of the forward pass, so that resid_mid sees what was edited at resid_pre.
        for site, fn in sorted(edits.items(), key=lambda item: site_order(item[0])):
            handles += tap(model, model.site(site), fn)
        yield
    finally:
        for handle in handles:
            handle.remove()


class SourceRunner:
    """Asks a source for edits during forward passes, applies them and logs them."""

    def __init__(self, model: LanguageModel, source: InterventionSource) -> None:
        self.model, self.source = model, source
        self.sites = tuple(model.site(site) for site in source.sites)
        self._batch = self._time = self._row = self._position = self._token = torch.empty(0, dtype=torch.long)
        self._parts: list[EditLog] = []
        self._visits: list[tuple[int, Tensor, Tensor]] = []

    def aim(
        self,
        ids: Int[Tensor, "B T"],
        position: Int[Tensor, "B T"],
        selected: Bool[Tensor, "B T"],
        row: Int[Tensor, "B T"],
    ) -> None:
        """Say which places of the coming forward pass are to be edited."""
        self._batch, self._time = selected.nonzero(as_tuple=True)
        self._row = row[self._batch, self._time]
        self._position = position[self._batch, self._time]
        self._token = ids[self._batch, self._time]

    def edits(self) -> dict[Site, Callable[[Tensor], RowDelta | None]]:
        """What `edited` takes: one function per site."""
        return {site: self._at(index, site) for index, site in enumerate(self.sites)}

    def _at(self, index: int, site: Site) -> Callable[[Tensor], RowDelta | None]:
        def fn(x: Tensor) -> RowDelta | None:
            if len(self._batch) == 0:
                return None
            self._visits.append((index, self._row, self._position))
            rows = x[self._batch, self._time]
            edit = self.source.choose(EditRequest(site, rows, self._row, self._position, self._token))
            if edit is None:
                return None
            change = edit.change(self.source.directions(site), self._batch, self._time)
            self._log(index, rows, edit, change)
            return change

        return fn

    def _log(self, site: int, x: Tensor, edit: Edit, change: RowDelta) -> None:
        count, device = len(self._row), self._row.device
        nan = torch.full((count,), float("nan"), device=device)
        applied = change.delta
        if change.base is not None:
            applied = torch.where(change.base.isnan(), applied, change.of(x) - x)
        replaced, kept = torch.zeros_like(self._row), dict[int, Tensor]()
        if edit.replacement is not None:
            rows = edit.replacement.detach().to("cpu", x.dtype)
            keys = [0 if row.isnan().any() else activation_hash(row) for row in rows]
            replaced = torch.tensor(keys, device=device)
            if getattr(self.source, "keep_replacements", False):
                kept = {key: row for key, row in zip(keys, rows, strict=True) if key}
        self._parts.append(
            EditLog(
                site=torch.full((count,), site, device=device),
                row=self._row,
                position=self._position,
                feature=edit.feature,
                coefficient=edit.coefficient,
                requested=edit.coefficient if edit.requested is None else edit.requested,
                x_norm=x.float().norm(dim=-1),
                delta_norm=applied.float().norm(dim=-1),
                action_logp=nan if edit.action_logp is None else edit.action_logp,
                n_allowed=torch.full((count,), -1, device=device) if edit.n_allowed is None else edit.n_allowed,
                value=nan if edit.value is None else edit.value,
                target=torch.full_like(edit.coefficient, float("nan")) if edit.target is None else edit.target,
                replaced=replaced,
                kept=kept,
            )
        )

    def visits(self, site: int) -> list[tuple[int, int]]:
        """(row, position) of every place at which the source was asked, at one of its sites."""
        mine = [(row, position) for index, row, position in self._visits if index == site]
        return [pair for rows, places in mine for pair in zip(rows.tolist(), places.tolist(), strict=True)]

    def finish(self) -> EditLog:
        """All edits so far, on the CPU, ordered by row, position and site."""
        if not self._parts:
            return EditLog.empty()
        return EditLog.cat(self._parts).to("cpu").sorted()
