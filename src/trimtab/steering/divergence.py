"""KL(steered ‖ unsteered) along decoded answers, for little more than one pass over them.

Decoding has computed half of it already: the logits of every choice, and every activation below the first edited site,
which depends on the tokens alone and is therefore the unsteered model's as well. Both are kept. What is left is the
layers above the site and the head, unedited, over the finished answers: all positions at once, behind the prompts'
cached keys and values, once for all rows with equal prompts and tokens. Where logits are too many to be kept, or are
those of steps that were taken ahead, what the head read is kept instead, and multiplied again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm import Decoded, InterventionSource, LanguageModel, PromptCache, TokenBatch, edited
from trimtab.lm.answer_logits import answer_logits
from trimtab.lm.token_statistics import as_slice, kl_divergence
from trimtab.lm.upper_layers import first_edited_layer, input_site, starting_at

KEPT_BYTES = 1 << 30
"""Steered logits are kept if they need no more than this."""
LOGITS_PER_PASS = 1 << 25
"""Unsteered logits held at once; rows per pass follow from it."""


class _Choices(NamedTuple):
    """What was kept of the choices of some rows."""

    rows: Int[Tensor, " B"]
    step: int
    logits: Float[Tensor, "B V"] | None
    read: Float[Tensor, "B d"] | None
    """What the head read, where logits are not kept."""
    lower: Float[Tensor, "B d"] | None
    """The input of the first layer that may be edited."""


class DivergenceRecorder:
    """Keeps what a decode call computes, and measures afterwards how far each choice was from the unsteered model's.

        recorder = DivergenceRecorder(model, source)
        decoded = decode(model, prompts, config, source, observe=recorder)
        kl = recorder.measure(decoded, prompt_cache)

    Args:
        model: the model.
        source: what steers; None if the model is changed in another way, and then all of its layers run again.
        kept_bytes: memory for the steered logits; of those that need more the head's input is kept.
        to: another model to measure the divergence from, of the same vocabulary; the model itself by default.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: InterventionSource | None,
        *,
        kept_bytes: int = KEPT_BYTES,
        to: LanguageModel | None = None,
    ) -> None:
        self.model, self.to = model, to or model
        sites = [] if source is None or to is not None else [model.site(site) for site in source.sites]
        self._layer = first_edited_layer(sites) if sites else 0
        """The first layer whose input may be edited."""
        self._bytes_left = kept_bytes
        self._kept: list[_Choices] = []
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the head reads, and the input of the first layer that may be edited."""
        below = {input_site(self._layer): lambda x: self._seen.update(lower=x)} if self._layer else {}
        with edited(self.model, below), ExitStack() as stack:
            head = self.model.layout.head.register_forward_pre_hook(lambda _, args: self._seen.update(read=args[0]))
            stack.callback(head.remove)
            yield
        self._seen = {}

    def seen(self, rows: int) -> list[Float[Tensor, "B d"]]:
        """What the head read of each row, and what that layer was given."""
        return [_of_rows(self._seen[name], rows) for name in ("read", "lower") if name in self._seen]

    def keep(
        self, rows: Int[Tensor, " B"], step: int, logits: Float[Tensor, "B V"] | None, seen: Sequence[Tensor]
    ) -> None:
        """Keep one choice; see `StepRecorder`."""
        read, *lower = seen
        if logits is not None:
            self._bytes_left -= logits.nbytes
        kept = logits if self._bytes_left >= 0 else None
        lowest = lower[0] if lower else None
        self._kept.append(_Choices(rows.cpu(), step, kept, None if kept is not None else read, lowest))

    @torch.no_grad()
    def measure(self, decoded: Decoded, prompt_cache: PromptCache | None = None) -> Float[Tensor, "N T"]:
        """KL(steered ‖ unsteered) of each choice, in nats; 0 behind the end of a row. On the CPU.

        Args:
            decoded: the result of the recorded call; T is its longest row.
            prompt_cache: of the model that it is measured from.
        """
        kl, cache = torch.zeros(len(decoded), max(map(len, decoded.token_ids))), prompt_cache or PromptCache(self.to)
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}  # an unsteered pass depends on no more
        for row, tokens in enumerate(decoded.token_ids):
            alike.setdefault((tuple(_prefix(decoded, row)), tuple(tokens[:-1])), []).append(row)
        texts = sorted(alike.values(), key=lambda rows: len(decoded.token_ids[rows[0]]))
        for part in _passes(texts, decoded, LOGITS_PER_PASS // self.model.vocab_size):
            self._measure(decoded, part, cache, kl)
        return kl

    def _measure(self, decoded: Decoded, texts: list[list[int]], cache: PromptCache, kl: Tensor) -> None:
        """Fill in some texts, each with the rows that have it."""
        plain = self._plain(decoded, [rows[0] for rows in texts], cache)
        text = torch.full((len(decoded),), -1)
        for number, rows in enumerate(texts):
            text[rows] = number
        for choices in self._kept:
            mine = (text[choices.rows] >= 0).nonzero()[:, 0]
            if len(mine) == 0:
                continue
            rows, index = choices.rows[mine], as_slice(mine.tolist())
            if choices.logits is not None:
                steered = choices.logits[index]
            else:
                assert choices.read is not None
                steered = self._logits(choices.read[index])
            compared, which = text[rows].unique(return_inverse=True)
            kl[rows, choices.step] = kl_divergence(steered, plain[compared, choices.step], which).cpu()

    def _plain(self, decoded: Decoded, rows: list[int], cache: PromptCache) -> Float[Tensor, "B A V"]:
        """The logits of the model that is measured from, unsteered, at the places of some answers."""
        prefixes, answers = [_prefix(decoded, row) for row in rows], [decoded.token_ids[row] for row in rows]
        if min(map(len, prefixes)) < 2:  # there is nothing that a cache could hold
            return answer_logits(self.to, prefixes, answers, None)
        under = None
        if self._layer:
            under = starting_at(self.to, self._layer, self._lower(rows, max(map(len, answers))))
        return answer_logits(self.to, prefixes, answers, cache, under)

    def _lower(self, rows: list[int], steps: int) -> Float[Tensor, "B A d"]:
        """The input of the first layer that may be edited, at the places of some answers."""
        first = self._kept[0].lower
        assert first is not None
        found = first.new_zeros(len(rows), steps, first.shape[-1])
        place = {row: i for i, row in enumerate(rows)}
        for choices in self._kept:
            mine = [i for i, row in enumerate(choices.rows.tolist()) if row in place]
            if mine and choices.lower is not None:
                found[[place[row] for row in choices.rows[mine].tolist()], choices.step] = choices.lower[mine]
        return found

    def _logits(self, read: Float[Tensor, "B d"]) -> Float[Tensor, "B V"]:
        """What the model makes of what its head reads."""
        model, read = self.model, read[:, None]
        ids = torch.full(read.shape[:2], model.pad_id, device=model.device)
        with starting_at(model, model.n_layers, read), ExitStack() as stack:
            handle = model.layout.head.register_forward_pre_hook(lambda _module, args: (read, *args[1:]))
            stack.callback(handle.remove)
            return model.forward(TokenBatch.full(ids), last=1)[:, 0]


def _prefix(decoded: Decoded, row: int) -> list[int]:
    return decoded.prompts[row] + decoded.forced[row]


def _of_rows(seen: Float[Tensor, "B T d"], rows: int) -> Float[Tensor, "R d"]:
    """What each row's last token gave; copies of a prompt may have been fed as tokens side by side, or as one."""
    last = seen.flatten(0, 1) if len(seen) < rows and seen.shape[1] > 1 else seen[:, -1].contiguous()
    return last.repeat_interleave(rows // len(last), dim=0) if len(last) < rows else last


def _passes(texts: Sequence[list[int]], decoded: Decoded, tokens: int) -> Iterator[list[list[int]]]:
    """Texts, shortest first, in parts of at most so many tokens, padding included."""
    part: list[list[int]] = []
    for text in texts:
        if part and (len(part) + 1) * len(decoded.token_ids[text[0]]) > tokens:
            yield part
            part = []
        part.append(text)
    yield part
