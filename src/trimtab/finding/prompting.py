"""The alternative that needs no edit: an instruction before the prompt, chosen where everything is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask
from trimtab.finding.ground import Ground
from trimtab.finding.passes import answer_log_probs, batches, run
from trimtab.lm import LanguageModel, PromptCache

SHOWN = 3
"""Texts of a demonstration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InstructionChoice:
    """The instruction that did most on the examples to choose on within the budget, or the cheapest if none is."""

    instruction: str
    effects: Float[Tensor, " X"]
    tried: int


def choose_instruction(ground: Ground) -> InstructionChoice:
    """Choose among the wish's own instructions, words to use, and a demonstration by wanted texts.

    Raises:
        UserError: there is nothing to try.
    """
    tried = instructions(ground)
    if not tried:
        raise UserError("prompting", "there is no instruction, and no wanted text to show", "give an instruction")
    effects = [instructed_effects(ground, "choice", text) for text in tried]
    kls = [float(instructed_kl(ground, "choice", text).mean()) for text in tried]
    within = [i for i, kl in enumerate(kls) if kl <= ground.options.most_kl] or [int(np.argmin(kls))]
    best = max(within, key=lambda i: float(effects[i].mean()))
    return InstructionChoice(instruction=tried[best], effects=effects[best], tried=len(tried))


def instructions(ground: Ground) -> list[str]:
    """What can be tried before prompts."""
    examples = ground.splits["candidates"]
    found = list(examples.instructions)
    if examples.more:
        found.append(f"Use words like these: {', '.join(examples.more)}.")
    shown = [examples.wanted[one.id] for one in examples.examples if one.id in examples.wanted][:SHOWN]
    if shown:
        found.append("Write as in these texts:\n\n" + "\n\n".join(shown))
    return list(dict.fromkeys(found))


def instructed_effects(ground: Ground, split: str, instruction: str) -> Float[Tensor, " X"]:
    """Every example's score with an instruction before its prompts, less its score without."""
    model, examples, base = ground.model, ground.splits[split], ground.scorer(split).base
    if (items := examples.decoding) is not None:
        ids = tuple(one.asks[0].ids(model, instruction) for one in examples.examples)
        asked = replace(items, ids=ids)
        rewards = [outcome.reward for outcome in asked.outcomes(asked.decode(model))]
        return torch.tensor(rewards, dtype=torch.float64) - base
    answered = [
        Answered(ask.ids(model, instruction), one.answer)
        for example in examples.examples
        for ask, one in zip(example.asks, example.answered, strict=True)
    ]
    return examples.scores(log_probs(model, answered, ground.cache)) - base


def instructed_kl(ground: Ground, split: str, instruction: str) -> Float[Tensor, " P"]:
    """KL(instructed ‖ not) along neutral text, in nats per token."""
    neutral, text, model = ground.neutral(split), ground.written[split], ground.model
    found = torch.empty(len(text.prompts), dtype=torch.float64)
    answered = [
        Answered(Ask(prompt).ids(model, instruction), tokens)
        for prompt, tokens in zip(text.prompts, text.new, strict=True)
    ]
    for rows in batches(model, answered):
        with torch.no_grad():
            logits = run(model, [answered[i] for i in rows], ground.cache)
        for i, row in zip(rows, logits, strict=True):
            found[i] = float(neutral.of_logits(i, row[None])[0])
    return found


@torch.no_grad()
def log_probs(model: LanguageModel, answered: Sequence[Answered], cache: PromptCache) -> Float[Tensor, " S"]:
    """Log-probability of each answer under the model as it is, summed over its tokens."""
    found = torch.empty(len(answered), dtype=torch.float64)
    for part in batches(model, answered):
        logits = run(model, [answered[i] for i in part], cache)
        found[part] = answer_log_probs(logits, [answered[i].answer for i in part]).sum(-1).double().cpu()
    return found
