"""From a residual to next-token logits: the model's own final norm and head, a block of rows at a time.

A block of logits is kept in one buffer that is used again and again, so that scoring thousands of rows over a
vocabulary of 50,000 or more neither fills the memory nor pays for fresh pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm.capabilities import percent
from trimtab.lm.layouts import text_config
from trimtab.lm.model import LanguageModel
from trimtab.lm.precision import product_precision
from trimtab.lm.upper_layers import allowed_difference, difference

CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 96 << 20, 1 << 30


class LogitRows(NamedTuple):
    """A block of logits, valid until the next block is asked for."""

    start: int  # index of the first row
    logits: Tensor  # [R, V] float32


class Unembedding:
    """The final norm and the head of a model.

    Args:
        model: the model.
        block_bytes: size of a block of float32 logits (default: 96 MiB, on a GPU 1 GiB).

    Raises:
        UserError: they do not give the model's logits.
    """

    def __init__(self, model: LanguageModel, block_bytes: int | None = None) -> None:
        model.require("logit-lens")
        self.norm: nn.Module | None = model.layout.final_norm
        self.head: nn.Module = model.layout.head
        config = text_config(model.hf)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = _logit_scale(config)
        self.name, self.dtype, self.vocab_size = model.name, model.dtype, int(self.head.weight.shape[0])  # type: ignore[union-attr]
        if block_bytes is None:
            block_bytes = CPU_BLOCK_BYTES if model.device.type == "cpu" else GPU_BLOCK_BYTES
        self.block_rows = max(1, block_bytes // (4 * self.vocab_size))
        self._buffer: Tensor | None = None

    @torch.no_grad()
    def blocks(self, hidden: Float[Tensor, "B d"]) -> Iterator[LogitRows]:
        """Logits of residual rows (before the final norm), in blocks of `block_rows`."""
        normed = self._normed(hidden)
        count = -(-len(normed) // self.block_rows)
        size = -(-len(normed) // max(count, 1))  # blocks of even size: a short last one would be a slow product
        for start in range(0, len(normed), max(size, 1)):
            yield LogitRows(start, self._project(normed[start : start + size]))

    def free(self) -> None:
        """Free the memory of blocks until the next one."""
        self._buffer = None

    def logits(self, hidden: Float[Tensor, "B d"]) -> Float[Tensor, "B V"]:
        """All logits of residual rows at once, in float32; gradients, where they are on, reach the rows."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return self._capped(self.head(self._normed(hidden)).float())
        return torch.cat([rows.logits.clone() for rows in self.blocks(hidden)])

    def of_tokens(self, hidden: Float[Tensor, "B d"], tokens: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Logits of a few tokens for each residual row, in float32; the others are not computed."""
        normed = self._normed(hidden)
        logits = (self.head.weight[tokens] @ normed[..., None]).squeeze(-1).float()  # type: ignore[index]
        if getattr(self.head, "bias", None) is not None:
            logits = logits + self.head.bias[tokens]  # type: ignore[index]
        return self._capped(logits)

    def check(self, hidden: Float[Tensor, " d"], logits: Float[Tensor, " V"]) -> None:
        """Compare with the model's own logits for one row.

        Raises:
            UserError: they differ, as where a model scales its logits in a way that is not known here.
        """
        precision = product_precision(self.dtype, hidden.device)
        by = difference(self.logits(hidden[None]), logits[None].float())
        if not by <= allowed_difference(precision):
            why = "its logits are not final norm and head of its residual"
            if not math.isnan(by):
                why += f" (by {percent(by)}, more than rounding to {precision.name})"
            finer = f", or {precision.finer}" if precision.finer else ""
            raise UserError(f"model {self.name}", why, f"use another model{finer}")

    def _normed(self, hidden: Float[Tensor, "R d"]) -> Float[Tensor, "R d"]:
        return hidden.to(self.dtype) if self.norm is None else self.norm(hidden.to(self.dtype))

    def _project(self, normed: Float[Tensor, "R d"]) -> Float[Tensor, "R V"]:
        head = self.head
        hooked = bool(head._forward_hooks or head._forward_pre_hooks)
        if type(head) is nn.Linear and head.bias is None and self.dtype == torch.float32 and not hooked:
            if self._buffer is None or len(self._buffer) < len(normed):
                self._buffer = normed.new_empty(len(normed), self.vocab_size)
            logits = torch.mm(normed, head.weight.t(), out=self._buffer[: len(normed)])
        else:
            logits = head(normed).float()
        return self._capped(logits)

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, as Cohere, Granite and Falcon-H1 say it; that no other is, is checked."""
    scale = 1.0
    for name, divides in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scale = scale / value if divides else scale * value
    return scale
