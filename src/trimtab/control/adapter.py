"""A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) on the attention projections, by hooks: the model is unchanged.

`W x` becomes `W x + scale · alpha / rank · B A x`. It acts at the places that a policy may edit (the last prompt token
and the answer), so that prompts' keys and values are shared with everything else, or at all places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm import GrowingCache, LanguageModel, PromptCache

AdapterPositions = Literal["generated", "all"]
ALPHA = 16.0
"""Divided by the rank, it multiplies the changes."""


class Adapter(nn.Module):
    """Low-rank changes of every layer's query and value projections (of the fused projection in GPT-2's layout).

    Args:
        model: the model.
        rank: of each change.
        positions: `generated` for the last prompt token and the answer, `all` for prompts as well.
        seed: of A; B starts at 0, so that a fresh adapter changes nothing.

    Attributes:
        scale: multiplies the changes; 1 as trained.

    Raises:
        UserError: the model's projections are not known.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rank: int = 8,
        positions: AdapterPositions = "generated",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.positions: AdapterPositions = positions
        self.factor, self.scale, self._on = ALPHA / rank, 1.0, True
        self._modules_changed = _projections(model)
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for module in self._modules_changed:
            n_in, n_out = _shape(module)
            a = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            self.down.append(nn.Parameter(a.to(model.device)))
            self.up.append(nn.Parameter(torch.zeros(n_out, rank, device=model.device)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model with the changes, inside the block."""
        handles = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(self._modules_changed)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without the changes, inside a block in which they are active."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def cache(self, cache: PromptCache) -> PromptCache | None:
        """What to decode with while active: the unchanged model's prompts, or none if prompts are changed too."""
        return None if self.positions == "all" else _UnadaptedCache(cache, self)

    def _hook(self, index: int) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._on:
                return output
            x = args[0].to(self.down[index].dtype)
            change = (x @ self.down[index].T) @ self.up[index].T
            return output + (self.scale * self.factor * change).to(output.dtype)

        return add


class _UnadaptedCache(PromptCache):
    """A prompt cache that never computes prompts under the adapter."""

    def __init__(self, held: PromptCache, adapter: Adapter) -> None:
        self._prompts, self._adapter = held, adapter

    def load(self, heads: Sequence[Sequence[int]], reserve: int) -> GrowingCache:
        with self._adapter.off():
            return self._prompts.load(heads, reserve)


def _projections(model: LanguageModel) -> list[nn.Module]:
    found: list[nn.Module] = []
    for layer in model.layout.layers:
        attention = layer.attention
        if attention is None:
            raise UserError(
                f"an adapter for {model.name}", "its attention projections were not found", "leave out the control lora"
            )
        parts = [attention.fused] if attention.fused is not None else [attention.q, attention.v]
        found += [part for part in parts if part is not None]
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; GPT-2's projections keep their weight transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    n_out, n_in = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    return int(n_in), int(n_out)
