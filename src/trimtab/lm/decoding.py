"""Decode many prompts at once: what `DecodeStream` yields, collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.lm.decode_stream import DecodeStep, DecodeStream
from trimtab.lm.editing import InterventionSource, check_is_source
from trimtab.lm.edits import EditLog
from trimtab.lm.memory import held_bytes, too_many_rows
from trimtab.lm.model import LanguageModel, check_is_model
from trimtab.lm.observing import Observe, StepRecorder
from trimtab.lm.prompt_cache import PromptCache
from trimtab.lm.row import DecodeConfig, Row, check_prompts
from trimtab.lm.steps_ahead import usual_steps

MANY = 8
"""Steps from which on it pays to keep weights in the layout that products take."""


@dataclass
class Decoded:
    """What was decoded, one entry per row. Rows are prompts, each `repeats` times, copies side by side."""

    prompts: list[list[int]]
    forced: list[list[int]]
    """Tokens that were given as the beginning of the continuation."""
    token_ids: list[list[int]]
    """Tokens fed after prompt and forced tokens; with a teacher, the teacher's."""
    decided_ids: list[list[int]]
    """Tokens that this call chose; the same as `token_ids` unless there was a teacher."""
    texts: list[str]
    """Continuations as text, forced tokens included, special tokens and everything from a stop string on left out."""
    token_logp: list[list[float]]
    """Log-probability of each token fed, under the model as steered, at temperature 1, among its whole vocabulary."""
    decided_logp: list[list[float]]
    """The same of each token that this call chose; the difference says how near a tie a teacher's other token was."""
    entropy: list[list[float]]
    """Entropy of each next-token distribution over the whole vocabulary, in nats, at temperature 1."""
    finish: list[str]
    """Why each row ended: `eos`, `stop` or `length`."""
    sample: list[int]
    branch: list[int]
    edits: EditLog
    """Every edit that shaped a row, ordered by row, position and site. Those of a shared prefill are listed for each
    copy, although they were applied once."""
    repeats: int = 1
    """Rows per prompt."""
    ahead: list[int] = field(default_factory=list)
    """Per row, steps at most that were taken before what they chose was looked at. A replay takes as many."""
    allowed_logp: list[list[list[float]]] = field(default_factory=list)
    """Per row and step, the log-probability of each of the row's allowed tokens, in the order given, among the whole
    vocabulary; empty unless tokens were restricted. Differences of two are differences of their logits."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"<Decoded: {sum(map(len, self.token_ids)):,} tokens in {len(self)} rows, {len(self.edits):,} edits>"

    @classmethod
    def joined(cls, calls: Sequence[Decoded]) -> Decoded:
        """Several calls without repeats as one, rows behind each other."""
        assert all(call.repeats == 1 for call in calls)
        lists = [name for name, value in vars(calls[0]).items() if isinstance(value, list)]
        columns: dict[str, Any] = {name: [*chain(*(getattr(call, name) for call in calls))] for name in lists}
        starts = accumulate(map(len, calls[:-1]), initial=0)
        logs = [replace(call.edits, row=call.edits.row + start) for call, start in zip(calls, starts, strict=True)]
        return cls(**columns, edits=EditLog.cat(logs))

    def first_position(self, row: int) -> int:
        """Absolute position of a row's first token in `token_ids`."""
        return len(self.prompts[row]) + len(self.forced[row])


