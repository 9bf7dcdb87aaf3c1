"""What a word adds to a judge's log-odds: taken out wherever it stands, held against the judge's own probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from trimtab.judges import ConceptJudge, word_weights

CALM = ("town", "office", "letter", "garden")
TOPIC = ("ship", "sailor", "whale", "harbor")
FRAMES = ("the old {} was near the {}", "we saw a {} and the {}", "nobody liked the {} or that {}", "a {} met the {}")


@pytest.fixture(scope="module")
def judge() -> ConceptJudge:
    """Fitted on sentences that differ in their nouns alone."""
    made = [
        (frame.format(a, b), [label] if label else [])
        for label, nouns in (("sea", TOPIC), ("", CALM))
        for frame in FRAMES
        for a in nouns
        for b in nouns
        if a != b
    ]
    return ConceptJudge.fit([text for text, _ in made], [labels for _, labels in made], ("sea",))


def log_odds(judge: ConceptJudge, text: str) -> float:
    (p,) = judge.probabilities([text])[:, 0]
    return math.log(p / (1 - p))


def check(judge: ConceptJudge, weigh: Callable[[ConceptJudge, str], list[tuple[str, float]]]) -> None:
    text = "\nThe whale, near the town: a Whale met the old office."
    found = weigh(judge, text)
    assert "".join(word for word, _ in found) == text
    by_word = {word.strip(): value for word, value in found}
    without = "\nThe near the town: a met the old office."
    expected = (log_odds(judge, text) - log_odds(judge, without)) / 2
    assert by_word["whale,"] == by_word["Whale"] == pytest.approx(expected)
    assert by_word["whale,"] == max(by_word.values()) > 0
    assert by_word["town:"] < 0
    assert by_word["old"] == pytest.approx(log_odds(judge, text) - log_odds(judge, text.replace(" old", "")))


def test_a_word_adds_what_the_judge_loses_without_it(judge: ConceptJudge) -> None:
    check(judge, word_weights)


def test_words_beside_those_that_carry_the_concept_are_told_apart(judge: ConceptJudge) -> None:
    """Mutation: what a word adds is said of the word behind it."""

    def shifted(judge: ConceptJudge, text: str) -> list[tuple[str, float]]:
        found = word_weights(judge, text)
        values = [value for _, value in found]
        return [(word, value) for (word, _), value in zip(found, values[-1:] + values[:-1], strict=True)]

    with pytest.raises(AssertionError):
        check(judge, shifted)


def test_a_word_that_stands_twice_is_taken_out_twice(judge: ConceptJudge) -> None:
    """Mutation: places of a word count as different words."""

    def apart(judge: ConceptJudge, text: str) -> list[tuple[str, float]]:
        words = re.findall(r"\s*\S+", text)
        left = [log_odds(judge, "".join(words[:i] + words[i + 1 :])) for i in range(len(words))]
        return [(word, log_odds(judge, text) - one) for word, one in zip(words, left, strict=True)]

    with pytest.raises(AssertionError):
        check(judge, apart)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_where_there_is_no_word_there_is_nothing(judge: ConceptJudge, text: str) -> None:
    assert word_weights(judge, text) == []
