"""The plain model, a token per row at a time behind a static cache: on CUDA one captured step, replayed."""

from __future__ import annotations

import torch
from transformers import StaticCache

from trimtab.lm import LanguageModel
from trimtab.lm.captured import end_capture

WARM = 3
"""Steps before one is captured."""


class PlainSteps:
    """Steps of `transformers`' own: forward pass, largest logit, fed again; no prompt, no text, no check.

    Args:
        model: whose `hf` is called, and nothing else of it.
        rows: side by side.
        steps: of a call.
        capacity: tokens that the cache holds, all of which each step attends to.
    """

    def __init__(self, model: LanguageModel, rows: int, steps: int, capacity: int) -> None:
        assert max(steps, WARM) <= capacity, "the steps do not fit in the cache"
        self.hf, self.steps, self.argument = model.hf, steps, model.cache_argument
        self.cache = StaticCache(config=model.hf.config, max_cache_len=capacity)
        self.ids = torch.full((rows, 1), model.vocab_size // 2, device=model.device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._capture(model.device)

    @torch.no_grad()
    def _step(self) -> None:
        given = {"input_ids": self.ids, "position_ids": self.position, self.argument: self.cache}
        logits = self.hf(**given, use_cache=True, logits_to_keep=1).logits
        self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def _capture(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, stream=stream),
            ):
                self._step()
        except RuntimeError:
            end_capture(graph, device, pool)
            raise
        self.graph = graph

    def __call__(self) -> None:
        """So many steps from an empty cache on."""
        self.cache.reset()
        self.position.zero_()
        for _ in range(self.steps):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
