"""Decoding steps that ask nothing of the device between them, so that a GPU replays each as one graph.

Keys and values lie in storage of a fixed size, and where a token goes is a number on the device; tokens are chosen,
edited, recorded and fed again there, and what was chosen is looked at every few steps. On a CPU the same steps can be
taken as they are, which is how they are tested; what grows in place is faster there.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.captured import Captured, are_near, is_watched
from trimtab.lm.chosen import Chosen, Way, choose
from trimtab.lm.editing import RecordingSource, RowColumns, SourceRunner
from trimtab.lm.edits import EditLog
from trimtab.lm.model import LanguageModel
from trimtab.lm.observing import StepRecorder
from trimtab.lm.precision import ProductPrecision, product_precision
from trimtab.lm.row import Row
from trimtab.lm.running import RunningRows
from trimtab.lm.sampling import uniform
from trimtab.lm.slotted_cache import SlottedCache
from trimtab.lm.taps import edited
from trimtab.lm.upper_layers import agree

LENGTHS = 64
"""The shortest cache; longer ones are as many times twice as long as is needed."""
AHEAD = 8
"""Steps that are taken on a GPU before what they chose is looked at."""
SHORT = 8
"""Rows of fewer tokens are decoded step by step: copying their caches would not pay."""
PAYS = 16
"""Steps at least that rows have left for one to be captured, which takes as long as several."""
GRAPHS = 4
"""Shapes of batches whose caches are held at once."""
_able: weakref.WeakKeyDictionary[transformers.PreTrainedModel, dict[Any, bool]] = weakref.WeakKeyDictionary()


class _Records:
    """What steps computed, a row of memory for each kind of number: columns of one kind are written at once.

    Args:
        columns: what one step computes.
        steps: that are kept.
    """

    def __init__(self, columns: Sequence[Tensor], steps: int) -> None:
        self._shapes, self._kinds = [column.shape for column in columns], [column.dtype for column in columns]
        sizes = {kind: sum(column.numel() for column in columns if column.dtype == kind) for kind in self._kinds}
        self._held = {kind: columns[0].new_zeros(steps, size, dtype=kind) for kind, size in sizes.items()}

    def write(self, step: Int[Tensor, " 1"], columns: Sequence[Tensor]) -> None:
        """Keep a step's columns, which are of the same shapes and kinds each time."""
        assert [column.dtype for column in columns] == self._kinds
        for kind, held in self._held.items():
            row = torch.cat([column.reshape(-1) for column in columns if column.dtype == kind])
            held.index_copy_(0, step, row[None])

    def read(self) -> list[Shaped[Tensor, "N ..."]]:
        """Each column of all steps."""
        starts, found = dict.fromkeys(self._held, 0), list[Tensor]()
        for shape, kind in zip(self._shapes, self._kinds, strict=True):
            held, start = self._held[kind], starts[kind]
            starts[kind] = start + shape.numel()
            found.append(held[:, start : starts[kind]].unflatten(1, shape))
        return found


