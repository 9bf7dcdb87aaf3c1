"""What a rollout must say of its decisions: rows end where the model ends them, and are worth what the task says then.

The task's answers are letters and the end-of-sequence token, at temperature 1, so that rows differ in length; the
reward is of the answer's length and of the item, so that no two kinds of rows are worth the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies import rollout
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.rollout import Rollouts
from trimtab.policies.setup import Setup
from trimtab.policies.source import PolicySource
from trimtab.steering import token_effects
from trimtab.tasks import Item, Outcome, Task

LENGTH, ITEMS, REPEATS = 5, 6, 4
PENALTY = 0.7


class UntilTheEnd(Task):
    """An item's answer is any number of letters; each letter is worth what the item says."""

    name = "until-the-end"
    max_new_tokens = LENGTH
    chat = False

    @classmethod
    def load(cls, data: object = None, tokenizer: object = None) -> UntilTheEnd:
        items = [Item(id=f"end/{i}", prompt="abcdefgh"[i:] + "/", answer=str(i)) for i in range(ITEMS)]
        return cls({"train": items})

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return Outcome(reward=worth(int(item.answer), len(text)), correct=None)


def worth(item: int, letters: int) -> float:
    return 1.0 + item + 10 * letters


class RolledOut(NamedTuple):
    """Rollouts and what decided them."""

    rollouts: Rollouts
    source: PolicySource


def rolled_out(model: LanguageModel, sae: Standard, *, kl_penalty: float) -> RolledOut:
    """Roll a policy out that picks features at random."""
    config = PolicyConfig(task=UntilTheEnd.name, mask="none", dose=1.0, max_new_tokens=LENGTH)
    setup = Setup.with_parts(config, model, sae, UntilTheEnd.load())
    policy = Policy.build(sae.directions, hidden=(8,), seed=0)
    source = setup.source(policy)
    plain = setup.prompts("train")
    encode = model.tokenizer.encode
    letters = tuple(encode(letter, add_special_tokens=False)[0] for letter in "XYZ")
    prompts = TaskPrompts(
        task=plain.task, items=plain.items, ids=plain.ids, max_new_tokens=LENGTH,
        allowed=((*letters, min(model.eos_ids)),) * len(plain),
    )  # fmt: skip
    rollouts = rollout.roll_out(
        model, source, prompts, repeats=REPEATS, seed=1, temperature=1.0, kl_penalty=kl_penalty
    )  # fmt: skip
    return RolledOut(rollouts, source)


def expected_reward(model: LanguageModel, found: RolledOut, *, kl_penalty: float) -> torch.Tensor:
    """Row by row: the outcome at the last token; at each token less the penalty on KL, measured by other passes."""
    decoded = found.rollouts.decoded
    expected = torch.zeros(len(decoded), LENGTH)
    kl = token_effects(model, decoded, found.source).kl_total
    for row, tokens in enumerate(decoded.token_ids):
        letters = len(tokens) - (tokens[-1] in model.eos_ids)
        expected[row, len(tokens) - 1] = worth(row // REPEATS, letters)
        for step in range(len(tokens)):
            expected[row, step] -= kl_penalty * kl[row][step]
    return expected


def check_reward_is_at_the_end(model: LanguageModel, sae: Standard) -> None:
    """Without a penalty all but the last decision of each row get nothing."""
    found = rolled_out(model, sae, kl_penalty=0.0)
    lengths = {len(tokens) for tokens in found.rollouts.decoded.token_ids}
    assert len(lengths) > 2, "rows do not differ in length"
    assert found.rollouts.kl is None
    assert torch.equal(found.rollouts.reward, expected_reward(model, found, kl_penalty=0.0))


def check_divergence_costs_reward(model: LanguageModel, sae: Standard) -> None:
    """With a penalty every decision loses it where its divergence occurs, and nothing else changes."""
    found = rolled_out(model, sae, kl_penalty=PENALTY)
    assert found.rollouts.kl is not None
    last = torch.tensor([len(tokens) for tokens in found.rollouts.decoded.token_ids])
    made = torch.arange(LENGTH) < last[:, None]
    assert (found.rollouts.kl[made] > 1e-3).float().mean() > 0.5, "the edits change nothing"
    assert found.rollouts.kl[~made].abs().max() == 0
    assert torch.allclose(found.rollouts.reward, expected_reward(model, found, kl_penalty=PENALTY), atol=1e-4), (
        "another penalty"
    )
