"""Texts that are written on neutral prompts, and how they are read: by what did not choose.

Where a wish is stated by texts, a classifier of words and letters reads them; it is fitted on those of the wish's texts
that neither candidates nor choice were made from, and says how often it is right. Where it is stated by words, their
presence is read; where by a task, the task's own reward of greedy answers to its items.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Examples
from trimtab.finding.ground import Ground
from trimtab.finding.prompting import log_probs
from trimtab.judges import ConceptJudge
from trimtab.lm import Decoded, InterventionSource, decode
from trimtab.stats import Interval
from trimtab.steering.fluency import repetition

CONCEPT = "the wish"


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """Texts behind the neutral prompts of the report, all of equally many tokens."""

    texts: tuple[str, ...]
    nll: NDArray[np.float64]
    """Mean negative log-likelihood of each under the unsteered model, in nats per token."""
    repetition: NDArray[np.float64]
    """Share of 4-grams that occurred before in the same text."""


def write(ground: Ground, source: InterventionSource | None = None, instruction: str = "") -> Written:
    """Write texts under a source or behind an instruction, with the random draws of the unsteered ones."""
    neutral, model = ground.neutral("report"), ground.model
    decoded: Decoded = neutral.decoded
    if source is not None or instruction:
        prompts = [Ask(text).ids(model, instruction) for text in neutral.prompts]
        decoded = decode(model, prompts, neutral.config, source, progress=ground.meter.advance)
    answered = [Answered(tuple(ids), tuple(new)) for ids, new in zip(neutral.ids, decoded.token_ids, strict=True)]
    nll = -log_probs(model, answered, ground.cache).numpy() / [len(one.answer) for one in answered]
    return Written(
        texts=tuple(decoded.texts), nll=nll, repetition=np.array([repetition(ids) for ids in decoded.token_ids])
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Reads what a way of steering brings about in generated text."""

    name: str
    read: Callable[[Written, InterventionSource | None, str], NDArray[np.float64]]
    """From texts, and what they were written under, to a number of each text or item."""
    accuracy: Interval | None = None
    """Of the classifier, on texts that it was not fitted on."""


def make_reader(ground: Ground) -> Reader:
    """What reads generated texts for the wish.

    Raises:
        UserError: there is too little to fit a classifier on.
    """
    report = ground.splits["report"]
    if report.reader is not None:
        return Reader(name=f"reward of {report.reader.task.name}", read=_by_task(ground, report))
    if report.more or report.less:
        return Reader(name="words", read=lambda written, *_: np.array([_words(t, report) for t in written.texts]))
    judge = _fit(ground)
    return Reader(
        name="classifier of the wish's texts",
        read=lambda written, *_: judge.has(written.texts)[:, 0].astype(float),
        accuracy=judge.quality.accuracy,
    )


def _words(text: str, examples: Examples) -> float:
    """1 if a text has a wanted word, less 1 if it has an unwanted one."""

    def has(words: tuple[str, ...]) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)

    return float(has(examples.more)) - float(has(examples.less))


def _by_task(
    ground: Ground, examples: Examples
) -> Callable[[Written, InterventionSource | None, str], NDArray[np.float64]]:
    items = examples.reader
    assert items is not None

    def read(_written: Written, source: InterventionSource | None, instruction: str) -> NDArray[np.float64]:
        asked = items
        if instruction:
            ids = tuple(one.asks[0].ids(ground.model, instruction) for one in examples.examples)
            asked = replace(items, ids=ids)
        decoded = asked.decode(ground.model, source, prompt_cache=ground.cache)
        return np.array([outcome.reward for outcome in asked.outcomes(decoded)])

    return read


def _fit(ground: Ground) -> ConceptJudge:
    """A classifier of the wish's texts but those that candidates and choice were made from."""
    chosen_on = {one.id for split in ("candidates", "choice") for one in ground.splits[split].examples}
    examples = ground.splits["report"]
    texts = [
        (text, [CONCEPT] * wanted)
        for kind, wanted in ((examples.wanted, True), (examples.unwanted, False))
        for id_, text in kind.items()
        if id_ not in chosen_on
    ]
    if not texts:
        raise UserError("a judge of generated text", "the wish has no texts to fit one on", "state it by texts")
    return ConceptJudge.fit(
        [text for text, _ in texts], [labels for _, labels in texts], (CONCEPT,), ground.options.seed
    )
