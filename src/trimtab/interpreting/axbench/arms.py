"""Directions that are to bring concepts about: each arm is a function from what is known of the concepts to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from trimtab.control.arms.vector import add_everywhere
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.finding.examples import Answered
from trimtab.finding.passes import answer_log_probs, batches, run
from trimtab.interpreting.axbench.concepts import Concept
from trimtab.interpreting.judge import Meaning, Passage
from trimtab.lm import LanguageModel, PromptCache, Site, TokenBatch, capture, edited
from trimtab.steering import DirectionTable

TEXT_TOKENS = 48
"""Tokens of an exemplar that are read."""
BATCH = 16
"""Exemplars that are read side by side."""
TOKENS = 2000
"""Of each kind that a probe is fitted on at most."""
STEPS, STEP_BATCH, STEP_DOSE, STEP_WEIGHT = 24, 4, 0.4, 3
"""Of the learned direction: steps of Adam, answers of each, the relative dose that it is trained at, and how many times
a pass's logits are held for gradients."""


class Aim(NamedTuple):
    """How an arm brings a concept about: one direction, and what a factor of 1 comes to."""

    direction: Float[Tensor, " d"]
    largest: float
    """How far the concept's own texts lie along it at most, in model units."""
    feature: int | None = None
    """Where it is a feature's."""


class Read(NamedTuple):
    """Activations of a concept's exemplars, token by token without the first, which is a sink in most models."""

    has: list[Float[Tensor, "T d"]]
    lacks: list[Float[Tensor, "T d"]]


@dataclass(kw_only=True, eq=False)
class Ground:
    """What arms may be made of: exemplars and the instructions to choose on, never those that report."""

    model: LanguageModel
    site: Site
    concepts: Sequence[Concept]
    meanings: Sequence[Meaning]
    """Of the concepts, by the judge."""
    prompts: Sequence[Sequence[int]]
    """Token ids of the instructions to choose on."""
    dictionary: Dictionary | None = None
    seed: int = 0
    _reads: dict[int, Read] = field(default_factory=dict, repr=False)

    def needed_dictionary(self, arm: str) -> Dictionary:
        """The dictionary. Raises a `UserError` if there is none."""
        if self.dictionary is None:
            raise UserError(f"arm {arm}", "there is no SAE", "name one, or leave the arm out")
        return self.dictionary

    @cached_property
    def cache(self) -> PromptCache:
        return PromptCache(self.model)

    def read(self, number: int) -> Read:
        """Activations of a concept's exemplars at the site."""
        if number not in self._reads:
            one = self.concepts[number].exemplars
            self._reads[number] = Read(self._activations(one.has), self._activations(one.lacks))
        return self._reads[number]

    @torch.no_grad()
    def _activations(self, passages: Sequence[Passage]) -> list[Float[Tensor, "T d"]]:
        rows = [self.model.encode_text(passage.text)[:TEXT_TOKENS] for passage in passages]
        rows = [row for row in rows if len(row) > 1]
        found: list[Tensor] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            x = capture(self.model, TokenBatch.pad(part, self.model.pad_id, self.model.device), [self.site])[self.site]
            found += [each[-len(row) + 1 :].flatten(1).float().cpu() for each, row in zip(x, part, strict=True)]
        if not found:
            raise UserError("the exemplars of a concept", "none has two tokens", "give longer texts")
        return found

    def aim(self, number: int, vector: Float[Tensor, " d"]) -> Aim:
        """A vector for a concept. A factor of 1 is how far the texts that have it lie along it at most, beyond where
        the others lie on average: what most activations have in common says nothing of the concept."""
        if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            name = self.concepts[number].name
            raise UserError(f"a direction for {name}", "its texts do not differ from the others", "leave it out")
        unit = vector.float().cpu() / vector.float().norm().cpu()
        read = self.read(number)
        usual = float((torch.cat(read.lacks) @ unit).mean())
        return Aim(unit, max(float((torch.cat(read.has) @ unit).max()) - usual, 1e-6))


Directions = Callable[[Ground], list[Aim]]
"""One aim for each concept, in order."""


def features(ground: Ground) -> list[Aim]:
    """The feature that a concept is of, or else the one that tells its texts from the others best (AxBench's choice).

    Source: arXiv 2501.17148, "SAE-A": the highest AUC of the largest activation of each text.
    """
    dictionary = ground.needed_dictionary("features")
    ids = [
        _best_reader(dictionary, ground.read(i)) if concept.feature is None else concept.feature
        for i, concept in enumerate(ground.concepts)
    ]
    return _feature_aims(dictionary, ids)


