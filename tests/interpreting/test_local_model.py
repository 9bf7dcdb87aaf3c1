"""A model on this machine as a judge: probabilities against plain forward passes of the transformers model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate, make_feature_judge
from trimtab.interpreting.judges import questions
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
