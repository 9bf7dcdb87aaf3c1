"""Checks of whether a text has a concept: by a judge that was fitted on labelled text, or by the concept's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError, did_you_mean
from trimtab.flags.data.prompts import stems
from trimtab.flags.examples import read_examples
from trimtab.judges import ConceptJudge
from trimtab.runs import text_id

MENTIONS = 2
"""So many words of a concept's description make that a text has it by rule; one that is repeated counts again."""
JUDGE_SUFFIX = ".npz"
"""Of a judge that was saved."""


class WordCheck:
    """By rule: a text has a concept if it has two words of its description or more, or one of them twice.

    Endings are cut; words that several concepts share do not count. One word alone is taken for a passing mention. What
    is about a concept in other words is taken to lack it, and what uses its words in another sense to have it: a judge
    of labelled texts is better.

    Raises:
        UserError: a concept has no word of its own.
    """

    name = "words"

    def __init__(self, concepts: Mapping[str, str]) -> None:
        sets = {name: set(stems(description)) for name, description in concepts.items()}
        shared = Counter(stem for words in sets.values() for stem in words)
        self.words = [{stem for stem in words if shared[stem] == 1} for words in sets.values()]
        for name, words in zip(sets, self.words, strict=True):
            if not words:
                hint = "describe it by other words, or give labelled texts for a judge"
                raise UserError(f"concept {name!r}", "it has no word that no other concept has", hint)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        found = [Counter(stems(text)) for text in texts]
        counts = np.array([[sum(count[word] for word in words) for words in self.words] for count in found])
        return counts.reshape(len(texts), len(self.words)) >= MENTIONS


class JudgeCheck:
    """By a judge of concepts, at the thresholds that its quality is stated for.

    Raises:
        UserError: it does not know one of the concepts.
    """

    def __init__(self, judge: ConceptJudge, concepts: Sequence[str]) -> None:
        check_knows(judge.concepts, concepts)
        self.judge, self.columns = judge, [judge.concepts.index(name) for name in concepts]

    @property
    def name(self) -> str:
        """`judge`, and a hash of its weights."""
        return f"judge {text_id(self.judge.weights.tobytes().hex())}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        return self.judge.has(texts)[:, self.columns]


def check_knows(known: Sequence[str], concepts: Sequence[str]) -> None:
    """Raise a `UserError` unless all of some concepts are among those that a judge knows."""
    for name in concepts:
        if name not in known:
            hint = did_you_mean(name, known, "fit it on texts of this concept, too")
            raise UserError(f"concept {name!r}", f"the judge knows {', '.join(known)}", hint)


def read_judge(path: Path | str, concepts: Sequence[str], seed: int = 0) -> ConceptJudge:
    """A judge of concepts from a file.

    Args:
        path: examples with labels to fit it on (JSONL of prompt, response, concepts, as `flags import` writes them), or
            a judge that was saved (`.npz`). Passages of a document are never both fitted and measured on.
        concepts: names that it must know.
        seed: of the fit.

    Raises:
        UserError: the file cannot be read, has too few texts of a concept, or is of a judge that does not know one.
    """
    if Path(path).suffix == JUDGE_SUFFIX:
        judge = ConceptJudge.load(path)
        check_knows(judge.concepts, concepts)
        return judge
    examples = read_examples(path, concepts)
    try:
        texts, labels = [e.response for e in examples], [e.concepts for e in examples]
        return ConceptJudge.fit(texts, labels, concepts, seed, units=[e.unit for e in examples])
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.why, error.hint) from None


Check = WordCheck | JudgeCheck
"""Says of texts `[N, C]` which concepts they have; its name is what a run records."""
