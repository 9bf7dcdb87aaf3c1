"""Prompts of one length as a model reads them, and the activations of a plain run that patching starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.lm import LanguageModel, Site, TokenBatch, capture
from trimtab.lm.cache import GrowingCache
from trimtab.lm.unembedding import Unembedding
from trimtab.tasks.ioi_prompts import TokenisedPrompt


class PromptRows(NamedTuple):
    """B prompts of T tokens each."""

    ids: Tensor  # [B, T]
    positions: Mapping[str, Tensor]  # name → [B]
    answers: Tensor  # [B, 2] tokens of the right and the wrong name
    numbers: tuple[int, ...]  # among the prompts that they were taken from

    def at(self, x: Tensor, position: str) -> Tensor:
        """Of `x [B, T, ...]` what stands at a position: `[B, ...]`."""
        return x[torch.arange(len(x), device=x.device), self.positions[position]]


def rows_of(prompts: Sequence[TokenisedPrompt], model: LanguageModel, *, batch_size: int = 64) -> Iterator[PromptRows]:
    """Groups of prompts of equal length, at most `batch_size` each, the shortest first."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(number)
    for _, same in sorted(by_length.items()):
        for start in range(0, len(same), batch_size):
            part = same[start : start + batch_size]
            chosen = [prompts[number] for number in part]
            columns = {name: [prompt.positions[name] for prompt in chosen] for name in chosen[0].positions}
            yield PromptRows(
                torch.tensor([prompt.ids for prompt in chosen], device=model.device),
                {name: torch.tensor(column, device=model.device) for name, column in columns.items()},
                torch.tensor([[prompt.io_token, prompt.s_token] for prompt in chosen], device=model.device),
                tuple(part),
            )


class PlainRun(NamedTuple):
    """What a plain forward pass of B prompts leaves."""

    inputs: list[Tensor]  # per layer, and behind the last: [B, T, d]
    z: list[Tensor]  # per layer: [B, T, heads, head_dim], the output projection's input

    @classmethod
    def of(cls, model: LanguageModel, ids: Int[Tensor, "B T"], cache: GrowingCache | None = None) -> PlainRun:
        """Run the model, and fill a cache where one is given."""
        n = model.n_layers
        inputs = [*(Site("resid_pre", layer) for layer in range(n)), Site("resid_post", n - 1)]
        heads = [Site("attn_z", layer) for layer in range(n)]
        found = capture(model, TokenBatch.full(ids), [*inputs, *heads], cache=cache)
        return cls([found[site] for site in inputs], [found[site] for site in heads])


def logit_difference(
    unembedding: Unembedding, hidden: Float[Tensor, "N d"], answers: Int[Tensor, "N 2"]
) -> Float[Tensor, " N"]:
    """Logit of the right name minus that of the wrong one, from the residual behind the last layer."""
    right, wrong = unembedding.of_tokens(hidden, answers).unbind(-1)
    return right - wrong