def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    source: InterventionSource | None = None,
    *,
    forced: Sequence[Sequence[int]] | None = None,
    repeats: int = 1,
    teacher: Sequence[Sequence[int]] | None = None,
    samples: Sequence[int] | None = None,
    branches: Sequence[int] | None = None,
    allowed: Sequence[Sequence[int]] | None = None,
    lengths: Sequence[int] | None = None,
    prompt_cache: PromptCache | None = None,
    progress: Callable[[int], None] | None = None,
    observe: Observe | StepRecorder | None = None,
    ahead: int | None = None,
) -> Decoded:
    """Decode continuations of prompts, steered by a source if there is one.

    Args:
        model: the model.
        prompts: token ids, one non-empty list per prompt.
        config: how tokens are chosen.
        source: decides edits at its sites and positions.
        forced: per prompt, tokens with which its continuation begins (a fork's past).
        repeats: decode every prompt this many times from one prefill. Copies may be edited differently from the token
            before the first free one on; what lies below the first edited site is computed once for all of them there.
        teacher: per row, tokens to feed instead of the chosen ones; rows end where it ends, or before by the config's
            rules. What would have been chosen is in `decided_ids`.
        samples: per prompt, its key for random draws (its index by default).
        branches: per row, its fork's number (0 by default, the copy's number with `repeats`).
        allowed: per prompt, the tokens among which each of its tokens is chosen, such as the letters of the options.
            Temperature and `top_p` then act on the model's distribution renormalised over them. Log-probabilities and
            entropies stay those of the model's own distribution over the whole vocabulary, so that `exp(decided_logp)`
            says what share the model itself gave the token; `allowed_logp` holds those of all allowed tokens.
        lengths: per row, how many tokens it has, instead of the config's rules.
        prompt_cache: holds the keys and values of prompts from call to call. Not used where a source asks for positions
            before the last prompt token, where tokens are forced, or a prompt is a single token.
        progress: called with the number of rows whenever some have ended.
        observe: is called with the logits of every choice (see `Observe`), or records steps.
        ahead: steps that may be taken before what they chose is looked at; see `DecodeStream`. By default as many as
            pay on the model's device (`usual_steps`), and one where something is called at every choice, which allows
            no more.

    Returns:
        Tokens, texts, log-probabilities and the log of edits.

    Raises:
        UserError: a prompt is empty, holds an unknown token, or the rows exceed the model's context; no token is
            allowed, or one that the model does not have; the rows do not fit in the device's memory.
        RuntimeError: edits applied are not the positions asked for.
    """
    check_is_model(model)
    if source is not None:
        check_is_source(source)
    config = config or DecodeConfig()
    recorder = observe if isinstance(observe, StepRecorder) else None
    called = observe is not None and recorder is None
    if ahead is None:
        ahead = 1 if called else usual_steps(model)
    if called and ahead > 1:
        raise UserError(f"ahead = {ahead}", "what observes is shown each step", "leave out one of them")
    if repeats < 1:
        raise UserError(f"repeats = {repeats}", "it must be at least 1", "change it")
    copies = [i for i in range(len(prompts)) for _ in range(repeats)]
    for name, values, expected in (
        ("forced", forced, len(prompts)),
        ("samples", samples, len(prompts)),
        ("branches", branches, len(copies)),
        ("teacher", teacher, len(copies)),
        ("lengths", lengths, len(copies)),
        ("allowed", allowed, len(prompts)),
    ):
        assert values is None or len(values) == expected, f"{name} has {len(values)} entries, not {expected}"
    check_prompts(model, prompts, config, forced)
    rows = [
        Row(
            list(prompts[i]),
            config if lengths is None else _of_length(config, lengths[number]),
            forced=list(forced[i]) if forced else [],
            sample=i if samples is None else samples[i],
            branch=number % repeats if branches is None else branches[number],
            teacher=None if teacher is None else teacher[number],
            allowed=None if allowed is None else allowed[i],
        )
        for number, i in enumerate(copies)
    ]
    group = max(1, config.batch_size // repeats) * repeats
    stream = DecodeStream(
        model, source, batch_size=group, refill=False, prompt_cache=prompt_cache, ahead=ahead, recorder=recorder
    )
    for first in range(0, len(rows), repeats):
        stream.add(*rows[first : first + repeats])
    longest, held = max(row.config.max_new_tokens for row in rows), held_bytes(model.device)
    try:
        with model.products.kept() if longest >= MANY else nullcontext():
            for step in stream:
                if observe is not None:
                    _show(observe, step, model.device)
                if progress is not None and step.ended:
                    progress(len(step.ended))
    except torch.OutOfMemoryError as error:
        tokens = max(len(row.prefix) + row.config.max_new_tokens for row in rows)
        raise too_many_rows(model, min(group, len(rows)), tokens, held) from error
    same = ("token_ids", "decided_ids", "token_logp", "decided_logp", "entropy", "finish", "branch")
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in same}
    return Decoded(
        **columns,
        prompts=[list(row.prompt) for row in rows],
        forced=[list(row.forced) for row in rows],
        texts=[row.text for row in rows],
        sample=[int(row.sample or 0) for row in rows],
        edits=EditLog.cat([row.edits for row in rows if len(row.edits)] or [EditLog.empty()]),
        repeats=repeats,
        ahead=[stream.ahead] * len(rows),
        allowed_logp=[] if allowed is None else [row.allowed_logp for row in rows],
    )


def _show(observe: Observe | StepRecorder, step: DecodeStep, device: torch.device) -> None:
    numbers = torch.tensor([row.number for row in step.rows], device=device)
    chosen = len(step.rows[0].token_ids) - 1
    if isinstance(observe, StepRecorder):
        observe.keep(numbers, chosen, step.logits, step.seen)
    else:
        assert step.logits is not None
        observe(numbers, chosen, step.logits)


def _of_length(config: DecodeConfig, length: int) -> DecodeConfig:
    """The same for a row of a given length, whatever would end it."""
    return replace(config, max_new_tokens=length, stop=(), stop_at_eos=False)
