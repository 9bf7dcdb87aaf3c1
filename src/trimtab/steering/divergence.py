"""KL(steered ‖ unsteered) along decoded answers, at little more than the one pass that it cannot do without.

Decoding has computed half of it already: the logits of every choice, and every activation below the first edited site,
which depends on the tokens alone and is therefore the unsteered model's as well. Both are kept. What is left is the
layers above the site and the head, unedited, over the finished answers: all positions at once, behind the prompts'
cached keys and values, once for all rows with equal prompts and tokens. Where logits are too many to be kept, what the
head read is kept instead, and multiplied again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.lm import Decoded, InterventionSource, LanguageModel, PromptCache, TokenBatch
from trimtab.lm.copies import first_edited_layer
from trimtab.lm.token_statistics import rows_per_block
from trimtab.steering.effects import token_effects

KEPT_BYTES = 1 << 30
"""Steered logits are kept if they need no more than this."""
LOGITS_PER_PASS = 1 << 25
"""Unsteered logits held at once; rows per pass follow from it."""

_begins_above: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = weakref.WeakKeyDictionary()
"""Whether a model may be started at a layer's input, as far as it has been tried."""


class _SomeRows(NamedTuple):
    """Steered logits of some of the rows that were asked for."""

    which: Int[Tensor, " r"]
    logits: Float[Tensor, "r V"]


