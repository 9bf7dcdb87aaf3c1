"""A LoRA trained on the policy's prompts: what changing weights does where the policy changes activations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from trimtab.lm import PromptCache
from trimtab.policies.controls.adapter import Adapter, AdapterPositions
from trimtab.policies.controls.learning import Learned, learn
from trimtab.policies.controls.scene import Played, Scene


class LearnedAdapter:
    """An adapter as a control that can be trained."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @property
    def module(self) -> nn.Module:
        return self.adapter

    def applied(self, scene: Scene) -> AbstractContextManager[Any]:
        return self.adapter.active()

    def cache(self, scene: Scene) -> PromptCache | None:
        return self.adapter.cache(scene.cache)

    def play(
        self,
        scene: Scene,
        *,
        repeats: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        kl: bool = False,
        scale: float = 1.0,
    ) -> Played:
        """Decode under the adapter, its changes multiplied by `scale`."""
        before, self.adapter.scale = self.adapter.scale, scale
        try:
            return scene.play(adapter=self.adapter, repeats=repeats, seed=seed, temperature=temperature, kl=kl)
        finally:
            self.adapter.scale = before


def learn_adapter(
    train: Scene,
    validation: Scene,
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
    control = LearnedAdapter(Adapter(train.setup.model, rank=rank, positions=positions, seed=seed))
    found = learn(control, train, validation, steps=steps, learning_rate=learning_rate, batch=batch, seed=seed)
    return control, found
