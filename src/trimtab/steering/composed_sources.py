"""Sources made of others: a log applied again, a fork that leaves a log at some position, several sources at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeStart, Edit, EditLog, EditRequest, InterventionSource, PositionRule, Site
from trimtab.lm.editing import RecordingSource, check_is_source, tell_of_rows
from trimtab.lm.edits import NAN, NOTHING
from trimtab.steering.sources import DirectionBlock

_STRIDE = 1 << 32  # positions per row in a lookup key


def blocks_of(source: InterventionSource, site: Site) -> tuple[DirectionBlock, ...]:
    """How a trace names a source's directions at a site; one block unless the source says otherwise."""
    if hasattr(source, "blocks"):
        return source.blocks(site)  # type: ignore[attr-defined]
    n = source.directions(site).shape[0]
    return (DirectionBlock(0, n, source.unit, source.operation, source.dictionary_hash),)


class _WrappingSource:
    """A source that has the sites, positions, directions and names of another one."""

    def __init__(self, source: InterventionSource) -> None:
        check_is_source(source)
        self.source, self.sites, self.positions = source, source.sites, source.positions
        self.unit, self.operation, self.dictionary_hash = source.unit, source.operation, source.dictionary_hash
        self.keep_replacements = getattr(source, "keep_replacements", False)

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        return self.source.directions(site)

    def blocks(self, site: Site) -> tuple[DirectionBlock, ...]:
        return blocks_of(self.source, site)


class ReplaySource(_WrappingSource):
    """Applies logged edits again: the same coefficients along the same directions, so the same bits.

    Args:
        log: edits, by row and position.
        source: the source that made them, for its directions, sites, positions and names in the trace. It is not asked
            for edits.
        rows: `[N]` which row of the log each decoded row replays; row r replays row r by default.
        ahead: whether steps may be taken ahead, as the decode did that is replayed; by default as the source allows.
    """

    def __init__(
        self,
        log: EditLog,
        source: InterventionSource,
        *,
        rows: Sequence[int] | Int[Tensor, " N"] | None = None,
        ahead: bool | None = None,
    ) -> None:
        if not isinstance(log, EditLog):
            hint = "give one, like decode(...).edits"
            raise UserError(f"the {type(log).__name__} that is replayed", "it is no log of edits", hint)
        super().__init__(source)
        self.log, self.keep_replacements = log, bool(log.kept)
        self.rows = None if rows is None else torch.as_tensor(rows)
        self._ahead = getattr(source, "asks_nothing", False) if ahead is None else ahead
        self._index: dict[Site, tuple[Tensor, Edit]] = {}

    @property
    def asks_nothing(self) -> bool:
        """Said so that steps that went ahead are replayed as they were taken, and others, too."""
        return self._ahead and not self.keep_replacements

    def start(self, start: DecodeStart) -> None:
        self.source.start(start._replace(n_inputs=()))  # what was logged did happen, wherever this call ends
        if self.rows is not None:
            self.rows = self.rows.to(start.device)
        for index, site in enumerate(self.sites):
            mine = self.log.take(self.log.site == index).to(start.device)
            key = mine.row * _STRIDE + mine.position
            order = key.argsort()
            self._index[site] = key[order], mine.take(order).edit()

    def choose(self, request: EditRequest) -> Edit | None:
        keys, logged = self._index[request.site]
        if len(keys) == 0:
            return None
        row = request.row if self.rows is None else self.rows[request.row]
        wanted = row * _STRIDE + request.position
        index = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return _where(keys[index] == wanted, logged, index)


