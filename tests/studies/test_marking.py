"""Marked words are those that carry the wish: taken out one by one, by another way than the code's."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.finding.result import WrittenTexts
from trimtab.judges import ConceptJudge
from trimtab.studies import marking
from trimtab.studies.marking import Marks, mark

PLAIN = "the clerk read a letter and then he went to the office near the town to see the old garden again"
SEA = "the clerk saw a whale and then he went to the harbor near the town to see the old ship again"
WRITTEN = [
    WrittenTexts(prompt=prompt, texts={"unsteered": PLAIN, "found": SEA, "random": PLAIN.replace("letter", "sailor")})
    for prompt in ("Once", "Then")
]


@pytest.fixture(scope="module")
def judge() -> ConceptJudge:
    sea, plain = ("ship", "sailor", "whale", "harbor"), ("town", "office", "letter", "garden")
    frames = "the old {} was near the {}", "he went to see a {} and the {}", "nobody liked the {} or that {}"
    texts = {
        frame.format(a, b): [label] if label else []
        for label, nouns in (("sea", sea), ("", plain))
        for frame in frames
        for a in nouns
        for b in nouns
        if a != b
    }
    return ConceptJudge.fit(list(texts), list(texts.values()), ("sea",))


def check(judge: ConceptJudge) -> Marks:
    """Every marked word costs more log-odds than 99 of 100 words of the unsteered texts, and no other does."""
    marks = mark(judge, "sea", WRITTEN, ("found", "random"))

    def loss(text: str, word: str) -> float:
        left = " ".join(other for other in text.split() if other != word)
        whole, without = judge.log_odds([text, left])[:, 0]
        return float(whole - without) / text.split().count(word)

    threshold = max(0.0, np.quantile([loss(PLAIN, word) for word in PLAIN.split()] * 2, 0.99))
    assert marks.threshold == pytest.approx(threshold)
    for text in marks.texts:
        for word, value in zip(text.words, text.adds, strict=True):
            expected = loss("".join(text.words), word.strip())
            assert (value > 0) == (expected > threshold)
            assert value in (0, pytest.approx(expected))
    return marks


def test_marked_words_are_those_that_carry_the_wish(judge: ConceptJudge) -> None:
    marks = check(judge)
    found = next(text for text in marks.texts if text.way == "found")
    marked = {word.strip() for word, value in zip(found.words, found.adds, strict=True) if value > 0}
    assert {"whale", "harbor", "ship"} <= marked
    assert not {"the", "town", "old", "clerk"} & marked
    assert [text.prompt for text in marks.texts] == ["Once"] * 3 + ["Then"] * 3
    shares = {way: interval.estimate for way, interval in marks.shares.items()}
    assert shares["unsteered"] <= 0.1 < shares["found"]
    assert shares["unsteered"] < shares["random"] < shares["found"]
    assert marks.threshold < max(found.adds) <= marks.largest


def test_a_mark_beside_the_word_that_carries_it_is_caught(judge: ConceptJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the word behind the one that carries the wish is marked."""
    real = marking.word_weights

    def shifted(judge: ConceptJudge, text: str, concept: int) -> list[tuple[str, float]]:
        found = real(judge, text, concept)
        return [(word, found[i - 1][1]) for i, (word, _) in enumerate(found)]

    monkeypatch.setattr(marking, "word_weights", shifted)
    with pytest.raises(AssertionError):
        check(judge)


def test_a_list_of_words_that_the_judge_does_not_know_is_caught(
    judge: ConceptJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: words of a list are marked, whatever they add."""
    real = marking.word_weights
    listed = {"whale", "clerk", "town"}
    monkeypatch.setattr(
        marking, "word_weights", lambda *given: [(w, float(w.strip() in listed)) for w, _ in real(*given)]
    )
    with pytest.raises(AssertionError):
        check(judge)


def test_texts_without_words_have_no_marks(judge: ConceptJudge) -> None:
    marks = mark(
        judge, "sea", [WrittenTexts(prompt=p, texts={"unsteered": "", "found": SEA}) for p in "ab"], ("found",)
    )
    assert marks.threshold == 0
    assert marks.shares["unsteered"].estimate == 0 < marks.shares["found"].estimate
