"""Texts are cut where sentences end, never longer than asked, and nothing is lost unseen."""

from __future__ import annotations

from collections import Counter

import pytest

from trimtab.flags.data.passages import cleaned, ended, passages, sentences

NOVEL = (
    'The ship lay in the bay. "Where is\nMr. Silver?" asked the boy.\nNobody knew; the U.S. flag was gone!\n\n'
    "Short.\n\n"
    "A man came up the path. He had one leg."
)


def test_sentences_end_at_full_stops_but_not_at_abbreviations() -> None:
    first, _, _ = NOVEL.split("\n\n")
    assert sentences(first) == [
        "The ship lay in the bay.",
        '"Where is Mr. Silver?" asked the boy.',
        "Nobody knew; the U.S. flag was gone!",
    ]
    assert sentences("no full stop, and\nthat is fine") == ["no full stop, and that is fine"]
    assert sentences("  \n ") == []


def test_passages_are_whole_sentences_and_keep_paragraphs_apart() -> None:
    dropped = Counter[str]()
    found = passages(NOVEL, 10, 70, dropped)
    assert found == [
        'The ship lay in the bay. "Where is Mr. Silver?" asked the boy.',
        "Nobody knew; the U.S. flag was gone!\n\nShort.\n\nA man came up the path.",
        "He had one leg.",
    ]
    assert not dropped


def test_what_is_left_out_is_counted() -> None:
    dropped = Counter[str]()
    assert passages(NOVEL, 40, 50, dropped) == ["Nobody knew; the U.S. flag was gone!\n\nShort."]
    assert dropped == {"too short": 3}
    assert passages("one two three four five six seven eight.", 1, 20, dropped) == []
    assert dropped["a sentence too long"] == 1


@pytest.mark.parametrize("most", [12, 30, 80, 300])
def test_no_passage_is_longer_or_shorter_than_asked(most: int) -> None:
    for part in passages(NOVEL * 5, 12, most, Counter()):
        assert 12 <= len(part) <= most


def test_a_text_is_cut_after_its_last_whole_sentence() -> None:
    assert ended('It rained. "Go!" he said. And then it wa') == 'It rained. "Go!" he said.'
    assert ended('He said "Go!"') == 'He said "Go!"'
    assert ended("nothing ends here, 3.5 of them") == ""


def test_cleaning() -> None:
    assert cleaned("a second\\team got  #36;10 million, it #39;s &lt;b&gt;said&lt;/b&gt;", "html") == (
        "a second team got $10 million, it's said"
    )
    assert cleaned("it 's a film , and ( really ) good .", "wikitext") == "it's a film, and (really) good."
    assert cleaned("a  b", "none") == "a  b"