class DivergenceRecorder:
    """Keeps what a decode call computes, and measures afterwards how far each choice was from the unsteered model's.

        with DivergenceRecorder(model, source, n_rows=64, max_new_tokens=32) as recorder:
            decoded = decode(model, prompts, config, source, observe=recorder.see)
        kl = recorder.measure(decoded, prompt_cache)

    Args:
        model: the model.
        source: what steers. If it edits positions before the last prompt token, or the model's layers give more than
            an activation, `measure` does what `token_effects` does.
        n_rows: rows to be decoded.
        max_new_tokens: of the decoding config.
        kept_bytes: memory for the steered logits; if they need more, the head's input is kept.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: InterventionSource,
        *,
        n_rows: int,
        max_new_tokens: int,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.model, self.source = model, source
        self.shape = (n_rows, max_new_tokens)
        self._layer = first_edited_layer([model.site(site) for site in source.sites])
        """The first layer whose input may be edited."""
        self._follows = source.positions.kind == "generated"
        size = torch.empty(0, dtype=model.dtype).element_size()
        self._keeps_logits = n_rows * max_new_tokens * model.vocab_size * size <= kept_bytes
        self._input: Tensor | None = None
        """`[N, T, d]` of layer `_layer`, before any edit."""
        self._read: Tensor | None = None
        """`[N, T, d]` what the head read, if logits are not kept."""
        self._kept: list[Float[Tensor, "B V"]] = []
        self._entry = torch.full(self.shape, -1)
        self._place = torch.full(self.shape, -1)
        self._seen: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not self._follows:
            return self
        layout = self.model.layout
        # Registered before decoding registers its edits, so that it sees what is not edited.
        below = layout.layers[max(self._layer - 1, 0)].module
        self._stack.callback(below.register_forward_hook(self._see_layer).remove)
        if not self._keeps_logits:
            self._stack.callback(layout.head.register_forward_pre_hook(self._see_read).remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _see_layer(self, _module: object, _args: object, output: Any) -> None:
        if not isinstance(output, Tensor):
            self._follows = False
        elif self._layer:
            self._seen["input"] = output

    def _see_read(self, _module: object, args: tuple[Tensor, ...]) -> None:
        self._seen["read"] = args[0]

    def see(self, rows: Int[Tensor, " B"], step: int, logits: Float[Tensor, "B V"]) -> None:
        """Keep one choice; what `decode` takes as `observe`."""
        if not self._follows:
            return
        if "input" in self._seen:
            self._input = _filed(self._input, self.shape, rows, step, _last(self._seen.pop("input"), len(rows)))
        if not self._keeps_logits:
            self._read = _filed(self._read, self.shape, rows, step, _last(self._seen.pop("read"), len(rows)))
            return
        here = rows.cpu()
        self._entry[here, step] = len(self._kept)
        self._place[here, step] = torch.arange(len(here))
        self._kept.append(logits)

    @torch.no_grad()
    def measure(self, decoded: Decoded, prompt_cache: PromptCache | None = None) -> Float[Tensor, "N T"]:
        """KL(steered ‖ unsteered) of each choice, in nats; 0 behind the end of a row. On the CPU.

        Args:
            decoded: what came of the call that was recorded.
            prompt_cache: of the call.
        """
        kl = torch.zeros(self.shape)
        if not self._follows or any(decoded.forced) or min(map(len, decoded.prompts)) < 2:
            for row, values in enumerate(token_effects(self.model, decoded, self.source, top_k=1).kl_total):
                kl[row, : len(values)] = torch.tensor(values)
            return kl
        texts = self._alike(decoded) if self._keeps_logits else [[row] for row in range(len(decoded))]
        texts = sorted(texts, key=lambda rows: len(decoded.token_ids[rows[0]]))
        cache = prompt_cache or PromptCache(self.model)
        for part in _passes(texts, decoded, LOGITS_PER_PASS // self.model.vocab_size):
            self._measure(decoded, part, cache, kl)
        return kl

    def _alike(self, decoded: Decoded) -> list[list[int]]:
        """Rows by what was fed of them, which is all that an unsteered pass depends on."""
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for row, (prompt, tokens) in enumerate(zip(decoded.prompts, decoded.token_ids, strict=True)):
            found.setdefault((tuple(prompt), tuple(tokens[:-1])), []).append(row)
        return list(found.values())

    def _measure(self, decoded: Decoded, texts: list[list[int]], cache: PromptCache, kl: Tensor) -> None:
        """Fill in some texts, each with the rows that have it, the shortest first."""
        plain = self._plain(decoded, [rows[0] for rows in texts], cache)
        rows = torch.tensor([row for alike in texts for row in alike])
        text = torch.tensor([i for i, alike in enumerate(texts) for _ in alike])
        length = torch.tensor([len(decoded.token_ids[row]) for row in rows.tolist()])
        steered = self._kept_logits if self._keeps_logits else self._logits_again(rows, plain.shape[1])
        for step in range(plain.shape[1]):
            alive = int((length <= step).sum())
            first = int(text[alive])
            logp = plain[first:, step].float().log_softmax(-1)
            for which, logits in steered(step, rows[alive:]):
                which = which + alive
                kl[rows[which], step] = divergences(logits, logp, text[which] - first).cpu()

    def _plain(self, decoded: Decoded, rows: list[int], cache: PromptCache) -> Float[Tensor, "B A V"]:
        """The unsteered model's logits at the places of some answers."""
        begins = self._input is not None
        if begins and (known := _begins_above.setdefault(self.model.hf, {})).get(self._layer) is None:
            whole, begun = (self._forward(decoded, rows[-1:], cache, begins=b) for b in (False, True))
            tolerance = (1 + float(whole.abs().max())) * (1e-4 if self.model.dtype == torch.float32 else 5e-2)
            known[self._layer] = bool((whole - begun).abs().max() <= tolerance)
        return self._forward(decoded, rows, cache, begins=begins and _begins_above[self.model.hf][self._layer])

    def _forward(
        self, decoded: Decoded, rows: list[int], cache: PromptCache, *, begins: bool
    ) -> Float[Tensor, "B A V"]:
        model, longest = self.model, max(len(decoded.token_ids[row]) for row in rows)
        heads = [decoded.prompts[row][:-1] for row in rows]
        held = cache.load(heads, max(map(len, heads)) + longest)
        fed = [[decoded.prompts[row][-1], *decoded.token_ids[row][:-1]] for row in rows]
        ids = torch.tensor([tokens + [model.pad_id] * (longest - len(tokens)) for tokens in fed], device=model.device)
        past = torch.tensor([len(head) for head in heads], device=model.device)
        with ExitStack() as stack:
            if begins:
                assert self._input is not None
                stack.enter_context(_begun(model, self._layer, self._input[rows, :longest]))
            return model.forward(
                TokenBatch.full(ids),
                cache=held,
                past_lengths=past if len(set(map(len, heads))) > 1 else None,
                last=longest,
            )

    def _kept_logits(self, step: int, rows: Int[Tensor, " R"]) -> Iterator[_SomeRows]:
        """What some rows chose from, a batch of the decode call at a time."""
        entry, place = self._entry[rows, step], self._place[rows, step]
        assert bool((entry >= 0).all()), "a choice was not shown"
        for number in entry.unique().tolist():
            which = (entry == number).nonzero()[:, 0]
            yield _SomeRows(which, _take(self._kept[number], place[which]))

    def _logits_again(
        self, rows: Int[Tensor, " R"], count: int
    ) -> Callable[[int, Int[Tensor, " r"]], Iterator[_SomeRows]]:
        """The same from the head's output for what it read while decoding, for the last of `rows`."""
        assert self._read is not None
        model, read = self.model, self._read[rows.to(self._read.device), :count]
        ids = torch.full(read.shape[:2], model.pad_id, device=model.device)
        with ExitStack() as stack:
            stack.enter_context(_begun(model, model.n_layers, read))
            handle = model.layout.head.register_forward_pre_hook(lambda _module, args: (read, *args[1:]))
            stack.callback(handle.remove)
            logits = model.forward(TokenBatch.full(ids), last=count)
        return lambda step, last: iter([_SomeRows(torch.arange(len(last)), logits[len(rows) - len(last) :, step])])


