"""A LoRA trained on the training prompts: what changing weights does where others change activations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from trimtab.control.adapter import Adapter, AdapterPositions
from trimtab.control.answers import Answers, ItemSet
from trimtab.control.learning import Learned, learn
from trimtab.lm import PromptCache


class LearnedAdapter:
    """An adapter as an arm that can be trained."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @property
    def module(self) -> nn.Module:
        return self.adapter

    def applied(self, items: ItemSet) -> AbstractContextManager[Any]:
        return self.adapter.active()

    def cache(self, items: ItemSet) -> PromptCache | None:
        return self.adapter.cache(items.cache)

    def answer(
        self,
        items: ItemSet,
        *,
        repeats: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        kl: bool = False,
        scale: float = 1.0,
    ) -> Answers:
        """Decode under the adapter, its changes multiplied by `scale`."""
        before, self.adapter.scale = self.adapter.scale, scale
        try:
            return items.answer(adapter=self.adapter, repeats=repeats, seed=seed, temperature=temperature, kl=kl)
        finally:
            self.adapter.scale = before


def learn_adapter(
    train: ItemSet,
    validation: ItemSet,
    *,
    rank: int = 8,
    positions: AdapterPositions = "generated",
    steps: int = 100,
    batch: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[LearnedAdapter, Learned]:
    """Train a fresh adapter on the training items.

    Raises:
        UserError: the model's projections are not known.
    """
    control = LearnedAdapter(Adapter(train.setting.model, rank=rank, positions=positions, seed=seed))
    found = learn(control, train, validation, steps=steps, learning_rate=learning_rate, batch=batch, seed=seed)
    return control, found
