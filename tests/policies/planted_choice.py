"""A tiny model that writes a letter at a time, each letter by the sign of one coordinate of the last layer's stream.

Y and N have the same embedding, so no letter says anything about later ones. Features 0 to 7 push the coordinate
towards Y, the other 56 leave it alone; a task rewards one letter of the answer, so that only the choice there matters.
"""

from __future__ import annotations

import copy

import torch

from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.lm import LanguageModel
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.tasks import Item, Outcome, Task

SITE = "resid_post.3"
LENGTH, DECISIVE = 4, 2
PUSHING = range(8)
TEXTS = [f"{a}{b}{cue}" for a in "bcdfghjkv" for b in "lmnpqrstwxyz" for cue in "/."]


def choice_model(tiny: LanguageModel) -> LanguageModel:
    """The tiny Llama with head rows of Y and N of ±0.5 along coordinate 0, and one embedding for both."""
    hf = copy.deepcopy(tiny.hf)
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    assert head is not None
    yes, no = (tiny.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "YN")
    with torch.no_grad():
        head.weight[:, 0] = 0  # pyright: ignore[reportIndexIssue]
        head.weight[[yes, no]] = 0  # pyright: ignore[reportIndexIssue]
        head.weight[yes, 0], head.weight[no, 0] = 0.5, -0.5  # pyright: ignore[reportIndexIssue]
        embedding.weight[no] = embedding.weight[yes]  # pyright: ignore[reportIndexIssue]
    return LanguageModel.from_hf(hf, tiny.tokenizer, name="choice")


def choice_sae(model: LanguageModel) -> Standard:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, model.d_model, generator=generator)
    rows[:, 0] = 0
    rows[: len(PUSHING), 0] = 2 * rows[: len(PUSHING)].norm(dim=1)
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", model=model.name, site=SITE)
    return Standard(rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(model.d_model), info=info)


def fixed_policy(sae: Standard, order: list[int]) -> Policy:
    """Prefers actions in a given order everywhere, `sae.n_features` being no edit; the others lie far behind."""
    policy = Policy.build(sae.directions, hidden=(), seed=0)
    with torch.no_grad():
        policy.actor.head.weight.zero_()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        for rank, action in enumerate(order):
            policy.actor.head.bias[action] = 40.0 - rank  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    return policy


class Letters(Task):
    """Write four letters; only the third counts, and N is right."""

    name = "letters"
    max_new_tokens = LENGTH
    chat = False
    options_only = True

    @classmethod
    def load(cls, data: object = None, tokenizer: object = None) -> Letters:
        items = [Item(id=f"letters/{i}", prompt=text, answer="N", options=("Y", "N")) for i, text in enumerate(TEXTS)]
        return cls({"train": items[:60], "validation": items[60:100], "test": items[100:]})

    def option_strings(self, item: Item) -> tuple[str, ...]:
        return item.options

    def option_tokens(self, item: Item, tokenizer: object, context: str | None = None) -> tuple[int, ...]:
        encode = tokenizer.encode  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(encode(option, add_special_tokens=False)[0] for option in item.options)

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        hit = text[DECISIVE : DECISIVE + 1] == item.answer
        return Outcome(reward=float(hit), correct=hit, answer=text)


def letters_setup(model: LanguageModel, sae: Standard, **settings: object) -> Setup:
    """The task under any policy; settings are of `PolicyConfig`."""
    values: dict[str, object] = {
        "task": "letters", "mask": "none", "dose": 0.7, "options_only": True, "hidden": (), "max_new_tokens": LENGTH,
    }  # fmt: skip
    config = PolicyConfig(**(values | settings))  # pyright: ignore[reportArgumentType]
    return Setup.with_parts(config, model, sae, Letters.load())
