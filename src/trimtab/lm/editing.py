"""Editing while the model runs: what decides edits, and the one mechanism that asks it, applies them and logs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.edits import NAN, Edit, EditLog, activation_hash
from trimtab.lm.model import LanguageModel
from trimtab.lm.positions import PositionRule
from trimtab.lm.sampling import uniform
from trimtab.lm.sites import Site
from trimtab.lm.taps import RowDelta


class EditRequest(NamedTuple):
    """What a source is shown: the selected rows of one forward pass, at one site.

    A source that `asks_nothing` changes none of it in place: where steps are taken ahead, rows go on with these.
    """

    site: Site
    x: Tensor  # [R, d] activations before the edit
    row: Tensor  # [R] index among the rows of `start`; one that joins a stream may have that of one that has left
    position: Tensor  # [R] absolute position, padding excluded
    token: Tensor  # [R] the input token there
    prompt_length: Tensor  # [R]
    seed: Tensor  # [R] of the row's draws, as are the next two
    sample: Tensor  # [R]
    branch: Tensor  # [R]
    shared: Tensor  # [R, C] all rows that the edit shapes: copies of a prompt share what is fed once for all of them

    def uniform(self, stream: int, *, seed: int | None = None) -> Float[Tensor, " R"]:
        """A draw for each row at its position, independent of what else is decoded.

        Args:
            stream: what it is for; see `trimtab.lm.sampling.uniform`.
            seed: another one than the row's.
        """
        return uniform(self.seed if seed is None else seed, self.sample, self.branch, self.position, stream)

    def take(self, index: Tensor) -> EditRequest:
        """Some of the rows."""
        return EditRequest(self.site, *(column[index] for column in self[1:]))


class DecodeStart(NamedTuple):
    """What a source learns of rows before their first token."""

    prompts: list[list[int]]  # per row, teacher-forced continuation excluded
    row: Tensor  # [N] index of each in requests
    max_new_tokens: int  # of any row
    device: torch.device
    n_inputs: Sequence[int] = ()
    """Per row, the most tokens that the model can read: prompt, forced tokens, all new ones but the last."""
    model: LanguageModel | None = None


class InterventionSource(Protocol):
    """Anything that decides edits while tokens are decoded: a constant, a random draw, a log, a policy.

    It may also have `blocks(site)`, how a trace names its directions; `keep_replacements`, which is whether the log
    keeps the activations that took others' places, so that it can be replayed; `keep_log`, which is False where
    edits are not logged at all, since texts alone are wanted of very many; and `asks_nothing`, which is True where
    `choose` computes by tensors alone, of the same shapes whatever is in them: it asks the device for no number, copies
    none there, keeps nothing in Python from call to call, its tensors keep their addresses from `start` on, and asked
    again for the same places it decides the same.
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


def check_is_source(given: object) -> None:
    """Raise a `UserError` unless what is given as a source of interventions looks like one."""
    if not hasattr(given, "sites"):
        hint = "give one, like trimtab.steering.VectorSource(vector, site, dose) or StaticSource(sae, feature, dose)"
        raise UserError(f"the {type(given).__name__} that is to steer", "it is no source of interventions", hint)


@runtime_checkable
class JoinableSource(InterventionSource, Protocol):
    """A source whose rows need not all be there at the start."""

    def join(self, start: DecodeStart) -> None:
        """Called when rows join a stream that has started.

        Raises:
            UserError: not under this source's settings.
        """
        ...


@runtime_checkable
class RecordingSource(InterventionSource, Protocol):
    """A source that keeps what it decides, by row and position."""

    def take_back(self, ends: Mapping[int, int]) -> None:
        """Called when rows have ended before the last steps that were taken ahead: forget what they decided then.

        Args:
            ends: by row, the first position that is not its own.
        """
        ...


def tell_of_rows(source: InterventionSource, rows: DecodeStart) -> None:
    """Tell a source of rows that join.

    Raises:
        UserError: it must know all rows at the start, always or under its settings.
    """
    if not isinstance(source, JoinableSource):
        raise UserError(
            f"a row that joins a stream steered by {type(source).__name__}",
            "this source learns of all rows at the start",
            "add the row before the first step, or begin another stream",
        )
    source.join(rows)


class RowColumns(NamedTuple):
    """What is known of the rows of a batch, on the model's device."""

    number: Int[Tensor, " B"]  # unique in a stream
    row: Int[Tensor, " B"]  # what requests call it, used again once it has left
    prompt_length: Int[Tensor, " B"]
    seed: Int[Tensor, " B"]
    sample: Int[Tensor, " B"]
    branch: Int[Tensor, " B"]

    def take(self, index: Tensor) -> RowColumns:
        """Some of the rows."""
        return RowColumns(*(column[index] for column in self))


