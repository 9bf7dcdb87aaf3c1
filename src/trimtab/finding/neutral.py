"""Neutral prompts and what the unsteered model writes behind them: where the price of an edit is measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.finding.examples import Answered
from trimtab.finding.passes import EditedPasses
from trimtab.finding.scoring import Progress
from trimtab.finding.steering_edit import SteeringEdit, Tables
from trimtab.lm import DecodeConfig, LanguageModel, PromptCache, Site, decode
from trimtab.lm.token_statistics import kl_divergence
from trimtab.runs import ASSETS


def read_neutral_prompts(path: Path | None) -> dict[str, list[str]]:
    """Neutral prompts: those to choose on (`validation`), and those to report on (`held_out`).

    Args:
        path: JSON with both lists; the openings that ship with trimtab by default.

    Raises:
        UserError: the file is missing or has no two separate lists of texts.
    """
    file = ASSETS / "demo_prompts.json" if path is None else path
    hint = 'give JSON like {"validation": ["…"], "held_out": ["…"]}'
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        prompts = {name: list(found[name]) for name in ("validation", "held_out")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"prompts {file}", f"not readable as two lists of prompts ({error})", hint) from error
    for name, texts in prompts.items():
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"prompts {file}", f"{name} must be a list of texts, none of them empty", hint)
    (most, times), *_ = Counter(prompts["validation"] + prompts["held_out"]).most_common(1)
    if times > 1:
        raise UserError(f"prompt {most!r}", "it occurs twice, so that the splits are not apart", "remove one")
    for name, texts in prompts.items():
        if len(texts) < 2:
            raise UserError(f"prompts {file}", f"{name} has one text, and an interval needs two or more", hint)
    return prompts


class NeutralText:
    """What the unsteered model writes behind neutral prompts, and how far edits move its distributions there.

    Args:
        model: the model.
        prompts: neutral ones.
        tokens: of each continuation; drawn at temperature 0.7, without an early end.
        sites: all that edits may be at.
        seed: of the draws.
        cache: of prompts.

    Attributes:
        nll: `[P]` mean negative log-likelihood of each continuation, in nats per token.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[str], tokens: int, sites: Sequence[Site], seed: int,
        cache: PromptCache,
    ) -> None:  # fmt: skip
        self.model, self.prompts = model, list(prompts)
        self.ids = [model.encode_text(text) for text in prompts]
        self.config = DecodeConfig(
            max_new_tokens=tokens, temperature=0.7, top_p=0.95, seed=seed, batch_size=32, stop_at_eos=False
        )
        self.decoded = decode(model, self.ids, self.config)
        self.logits: dict[int, Float[Tensor, "A V"]] = {}
        answered = [Answered(tuple(ids), tuple(new)) for ids, new in zip(self.ids, self.decoded.token_ids, strict=True)]
        self.passes = EditedPasses(
            model, answered, sites, cache, lambda number, logits: self.logits.update({number: logits.clone()})
        )

    def kl(self, tables: Tables, edits: Sequence[SteeringEdit], progress: Progress = None) -> Float[Tensor, "E P"]:
        """KL(steered ‖ unsteered) of the next-token distributions along each continuation, in nats per token."""

        def divergence(number: int, logits: Float[Tensor, "E A V"]) -> Float[Tensor, " E"]:
            return self.of_logits(number, logits)

        return self.passes.reduce(tables, edits, divergence, progress)

    def of_logits(self, number: int, logits: Float[Tensor, "E A V"]) -> Float[Tensor, " E"]:
        """The divergence of other logits from the unsteered ones along one continuation."""
        edits, places, _ = logits.shape
        which = torch.arange(places).repeat(edits)
        return kl_divergence(logits.flatten(0, 1), self.logits[number], which).view(edits, places).mean(1)
