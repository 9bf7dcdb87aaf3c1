"""Edits as data: every intervention is a sum of coefficients times unit directions.

Adding a feature, ablating it, clamping it and overwriting a coordinate differ only in how the
coefficient is computed, so one mechanism applies, logs and replays them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import Site, site_order
from trimtab.lm.taps import RowDelta, tap


class EditRequest(NamedTuple):
    """What a source is shown: the selected rows of one forward pass, at one site."""

    site: Site
    x: Tensor  # [R, d] activations before the edit
    row: Tensor  # [R] index into the rows given to decode
    position: Tensor  # [R] absolute position, padding excluded
    token: Tensor  # [R] the input token there


class Edit(NamedTuple):
    """What a source answers, for R rows with up to K features each."""

    feature: Tensor  # [R, K] row of `directions(site)`; -1 for no edit in this slot
    coefficient: Tensor  # [R, K] in model units, along the unit direction
    requested: Tensor | None = None  # [R, K] the dose asked for, in the source's unit
    action_logp: Tensor | None = None  # [R] log-probability of the choice
    n_allowed: Tensor | None = None  # [R] features that could have been chosen
    value: Tensor | None = None  # [R] the critic's value


@dataclass(frozen=True)
class PositionRule:
    """Which input positions of a row are edited; positions are absolute and exclude padding.

    `generated` is every position whose logits choose a token: the last prompt token and each generated token but the
    last. `prompt` is every prompt position, `all` both, `span` the half-open range from `start` to `stop`.
    """

    kind: Literal["generated", "prompt", "all", "span"] = "generated"
    start: int = 0
    stop: int = 0

    @classmethod
    def parse(cls, text: str) -> PositionRule:
        """Read `generated`, `prompt`, `all` or `START:STOP`.

        Raises:
            UserError: the text is none of these.
        """
        if text in ("generated", "prompt", "all"):
            return cls(text)  # type: ignore[arg-type]
        start, colon, stop = text.partition(":")
        if colon and start.isdigit() and stop.isdigit() and int(start) < int(stop):
            return cls("span", int(start), int(stop))
        raise UserError(f"positions {text!r}", "allowed are generated, prompt, all or START:STOP", "choose one of them")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}" if self.kind == "span" else self.kind

    def selects(self, position: Tensor, prompt_length: Tensor) -> Bool[Tensor, "*shape"]:
        """Whether each position is edited. Shapes broadcast."""
        if self.kind == "generated":
            return position >= prompt_length - 1
        if self.kind == "prompt":
            return position < prompt_length
        if self.kind == "span":
            return (position >= self.start) & (position < self.stop)
        return torch.ones_like(position, dtype=torch.bool)


class DecodeStart(NamedTuple):
    """What a source learns before the first token: all rows of a decode call."""

    prompts: list[list[int]]  # per row, teacher-forced continuation excluded
    sample: Tensor  # [N] sample ids, the key of random draws
    branch: Tensor  # [N]
    seed: int
    max_new_tokens: int
    device: torch.device


class InterventionSource(Protocol):
    """Anything that decides edits while tokens are decoded: a constant, a random draw, a log, a policy."""

    sites: tuple[Site, ...]
    positions: PositionRule
    unit: str
    operation: str
    dictionary_hash: str

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        """Unit rows that an edit's features index."""
        ...

    def start(self, start: DecodeStart) -> None:
        """Called once before decoding; allocate per-row state here."""
        ...

    def choose(self, request: EditRequest) -> Edit | None:
        """Edits for the rows of one forward pass at one site; None edits nothing and logs nothing."""
        ...


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

    def __len__(self) -> int:
        return int(self.row.shape[0])

    @property
    def columns(self) -> dict[str, Tensor]:
        """Every column by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def relative_dose(self) -> Float[Tensor, " R"]:
        """Realised ‖Δ‖/‖x‖ of each edit."""
        return self.delta_norm / self.x_norm.clamp_min(torch.finfo(self.x_norm.dtype).tiny)

    @classmethod
    def empty(cls) -> EditLog:
        long, real = torch.empty(0, dtype=torch.long), torch.empty(0)
        pair = (long.reshape(0, 1), real.reshape(0, 1), real.reshape(0, 1))
        return cls(long, long, long, *pair, real, real, real, long, real)

    @classmethod
    def cat(cls, parts: Sequence[EditLog]) -> EditLog:
        """Logs one behind the other; narrower ones get empty slots."""
        width = max(part.feature.shape[1] for part in parts)
        columns: dict[str, Tensor] = {}
        for name in parts[0].columns:
            values = [part.columns[name] for part in parts]
            if name in ("feature", "coefficient", "requested"):
                fill = -1 if name == "feature" else 0
                values = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
            columns[name] = torch.cat(values)
        return cls(**columns)

    def to(self, device: torch.device | str) -> EditLog:
        """The log on another device."""
        return EditLog(**{name: column.to(device) for name, column in self.columns.items()})

    def take(self, index: Tensor) -> EditLog:
        """Some of the edits, by index or mask."""
        return EditLog(**{name: column[index] for name, column in self.columns.items()})

    def sorted(self) -> EditLog:
        """Ordered by row, position and site."""
        log = self
        for key in ("site", "position", "row"):
            log = log.take(torch.argsort(log.columns[key], stable=True))
        return log


def edit_delta(directions: Float[Tensor, "n d"], edit: Edit) -> Float[Tensor, "R d"]:
    """Δ = Σ_k coefficient[:, k] · directions[feature[:, k]]; slots with feature −1 add nothing."""
    coefficient = torch.where(edit.feature >= 0, edit.coefficient, 0).to(directions.dtype)
    rows = directions[edit.feature.clamp_min(0)]
    if rows.shape[1] == 1:
        return rows[:, 0] * coefficient
    # Not a matrix product: its rounding may depend on R and K, and a replay must give the same bits.
    return (rows * coefficient[..., None]).sum(dim=1)


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
            delta = edit_delta(self.source.directions(site), edit)
            self._log(index, rows, edit, delta)
            return RowDelta(self._batch, self._time, delta)

        return fn

    def _log(self, site: int, x: Tensor, edit: Edit, delta: Tensor) -> None:
        count, device = len(self._row), self._row.device
        nan = torch.full((count,), float("nan"), device=device)
        self._parts.append(
            EditLog(
                site=torch.full((count,), site, device=device),
                row=self._row,
                position=self._position,
                feature=edit.feature,
                coefficient=edit.coefficient,
                requested=edit.coefficient if edit.requested is None else edit.requested,
                x_norm=x.float().norm(dim=-1),
                delta_norm=delta.float().norm(dim=-1),
                action_logp=nan if edit.action_logp is None else edit.action_logp,
                n_allowed=torch.full((count,), -1, device=device) if edit.n_allowed is None else edit.n_allowed,
                value=nan if edit.value is None else edit.value,
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
