"""A task of one's own prompts, whose answers a Python function rewards."""

from __future__ import annotations

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
        UserError: a prompt is given twice, there is none, or a split has another name.
    """

    name = "prompts"
    metric = "reward"

    def __init__(
        self,
        prompts: Sequence[str] | Mapping[str, Sequence[str]],
        reward: Reward,
        *,
        chat: bool = False,
        max_new_tokens: int = 20,
    ) -> None:
        if not isinstance(prompts, Mapping):
            ordered, n = sorted(prompts, key=text_id), max(1, round(HELD_OUT * len(prompts)))
            prompts = {"test": ordered[:n], "validation": ordered[n : 2 * n], "train": ordered[2 * n :]}
        listed = [text for texts in prompts.values() for text in texts]
        if len(set(listed)) < len(listed):
            raise UserError("the prompts", "one is given twice", "give each once")
        divided = {split: [_item(text) for text in texts] for split, texts in prompts.items()}
        super().__init__(divided)
        self.reward, self.chat, self.max_new_tokens = reward, chat, max_new_tokens  # pyright: ignore[reportAttributeAccessIssue]

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return Outcome(reward=float(self.reward(item.prompt, text)), correct=None)


def _item(text: str) -> Item:
    return Item(id=text_id(text), prompt=text, answer="")