class EndedRow(NamedTuple):
    """A row that has ended."""

    number: int
    prompt_length: int
    fed: int  # tokens that went through the model
    before: int = 0  # of them before the source was asked


class SourceRunner:
    """Asks a source for edits during forward passes, applies them, and logs them until their row leaves."""

    def __init__(self, model: LanguageModel, source: InterventionSource) -> None:
        self.model, self.source = model, source
        self.sites = tuple(model.site(site) for site in source.sites)
        self._batch = self._time = self._position = self._token = self._shared = self._number = torch.empty(0).long()
        self._rows: RowColumns | None = None
        self._parts: list[EditLog] = []
        self._visits: list[Int[Tensor, "3 V"]] = []
        self._numbers: dict[tuple[object, ...], Tensor] = {}
        """Numbers that all rows of a log have in common, on the device."""

    def aim(
        self,
        ids: Int[Tensor, "B T"],
        position: Int[Tensor, "B T"],
        rows: RowColumns,
        which: Int[Tensor, "B T"],
        *,
        real: Bool[Tensor, "B T"] | None = None,
        copies: int = 1,
        chooses: bool = False,
    ) -> None:
        """Say what the coming forward pass holds, so that the places to be edited are known.

        Args:
            ids: the input tokens.
            position: absolute positions.
            rows: of the batch.
            which: of them each place belongs to.
            real: where there is a token, not padding.
            copies: each place is shared by so many rows, from `which` on.
            chooses: there is one token per row, in their order, from whose logits another is chosen.
        """
        if chooses and self.edits_choices:  # without asking the device where that is
            self._batch, self._time = which[:, 0], self._all(0, which, len(which))
            self._position, self._token, self._rows = position[:, 0], ids[:, 0], rows
            self._shared, self._number = rows.row[:, None], rows.number[:, None]
            return
        selected = self.source.positions.selects(position, rows.prompt_length[which])
        if real is not None:
            selected = selected & real
        self._batch, self._time = where = selected.nonzero(as_tuple=True)
        self._position, self._token = position[where], ids[where]
        first = which[where]
        self._rows, all_copies = rows.take(first), first[:, None] + torch.arange(copies, device=first.device)
        self._shared, self._number = rows.row[all_copies], rows.number[all_copies]

    @property
    def edits_choices(self) -> bool:
        """Whether all places from whose logits a token is chosen are edited."""
        return self.source.positions.kind in ("generated", "all")

    def _all(self, value: float, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of one number where another is, which holds it once; steps have the same ones each time."""
        dtype = like.dtype if dtype is None else dtype
        key = (value, dtype, like.device)
        one = self._numbers.get(key)
        if one is None:
            one = like.new_full((), value, dtype=dtype)
            if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):  # which fills it at a replay only
                self._numbers[key] = one
        return one.expand(shape)

    @contextmanager
    def apart(self) -> Iterator[tuple[list[Int[Tensor, "3 V"]], list[EditLog]]]:
        """What is seen and logged inside the block, which is not kept otherwise; see `keep`."""
        kept = self._visits, self._parts
        self._visits, self._parts = found = [], []
        try:
            yield found
        finally:
            self._visits, self._parts = kept

    def keep(self, visits: Sequence[Int[Tensor, "3 V"]], parts: Sequence[EditLog]) -> None:
        """Keep what was seen and logged as if it had just been."""
        self._visits += visits
        self._parts += parts

    def edits(self) -> dict[Site, Callable[[Tensor], RowDelta | None]]:
        """What `edited` takes: one function per site."""
        return {site: self._at(index, site) for index, site in enumerate(self.sites)}

    def _at(self, index: int, site: Site) -> Callable[[Tensor], RowDelta | None]:
        def fn(x: Tensor) -> RowDelta | None:
            if len(self._batch) == 0:
                return None
            assert self._rows is not None
            for number in self._number.unbind(1):
                self._visits.append(torch.stack([self._all(index, number, len(number)), number, self._position]))
            _, row, prompt_length, seed, sample, branch = self._rows
            request = EditRequest(
                site, x[self._batch, self._time], row, self._position, self._token, prompt_length, seed, sample, branch,
                self._shared,
            )  # fmt: skip
            edit = self.source.choose(request)
            if edit is None:
                return None
            change = edit.change(self.source.directions(site), self._batch, self._time)
            if getattr(self.source, "keep_log", True):
                self._log(index, request.x, edit, change)
            return change

        return fn

    def _log(self, site: int, x: Tensor, edit: Edit, change: RowDelta) -> None:
        count, numbers = len(self._position), self._position
        nan = self._all(NAN, numbers, count, dtype=torch.float32)
        applied = change.delta
        if change.base is not None:
            applied = torch.where(change.base.isnan(), applied, change.of(x) - x)
        replaced, kept = self._all(0, numbers, count), dict[int, Tensor]()
        if edit.replacement is not None:
            rows = edit.replacement.detach().to("cpu", x.dtype)
            keys = [0 if row.isnan().any() else activation_hash(row) for row in rows]
            replaced = torch.tensor(keys, device=numbers.device)
            if getattr(self.source, "keep_replacements", False):
                kept = {key: row for key, row in zip(keys, rows, strict=True) if key}
        log = EditLog(
            site=self._all(site, numbers, count),
            row=self._number[:, 0],
            position=self._position,
            feature=edit.feature,
            coefficient=edit.coefficient,
            requested=edit.coefficient if edit.requested is None else edit.requested,
            x_norm=x.float().norm(dim=-1),
            delta_norm=applied.float().norm(dim=-1),
            action_logp=nan if edit.action_logp is None else edit.action_logp,
            n_allowed=self._all(-1, numbers, count) if edit.n_allowed is None else edit.n_allowed,
            value=nan if edit.value is None else edit.value,
            target=self._all(NAN, edit.coefficient, *edit.coefficient.shape) if edit.target is None else edit.target,
            replaced=replaced,
            kept=kept,
        )
        self._parts += [replace(log, row=number) for number in self._number.unbind(1)]

    def leave(self, rows: Sequence[EndedRow], *, ahead: bool = False) -> list[EditLog]:
        """The edits of rows that have ended, one log for each, ordered by position and site, on the CPU.

        Args:
            rows: that have ended.
            ahead: more may have been fed behind their ends, which is not their own.

        Raises:
            RuntimeError: the places shown to the source are not those that its rule asks for.
        """
        numbers = torch.tensor([row.number for row in rows])
        visits, log = self.forget(numbers)
        visits, log = visits.cpu(), log.to("cpu").sorted()
        order = numbers.argsort()
        if ahead:
            fed = torch.tensor([row.fed for row in rows])

            def own(number: Tensor, position: Tensor) -> Tensor:
                return position < fed[order][torch.searchsorted(numbers[order], number)]

            visits, log = visits[:, own(visits[1], visits[2])], log.take(own(log.row, log.position))
        self._check(rows, visits.tolist())
        edits = log.split(torch.searchsorted(numbers[order], log.row).bincount(minlength=len(rows)).tolist())
        return [edits[place] for place in order.argsort().tolist()]

    def forget(self, numbers: Int[Tensor, " N"]) -> tuple[Int[Tensor, "3 V"], EditLog]:
        """Take out what is known of some rows: site, number and position of each place shown, and the log."""
        numbers = numbers.to(self.model.device)
        visits = torch.cat(self._visits, dim=1) if self._visits else numbers.new_empty(3, 0)
        log = EditLog.cat(self._parts) if self._parts else EditLog.empty()
        shown, logged = torch.isin(visits[1], numbers), torch.isin(log.row, numbers)
        self._visits = [] if bool(shown.all()) else [visits[:, ~shown]]
        self._parts = [] if bool(logged.all()) else [log.take(~logged)]
        return visits[:, shown], log.take(logged)

    def _check(self, rows: Sequence[EndedRow], visits: list[list[int]]) -> None:
        """Every position that the rule asks for was shown to the source once per site, and none other."""
        places = [(i, position) for i, row in enumerate(rows) for position in range(row.before, row.fed)]
        which, position = torch.tensor(places).T
        selected = self.source.positions.selects(position, torch.tensor([row.prompt_length for row in rows])[which])
        asked = {(rows[i].number, at) for (i, at), kept in zip(places, selected.tolist(), strict=True) if kept}
        by_site: list[list[tuple[int, int]]] = [[] for _ in self.sites]
        for index, number, at in zip(*visits, strict=True):
            by_site[index].append((number, at))
        for site, seen in zip(self.sites, by_site, strict=True):
            if len(seen) != len(asked) or set(seen) != asked:
                raise RuntimeError(
                    f"{len(seen)} places edited at {site}, {len(asked)} asked for: the hooks did not see each position "
                    "once"
                )
