"""The classifier judge with a tiny model whose logits are set by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trimtab.errors import UserError
from trimtab.judges import ClassifierJudge, Verdict


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer whose label 1, REJECTION, has logit 1 above the other, whatever the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "no", "yes", "please"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, id2label={0: "NORMAL", 1: "REJECTION"}, label2id={"NORMAL": 0, "REJECTION": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    path = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return path


def test_the_refusal_label_s_probability_decides(classifier: Path) -> None:
    judge = ClassifierJudge(str(classifier), batch_size=2)
    expected = 1 / (1 + math.exp(-1))
    verdicts = judge.score_all(["p"] * 4, ["no please", "yes", " ", "yes please no " * 3])
    assert [v.refused for v in verdicts] == [True, True, False, True]
    assert verdicts[2] == Verdict(refused=False, gibberish=True, reason="empty")
    assert verdicts[0].score == pytest.approx(expected, abs=1e-6)
    assert verdicts[0].reason == "REJECTION"
    assert not ClassifierJudge(str(classifier), threshold=0.9).score("p", "no please").refused
    assert ClassifierJudge(str(classifier), with_prompt=True).score("please", "no").refused
    assert ClassifierJudge(str(classifier), refusal_label="normal").score("p", "no").score == pytest.approx(
        1 - expected, abs=1e-6
    )


def test_an_answer_longer_than_the_model_is_cut(classifier: Path) -> None:
    words = "we went to the market in the morning and bought apples, bread and a jar of honey for our aunt"
    assert ClassifierJudge(str(classifier)).score("p", words).refused


def test_what_is_wrong_is_said(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classifier could be loaded"):
        ClassifierJudge(str(tmp_path)).score("p", "yes")
    with pytest.raises(UserError, match="its labels are NORMAL, REJECTION, none of them toxic"):
        ClassifierJudge(str(classifier), refusal_label="toxic").score("p", "yes")
    with pytest.raises(UserError, match=r"threshold 1\.5: it must be between 0 and 1"):
        ClassifierJudge("x", threshold=1.5)
    with pytest.raises(UserError, match="batch_size 0"):
        ClassifierJudge("x", batch_size=0)
