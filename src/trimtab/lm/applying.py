"""Edits in the model's own calls: `generate` and plain forward passes of the `transformers` model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.editing import (
    DecodeStart,
    EndedRow,
    InterventionSource,
    JoinableSource,
    RowColumns,
    SourceRunner,
    check_is_source,
)
from trimtab.lm.edits import EditLog
from trimtab.lm.model import LanguageModel, check_is_model
from trimtab.lm.taps import edited


@contextmanager
def applied(model: LanguageModel | transformers.PreTrainedModel, source: InterventionSource) -> Iterator[AppliedEdits]:
    """Apply a source's edits whenever the `transformers` model runs inside the block.

        with applied(model, VectorSource(vector, "resid_post.15")):
            ids = model.hf.generate(**model.tokenizer("The sea", return_tensors="pt"))

    Input without a cache is a prompt, single tokens behind it are what is generated, and positions mean what they mean
    in `decode`: a greedy `generate` gives its tokens. What `generate` feeds behind a row's end is edited, too.

    Args:
        model: the model, or one of `transformers` by itself; its hooks are removed on leaving.
        source: decides edits. It must let rows join; one with features for each row is for one call.

    Yields:
        What was done.

    Raises:
        UserError: a site does not exist; while the model runs, if it cannot be known which tokens are a prompt, or rows
            are mixed as in beam search.
    """
    if isinstance(model, transformers.PreTrainedModel):
        model = LanguageModel.around(model)
    calls = AppliedEdits(model, source)
    with ExitStack() as stack:
        stack.callback(model.hf.base_model.register_forward_pre_hook(calls.before, with_kwargs=True).remove)
        stack.callback(model.hf.base_model.register_forward_hook(calls.after).remove)
        with edited(model, calls.runner.edits()):
            yield calls
        calls.finish()


class AppliedEdits:
    """What `applied` knows of the model's calls.

    Attributes:
        edits: of the latest prompts, once other prompts have come or the block has ended.
    """

    def __init__(self, model: LanguageModel, source: InterventionSource) -> None:
        check_is_model(model)
        check_is_source(source)
        if not isinstance(source, JoinableSource):
            raise UserError(
                f"{type(source).__name__} in the model's own calls",
                "it must know all rows and their length before the first token",
                "decode with it, or steer",
            )
        self.model, self.source, self.edits = model, source, EditLog.empty()
        self.runner = SourceRunner(model, source)
        self._started = self._complete = False
        self._names = list(inspect.signature(model.hf.base_model.forward).parameters)
        self._rows: RowColumns | None = None
        self._prompts: Int[Tensor, "B T"] = torch.empty(0, 0, dtype=torch.long)
        self._fed: Int[Tensor, " B"] = torch.empty(0, dtype=torch.long)
        """Tokens of each row that went through the model, padding excluded."""
        self._before = self._fed
        """Those of them that did so before the block."""
        self._length = 0
        """The same with padding, which is the cache's length."""
        self._cache: Any = None
        self._last_keys: Tensor | None = None

    def __repr__(self) -> str:
        return f"<AppliedEdits of {self.source!r}: {len(self.edits):,} edits>"

    def before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what the coming forward pass holds."""
        call = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, cache = call.get("input_ids"), call.get(self.model.cache_argument, call.get("past_key_values"))
        if getattr(cache, "keeps_nothing", False):
            cache = None
        if ids is None:
            raise UserError("inputs_embeds", "edits are chosen by token", "give input_ids")
        past = 0 if cache is None else int(cache.get_seq_length())
        real = self._real(call.get("attention_mask"), ids, past)
        position = real.long().cumsum(dim=1) - 1
        token_by_token = ids.shape[1] == 1 or not self.source.positions.needs_prompt
        known = self._rows is not None and cache is self._cache and (len(ids), past) == (len(self._fed), self._length)
        if past and token_by_token and known:
            self._check_order(cache)
        else:
            self._begin(ids, real, position, past)
        self._cache, self._length, self._fed = cache, past + ids.shape[1], position[:, -1] + 1
        assert self._rows is not None
        self._complete = False
        which = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        self.runner.aim(ids, position[:, past:].clamp_min(0), self._rows, which, real=real[:, past:])

    def after(self, _module: Any, _args: Any, _output: Any) -> None:
        """Remember how the pass left the cache."""
        self._last_keys, self._complete = self._keys(self._cache), True

    def finish(self) -> None:
        """Take the edits of the rows out of the runner, and check that they are those that were asked for."""
        if self._rows is None:
            return
        fed, lengths = self._fed.tolist(), self._rows.prompt_length.tolist()
        if not self._complete:  # the last pass failed
            self.runner.forget(self._rows.number)
            self._rows = None
            return
        self.source.positions.check([[0] * length for length in lengths], fed)
        known = zip(lengths, fed, self._before.tolist(), strict=True)
        logs = self.runner.leave([EndedRow(i, length, n, before) for i, (length, n, before) in enumerate(known)])
        self.edits, self._rows = EditLog.cat(logs), None

    def _real(self, mask: Any, ids: Int[Tensor, "B T"], past: int) -> Bool[Tensor, "B P"]:
        """Where each row has a token, the cache's included."""
        length = past + ids.shape[1]
        if mask is None:
            return torch.ones(len(ids), length, dtype=torch.bool, device=ids.device)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (len(ids), length):
            raise UserError(
                "the attention mask",
                f"it does not say of {len(ids)} rows which of {length} places hold tokens",
                "leave it [rows, places], with a dynamic cache",
            )
        return mask.bool()

    def _begin(
        self, ids: Int[Tensor, "B T"], real: Bool[Tensor, "B P"], position: Int[Tensor, "B P"], past: int
    ) -> None:
        """Take what is fed as prompts."""
        rule = self.source.positions
        if rule.needs_prompt and past:
            raise UserError(
                f"{ids.shape[1]} tokens behind a cache",
                f"positions {rule} ask where the prompt ends, which only a call that begins without a cache says",
                "begin without one, generate token by token, or use positions all",
            )
        before = self._prompts
        grows = ids.shape == (before.shape[0], before.shape[1] + 1) and bool((ids[:, :-1] == before).all())
        if rule.needs_prompt and self._rows is not None and self._cache is None and grows:
            raise UserError(
                "generation without a cache",
                f"positions {rule} ask where the prompt ends, and each call looks like one",
                "leave use_cache on, or use positions all",
            )
        self.finish()
        length, each = real.sum(dim=1), torch.arange(len(ids), device=ids.device)
        prompts = [row[kept].tolist() for row, kept in zip(ids, real[:, past:], strict=True)]
        tell = self.source.join if self._started else self.source.start
        tell(DecodeStart(prompts, each, 0, self.model.device, (), self.model))
        self._started = True
        self._rows = RowColumns(each, each, length, torch.zeros_like(each), each, torch.zeros_like(each))
        self._prompts, self._before = ids, real[:, :past].sum(dim=1)

    def _check_order(self, cache: Any) -> None:
        """Refuse rows that have changed places, as in beam search: the source and the log know them by their place."""
        keys = self._keys(cache)
        if keys is None or self._last_keys is None or not torch.equal(keys, self._last_keys):
            raise UserError("rows that change places", "edits belong to rows", "decode without beams (num_beams=1)")

    def _keys(self, cache: Any) -> Tensor | None:
        """What the last layer that has keys holds of each row's last token, which depends on all tokens before."""
        held = [] if cache is None else [keys for layer in cache.layers if (keys := layer.keys) is not None]
        return held[-1][:, :, -1].clone() if held else None
