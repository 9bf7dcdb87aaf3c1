"""A LoRA trained on the training prompts: changes of weights, to compare with changes of activations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from trimtab.control.adapter import Adapter, AdapterPositions
from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.control.learning import Learnable, Learned, answers_to_learn, learn
from trimtab.lm import PromptCache


class LearnedAdapter(Learnable):
    """An adapter as an arm that can be trained."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def applied(self, items: ItemSet) -> AbstractContextManager[Any]:
        return self.adapter.active()

    def cache(self, items: ItemSet) -> PromptCache | None:
        return self.adapter.cache(items.cache)

    def changes(self, items: ItemSet) -> dict[str, Any]:
        return {"adapter": self.adapter}


def learn_adapter(
    train: ItemSet,
    validation: ItemSet,
    *,
    rank: int = 8,
    positions: AdapterPositions = "generated",
    seed: int = 0,
    lr: float = 1e-3,
    **options: int,
) -> tuple[Adapter, Learned]:
    """Train a fresh adapter on the training items; `options` are further arguments of `learn`.

    Raises:
        UserError: the model's projections are not known.
    """
    adapter = Adapter(train.setting.model, rank=rank, positions=positions, seed=seed)
    return adapter, learn(LearnedAdapter(adapter), train, validation, seed=seed, lr=lr, **options)


@register
@dataclass(frozen=True, kw_only=True)
class Lora(ArmKind):
    """A LoRA by itself, and with its changes scaled to equal KL; it edits no activation, so that it has no dose."""

    name: ClassVar[str] = "lora"
    main: ClassVar[bool] = True
    per_training: ClassVar[bool] = True
    strengths: ClassVar[tuple[Match, ...]] = ("own", "kl")
    rank: int = 8
    """Of each change."""
    positions: AdapterPositions = "generated"
    """Where it acts: on answers and the last prompt token (`generated`), or on prompts too (`all`)."""
    steps: int = 100
    """Steps of training."""
    batch: int = 16
    """Items of a step."""

    def effort(self, choosing: Choosing) -> dict[str, int]:
        return {"a LoRA": answers_to_learn(choosing.train, choosing.validation, steps=self.steps, batch=self.batch)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        adapter, learned = learn_adapter(
            choosing.train, choosing.validation, rank=self.rank, positions=self.positions, steps=self.steps,
            batch=self.batch, seed=choosing.train.setting.seed,
        )  # fmt: skip
        about = asdict(learned) | {"rank": self.rank, "positions": self.positions}

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            adapter.scale = scale
            return [items.answer(adapter=adapter, kl=True)]

        matches: tuple[Match, ...] = ("own", "kl") if learned.best_step else ("own",)
        return [self.arm(answer, about, match=match) for match in matches]
