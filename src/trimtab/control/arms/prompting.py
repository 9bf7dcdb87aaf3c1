"""Prompting: an instruction before the question, chosen on validation among a few written for the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from trimtab.control.answers import Answers, ItemSet
from trimtab.control.arm import Arm, ArmKind, Choosing, Match, register
from trimtab.control.task_prompts import TaskPrompts
from trimtab.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """An instruction, chosen on validation."""

    instruction: str
    reward: float
    """Mean on validation."""
    tried: int


def instructed(items: ItemSet, instruction: str) -> TaskPrompts:
    """The items with an instruction before the user's text."""
    model, prompts = items.setting.model, items.prompts
    task = prompts.task
    chat = task.chat and bool(model.tokenizer.chat_template)
    texts = [f"{instruction}\n\n{task.prompt(item, prompts.permutation)}" for item in prompts.items]
    return replace(prompts, ids=tuple(tuple(model.encode_text(text, chat=chat)) for text in texts))


def best_instruction(
    validation: ItemSet, instructions: Sequence[str] = (), model: LanguageModel | None = None
) -> PromptChoice:
    """Choose by mean reward on validation; ties go to the first.

    Args:
        validation: items of validation.
        instructions: to try; those for the task by default.
        model: what answers; the setting's by default.
    """
    tried = tuple(instructions) or validation.prompts.task.instructions
    answers = [validation.answer(prompts=instructed(validation, text), model=model) for text in tried]
    rewards = [float(one.reward.mean()) for one in answers]
    best = max(range(len(tried)), key=lambda i: (rewards[i], -i))
    return PromptChoice(instruction=tried[best], reward=rewards[best], tried=len(tried))


@register
@dataclass(frozen=True, kw_only=True)
class Prompting(ArmKind):
    """The best instruction before every prompt."""

    name: ClassVar[str] = "prompting"
    main: ClassVar[bool] = True
    instruction: tuple[str, ...] = ()
    """Instructions to choose from; the task's own by default."""
    model: LanguageModel | None = None
    """What answers; the setting's model by default."""
    strengths: ClassVar[tuple[Match, ...]] = ("own",)

    def effort(self, choosing: Choosing) -> dict[str, int]:
        tried = self.instruction or choosing.validation.prompts.task.instructions
        return {"an instruction": len(tried) * len(choosing.validation)}

    def arms(self, choosing: Choosing) -> list[Arm]:
        choice = best_instruction(choosing.validation, self.instruction, self.model)

        def answer(items: ItemSet, scale: float) -> list[Answers]:
            return [items.answer(prompts=instructed(items, choice.instruction), model=self.model)]

        return [self.arm(answer, asdict(choice))]