class _Shape:
    """Steps of so many rows that choose in one way: everything that a step reads or writes, at fixed addresses."""

    def __init__(
        self, model: LanguageModel, runner: SourceRunner | None, running: RunningRows, rows: Tensor, capacity: int,
        way: Way, taught: bool, ahead: int, recorder: StepRecorder | None,
    ) -> None:  # fmt: skip
        device, size = model.device, len(rows)
        self.rows = len(running.rows)
        self.model, self.runner, self.way, self.capacity, self.ahead = model, runner, way, capacity, ahead
        self.place, self.step = torch.zeros(2, 1, dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        self.which = torch.arange(size, device=device)[:, None]
        self.given = torch.full((ahead, size), -1, device=device) if taught else None
        self.recorder, self.n_seen = recorder, 0
        self.records: _Records | None = None
        """Of each step what was chosen, what the recorder saw, and what was edited."""
        steered = "" if runner is None else f" steered by {type(runner.source).__name__}"
        self.captured = Captured(device, f"decoding with {model.name}{steered}")
        self.ids, self.held = running.ids[rows], running.held[rows]
        self.columns = RowColumns(*(column[rows].clone() for column in running.columns))
        self.allowed = None if running.allowed is None else running.allowed[rows]
        self.cache = SlottedCache(running.cache, rows, capacity, self.place)
        self.length = running.cache.length
        self.place.fill_(self.length)

    def holds(self, running: RunningRows) -> bool:
        """Whether the rows are where the last step left them; what becomes of rows otherwise moves or grows them."""
        (mine, theirs) = (cache.growing[0].keys for cache in (self.cache, running.cache))
        assert mine is not None
        same = theirs is not None and theirs.data_ptr() == mine.data_ptr()
        return same and running.cache.length == self.length

    def load(self, running: RunningRows, rows: Tensor) -> None:
        """Put rows where the steps look for them, unless they are there."""
        self.rows = len(running.rows)
        if self.holds(running):
            return
        self.cache.load(running.cache, rows)
        self.ids.copy_(running.ids[rows])
        self.held.copy_(running.held[rows])
        for mine, column in zip(self.columns, running.columns, strict=True):
            mine.copy_(column[rows])
        if self.allowed is not None:
            assert running.allowed is not None
            self.allowed.copy_(running.allowed[rows])
        self.length = running.cache.length
        self.place.fill_(self.length)

    def take(
        self, running: RunningRows, given: Int[Tensor, "N B"] | None, count: int
    ) -> tuple[Chosen, list[Shaped[Tensor, "N B ..."]]]:
        """Take some steps of rows that are loaded, and hand over what they did and what was seen of them."""
        rows = self.rows
        self.step.zero_()
        pays = self.captured.is_captured or max(row.tokens_left for row in running.rows) >= PAYS
        replay = pays and self.captured.may_replay(self.model.hf)
        if given is not None:
            assert self.given is not None
            self.given[:count, :rows] = given
            self.given[:count, rows:] = given[:, -1:]
        for _ in range(count):
            self.captured(self._step, replay=replay, proven=self._proven)
        self.length += count
        running.cache = self.cache.grown(rows, self.length)
        running.ids, running.held = self.ids[:rows].clone(), self.held[:rows].clone()
        assert self.records is not None
        records = iter(self.records.read())
        width = 5 if self.allowed is None else 6
        columns = [record[:count, :rows] for record in itertools.islice(records, width)]
        watched = [record[:count, :rows].clone() for record in itertools.islice(records, self.n_seen)]
        if self.runner is not None:
            sites, names = len(self.runner.sites), [*EditLog.empty().columns]
            kept = [
                record[:count, :, :rows].clone().transpose(0, 1).flatten(1)
                for record in itertools.islice(records, sites)
            ]
            parts: list[EditLog] = []
            while len(found := [*itertools.islice(records, len(names))]) == len(names):
                flat = [record[:count, :rows].clone().flatten(0, 1) for record in found]
                parts.append(replace(EditLog.empty(), **dict(zip(names, flat, strict=True))))
            self.runner.keep(kept, parts)
        return Chosen(*columns, *([None] if width == 5 else [])), watched

    def _proven(self, replayed: Callable[[], Tensor | None]) -> bool:
        """Whether what replays a step does what the step does; rows stay where they are, and what a source keeps of
        them is the same when it is asked again."""
        moved = self.ids, self.held, self.place, self.step
        before, at = [one.clone() for one in moved], int(self.step)
        found: list[list[Tensor]] = []
        for step in (replayed, self._step):
            step()
            assert self.records is not None
            found.append([record[at].clone() for record in self.records.read()])
            for mine, one in zip(moved, before, strict=True):
                mine.copy_(one)
        precision = product_precision(self.model.dtype, self.model.device)
        return all(are_near(mine, other, precision) for mine, other in zip(*found, strict=True))

    @torch.no_grad()
    def _step(self) -> None:
        """Feed each row's token and choose the next one; nothing here waits for the device."""
        model, runner, held = self.model, self.runner, self.held
        with nullcontext(([], [])) if runner is None else runner.apart() as (visits, parts):
            if runner is not None:
                runner.aim(self.ids[:, None], held[:, None], self.columns, self.which, chooses=True)
            with (
                nullcontext() if self.recorder is None else self.recorder.watching(),
                nullcontext() if runner is None else edited(model, runner.edits()),
            ):
                logits = self._logits()
                watched = [] if self.recorder is None else self.recorder.seen(len(held))
        self.n_seen = len(watched)
        seen = [*watched, *visits, *(column for part in parts for column in part.columns.values())]
        u = None
        if self.way.temperature > 0:
            u = uniform(self.columns.seed, self.columns.sample, self.columns.branch, held)
        given = None if self.given is None else self.given.index_select(0, self.step)[0]
        every = {self.way: range(len(held))}
        chosen = choose(logits, every, u, self.allowed, given, first=None)
        columns = [column for column in chosen if column is not None] + seen
        self.records = self.records or _Records(columns, self.ahead)
        self.records.write(self.step, columns)
        self.ids.copy_(chosen.ids)
        torch._foreach_add_([held, self.place, self.step], 1)  # pyright: ignore[reportPrivateImportUsage]

    def _logits(self) -> Float[Tensor, "B V"]:
        return slotted_logits(self.model, self.cache, self.ids, self.held, self.place, self.places)


def slotted_logits(
    model: LanguageModel, cache: SlottedCache, ids: Int[Tensor, " B"], held: Int[Tensor, " B"],
    place: Int[Tensor, " 1"], places: Int[Tensor, " C"],
) -> Float[Tensor, "B V"]:  # fmt: skip
    """Logits behind one more token of each row."""
    mask = places >= (place - held)[:, None]  # what is behind `place` is hidden as what is yet to come
    arguments = model.named_arguments(
        cache, input_ids=ids[:, None], position_ids=held[:, None], attention_mask=mask.long(), logits_to_keep=1
    )
    return model.call(**arguments).logits[:, -1]


class Steps:
    """Takes steps of the rows of one stream.

    Args:
        model: the model, of which `can_step_ahead` is true.
        runner: applies the source's edits, if there is one.
        ahead: steps at most before what they chose is looked at.
        recorder: watches each forward pass.
    """

    def __init__(
        self, model: LanguageModel, runner: SourceRunner | None, ahead: int, recorder: StepRecorder | None = None
    ) -> None:
        self.model, self.runner, self.ahead, self.recorder = model, runner, ahead, recorder
        self._shapes: OrderedDict[tuple[Any, ...], _Shape] = OrderedDict()
        self._size = 0

    def take(
        self, running: RunningRows, way: Way, given: Sequence[Sequence[int]] | None, count: int
    ) -> tuple[Chosen, list[Shaped[Tensor, "N B ..."]]]:
        """What running rows choose at so many steps, of which each may take as many by its `max_new_tokens`; and what
        the recorder saw of each row.

        Args:
            running: the rows.
            way: how they choose, all alike.
            given: per step the tokens that rows are fed instead; −1 for none.
            count: steps.
        """
        rows = len(running.rows)
        # A copy of a row would write to the same places of what a source keeps, perhaps with other last bits.
        keeps = self.runner is not None and isinstance(self.runner.source, RecordingSource)
        if keeps or not rows <= self._size < 2 * rows:
            self._size = rows
        device = self.model.device
        index = torch.arange(self._size, device=device).clamp_max_(rows - 1)  # what is left over repeats the last row
        capacity = LENGTHS
        while capacity < running.cache.length + self.ahead:
            capacity *= 2
        width = None if running.allowed is None else running.allowed.shape[1]
        key = self._size, capacity, way, given is not None, width
        shape = self._shapes.pop(key, None)
        if shape is None:
            while len(self._shapes) >= GRAPHS:
                self._shapes.popitem(last=False)
            taught = given is not None
            shape = _Shape(self.model, self.runner, running, index, capacity, way, taught, self.ahead, self.recorder)
        else:
            shape.load(running, index)
        self._shapes[key] = shape
        tokens = None if given is None else torch.tensor(given, device=device)
        return shape.take(running, tokens, count)


def usual_steps(model: LanguageModel) -> int:
    """Steps that pay to be taken before what they chose is looked at: several on a GPU, which waits for the host at
    each look; one on a CPU."""
    return AHEAD if model.device.type == "cuda" else 1


def can_step_ahead(model: LanguageModel, runner: SourceRunner | None) -> bool:
    """Whether steps behind a cache of a fixed size are right: the model's by a trial, which is made once, the source's
    by what it says (`asks_nothing`)."""
    if runner is not None and not (runner.edits_choices and getattr(runner.source, "asks_nothing", False)):
        return False
    if is_watched(model.hf):  # by somebody who is to see the steps of each row alone
        return False
    if model.turning_length or "padding" not in model.capabilities or "positions" not in model.capabilities:
        return False
    known = _able.setdefault(model.hf, {})
    precision = product_precision(model.dtype, model.device)
    attention = getattr(model.hf.config.get_text_config(), "_attn_implementation", None)
    key = model.dtype, model.device, attention, precision.name
    if key not in known:
        known[key] = _trial(model, precision)
    return known[key]


@torch.no_grad()
def _trial(model: LanguageModel, precision: ProductPrecision) -> bool:
    """Whether a token behind a padded cache of a fixed size gets the logits that it gets behind one that grows."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (2, 6), generator=generator).tolist()
    try:
        batch = TokenBatch.pad([tokens[0][:3], tokens[1]], model.pad_id, model.device)
        cache = model.new_cache()
        ids = model.forward(batch, cache=cache, last=1)[:, -1].argmax(-1)
        place = torch.tensor([cache.length], device=model.device)
        places, rows = torch.arange(16, device=model.device), torch.arange(2, device=model.device)
        slotted = SlottedCache(cache, rows, 16, place)
        expected = model.forward(TokenBatch.full(ids[:, None]), cache=cache, past_lengths=batch.lengths)[:, -1]
        found = slotted_logits(model, slotted, ids, batch.lengths, place, places)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a foreign model that takes no such cache
        return False
    return agree(found, expected, precision)


def given_tokens(rows: Sequence[Row], count: int) -> list[list[int]] | None:
    """Per step what the rows' teachers say; −1 where there is none, or where it has no more to say."""
    if all(row.teacher is None for row in rows):
        return None
    left = [() if row.teacher is None else row.teacher[len(row.token_ids) :] for row in rows]
    return [[tokens[step] if step < len(tokens) else -1 for tokens in left] for step in range(count)]