def divergences(
    steered: Float[Tensor, "R V"], plain: Float[Tensor, "U V"], which: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """KL of each row of logits to one of several distributions, in nats, never below 0.

    Args:
        steered: logits.
        plain: log-probabilities.
        which: the row of `plain` that each row of `steered` is compared with.
    """
    rows = rows_per_block(steered)
    logp = steered.new_empty(min(rows, len(steered)), steered.shape[1], dtype=torch.float32)
    difference = torch.empty_like(logp)
    found = logp.new_empty(len(steered))
    for start in range(0, len(steered), max(rows, 1)):
        part = steered[start : start + rows].float()
        p, d = logp[: len(part)], difference[: len(part)]
        torch.log_softmax(part, -1, out=p)
        torch.sub(p, _take(plain, which[start : start + rows]), out=d)
        found[start : start + rows] = torch.linalg.vecdot(p.exp_(), d)
    return found.clamp_min_(0)


def _take(rows: Tensor, which: Int[Tensor, " R"]) -> Tensor:
    """Rows by number; a view where they are consecutive or all the same."""
    first = int(which[0])
    if bool((which == first).all()):
        return rows[first : first + 1]
    if torch.equal(which, torch.arange(first, first + len(which))):
        return rows[first : first + len(which)]
    return rows[which.to(rows.device)]


def _last(seen: Float[Tensor, "B T d"], rows: int) -> Float[Tensor, "R d"]:
    """What each row's last token gave; copies of a prompt may have been fed as tokens side by side."""
    return seen[:, -1] if len(seen) == rows else seen.flatten(0, 1)


def _filed(
    table: Float[Tensor, "N T d"] | None, shape: tuple[int, int], rows: Tensor, step: int, values: Float[Tensor, "B d"]
) -> Float[Tensor, "N T d"]:
    """A table with one step of some rows written; it is made when the width is known."""
    if table is None:
        table = values.new_zeros(*shape, values.shape[-1])
    table[rows.to(table.device), step] = values
    return table


def _passes(texts: Sequence[list[int]], decoded: Decoded, tokens: int) -> Iterator[list[list[int]]]:
    """Texts, shortest first, in parts of at most so many tokens, padding included."""
    part: list[list[int]] = []
    for text in texts:
        if part and (len(part) + 1) * len(decoded.token_ids[text[0]]) > tokens:
            yield part
            part = []
        part.append(text)
    yield part


@contextmanager
def _begun(model: LanguageModel, layer: int, hidden: Float[Tensor, "B T d"]) -> Iterator[None]:
    """Forward passes begin with `hidden` at a layer's input: every layer below gives just that."""
    below = [found.module for found in model.layout.layers[:layer]]
    own = [module.__dict__.get("forward") for module in below]  # accelerate puts its own there
    try:
        for module in below:
            module.forward = lambda *_args, **_kwargs: hidden  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(below, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
