"""Words, detectors and their combination, on passages whose rule is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from planted_passages import passage, planted

from trimtab.interpreting import Passage
from trimtab.interpreting.judges.combining import Combined
from trimtab.interpreting.judges.detectors import CountedWords, EmbeddedText, EmbeddedWords, WordsAndLetters
from trimtab.interpreting.judges.embeddings import TokenEmbeddings
from trimtab.interpreting.judges.passage_words import words_of
from trimtab.lm import LanguageModel


@pytest.fixture(scope="module")
def table(tiny_llama: LanguageModel) -> TokenEmbeddings:
    return TokenEmbeddings(tiny_llama)


def test_a_word_fires_as_its_strongest_token_whatever_the_tokens_are() -> None:
    """Mutation: tokens are matched to words by their number instead of by their characters."""
    one = Passage(tokens=(" Har", "bour", " lights", ".", "\n"), activations=(1.0, 3.0, 0.0, 0.5, 2.0))
    words, fires = words_of(one, largest=4.0)
    assert words == ["harbour", "lights", ".", "\n"]
    assert fires is not None
    assert fires.tolist() == [0.75, 0.0, 0.125, 0.5]
    assert words_of(Passage(tokens=("it's", " 5"))).fires is None


def test_rates_of_words_are_counts() -> None:
    """Mutation: words that stand in passages that lack it are not counted."""
    has = [Passage(tokens=(" sea", " calm"), activations=(2.0, 0.0)), Passage(tokens=(" sea",), activations=(1.0,))]
    lacks = [Passage(tokens=(" calm", " sea"), activations=(0.0, 0.0))]
    found = CountedWords(has, lacks)
    assert found.rates == {"sea": pytest.approx((1 + 0.5) / (3 + 2)), "calm": 0.0}
    assert found.strongest == ["sea"]
    assert found.scores([Passage(tokens=(" calm", " sea")), Passage(tokens=(" new",))]).tolist() == [0.3, 0.0]


def test_without_activations_a_word_counts_once_in_each_text() -> None:
    found = CountedWords([Passage(tokens=("sea sea sea",))], [Passage(tokens=("land",)), Passage(tokens=("sea",))])
    assert found.rates == {"sea": pytest.approx(1 / (2 + 2)), "land": 0.0}


def test_embeddings_of_texts_are_weighted_means_of_rows(table: TokenEmbeddings, tiny_llama: LanguageModel) -> None:
    """A slow loop over tokens. Mutation: a token counts as often as it stands in the text."""
    weight: Any = tiny_llama.hf.get_input_embeddings()
    rows = weight.weight.double().numpy()
    rows = rows - rows.mean(axis=0)
    text = "the tide and the boat"
    ids = sorted(set(tiny_llama.tokenizer(text, add_special_tokens=False)["input_ids"]))
    total, weights = np.zeros(rows.shape[1]), 0.0
    for i in ids:
        weight = table.rarity[i]
        total += weight * rows[i] / np.linalg.norm(rows[i])
        weights += weight
    wanted = total / weights - table.common
    found = table.of_texts([text, ""])
    assert found[0] == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-5)
    assert not found[1].any()
    assert table.rarity[ids].min() < table.rarity.max()  # a frequent token weighs less than one that never occurs


@pytest.mark.parametrize("kind", ["counted", "letters", "text", "words"])
def test_every_detector_finds_a_planted_word(kind: str, table: TokenEmbeddings, rng: np.random.Generator) -> None:
    from sklearn.metrics import roc_auc_score

    fitting = {
        "counted": CountedWords, "letters": WordsAndLetters, "text": partial(EmbeddedText, table),
        "words": partial(EmbeddedWords, table),
    }[kind]  # fmt: skip
    exemplars = planted(rng, "zebra", 16, 40)
    new = [passage(rng, "zebra", known=False) for _ in range(30)] + [passage(rng, known=False) for _ in range(30)]
    scores = fitting(exemplars.has, exemplars.lacks).scores(new)
    assert roc_auc_score(np.arange(60) < 30, scores) > 0.9


def test_of_passages_without_activations_embedded_words_learn_nothing(table: TokenEmbeddings) -> None:
    has, lacks = [Passage(tokens=("sea",))], [Passage(tokens=("land",))]
    assert EmbeddedWords(table, has, lacks).scores([*has, *lacks]).tolist() == [0, 0]


class Known:
    """Knows the word, whatever it is fitted on."""

    def __init__(self, sign: float, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        self.sign = sign

    def scores(self, passages: Sequence[Passage]) -> np.ndarray:
        return self.sign * np.array([float(" zebra" in passage.tokens) for passage in passages])


class Memory:
    """Knows the passages it was fitted on, and no others: perfect on them, and worth nothing."""

    def __init__(self, has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        self.has = set(has)

    def scores(self, passages: Sequence[Passage]) -> np.ndarray:
        return np.array([float(passage in self.has) for passage in passages])


def test_detectors_are_weighed_by_passages_that_they_have_not_seen(rng: np.random.Generator) -> None:
    """Mutation: the weights are learned on scores of detectors that were fitted on the same passages."""
    exemplars = planted(rng, "zebra")
    fittings = {"known": partial(Known, 1.0), "memory": Memory, "wrong": partial(Known, -1.0)}
    both = Combined(fittings, exemplars.has, exemplars.lacks)
    assert list(both.weights) == ["known"]
    found = both.probabilities([passage(rng, "zebra"), passage(rng)])
    assert found[0] > 0.9
    assert found[1] < 0.1


def test_with_nothing_better_than_chance_the_probability_is_a_half(rng: np.random.Generator) -> None:
    exemplars = planted(rng, "zebra")
    none = Combined({"memory": Memory}, exemplars.has, exemplars.lacks)
    assert none.probabilities([*exemplars.has, *exemplars.lacks]).tolist() == [0.5] * 30
    assert none.probabilities([]).tolist() == []