class CombinedSource:
    """Several sources at once; at a site that they share, their edits are summed.

    Where one of them replaces an activation, the others are shown what takes its place.

    Features of the log index the sources' directions one behind the other; traces give each its own number and hash.

    Args:
        sources: all with the same positions.

    Raises:
        UserError: there is none, or they edit different positions.
    """

    def __init__(self, sources: Sequence[InterventionSource]) -> None:
        sources = list(sources) if isinstance(sources, Iterable) else [sources]
        for source in sources:
            check_is_source(source)
        if not sources or len({s.positions for s in sources}) != 1:
            raise UserError("combined sources", "they must edit the same positions", "give all the same positions")
        self.sources = tuple(sources)
        self.positions: PositionRule = sources[0].positions
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(site for s in sources for site in s.sites))
        self.unit, self.operation, self.dictionary_hash = (
            "+".join(dict.fromkeys(getattr(s, name) for s in sources))
            for name in ("unit", "operation", "dictionary_hash")
        )
        self.keep_replacements = any(getattr(s, "keep_replacements", False) for s in sources)
        self._joined: dict[Site, Tensor] = {}

    @property
    def asks_nothing(self) -> bool:
        """Whether none of them asks; see `InterventionSource`."""
        return all(getattr(source, "asks_nothing", False) for source in self.sources)

    def take_back(self, ends: Mapping[int, int]) -> None:
        """Let those that keep what they decide forget what is behind rows' ends."""
        for source in self.sources:
            if isinstance(source, RecordingSource):
                source.take_back(ends)

    def _at(self, site: Site) -> list[InterventionSource]:
        return [source for source in self.sources if site in source.sites]

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        if site not in self._joined:
            self._joined[site] = torch.cat([source.directions(site) for source in self._at(site)])
        return self._joined[site]

    def blocks(self, site: Site) -> tuple[DirectionBlock, ...]:
        found: list[DirectionBlock] = []
        offset = 0
        for source in self._at(site):
            found += [block._replace(start=block.start + offset) for block in blocks_of(source, site)]
            offset += source.directions(site).shape[0]
        return tuple(found)

    def start(self, start: DecodeStart) -> None:
        self._joined = {}
        for source in self.sources:
            source.start(start)

    def join(self, start: DecodeStart) -> None:
        """All of them must let rows join."""
        for source in self.sources:
            tell_of_rows(source, start)

    def choose(self, request: EditRequest) -> Edit | None:
        sources = self._at(request.site)
        replaces = [any(block.replaces for block in blocks_of(source, request.site)) for source in sources]
        found: dict[int, Edit] = {}
        for i in sorted(range(len(sources)), key=lambda i: not replaces[i]):  # those that replace come first
            edit = sources[i].choose(request)
            if edit is not None:
                found[i] = edit
            if edit is not None and edit.replacement is not None:
                new = edit.replacement
                request = request._replace(x=torch.where(new.isnan(), request.x, new.to(request.x)))
        edits: list[Edit] = []
        offset = 0
        for i, source in enumerate(sources):
            edits += [_shifted(found[i], offset)] if i in found else []
            offset += source.directions(request.site).shape[0]
        return _beside(edits, request.site)


class ForkSource(_WrappingSource):
    """One source up to a position, another from there on: replay the past, then do something else.

    Args:
        past: asked at positions before `at`, usually a `ReplaySource`.
        future: asked from `at` on. It edits the same positions as `past`, but may use other directions.
        at: absolute position of the first token that `future` edits; one number or one per row.

    Raises:
        UserError: the two edit different sites or positions.
    """

    def __init__(
        self, past: InterventionSource, future: InterventionSource, at: int | Sequence[int] | Int[Tensor, " N"]
    ) -> None:
        for source in (past, future):
            check_is_source(source)
        if set(past.sites) != set(future.sites):
            raise UserError("a fork", "past and future edit different sites", "give both the same sites")
        super().__init__(CombinedSource([past, future]))
        self.past, self.future, self.at = past, future, torch.as_tensor(at)

    def start(self, start: DecodeStart) -> None:
        self.source.start(start)
        self.at = self.at.to(start.device)

    def choose(self, request: EditRequest) -> Edit | None:
        at = self.at if self.at.ndim == 0 else self.at[request.row]
        late = request.position >= at
        offset = self.past.directions(request.site).shape[0]
        parts: list[tuple[Tensor, Edit]] = []
        for source, mine, shift in ((self.past, ~late, 0), (self.future, late, offset)):
            where = mine.nonzero()[:, 0]
            if len(where) == 0:
                continue
            edit = source.choose(request.take(where))
            if edit is not None:
                parts.append((where, _shifted(edit, shift)))
        return _in_turn(parts, len(request.row))


