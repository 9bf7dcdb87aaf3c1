"""A tiny model whose answer is the sign of one coordinate of the last layer's residual stream, a dictionary that has
this coordinate as its features 0 (towards Y) and 1 (towards N) and 30 others that leave it alone, and tasks on it.

At dose r ≥ 2 feature 0 makes every answer Y, since |x_0| ≤ ‖x‖, and no other feature but 1 changes any answer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from trimtab.control.answers import ItemSet
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.lm import LanguageModel
from trimtab.tasks import Item, Outcome, Task

SITE = "resid_post.3"
TEXTS = [f"{a}{b}{cue}" for a in "bcdfghjkv" for b in "lmnpqrstwxyz" for cue in "/."]
TRAIN, VALIDATION = 90, 64


def planted_model(tiny: LanguageModel) -> LanguageModel:
    """The tiny Llama with its head rows of Y and N replaced by ±8 along coordinate 0 of the normed stream."""
    hf = copy.deepcopy(tiny.hf)
    head = hf.get_output_embeddings()
    assert head is not None
    yes, no = (tiny.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "YN")
    with torch.no_grad():
        head.weight[:, 0] = 0  # pyright: ignore[reportIndexIssue]
        head.weight[yes] = 0  # pyright: ignore[reportIndexIssue]
        head.weight[no] = 0  # pyright: ignore[reportIndexIssue]
        head.weight[yes, 0], head.weight[no, 0] = 8.0, -8.0  # pyright: ignore[reportIndexIssue]
    return LanguageModel.from_hf(hf, tiny.tokenizer, name="planted")


def planted_sae(model: LanguageModel, site: str = SITE) -> Standard:
    """Features 0 and 1 are ± coordinate 0; the others are random directions without it, each read along itself."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(32, model.d_model, generator=generator)
    rows[:, 0] = 0
    rows[0], rows[1] = 0.0, 0.0
    rows[0, 0], rows[1, 0] = 1.0, -1.0
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", model=model.name, site=site)
    return Standard(rows.T.contiguous(), torch.zeros(32), rows, torch.zeros(model.d_model), info=info)


class Planted(Task):
    """Answer Y or N; anything else is malformed. Subclasses say what is right."""

    name = "planted"
    max_new_tokens = 1
    chat = False
    options_only = True

    @staticmethod
    def right(text: str) -> str:
        return "Y"

    @classmethod
    def load(cls, data: object = None, tokenizer: object = None) -> Planted:
        order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
        items = [
            Item(
                id=f"{cls.name}/{i}",
                prompt=TEXTS[i],
                answer=cls.right(TEXTS[i]),
                options=("Y", "N"),
                group=TEXTS[i][-1],
            )
            for i in order
        ]
        stop = TRAIN + VALIDATION
        return cls({"train": items[:TRAIN], "validation": items[TRAIN:stop], "test": items[stop:]})

    def option_strings(self, item: Item) -> tuple[str, ...]:
        return item.options

    def option_tokens(self, item: Item, tokenizer: object, context: str | None = None) -> tuple[int, ...]:
        encode = tokenizer.encode  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(encode(option, add_special_tokens=False)[0] for option in item.options)

    def correct_option(self, item: Item, permutation: int = 0) -> int:
        return item.options.index(item.answer)

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        if text[:1] not in item.options:
            return Outcome(reward=0.0, correct=False, malformed=True)
        return Outcome(reward=float(text[0] == item.answer), correct=text[0] == item.answer, answer=text[0])


class HalfHurt(Planted):
    """N is right behind a full stop: making every answer Y helps some items and hurts others."""

    name = "half-hurt"

    @staticmethod
    def right(text: str) -> str:
        return "Y" if text[-1] == "/" else "N"


class OnlyRewards(HalfHurt):
    """The same, but the task does not say which option is right."""

    name = "only-rewards"

    def correct_option(self, item: Item, permutation: int = 0) -> int:
        return Task.correct_option(self, item, permutation)


def readout_setting(model: LanguageModel, sae: Standard, **changes: Any) -> Setting:
    """What all arms on a task have in common."""
    values = {"dictionary": sae, "site": model.site(sae.info.site or SITE), "dose": 2.0}
    return Setting(model=model, **(values | changes))


def readout_prompts(model: LanguageModel, task: type[Task], split: str, *, tokens: int = 1) -> TaskPrompts:
    """A split of a task, restricted to its options where answers are one token."""
    loaded = task.load()
    return TaskPrompts.of(model, loaded, loaded.items(split), options_only=tokens == 1, max_new_tokens=tokens)


def readout_items(
    model: LanguageModel, sae: Standard, task: type[Task], split: str, *, tokens: int = 1, **changes: Any
) -> ItemSet:
    """The same under a setting."""
    prompts = readout_prompts(model, task, split, tokens=tokens)
    return ItemSet.of(readout_setting(model, sae, **changes), prompts)
