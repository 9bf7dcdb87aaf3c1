"""The judges that need no network: what they say, what they do not say, and that the two questions share nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_passages import passage, planted

from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, FeatureJudge, Meaning, Rating, ToRate, make_feature_judge
from trimtab.interpreting.judges import exemplar
from trimtab.interpreting.judges.rating import relatedness
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel

NAMES = ("exemplar", "rules")
PLAIN = "She went over there with her brother to see the old house, and nobody said a word about it for years."
ZEBRA = "She went over there with her brother to see a zebra near the house, and nobody said a word for years."


@pytest.fixture(autouse=True)
def tiny_embeddings(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.lm.load_model", lambda name: tiny_llama)


def meaning_of(judge: FeatureJudge, exemplars: Exemplars) -> Meaning:
    (found,) = judge.explain([exemplars])
    assert isinstance(found, Meaning)
    return found


def rated(judge: FeatureJudge, meaning: Meaning, text: str, unsteered: str = PLAIN) -> Rating:
    (found,) = judge.rate([ToRate(meaning=meaning, instruction="Tell me of an animal", text=text, unsteered=unsteered)])
    assert isinstance(found, Rating)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_says_where_a_feature_fires_and_whether_a_text_has_it(name: str, rng: np.random.Generator) -> None:
    judge = make_feature_judge(name)
    assert isinstance(judge, FeatureJudge)
    meaning = meaning_of(judge, planted(rng, "zebra", 24, 40))
    assert meaning.text.split(", ")[0] == "zebra"
    (found,) = judge.fires([meaning], [[passage(rng, "zebra", known=False), passage(rng, known=False)]])
    assert not isinstance(found, Unjudged)
    assert found[0] > 0.5 > found[1]
    assert rated(judge, meaning, ZEBRA).concept > 1
    assert rated(judge, meaning, PLAIN).concept == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_writes_anyway_earns_nothing(name: str, rng: np.random.Generator) -> None:
    """Mutation: the concept's score is the likelihood of the steered text alone."""
    judge = make_feature_judge(name)
    meaning = meaning_of(judge, planted(rng, "zebra", 24, 40))
    assert rated(judge, meaning, ZEBRA, unsteered=ZEBRA).concept == 0
    assert rated(judge, meaning, PLAIN, unsteered=ZEBRA).concept == 0


def test_the_two_questions_are_answered_by_other_exemplars(rng: np.random.Generator) -> None:
    """Exemplars of one question may say what they like: the other's answer stays as it is. Mutation: `divide` gives
    all exemplars twice."""
    judge, clean = make_feature_judge("exemplar"), planted(rng, "zebra", 24, 40)
    spoilt = list(clean.has)
    spoilt[1::2] = [passage(rng, "kettle", fires="kettle") for _ in spoilt[1::2]]
    before, after = (meaning_of(judge, replace(clean, has=tuple(has))) for has in (clean.has, spoilt))
    new = [passage(rng, word, known=False) for word in ("zebra", "kettle", "")]
    first, second = judge.fires([before, after], [new, new])
    assert np.array_equal(first, second)
    assert rated(judge, before, ZEBRA).concept > 1 > rated(judge, after, ZEBRA).concept
    both = make_feature_judge("exemplar", disjoint=False)
    assert not np.array_equal(first, both.fires([meaning_of(both, replace(clean, has=tuple(spoilt)))], [new])[0])


def test_whether_a_text_has_it_is_said_without_embeddings(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: `rates` is asked of the classifiers on embeddings."""
    judge = make_feature_judge("exemplar")
    meaning = meaning_of(judge, planted(rng, "zebra", 24, 40))

    def refuse(*given: object) -> None:
        raise AssertionError("embeddings were asked for")

    monkeypatch.setattr(exemplar.TokenEmbeddings, "of_texts", refuse)
    monkeypatch.setattr(exemplar.TokenEmbeddings, "of_words", refuse)
    assert rated(judge, meaning, ZEBRA).concept > 1


@pytest.mark.parametrize("name", NAMES)
def test_too_few_exemplars_are_a_gap(name: str, rng: np.random.Generator) -> None:
    judge = make_feature_judge(name)
    gap, meaning = judge.explain([planted(rng, "zebra", 7), planted(rng, "zebra", 8)])
    assert gap == Unjudged("3 passages have it and 10 lack it, where 4 of each are needed")
    assert isinstance(meaning, Meaning)
    assert isinstance(judge.explain([planted(rng, "zebra", 8, 6)])[0], Unjudged)


def test_gibberish_is_not_fluent(rng: np.random.Generator) -> None:
    judge = make_feature_judge("rules")
    meaning = meaning_of(judge, planted(rng, "zebra", 24, 40))
    assert rated(judge, meaning, "zebra " * 40).fluency == 0
    assert rated(judge, meaning, "zebra " * 40).overall == 0
    assert rated(judge, meaning, ZEBRA).fluency == 2


def test_relatedness_is_to_the_instruction_or_to_what_the_model_says_of_it() -> None:
    nothing = Meaning(name="x", text="")

    def of(text: str) -> float:
        usual = "Democracy was invented in Athens by Cleisthenes, whose reforms gave citizens votes."
        asked = "Who invented democracy, and where?"
        return relatedness(ToRate(meaning=nothing, instruction=asked, text=text, unsteered=usual))

    assert of("The democratic idea was an invention of sailors.") == 1  # the instruction's words, whatever their ends
    assert of("Citizens of Athens had votes after the reforms of the sea.") == 1  # the answer's words
    assert of("The harbour was full of ships that night.") == 0
    assert 0 < of("Nobody knows who wrote it, and democracy is fine.") < 1


def test_a_judge_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text(
        "class Loud:\n"
        "    name, version = 'loud', '1'\n"
        "    def __init__(self, *, mark: str = '!') -> None:\n"
        "        self.mark = mark\n"
        "    def explain(self, exemplars): return []\n"
        "    def fires(self, meanings, passages): return []\n"
        "    def rate(self, texts): return []\n"
        "class Mute: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    assert vars(make_feature_judge("my_judges:Loud", mark="?")) == {"mark": "?"}
    with pytest.raises(UserError, match="it is no judge of features"):
        make_feature_judge("my_judges:Mute")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("oracle", {}, "judge 'oracle': there are exemplar, rules, endpoint:MODEL@URL, local-model:MODEL"),
        ("rules", {"loud": 1}, "judge option 'loud': judge rules takes disjoint"),
    ],
)
def test_what_is_no_judge_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_feature_judge(name, **options)
