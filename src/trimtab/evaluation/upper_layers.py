"""Run a batch once, then only the layers above a site again for every replacement of its activations.

The layers are the model's own modules, called with what the model itself handed them (masks, rotary embeddings), so
that no layout needs to be known. Where that does not reproduce the model, or the site is not in the residual stream
between two layers, the whole model runs with the edit instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, edited
from trimtab.lm.taps import apply_rows, tap

Splice = Callable[[Float[Tensor, "B T d"]], RowDelta]


class _Call(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, hidden: Tensor) -> Tensor:
        if self.args:
            output = self.module(hidden, *self.args[1:], **self.kwargs)
        else:
            output = self.module(**{**self.kwargs, "hidden_states": hidden})
        return output[0] if isinstance(output, tuple) else output


class RecordedBatch:
    """One forward pass of a batch, whose activations at a site can be replaced.

    Attributes:
        hidden: `[B, T, d]` the last layer's output, before the final norm, untouched.
    """

    def __init__(self, model: LanguageModel, site: Site, batch: TokenBatch) -> None:
        self.model, self.site, self.batch = model, site, batch
        self._calls: list[_Call] = []
        self._x: Tensor | None = None
        self._in_stream = site.kind in ("resid_pre", "resid_post")
        first = site.layer + (site.kind == "resid_post")
        last = Site("resid_post", model.n_layers - 1)
        found: list[Tensor] = []
        with ExitStack() as stack:
            if self._in_stream:
                for handle in tap(model, site, self._keep):
                    stack.callback(handle.remove)
                for layer in model.layout.layers[first:]:
                    stack.callback(layer.module.register_forward_pre_hook(self._record, with_kwargs=True).remove)
            for handle in tap(model, last, lambda x: found.append(x)):  # type: ignore[func-returns-value, arg-type]
                stack.callback(handle.remove)
            model.forward(batch, last=1)
        self.hidden: Float[Tensor, "B T d"] = found[0]

    def _keep(self, x: Tensor) -> None:
        self._x = x

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(_Call(module, args, kwargs))

    def is_faithful(self) -> bool:
        """Whether running the upper layers again, nothing replaced, gives what the model gave."""
        if not self._in_stream:
            return False
        assert self._x is not None
        hidden = self._x
        for call in self._calls:
            hidden = call.run(hidden)
        return torch.allclose(hidden, self.hidden, rtol=1e-4, atol=1e-4 * float(self.hidden.abs().max()))

    def spliced(self, splice: Splice, *, whole: bool = False) -> Float[Tensor, "B T d"]:
        """The last layer's output with the site's activations changed.

        Args:
            splice: the change, from the activations.
            whole: run the whole model rather than the upper layers.
        """
        if not whole and self._in_stream:
            assert self._x is not None
            hidden = apply_rows(self._x, splice(self._x))
            for call in self._calls:
                hidden = call.run(hidden)
            return hidden
        found: list[Tensor] = []
        last = Site("resid_post", self.model.n_layers - 1)
        with edited(self.model, {self.site: splice}), ExitStack() as stack:
            for handle in tap(self.model, last, lambda x: found.append(x)):  # type: ignore[func-returns-value, arg-type]
                stack.callback(handle.remove)
            self.model.forward(self.batch, last=1)
        return found[0]
