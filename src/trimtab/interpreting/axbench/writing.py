"""What a model writes to instructions, unsteered and under many directions and doses side by side, and how ordinary
the texts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.finding.examples import Answered
from trimtab.finding.prompting import log_probs
from trimtab.interpreting.axbench.arms import Aim
from trimtab.interpreting.instructions import Instructions
from trimtab.lm import DecodeConfig, InterventionSource, LanguageModel, PromptCache, Site, decode
from trimtab.stats import Interval, wilson_interval
from trimtab.steering import DirectionTable, StaticSource
from trimtab.steering.ordinary_texts import OrdinaryText, are_ordinary, ordinary_text

SAMPLES = 8
"""Unsteered answers to each instruction that say what is ordinary; the first is what steered ones are held against."""
LOOP, SPAM = 5, 4
"""Words of a loop, and different words of spam, in the texts that fluency must refuse."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """An answer."""

    text: str
    nll: float
    """Mean negative log-likelihood under the unsteered model, in nats per token."""
    ordinary: bool
    """Whether it is as likely as the model's own answers, no less and no more, and repeats itself no more than they."""


class OwnArm(Protocol):
    """A model that is steered in another way than by one direction, such as one that was finetuned with switches."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> LanguageModel: ...
    @property
    def factors(self) -> tuple[float, ...]:
        """Strengths that are tried."""
        ...

    def source(self, rows: Sequence[tuple[str, float]]) -> InterventionSource:
        """What steers rows, each towards a concept by its name, by a factor.

        Raises:
            UserError: it has no such concept.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FluencyCheck:
    """How often texts are refused as not ordinary: of held-out unsteered answers, and of what steering makes of texts
    at worst, made from these answers. The band was drawn from answers to other instructions."""

    unsteered: Interval | None
    """Should be low."""
    loops: Interval | None
    """Five words again and again."""
    spam: Interval | None
    """Four words in any order."""
    shuffled: Interval | None
    """All words in another order. None, as the others, where no answer has more words than a loop."""


