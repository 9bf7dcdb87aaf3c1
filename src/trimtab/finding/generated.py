"""Texts that are written on neutral prompts, and how they are read: by what did not choose.

Where a wish is stated by texts, a classifier of words and letters reads them; it is fitted on those of the wish's texts
that neither candidates nor choice were made from, and says how often it is right. Where it is stated by words, their
presence is read; where by a task, the task's own reward of greedy answers to its items.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.finding.examples import Answered, Ask, Examples
from trimtab.finding.ground import Ground
from trimtab.finding.prompting import log_probs
from trimtab.finding.result import HARDLY_DIFFER
from trimtab.finding.steering_edit import SteeringEdit, source_of
from trimtab.judges import ConceptJudge
from trimtab.lm import InterventionSource, decode
from trimtab.stats import Interval, bootstrap_mean, wilson_interval

CONCEPT = "the wish"
SURE = 0.99
"""Probability at which a classifier's log-odds are cut, so that no single text decides a mean."""
ROWS = 128
"""Texts that are written side by side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """Texts behind the neutral prompts of the report, all of equally many tokens."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    nll: NDArray[np.float64]
    """Mean negative log-likelihood of each under the unsteered model, in nats per token."""


def unsteered(ground: Ground) -> Written:
    """What the model writes by itself."""
    found = ground.written["report"]
    return Written(texts=found.texts, tokens=found.new, nll=np.array(found.nll))


def write(ground: Ground, ways: Mapping[str, SteeringEdit | str]) -> dict[str, Written]:
    """Write texts under edits and behind instructions, all side by side, with the random draws of the unsteered ones.

    Args:
        ground: of the search.
        ways: edits and instructions by name, at least one edit among them.
    """
    neutral, model = ground.written["report"], ground.model
    n, found = len(neutral.prompts), dict[SteeringEdit | str, Written]()
    edited = [way for way in ways.values() if isinstance(way, SteeringEdit)]
    first = edited[0].operation  # instructed rows go with these and are not edited
    for operation in dict.fromkeys(way.operation for way in edited):
        mine = [
            way
            for way in dict.fromkeys(ways.values())
            if (first if isinstance(way, str) else way.operation) == operation
        ]
        edits = [replace(edited[0], parts=()) if isinstance(way, str) else way for way in mine]
        prompts = [
            [Ask(text).ids(model, way) for text in neutral.prompts] if isinstance(way, str) else neutral.ids
            for way in mine
        ]
        source = source_of(ground.tables, [edit for edit in edits for _ in range(n)])
        decoded = decode(
            model, [*chain(*prompts)], replace(neutral.config, batch_size=ROWS), source,
            samples=[*range(n)] * len(mine), prompt_cache=ground.cache, progress=ground.meter.advance,
        )  # fmt: skip
        answered = [Answered(neutral.ids[row % n], tuple(new)) for row, new in enumerate(decoded.token_ids)]
        nll = -log_probs(model, answered, ground.cache).numpy() / [len(one.answer) for one in answered]
        for i, way in enumerate(mine):
            rows = slice(i * n, (i + 1) * n)
            tokens = tuple(one.answer for one in answered[rows])
            found[way] = Written(texts=tuple(decoded.texts[rows]), tokens=tokens, nll=nll[rows])
    return {name: found[way] for name, way in ways.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Reads what a way of steering brings about in generated text."""

    name: str
    unit: str
    """Of what it reads."""
    read: Callable[[Written, InterventionSource | None, str], NDArray[np.float64]]
    """From texts, and what they were written under, to a number of each text or item."""
    share: Callable[[Written, NDArray[np.float64]], Interval]
    """From texts and what was read in them to how much of the wish is there: a share of texts, or a mean."""
    accuracy: Interval | None = None
    """Of the classifier, on texts that it was not fitted on; 0.5 is chance."""

    def doubts(self) -> list[str]:
        """What is to be said of the wish's texts where nobody can be sure that they differ."""
        found = self.accuracy
        if found is None or found.low > 0.5:
            return []
        return [
            f"{HARDLY_DIFFER}: of those that it was not fitted on, a classifier of words and "
            f"letters tells {found:.2f} apart, where 0.5 is chance; say the wish otherwise, or state it by other texts"
        ]


def make_reader(ground: Ground) -> Reader:
    """What reads generated texts for the wish.

    Raises:
        UserError: there is too little to fit a classifier on.
    """
    report, seed = ground.splits["report"], ground.options.seed

    def mean(_written: Written, values: NDArray[np.float64]) -> Interval:
        return bootstrap_mean(values, seed=seed)

    if report.reader is not None:
        name = f"reward of {report.reader.task.name}"
        return Reader(name=name, unit="reward", read=_by_task(ground, report), share=mean)
    if report.more or report.less:
        return Reader(
            name="words", unit="texts", read=lambda written, *_: np.array([_words(t, report) for t in written.texts]),
            share=mean,
        )  # fmt: skip
    judge = _fit(ground)

    def log_odds(written: Written, *_: object) -> NDArray[np.float64]:
        likely = judge.probabilities(written.texts)[:, 0].clip(1 - SURE, SURE)
        return np.log(likely / (1 - likely))

    return Reader(
        name="classifier of the wish's texts",
        unit="nats of its log-odds",
        read=log_odds,
        share=lambda written, _: wilson_interval(int(judge.has(written.texts)[:, 0].sum()), len(written.texts)),
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
