"""A model on this machine as a judge: probabilities against plain forward passes of the transformers model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate, make_feature_judge
from trimtab.interpreting.judges import local_model, questions
from trimtab.interpreting.judges.local_model import YES_NO, LocalModelJudge
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel

SEA = Meaning(name="feature 3", text="ships and the sea")
PASSAGES = [Passage(tokens=(word,)) for word in ("The harbour", "A hill", "Her boat was there", "No", "An inn")]


@pytest.fixture
def judge(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LocalModelJudge:
    monkeypatch.setattr("trimtab.interpreting.judges.local_model.load_model", lambda *_, **__: tiny_llama)
    found = make_feature_judge("local-model:tiny", batch_size=2)
    assert isinstance(found, LocalModelJudge)
    return found


def by_hand(model: LanguageModel, text: str, answers: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """Probabilities of answers among themselves, from one forward pass over one prompt."""
    ids = model.encode_text(text, chat=True)
    p = model.hf(torch.tensor([ids])).logits[0, -1].double().softmax(0)
    first = [{model.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms} for forms in answers]
    each = np.array([sum(float(p[i]) for i in ids) for ids in first])
    return each / each.sum()


def test_where_it_fires_is_yes_against_no(judge: LocalModelJudge, tiny_llama: LanguageModel) -> None:
    """Mutation: rows come back in the order of their lengths."""
    other = Meaning(name="b", text="hills")
    first, second = judge.fires([SEA, other], [PASSAGES, PASSAGES[:2]])
    for meaning, passages, found in ((SEA, PASSAGES, first), (other, PASSAGES[:2], second)):
        wanted = [
            by_hand(
                tiny_llama,
                YES_NO.format(meaning=meaning.text, text=passage.text),
                (("Yes", "yes", "YES"), ("No", "no", "NO")),
            )[0]
            for passage in passages
        ]
        assert found == pytest.approx(np.array(wanted), abs=1e-4)
    assert judge.fires([], []) == []


def test_ratings_are_means_by_probability(judge: LocalModelJudge, tiny_llama: LanguageModel) -> None:
    one = ToRate(meaning=SEA, instruction="Describe a day.", text="A day at sea.", unsteered="A day.")
    (found,) = judge.rate([one])
    assert isinstance(found, Rating)
    digit = "Answer with 0, 1 or 2 and nothing else."
    for score, (instruction, question) in zip(found, questions.rating_questions(one, digit), strict=True):
        assert "<rating>" not in instruction
        text = f"{instruction}\n\n{question}"
        p = by_hand(tiny_llama, text, (("0",), ("1",), ("2",)))
        assert score == pytest.approx(float(p @ [0, 1, 2]), abs=1e-4)


def test_it_explains_in_its_own_words(judge: LocalModelJudge) -> None:
    (found,) = judge.explain([Exemplars(name="feature 3", has=(PASSAGES[0],), lacks=())])
    assert isinstance(found, Meaning | Unjudged)
    assert isinstance(found, Unjudged) or (found.name == "feature 3" and found.text.strip())


def test_a_model_that_cannot_chat_is_refused(judge: LocalModelJudge, tiny_llama: LanguageModel, monkeypatch) -> None:
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="judge local-model:tiny: the model has no chat template"):
        judge.fires([SEA], [PASSAGES])


def spaced(ids: dict[str, list[int]]) -> Any:
    """A model whose tokenizer gives these tokens to these words."""
    tokenizer = lambda text, add_special_tokens: {"input_ids": ids[text]}  # noqa: E731
    return SimpleNamespace(tokenizer=tokenizer, name="spaced")


def test_answers_are_told_apart_where_they_differ() -> None:
    """Mutation: take the first token of each, which is a space of its own before digits with Llama 2's tokenizer."""
    found = local_model._first_tokens(spaced({"0": [7, 10], "1": [7, 11], "2": [7, 12]}), ("0", "1", "2"))
    assert found == ([7], [[10], [11], [12]])
    yes_no = {"Yes": [1], "yes": [2], "YES": [3, 4], "No": [5], "no": [6], "NO": [5, 4]}
    assert local_model._first_tokens(spaced(yes_no), ("Yes", "No")) == ([], [[1, 2, 3], [5, 6]])
    with pytest.raises(UserError, match="Yes, No begin with the same token"):
        local_model._first_tokens(spaced(yes_no | {"NO": [3, 9]}), ("Yes", "No"))
    with pytest.raises(UserError, match="0, 1 begin with the same token"):
        local_model._first_tokens(spaced({"0": [7], "1": [7, 8]}), ("0", "1"))


def test_what_all_answers_begin_with_is_read_first(
    judge: LocalModelJudge, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: leave it out of the prompt."""
    monkeypatch.setattr(local_model, "_first_tokens", lambda *_: ([9], [[10], [11]]))
    (found,) = judge.fires([SEA], [PASSAGES[:1]])
    text = YES_NO.format(meaning=SEA.text, text=PASSAGES[0].text)
    p = tiny_llama.hf(torch.tensor([[*tiny_llama.encode_text(text, chat=True), 9]])).logits[0, -1].double().softmax(0)
    assert found[0] == pytest.approx(float(p[10] / (p[10] + p[11])), abs=1e-4)