class Writer:
    """Writes answers to instructions.

    Args:
        model: the model.
        site: where directions are added.
        instructions: all of them.
        config: how tokens are chosen.
        chat: whether instructions are put into the chat template.
        positions: which are edited.
        unit: of factors.
        progress: called with the number of answers whenever some are written.
    """

    def __init__(
        self, model: LanguageModel, site: Site, instructions: Instructions, config: DecodeConfig, *, chat: bool,
        positions: str, unit: str, progress: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.site, self.instructions, self.config = model, site, instructions.all, config
        self.chat, self.positions, self.unit, self.progress = chat, positions, unit, progress
        self.prompts = [model.encode_text(text, chat=chat) for text in self.instructions]
        self._cache = PromptCache(model)

    @cached_property
    def _own(self) -> tuple[list[str], list[list[int]], NDArray[np.float64]]:
        """Unsteered answers, all of an instruction's behind each other."""
        copies = SAMPLES if self.config.temperature > 0 else 1
        decoded = decode(self.model, self.prompts, self.config, repeats=copies, progress=self.progress)
        prompts = [prompt for prompt in self.prompts for _ in range(copies)]
        return decoded.texts, decoded.token_ids, self._nll(prompts, decoded.token_ids)

    @property
    def n_own(self) -> int:
        """Unsteered answers."""
        return len(self._own[0])

    @property
    def unsteered(self) -> list[str]:
        """The model's own answer to each instruction, with the draws that steered answers have, too."""
        texts = self._own[0]
        return texts[:: len(texts) // len(self.prompts)]

    @cached_property
    def ordinary(self) -> OrdinaryText:
        """What its own answers are like."""
        _, tokens, nll = self._own
        return ordinary_text(self.model, self.config, nll.tolist(), tokens, chat=self.chat)

    def check_fluency(self, seed: int) -> FluencyCheck:
        """How often loops, spam and shuffled words are refused, and ordinary answers."""
        texts, tokens, nll = self._own
        number = np.arange(len(texts)) // (len(texts) // len(self.prompts))
        drawn_from, held = np.flatnonzero(number % 2 == 0), np.flatnonzero(number % 2 == 1)
        band = ordinary_text(
            self.model, self.config, nll[drawn_from].tolist(), [tokens[i] for i in drawn_from], chat=self.chat
        )
        rng = np.random.default_rng(seed)

        def refused(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Interval | None:
            if not answers:
                return None
            inside = are_ordinary(band, self._nll(prompts, answers), answers)
            return wilson_interval(int((~inside).sum()), len(inside))

        def spoiled(how: Callable[[list[str]], list[str]]) -> Interval | None:
            kept = [i for i in held if len(texts[i].split()) > LOOP]
            spoilt = [" ".join(how(texts[i].split())) for i in kept]
            answers = [self.model.encode_continuation(text) for text in spoilt]
            return refused([self.prompts[number[i]] for i in kept], answers)

        return FluencyCheck(
            unsteered=refused([self.prompts[number[i]] for i in held], [tokens[i] for i in held]),
            loops=spoiled(lambda words: (words[:LOOP] * len(words))[: len(words)]),
            spam=spoiled(lambda words: rng.choice(sorted(set(words), key=len)[-SPAM:], len(words)).tolist()),
            shuffled=spoiled(lambda words: rng.permutation(words).tolist()),
        )

    def under_directions(
        self, aims: Sequence[Aim], factors: Sequence[Sequence[float]], which: range | None = None
    ) -> list[list[list[Text]]]:
        """Answers under each direction at each of its factors, in one decode call.

        Copies of an instruction are fed once for as many edits as are decoded side by side.

        Args:
            aims: directions.
            factors: of each.
            which: places of the instructions; all by default.

        Returns:
            Answers to these instructions, by direction and factor.
        """
        which = range(len(self.prompts)) if which is None else which
        table = DirectionTable(
            torch.stack([aim.direction for aim in aims]),
            max_activation=None if self.unit == "relative" else torch.tensor([aim.largest for aim in aims]),
        )
        edits = [(i, factor) for i, mine in enumerate(factors) for factor in mine]
        groups = ceil(len(edits) / self.config.batch_size)
        size = ceil(len(edits) / groups)
        # What fills up the last group steers nothing.
        padded = edits + [(-1, 0.0)] * (groups * size - len(edits))
        rows = [
            (place, edit)
            for group in range(groups)
            for place in which
            for edit in padded[group * size : (group + 1) * size]
        ]
        source = StaticSource(
            table, torch.tensor([[edit[0]] for _, edit in rows]), torch.tensor([[float(edit[1])] for _, edit in rows]),
            self.site, unit=self.unit, positions=self.positions,
        )  # fmt: skip
        prompts = [self.prompts[i] for i in which] * groups
        decoded = decode(
            self.model, prompts, self.config, source, repeats=size, samples=[*which] * groups,
            branches=[0] * len(rows), progress=self.progress,
        )  # fmt: skip
        texts = self._texts([self.prompts[i] for i, _ in rows], decoded.texts, decoded.token_ids)
        found: dict[tuple[int, float], list[Text]] = {}
        for (_, edit), text in zip(rows, texts, strict=True):
            found.setdefault(edit, []).append(text)
        return [[found[i, factor] for factor in mine] for i, mine in enumerate(factors)]

    def prompted(self, wanted: Sequence[str], which: range) -> list[list[list[Text]]]:
        """Answers where the instruction says what they are to be about."""
        asked = [f"{self.instructions[i]}\n\n{request(what)}" for what in wanted for i in which]
        prompts = [self.model.encode_text(text, chat=self.chat) for text in asked]
        decoded = decode(
            self.model, prompts, self.config, samples=[*which] * len(wanted), progress=self.progress
        )  # fmt: skip
        texts = iter(self._texts([self.prompts[i] for i in which] * len(wanted), decoded.texts, decoded.token_ids))
        return [[[next(texts) for _ in which]] for _ in wanted]

    def by_own_arm(
        self, arm: OwnArm, concepts: Sequence[str], factors: Sequence[Sequence[float]], which: range
    ) -> list[list[list[Text]]]:
        """Answers of another model under its own steering, read as likely by this one."""
        rows = [(name, factor) for name, mine in zip(concepts, factors, strict=True) for factor in mine]
        prompts = [self.prompts[i] for i in which] * len(rows)
        decoded = decode(
            arm.model, prompts, self.config, arm.source([row for row in rows for _ in which]),
            samples=[*which] * len(rows), progress=self.progress,
        )  # fmt: skip
        texts = iter(self._texts(prompts, decoded.texts, decoded.token_ids))
        return [[[next(texts) for _ in which] for _ in mine] for mine in factors]

    def _texts(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[str], tokens: Sequence[Sequence[int]]
    ) -> list[Text]:
        nll = self._nll(prompts, tokens)
        ordinary = are_ordinary(self.ordinary, nll, tokens)
        return [
            Text(text=text, nll=float(value), ordinary=bool(inside))
            for text, value, inside in zip(texts, nll, ordinary, strict=True)
        ]

    def _nll(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        answered = [Answered(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, tokens, strict=True)]
        return -log_probs(self.model, answered, self._cache).numpy() / np.array([len(ids) for ids in tokens])


def request(what: str) -> str:
    """What prompting asks for."""
    return f"Write your answer so that it has to do with this: {what}."