class SomeRowsSource(_WrappingSource):
    """A source for some of the rows that are decoded together; the others are left alone.

    Args:
        source: learns of its own rows alone, counted from 0 in order.
        mine: for each row, whether it is one of them.
    """

    def __init__(self, source: InterventionSource, mine: Sequence[bool]) -> None:
        super().__init__(source)
        self._mine = torch.tensor(list(mine))
        self._index = self._mine.long().cumsum(0) - 1

    def start(self, start: DecodeStart) -> None:
        self._mine, self._index = self._mine.to(start.device), self._index.to(start.device)
        kept = self._mine[start.row].tolist()
        prompts, n_inputs = (
            [value for value, mine in zip(values, kept, strict=False) if mine]
            for values in (start.prompts, start.n_inputs)
        )
        rows = self._index[start.row[self._mine[start.row]]]
        self.source.start(start._replace(prompts=prompts, row=rows, n_inputs=n_inputs))

    def choose(self, request: EditRequest) -> Edit | None:
        where = self._mine[request.row].nonzero()[:, 0]
        if len(where) == 0:
            return None
        part = request.take(where)
        edit = self.source.choose(part._replace(row=self._index[part.row], shared=self._index[part.shared]))
        return None if edit is None else _in_turn([(where, edit)], len(request.row))


def _where(found: Bool[Tensor, " R"], edit: Edit, index: Int[Tensor, " R"]) -> Edit:
    """Some rows of an edit, empty where they are not `found`."""
    known = {name: column[index] for name, column in edit._asdict().items() if column is not None}
    return Edit(**{n: torch.where(found if c.ndim == 1 else found[:, None], c, NOTHING[n]) for n, c in known.items()})


def _shifted(edit: Edit, offset: int) -> Edit:
    return edit._replace(feature=torch.where(edit.feature >= 0, edit.feature + offset, -1))


def _in_turn(parts: Sequence[tuple[Tensor, Edit]], rows: int) -> Edit | None:
    """Edits of different rows as one of all rows, empty where none has any."""
    if not parts:
        return None
    parts = [(where, e._replace(requested=e.coefficient if e.requested is None else e.requested)) for where, e in parts]
    slots = max(edit.feature.shape[1] for _, edit in parts)
    columns: list[Tensor | None] = []
    for name in Edit._fields:
        known = [(where, getattr(edit, name)) for where, edit in parts if getattr(edit, name) is not None]
        if not known:
            columns.append(None)
            continue
        values = known[0][1]
        width = values.shape[1:] if name == "replacement" else (slots,) * (values.ndim - 1)
        dtype = torch.promote_types(values.dtype, known[-1][1].dtype)
        whole = torch.full((rows, *width), NOTHING[name], dtype=dtype, device=values.device)
        for where, values in known:
            if values.ndim == 2:
                whole[where, : values.shape[1]] = values.to(dtype)
            else:
                whole[where] = values.to(dtype)
        columns.append(whole)
    return Edit(*columns)  # type: ignore[arg-type]


def _beside(edits: Sequence[Edit], site: Site) -> Edit | None:
    """Slots of several edits side by side; of what a row has once, the first that is known."""
    if len(edits) < 2:
        return edits[0] if edits else None
    if sum(e.target is not None or e.replacement is not None for e in edits) > 1:
        raise UserError(
            f"combined sources at {site}",
            "two of them set what the activation is to be there",
            "combine one of them only",
        )
    columns: dict[str, Tensor | None] = {
        "feature": torch.cat([e.feature for e in edits], dim=1),
        "coefficient": torch.cat([e.coefficient for e in edits], dim=1),
        "requested": torch.cat([e.coefficient if e.requested is None else e.requested for e in edits], dim=1),
    }
    if any(e.target is not None for e in edits):
        nan = [torch.full_like(e.coefficient, NAN) if e.target is None else e.target for e in edits]
        columns["target"] = torch.cat(nan, dim=1)
    for name in ("action_logp", "n_allowed", "value", "replacement"):
        known = [getattr(e, name) for e in edits if getattr(e, name) is not None]
        merged = known[0] if known else None
        for values in known[1:]:
            missing = merged < 0 if name == "n_allowed" else merged.isnan()  # type: ignore[union-attr]
            merged = torch.where(missing, values, merged)  # type: ignore[arg-type]
        columns[name] = merged
    return Edit(**columns)  # type: ignore[arg-type]
