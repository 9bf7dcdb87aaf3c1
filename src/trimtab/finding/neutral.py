"""Neutral prompts and what the unsteered model writes behind them: where the price of an edit is measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

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


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What the unsteered model writes behind neutral prompts, drawn at temperature 0.7, without an early end."""

    config: DecodeConfig
    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    new: tuple[tuple[int, ...], ...]
    """Tokens that were written."""
    nll: tuple[float, ...]
    """Mean negative log-likelihood of each text, in nats per token."""


def continued(
    model: LanguageModel, prompts: Mapping[str, Sequence[str]], tokens: int, seed: int
) -> dict[str, Continued]:
    """Let a model write so many tokens behind each prompt of some splits, side by side."""
    ids = {split: [tuple(model.encode_text(text)) for text in texts] for split, texts in prompts.items()}
    config = DecodeConfig(
        max_new_tokens=tokens, temperature=0.7, top_p=0.95, seed=seed, batch_size=32, stop_at_eos=False
    )
    samples = [i for texts in prompts.values() for i in range(len(texts))]
    decoded = decode(model, [*chain(*ids.values())], config, samples=samples)
    rows = zip(decoded.texts, map(tuple, decoded.token_ids), (-fmean(logp) for logp in decoded.token_logp), strict=True)
    found = {}
    for split, texts in prompts.items():
        written, new, nll = zip(*islice(rows, len(texts)), strict=True)
        found[split] = Continued(
            config=config, prompts=tuple(texts), ids=tuple(ids[split]), texts=written, new=new, nll=nll
        )
    return found


class NeutralText:
    """How far edits move a model's next-token distributions along neutral text.

    Args:
        model: the model.
        text: what was written behind neutral prompts.
        sites: all that edits may be at.
        cache: of prompts.
    """

    def __init__(self, model: LanguageModel, text: Continued, sites: Sequence[Site], cache: PromptCache) -> None:
        self.logits: dict[int, Float[Tensor, "A V"]] = {}
        answered = [Answered(ids, new) for ids, new in zip(text.ids, text.new, strict=True)]
        self.passes = EditedPasses(
            model, answered, sites, cache, lambda number, logits: self.logits.update({number: logits.clone()})
        )

    def kl(self, tables: Tables, edits: Sequence[SteeringEdit], progress: Progress = None) -> Float[Tensor, "E P"]:
        """KL(steered ‖ unsteered) of the next-token distributions along each continuation, in nats per token."""
        return self.passes.reduce(tables, edits, self.of_logits, progress)

    def of_logits(self, number: int, logits: Float[Tensor, "E A V"]) -> Float[Tensor, " E"]:
        """The divergence of other logits from the unsteered ones along one continuation."""
        edits, places, _ = logits.shape
        which = torch.arange(places).repeat(edits)
        return kl_divergence(logits.flatten(0, 1), self.logits[number], which).view(edits, places).mean(1)
