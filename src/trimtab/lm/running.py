"""Rows that are decoded together: their cache, and what is fed to the model for them.

Whole prompts at first (once for all copies of a prompt), then one token per row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm.batch import TokenBatch
from trimtab.lm.editing import RowColumns, SourceRunner
from trimtab.lm.model import LanguageModel
from trimtab.lm.observing import StepRecorder
from trimtab.lm.prompt_cache import PromptCache
from trimtab.lm.row import Row
from trimtab.lm.sampling import pack_allowed
from trimtab.lm.taps import edited
from trimtab.lm.upper_layers import MOST_COPIES, can_run_from, first_edited_layer, side_by_side


class RunningRows:
    """Rows that share a cache. Constructing one feeds their prompts.

    Args:
        model: the model.
        runner: applies the source's edits, if there is one.
        rows: copies of a prompt side by side.
        copies: of each prompt.
        prompt_cache: holds keys and values of prompts; see `decode`.
        recorder: watches each forward pass.

    Attributes:
        logits: `[B, V]` of each row's next token.
        held: `[B]` tokens in the cache, padding excluded.
        ids: `[B]` the tokens to feed next.
        allowed: `[B, A]` what each row may choose from (see `pack_allowed`), if that is restricted in any.
        seen: what the recorder saw of each row at its last pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        runner: SourceRunner | None,
        rows: list[Row],
        copies: int,
        prompt_cache: PromptCache | None,
        recorder: StepRecorder | None = None,
    ) -> None:
        self.model, self._runner, self.rows, self._recorder = model, runner, rows, recorder
        self.seen: Sequence[Tensor] = ()
        known = [(r.number, r.index, len(r.prompt), r.config.seed, r.sample, r.branch) for r in rows]
        self.columns = RowColumns(*torch.tensor(known, device=model.device).unbind(1))
        self.held = torch.zeros(len(rows), dtype=torch.long, device=model.device)
        self.ids = torch.tensor([row.prefix[-1] for row in rows], device=model.device)
        self.allowed = self._pack_allowed()
        self._side_by_side: tuple[int, int] | None = None
        """Copies of each prompt, and the layer from which on their last places in the cache are one for each."""
        self._prefill(copies, prompt_cache)

    def _prefill(self, copies: int, prompt_cache: PromptCache | None) -> None:
        """Feed the prompts: the last token for each row, what comes before it once for all copies of a prompt."""
        model, runner, device = self.model, self._runner, self.model.device
        prefixes = [row.prefix for row in self.rows]
        heads = [prefix[:-1] for prefix in prefixes[::copies]]
        parting = _parting_layer(model, runner, copies)
        reserve = self._reserve(1 if parting is None else copies)
        unedited = runner is None or runner.source.positions.kind == "generated"
        unedited = unedited and not any(row.forced for row in self.rows)  # a fork's past may hold edits
        if prompt_cache is not None and unedited and all(heads):
            self.cache = prompt_cache.load(heads, reserve)
        else:
            self.cache = model.new_cache(reserve=reserve)
            whole = heads if copies > 1 else prefixes
            if any(whole):
                batch = TokenBatch.pad(whole, model.pad_id, device)
                which = torch.arange(0, len(self.rows), copies, device=device)[:, None].expand_as(batch.ids)
                if runner is not None:
                    runner.aim(batch.ids, batch.position_ids, self.columns, which, real=batch.real, copies=copies)
                self.logits, self.held = self._forward(batch), batch.lengths
            if copies == 1:
                return
        self.held = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
        if parting is None:
            if copies > 1 and any(heads):
                self.cache.repeat(copies)
            self.feed()
        else:
            self._feed_copies(copies, parting)

    def feed(self) -> None:
        """Feed one token of each row, `ids`."""
        if self._runner is not None:
            which = torch.arange(len(self.ids), device=self.ids.device)[:, None]
            ids, held, *columns = (
                one.clone() for one in (self.ids, self.held, *self.columns)
            )  # a source may write there
            self._runner.aim(ids[:, None], held[:, None], RowColumns(*columns), which, chooses=True)
        self.logits = self._forward(TokenBatch.full(self.ids[:, None]), self.held)
        self.held = self.held + 1

    def _feed_copies(self, copies: int, layer: int) -> None:
        """Feed each prompt's last token once below a layer, and side by side for all copies from there on."""
        ids, held = self.ids.view(-1, copies), self.held.view(-1, copies)
        batch = TokenBatch.full(ids[:, :1])
        if self._runner is None:
            self.logits = self._forward(batch, held[:, 0]).repeat_interleave(copies, dim=0)
        else:
            which = torch.arange(len(self.rows), device=ids.device).view(-1, copies)
            self._runner.aim(ids, held, self.columns, which)
            with side_by_side(self.model, layer, copies, self.cache.length):
                self.logits = self._forward(batch, held[:, 0], last=copies)
        self.held = self.held + 1
        self._side_by_side = copies, layer

    def _forward(self, batch: TokenBatch, held: Int[Tensor, " B"] | None = None, last: int = 1) -> Float[Tensor, "B V"]:
        padded = self.cache.length > 0 and any(row.length - 1 != self.cache.length for row in self.rows)
        with (
            self._recorder.watching() if self._recorder else nullcontext(),
            edited(self.model, self._runner.edits()) if self._runner else nullcontext(),
        ):
            logits = self.model.forward(batch, cache=self.cache, past_lengths=held if padded else None, last=last)
            self.seen = self._recorder.seen(len(self.rows)) if self._recorder else ()
        return logits.reshape(-1, logits.shape[-1])

    def part(self) -> None:
        """Give copies that were fed side by side rows of their own in the cache."""
        if self._side_by_side is not None:
            self.cache.unfold(*self._side_by_side, reserve=self._reserve())
            self._side_by_side = None

    def keep(self, rows: list[Row]) -> None:
        """Drop all other rows."""
        kept = set(map(id, rows))
        index = torch.tensor([i for i, row in enumerate(self.rows) if id(row) in kept], device=self.model.device)
        self.cache.select(index)
        self.rows, self.columns = rows, self.columns.take(index)
        self.held, self.ids = self.held[index], self.ids[index]
        self.allowed = None if self.allowed is None else self.allowed[index]

    def join(self, other: RunningRows) -> None:
        """Put rows that have been fed by themselves behind these."""
        mine, theirs = (max(row.length for row in running.rows) for running in (self, other))
        self.part()
        other.part()
        self.rows = [*self.rows, *other.rows]
        self.allowed = self._pack_allowed()
        self.cache.append(other.cache, mine, theirs, reserve=self._reserve())
        self.columns = RowColumns(*map(torch.cat, zip(self.columns, other.columns, strict=True)))
        self.held, self.ids, self.logits = (
            torch.cat([ours, added])
            for ours, added in ((self.held, other.held), (self.ids, other.ids), (self.logits, other.logits))
        )
        self.seen = [torch.cat(both) for both in zip(self.seen, other.seen, strict=True)]

    def _pack_allowed(self) -> Int[Tensor, "B A"] | None:
        if all(row.allowed is None for row in self.rows):
            return None
        return pack_allowed([(0,) if row.allowed is None else row.allowed for row in self.rows], self.model.device)

    def _reserve(self, least: int = 1) -> int:
        """Places that the cache needs at most."""
        return max(row.length for row in self.rows) + max(least, max(row.tokens_left for row in self.rows))


def _parting_layer(model: LanguageModel, runner: SourceRunner | None, copies: int) -> int | None:
    """The layer from which copies of a prompt differ at its last token; None if they must be fed one by one."""
    if not 1 < copies <= MOST_COPIES:
        return None
    if runner is None:
        return model.n_layers
    layer = first_edited_layer(runner.sites)
    return layer if can_run_from(model, layer, "copies") else None
