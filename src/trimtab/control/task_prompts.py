"""A task's items, tokenised for a model: prompts' ids, allowed tokens, and the way from texts back to outcomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    Decoded,
    InterventionSource,
    LanguageModel,
    PromptCache,
    Site,
    TokenBatch,
    capture,
    decode,
)
from trimtab.tasks import Item, Outcome, Task


@dataclass(frozen=True, kw_only=True)
class TaskPrompts:
    """Items of one split of a task, tokenised for a model."""

    task: Task
    items: tuple[Item, ...]
    ids: tuple[tuple[int, ...], ...]
    """Tokens of each item's prompt."""
    allowed: tuple[tuple[int, ...], ...] | None
    """Per item, the tokens that may be chosen; None for all."""
    max_new_tokens: int
    permutation: int = 0
    """The cyclic order in which all items' options are shown."""

    def __repr__(self) -> str:
        return f"<TaskPrompts: {len(self)} items of {self.task.name}>"

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
    ) -> TaskPrompts:
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
        ids = tuple(tuple(model.encode_text(task.prompt(item, permutation), chat=chat)) for item in items)
        allowed = None
        if options_only:
            allowed = tuple(tuple(task.option_tokens(item, model.tokenizer)) for item in items)
        return cls(
            task=task,
            items=tuple(items),
            ids=ids,
            allowed=allowed,
            max_new_tokens=max_new_tokens or (1 if options_only else task.max_new_tokens),
            permutation=permutation,
        )

    def __len__(self) -> int:
        return len(self.items)

    def take(self, which: Sequence[int]) -> TaskPrompts:
        """Some of the items."""
        return replace(
            self,
            items=tuple(self.items[i] for i in which),
            ids=tuple(self.ids[i] for i in which),
            allowed=None if self.allowed is None else tuple(self.allowed[i] for i in which),
        )

    def other_orders(self, model: LanguageModel) -> list[TaskPrompts]:
        """The same items under each other cyclic order of their options; none if some have more orders than others."""
        orders, *unequal = {self.task.orders(item) for item in self.items}
        return [
            TaskPrompts.of(
                model, self.task, self.items, options_only=self.allowed is not None,
                max_new_tokens=self.max_new_tokens, permutation=permutation,
            )
            for permutation in range(1, 1 if unequal else orders)
        ]  # fmt: skip

    def digest(self) -> str:
        """SHA-256 of the items' ids, prompts, answers and options, in order."""
        said = [[item.id, item.prompt, item.answer, list(item.options)] for item in self.items]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()

    def decode(
        self,
        model: LanguageModel,
        source: InterventionSource | None = None,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 64,
        first_sample: int = 0,
        **options: Any,
    ) -> Decoded:
        """Decode all items.

        Args:
            model: the model that they were tokenised for.
            source: what steers.
            seed, temperature, batch_size: as in `DecodeConfig`.
            first_sample: key of the first item's draws; the others follow.
            options: further arguments of `lm.decode`: `repeats`, `prompt_cache`, `progress` and `observe`.
        """
        config = DecodeConfig(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
        )
        samples = range(first_sample, first_sample + len(self))
        return decode(model, self.ids, config, source, samples=samples, allowed=self.allowed, **options)

    def outcomes(self, decoded: Decoded) -> list[Outcome]:
        """What each decoded row is worth; rows are the items, each `decoded.repeats` times.

        Raises:
            UserError: a reward is not finite; the message names the item.
        """
        assert len(decoded) == len(self.items) * decoded.repeats
        asked = [item for item in self.items for _ in range(decoded.repeats)]
        return self.task.score(asked, decoded.texts, self.permutation)


def last_prompt_activations(
    model: LanguageModel,
    prompts: TaskPrompts,
    site: Site | str,
    prompt_cache: PromptCache | None = None,
    *,
    batch_size: int = 16,
) -> Float[np.ndarray, "P d"]:
    """Activations at each item's last prompt token; with a prompt cache that token alone is fed to the model.

    Args:
        model: the model.
        prompts: items.
        site: where.
        prompt_cache: holds the prompts' other tokens, or will from here on.
        batch_size: prompts fed together.
    """
    where, found = model.site(site), []
    for start in range(0, len(prompts), batch_size):
        ids = [list(prompt) for prompt in prompts.ids[start : start + batch_size]]
        if prompt_cache is None or any(len(prompt) == 1 for prompt in ids):
            x = capture(model, TokenBatch.pad(ids, model.pad_id, model.device), [where])[where]
        else:
            past = torch.tensor([len(prompt) - 1 for prompt in ids], device=model.device)
            last = torch.tensor([[prompt[-1]] for prompt in ids], device=model.device)
            cache = prompt_cache.load([prompt[:-1] for prompt in ids], max(map(len, ids)))
            x = capture(model, TokenBatch.full(last), [where], cache=cache, past_lengths=past)[where]
        found.append(x[:, -1].flatten(1).float().cpu().numpy())
    return np.concatenate(found)
