"""A task of one's own prompts, whose answers a Python function rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from trimtab.errors import UserError
from trimtab.runs import text_id
from trimtab.tasks.task import Item, Outcome, Task

HELD_OUT = 0.2
"""Share of the prompts that validation and test get each, where they are not divided already."""
Reward = Callable[[str, str], float]


class PromptTask(Task):
    """Prompts and a reward.

    Args:
        prompts: texts, of which three fifths train, one fifth validates and one tests, in the order of a hash; or those
            of each split.
        reward: called with a prompt and an answer; any finite number, more is better.
        chat: put prompts into the model's chat template, as user turns.
        max_new_tokens: how long an answer may be.

    Raises:
        UserError: a prompt is given twice, there is none, a split has another name, or the reward is no function of two
            texts.
    """

    name = "prompts"
    metric = "reward"
    best_reward = None

    def __init__(
        self,
        prompts: Sequence[str] | Mapping[str, Sequence[str]],
        reward: Reward,
        *,
        chat: bool = False,
        max_new_tokens: int = 20,
    ) -> None:
        if isinstance(prompts, str):
            raise UserError(f"prompts {prompts!r}", "it is a single text", "give a list of texts")
        _check_takes_two(reward)
        if not isinstance(prompts, Mapping):
            prompts = [_text(prompt) for prompt in prompts]
            ordered, n = sorted(prompts, key=text_id), max(1, round(HELD_OUT * len(prompts)))
            prompts = {"test": ordered[:n], "validation": ordered[n : 2 * n], "train": ordered[2 * n :]}
        listed = [text for texts in prompts.values() for text in texts]
        if len(set(listed)) < len(listed):
            raise UserError("the prompts", "one is given twice", "give each once")
        divided = {split: [_item(_text(text)) for text in texts] for split, texts in prompts.items()}
        super().__init__(divided)
        self.reward, self.chat, self.max_new_tokens = reward, chat, max_new_tokens  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def hashes(self) -> dict[str, str]:
        """Of the reward's source text, where Python has it."""
        try:
            return {"reward": text_id(inspect.getsource(self.reward))}  # type: ignore[arg-type]
        except (OSError, TypeError):
            return {}

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        found = self.reward(item.prompt, text)
        try:
            reward = float(found)
        except (TypeError, ValueError):
            raise UserError(f"reward {found!r}", "it is no number", "let the function return one") from None
        return Outcome(reward=reward, correct=None)


def _check_takes_two(reward: object) -> None:
    """Raise a `UserError` unless a reward can be called with a prompt and an answer."""
    if not callable(reward):
        raise UserError(f"reward {reward!r}", "it is no function", "give one that takes a prompt and an answer")
    try:
        takes = inspect.signature(reward)
    except ValueError:  # built in, with arguments that Python does not know
        return
    try:
        takes.bind("", "")
    except TypeError:
        why = "it is called with a prompt and an answer"
        raise UserError(f"a reward that takes {takes}", why, "let it take both") from None


def _text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"prompt {prompt!r}", "it is no text", "give a list of texts")
    return prompt


def _item(text: str) -> Item:
    return Item(id=text_id(text), prompt=text, answer="")
