"""A task's items, ready to be decoded: token ids, allowed tokens, and the way from texts back to outcomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.errors import UserError
from trimtab.lm import Decoded, LanguageModel
from trimtab.tasks import Item, Outcome, Task


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Items of one split of a task, tokenised for a model."""

    task: Task
    items: tuple[Item, ...]
    prompts: tuple[tuple[int, ...], ...]
    allowed: tuple[tuple[int, ...], ...] | None
    """Per item, the tokens that may be chosen; None for all."""
    max_new_tokens: int
    permutation: int = 0
    """The cyclic order in which all items' options are shown."""

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        task: Task,
        items: Sequence[Item],
        *,
        options_only: bool = False,
        max_new_tokens: int | None = None,
        permutation: int = 0,
    ) -> Episodes:
        """Tokenise items.

        Args:
            model: gives the tokenizer and, for chat tasks, the template.
            task: gives prompts.
            items: which.
            options_only: decode among the options' tokens only.
            max_new_tokens: the task's own if not given.
            permutation: the cyclic order in which options are shown.

        Raises:
            UserError: there are no items, or the task's options cannot be single tokens.
        """
        if not items:
            raise UserError(f"task {task.name}", "this split of it has no items", "choose another split or more data")
        chat = task.chat and bool(model.tokenizer.chat_template)
        prompts = tuple(tuple(model.encode_text(task.prompt(item, permutation), chat=chat)) for item in items)
        allowed = None
        if options_only:
            allowed = tuple(tuple(task.option_tokens(item, model.tokenizer)) for item in items)
        return cls(
            task=task,
            items=tuple(items),
            prompts=prompts,
            allowed=allowed,
            max_new_tokens=max_new_tokens or (1 if options_only else task.max_new_tokens),
            permutation=permutation,
        )

    def __len__(self) -> int:
        return len(self.items)

    def take(self, which: Sequence[int]) -> Episodes:
        """Some of the items."""
        return replace(
            self,
            items=tuple(self.items[i] for i in which),
            prompts=tuple(self.prompts[i] for i in which),
            allowed=None if self.allowed is None else tuple(self.allowed[i] for i in which),
        )

    def digest(self) -> str:
        """SHA-256 of the items' ids, prompts, answers and options, in order."""
        said = [[item.id, item.prompt, item.answer, list(item.options)] for item in self.items]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()

    def outcomes(self, decoded: Decoded) -> list[Outcome]:
        """What each decoded row is worth; rows are the items, each `decoded.repeats` times.

        Raises:
            UserError: a reward is not finite; the message names the item.
        """
        assert len(decoded) == len(self.items) * decoded.repeats
        asked = [item for item in self.items for _ in range(decoded.repeats)]
        return self.task.score(asked, decoded.texts, self.permutation)