def random_features(ground: Ground) -> list[Aim]:
    """Another feature for each concept, any that ever fired; without an SAE any direction."""
    generator = torch.Generator().manual_seed(ground.seed)
    if ground.dictionary is None:
        d = ground.read(0).has[0].shape[1]
        return [ground.aim(i, torch.randn(d, generator=generator)) for i in range(len(ground.concepts))]
    ids = DirectionTable.of(ground.dictionary).live_ids()
    named = torch.tensor([concept.feature for concept in ground.concepts if concept.feature is not None])
    ids = ids[~torch.isin(ids, named)]
    if not len(ids):
        raise UserError("random features", "none is left beside those under test", "use another dictionary")
    drawn = ids[torch.randint(len(ids), (len(ground.concepts),), generator=generator)]
    return _feature_aims(ground.dictionary, drawn.tolist())


def mean_difference(ground: Ground) -> list[Aim]:
    """From the mean activation on tokens of texts that lack a concept to that on those that have it."""
    reads = [ground.read(i) for i in range(len(ground.concepts))]
    return [ground.aim(i, torch.cat(r.has).mean(0) - torch.cat(r.lacks).mean(0)) for i, r in enumerate(reads)]


def probe(ground: Ground) -> list[Aim]:
    """The direction of a logistic regression of tokens, those of texts that have a concept against the others."""
    rng, found = np.random.default_rng(ground.seed), list[Aim]()
    for i in range(len(ground.concepts)):
        parts = [torch.cat(rows).numpy().astype(np.float64) for rows in ground.read(i)]
        parts = [rows[rng.permutation(len(rows))[:TOKENS]] for rows in parts]
        x, y = np.concatenate(parts), np.repeat([1, 0], list(map(len, parts)))
        scale = x.std(0) + 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=0.01, class_weight="balanced", max_iter=300).fit((x - x.mean(0)) / scale, y)
        found.append(ground.aim(i, torch.from_numpy(fitted.coef_[0] / scale)))
    return found


def rank_one(ground: Ground) -> list[Aim]:
    """A direction that is trained, at a fixed relative dose, to make the model write texts that have a concept, in
    answer to the instructions to choose on (the intervention of AxBench's ReFT-r1, without its detector)."""
    return [ground.aim(i, _learned(ground, i)) for i in range(len(ground.concepts))]


def _learned(ground: Ground, number: int) -> Float[Tensor, " d"]:
    model, rng = ground.model, np.random.default_rng([ground.seed, number])
    texts = [model.encode_text(passage.text)[:TEXT_TOKENS] for passage in ground.concepts[number].exemplars.has]
    # A tokenizer's first special token belongs before the prompt.
    texts = [ids[1:] if ids[:1] == [model.tokenizer.bos_token_id] else ids for ids in texts]
    answers = [Answered(tuple(rng.choice(len(ground.prompts), 1)), tuple(ids)) for ids in texts if ids]
    answers = [Answered(tuple(ground.prompts[which[0]]), answer) for which, answer in answers]
    read = ground.read(number)
    start = torch.cat(read.has).mean(0) - torch.cat(read.lacks).mean(0)
    vector = (start / start.norm().clamp_min(1e-30)).to(model.device).requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=0.25 / len(vector) ** 0.5)
    for _ in range(STEPS):
        part = [answers[i] for i in rng.choice(len(answers), min(STEP_BATCH, len(answers)), replace=False)]
        optimiser.zero_grad()
        for rows in batches(model, part, STEP_WEIGHT):
            some = [part[i] for i in rows]
            with torch.enable_grad():
                under = edited(model, {ground.site: lambda x: add_everywhere(x, vector, STEP_DOSE)})
                logits = run(model, some, ground.cache, under)
                lengths = torch.tensor([len(one.answer) for one in some], device=logits.device)
                nll = -(answer_log_probs(logits, [one.answer for one in some]).sum(-1) / lengths).sum() / len(part)
            nll.backward()
        optimiser.step()
    return vector.detach()


def _feature_aims(dictionary: Dictionary, ids: Sequence[int]) -> list[Aim]:
    table = DirectionTable.of(dictionary)
    largest = table.most_active(torch.tensor(ids)[None])
    largest = torch.full((1, len(ids)), torch.nan) if largest is None else largest
    return [
        Aim(table.rows[i].detach().float().cpu(), float(m), i) for i, m in zip(ids, largest[0].tolist(), strict=True)
    ]


@torch.no_grad()
def _best_reader(dictionary: Dictionary, read: Read) -> int:
    """The feature whose largest activation in a text says best whether it has the concept."""
    weight = dictionary.W_dec

    def largest(x: Tensor) -> Tensor:
        x = x.to(weight.device, weight.dtype)
        return dictionary.in_model_units(dictionary.encode(x), x).max(0).values

    has, lacks = (torch.stack([largest(x) for x in rows]) for rows in read)
    won = torch.zeros(has.shape[1], device=weight.device)
    for row in has:
        won += ((1 + torch.sign(row - lacks)) / 2).mean(0)
    return int((won / len(has)).argmax())


ARMS: dict[str, Directions] = {
    "features": features,
    "random": random_features,
    "mean-difference": mean_difference,
    "probe": probe,
    "rank-one": rank_one,
}
"""Directions by name; prompting, and models that are steered otherwise, are apart."""
