"""The one decode loop, as a generator of steps: batched, cached, steered; rows join and leave between steps.

A policy, a constant feature, a log to replay: each is an `InterventionSource`, and this loop is the
only place where tokens are chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.captured import is_watched, say_once
from trimtab.lm.chosen import choose, told, ways_of
from trimtab.lm.editing import (
    DecodeStart,
    EndedRow,
    InterventionSource,
    RecordingSource,
    SourceRunner,
    tell_of_rows,
)  # fmt: skip
from trimtab.lm.model import LanguageModel
from trimtab.lm.not_finite import not_finite_error
from trimtab.lm.observing import StepRecorder
from trimtab.lm.prompt_cache import PromptCache
from trimtab.lm.row import Row, check_prompt, check_tokens
from trimtab.lm.running import RunningRows
from trimtab.lm.sampling import uniform
from trimtab.lm.steps_ahead import SHORT, Steps, can_step_ahead, given_tokens
from trimtab.lm.stopping import text_before_stop


class DecodeStep(NamedTuple):
    """One more token of every running row."""

    rows: list[Row]
    """Those that chose a token, which is the last one of each."""
    logits: Float[Tensor, "B V"] | None
    """What they chose from. They stay as they are and may be kept; None of steps that were taken ahead."""
    ended: list[Row]
    """Rows that ended with this token."""
    seen: Sequence[Tensor] = ()
    """What a recorder saw of the rows."""


class DecodeStream:
    r"""Decodes rows that come and go, each with its own settings.

        stream = DecodeStream(model, source)
        stream.add(Row(ids, DecodeConfig(temperature=0.7, stop=("\n",))))
        for step in stream:
            ...  # rows may be added and cancelled here

    A row's results do not depend on when it joins or on other rows, up to rounding. A row that has ended holds
    all that is known of it; the stream keeps nothing.

    Args:
        model: the model.
        source: decides edits at its sites and positions.
        batch_size: rows decoded together. Others wait.
        refill: rows that wait begin as soon as there is room. Otherwise they begin when all rows before them have
            ended, so that what is decoded together depends on nothing but the order of rows.
        prompt_cache: holds keys and values of prompts; see `decode`.
        ahead: steps that may be taken before what they chose is looked at, which a GPU replays as one graph each. Rows
            join between them. Where a step cannot be taken so (`can_step_ahead`, rows that choose in different ways),
            each is looked at.
        recorder: watches each forward pass; what it saw of a step's rows is in `DecodeStep.seen`.

    Raises:
        UserError: the model does not decode rightly from a cache, or `ahead` is below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: InterventionSource | None = None,
        *,
        batch_size: int = 64,
        refill: bool = True,
        prompt_cache: PromptCache | None = None,
        ahead: int = 1,
        recorder: StepRecorder | None = None,
    ) -> None:
        model.require("decode")
        if ahead < 1:
            raise UserError(f"ahead = {ahead}", "it must be at least 1", "change it")
        self.model, self.batch_size, self.refill, self._prompt_cache = model, batch_size, refill, prompt_cache
        self._runner, self._recorder = None if source is None else SourceRunner(model, source), recorder
        self._started = self._failed = False
        self._waiting: deque[list[Row]] = deque()
        self._running: RunningRows | None = None
        self._count = 0
        self._size = 0
        able = ahead > 1 and can_step_ahead(model, self._runner)
        self.ahead = ahead if able else 1
        """Steps that may be taken before what they chose is looked at."""
        self._steps = Steps(model, self._runner, ahead, recorder) if able else None
        self._told: deque[tuple[list[Any], list[Tensor]]] = deque()
        """Of each step that was taken ahead, what rows chose, and what was seen of them."""
        self._free: list[int] = []
        """Indices of rows that have left, for rows to come."""

    def __len__(self) -> int:
        """Rows that wait or run."""
        return self._size

    def __iter__(self) -> Iterator[DecodeStep]:
        """Steps until no row is left."""
        while self._size:
            assert not self._failed, "a step of this stream has failed, begin another stream"
            self._failed = True
            step = self._step()
            self._failed = False
            yield step

    def add(self, row: Row, *copies: Row) -> None:
        """Let a row begin at the next step, or as soon as there is room.

        Args:
            row: how to decode it; results are filled in.
            copies: more rows of the same prompt and forced tokens, which are then fed once for all of them. They may be
                edited differently from the token before the first free one on; what lies below the first edited site
                is computed once for all of them there, too.

        Raises:
            UserError: the prompt is empty, holds an unknown token, or would exceed the model's context; no token is
                allowed or given to be fed, or an unknown one; the row was added before; the stream has started, and
                its source must know all rows at the start.
        """
        rows, model = [row, *copies], self.model
        assert all(copy.prefix == row.prefix for copy in copies), "copies have the same prompt and forced tokens"
        if any(added.number >= 0 for added in rows) or len(set(map(id, rows))) < len(rows):
            raise UserError("the row", "it was added before and holds its results", "make another Row")
        check_prompt(model, "the prompt", row.prompt, row.forced, max(added.config.max_new_tokens for added in rows))
        free, unused = sorted(self._free), self._size + len(self._free)
        for place, added in enumerate(rows):
            for name, tokens in (("allowed tokens", added.allowed), ("the teacher's tokens", added.teacher)):
                if tokens is not None:
                    check_tokens(model, f"the list of {name} of row {self._count + place}", tokens)
            added.index = free[place] if place < len(free) else unused + place - len(free)
        if self._started and self._runner is not None:
            tell_of_rows(self._runner.source, self._start_of(rows))
        for added in rows:
            added.number, self._count = self._count, self._count + 1
            added.sample = added.number if added.sample is None else added.sample
        self._free = free[len(rows) :]
        self._size += len(rows)
        self._waiting.append(rows)

    def cancel(self, row: Row) -> None:
        """Take a row out between two steps. It keeps what it has so far.

        Raises:
            UserError: it was not added to this stream.
        """
        running = [] if self._running is None else self._running.rows
        if not row.finish:
            if not any(mine is row for mine in chain(running, *self._waiting)):
                raise UserError("a row to cancel", "it is not in this stream", "cancel it where it was added")
            row.finish = "cancelled"
            left = ([other for other in rows if other is not row] for rows in self._waiting)
            self._waiting = deque(rows for rows in left if rows)
            self._leave([row])

    @torch.no_grad()
    def _step(self) -> DecodeStep:
        if not self._started:
            self._start([row for rows in self._waiting for row in rows])
        if self._running is not None and not self._told:
            count = self._may_take()
            if not count or not self._take(self._running, count):
                self._running.feed()
        if self._told:
            assert self._running is not None
            chosen, seen = self._told.popleft()
            return self._recorded(self._running, chosen, None, seen)
        while rows := self._next_rows():
            fresh = RunningRows(
                self.model, self._runner, [row for copies in rows for row in copies], len(rows[0]), self._prompt_cache,
                self._recorder,
            )  # fmt: skip
            if self._running is None:
                self._running = fresh
            else:
                self._running.join(fresh)
        running = self._running
        assert running is not None
        return self._recorded(running, self._choose(running), running.logits, running.seen)

    def _recorded(
        self, running: RunningRows, chosen: list[Any], logits: Tensor | None, seen: Sequence[Tensor]
    ) -> DecodeStep:
        """A step whose choices rows are told of; those that have ended leave."""
        places = [place for place, row in enumerate(running.rows) if not row.finish]
        rows = [running.rows[place] for place in places]
        if len(rows) < len(running.rows):
            seen = [of_all[places] for of_all in seen]
        self._record(running.rows, chosen)
        ended = [row for row in rows if row.finish]
        step = DecodeStep(rows, logits, ended, seen)
        self._leave(ended)
        return step

    def _may_take(self) -> int:
        """Steps that may be taken ahead now: as many as each row has tokens left; none if a row that waits has room."""
        running = self._running
        if self._steps is None or running is None or (self._waiting and self.refill and self._room(running)):
            return 0
        if len(ways_of(running.rows)) > 1 or max(row.config.max_new_tokens for row in running.rows) < SHORT:
            return 0
        if is_watched(self.model.hf):  # by somebody who came since the stream began
            return 0
        return min(self.ahead, *(row.tokens_left for row in running.rows))

    def _room(self, running: RunningRows) -> bool:
        return len(running.rows) + len(self._waiting[0]) <= self.batch_size

    def _take(self, running: RunningRows, count: int) -> bool:
        """Take some steps ahead. False where there is no room for that; rows are left as they were."""
        assert self._steps is not None
        (way,) = ways_of(running.rows)
        try:
            chosen, seen = self._steps.take(running, way, given_tokens(running.rows, count), count)
        except torch.OutOfMemoryError:
            self._steps, self.ahead = None, 1
            say_once("decoding is slower for want of memory; lower the batch size")
            return False
        columns = told(chosen)
        for step in range(count):
            of_step = [None if column is None else column[step] for column in columns]
            self._told.append((of_step, [of_all[step] for of_all in seen]))
        return True

    def _start(self, rows: list[Row]) -> None:
        for place, row in enumerate(rows):  # a source may know rows by their place in what it is told at the start
            row.index = place
        self._started, self._free = True, []
        if self._runner is not None:
            self._runner.source.start(self._start_of(rows))

    def _start_of(self, rows: list[Row]) -> DecodeStart:
        index = torch.tensor([row.index for row in rows], device=self.model.device)
        most = max(row.config.max_new_tokens for row in rows)
        n_inputs = [len(row.prefix) + row.config.max_new_tokens - 1 for row in rows]
        return DecodeStart([list(row.prompt) for row in rows], index, most, self.model.device, n_inputs, self.model)

    def _next_rows(self) -> list[list[Row]]:
        """Rows that begin together: with equally many copies, all or none of which have something to share."""
        size = 0 if self._running is None else len(self._running.rows)
        rows: list[list[Row]] = []
        while self._waiting and (self.refill or self._running is None):
            copies = self._waiting[0]
            if size and size + len(copies) > self.batch_size:
                break
            if rows and (len(copies), _shares(copies)) != (len(rows[0]), _shares(rows[0])):
                break
            rows.append(self._waiting.popleft())
            size += len(copies)
        return rows

    def _choose(self, running: RunningRows) -> list[Any]:
        """The next token of each row, and what is known of it, by column of `Chosen`."""
        rows, columns, u = running.rows, running.columns, None
        if any(row.config.temperature > 0 for row in rows):
            u = uniform(columns.seed, columns.sample, columns.branch, running.held - 1)
        given = given_tokens(rows, 1)
        tokens = None if given is None else torch.tensor(given[0], device=running.logits.device)
        chosen = choose(running.logits, ways_of(rows), u, running.allowed, tokens)
        running.ids = chosen.ids
        return told(chosen)

    def _record(self, rows: Sequence[Row], chosen: Sequence[Any]) -> None:
        """Tell rows that run what they chose, and say which end with it."""
        ids, decided, logp, decided_logp, entropy, allowed_logp = chosen
        self._check_finite(rows, logp)
        for at, row in enumerate(rows):
            if row.finish:
                continue
            row.token_ids.append(ids[at])
            row.decided_ids.append(decided[at])
            row.token_logp.append(logp[at])
            row.decided_logp.append(decided_logp[at])
            row.entropy.append(entropy[at])
            if row.allowed is not None:
                of_token = dict(zip(sorted(set(row.allowed)), allowed_logp[at], strict=False))
                row.allowed_logp.append([of_token[token] for token in row.allowed])
            row.finish = self._reason_to_end(row)

    def _check_finite(self, rows: Sequence[Row], logp: Sequence[float]) -> None:
        """A log-probability is NaN if and only if any of its row's logits is NaN or +∞, or all are −∞."""
        for row, value in zip(rows, logp, strict=True):
            if value != value and not row.finish:
                before = self._runner is not None
                raise not_finite_error(self.model, [*row.prefix, *row.token_ids], edited_before=before)

    def _reason_to_end(self, row: Row) -> str:
        config = row.config
        if config.stop_at_eos and row.token_ids[-1] in self.model.eos_ids:
            return "eos"
        if config.stop and self._text_before_stop(row) is not None:
            return "stop"
        ends = row.tokens_left == 0 or (row.teacher is not None and len(row.token_ids) == len(row.teacher))
        return "length" if ends else ""

    def _text_before_stop(self, row: Row) -> str | None:
        return text_before_stop(self.model, [*row.forced, *row.token_ids], row.config.stop)

    def _leave(self, ended: list[Row]) -> None:
        """Hand rows that have ended what is known of them, and keep nothing of it."""
        fed = [row for row in ended if row.token_ids]
        if self._runner is not None and fed:
            ends = [EndedRow(row.number, len(row.prompt), row.length - 1) for row in fed]
            logs = self._runner.leave(ends, ahead=self.ahead > 1)
            for row, log in zip(fed, logs, strict=True):
                row.edits = log
            if self._told and isinstance(self._runner.source, RecordingSource):
                self._runner.source.take_back({row.index: row.length - 1 for row in fed})
        for row in ended:
            before = self._text_before_stop(row) if row.finish == "stop" else None
            row.text = self.model.decode_continuation([*row.forced, *row.token_ids]) if before is None else before
            self._free.append(row.index)
        self._size -= len(ended)
        if self._running is not None:
            left = [row for row in self._running.rows if not row.finish]
            if not left:
                self._running = None
                self._told.clear()
            elif not self._told:
                self._running.part()
                if len(left) < len(self._running.rows):
                    self._running.keep(left)


def _shares(copies: list[Row]) -> bool:
    """Whether copies of a prompt have anything to share."""
    return len(copies) > 1 and len(copies[0].prefix) > 1
