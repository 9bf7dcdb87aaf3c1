"""Kurtosis of the logit lens against scipy in float64, closed forms, and planted tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch

from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.selection import lens_concentration as module
from trimtab.selection import rank


def check(model: LanguageModel, dictionary: Any) -> None:
    table = rank(model, dictionary, "lens-concentration")
    exact = copy.deepcopy(model.hf).double()
    whole = LanguageModel.from_hf(exact, model.tokenizer, "float64").layout
    with torch.no_grad():
        logits = whole.head(whole.final_norm(dictionary.W_dec.detach().double()[None]))[0]
    expected = scipy.stats.kurtosis(logits.numpy(), axis=1, fisher=False)
    assert sorted(table.feature.tolist()) == list(range(dictionary.n_features))
    assert table.score.tolist() == sorted(table.score.tolist(), reverse=True)
    assert table.score == pytest.approx(expected[table.feature], rel=2e-5)


def test_it_is_scipys_kurtosis_of_the_lens(any_tiny: LanguageModel, make_rows: Callable[..., Any]) -> None:
    check(any_tiny, make_rows(40))


def test_of_blocks_of_any_size(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.lm import unembedding

    monkeypatch.setattr(unembedding, "CPU_BLOCK_BYTES", 4 * 160 * 7)
    check(any_tiny, make_rows(40))


def test_one_token_in_closed_form(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    """A head that reads something into one token alone: V²/(V − 1) − 3, whatever is read, and 1 of a row of zeros."""
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "one-token")
    with torch.no_grad():
        model.layout.head.weight.zero_()
        model.layout.head.weight[77] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    dictionary = make_rows(9)
    dictionary.W_dec.data[4] = 0
    table = rank(model, dictionary, "lens-concentration")
    assert table.score[:-1].tolist() == pytest.approx([160**2 / 159 - 3] * 8, rel=1e-5)
    assert (table.feature[-1], table.score[-1]) == (4, 1.0)


def test_the_planted_direction_comes_first(planted: Any) -> None:
    table = rank(planted.model, planted.dictionary, "lens-concentration")
    assert table.feature[0] == planted.feature
    assert table.score[0] == pytest.approx(160**2 / 159 - 3, rel=5e-3)
    assert table.score[1] < 120


def test_rows_of_attention_heads_have_no_lens(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"features of width 8: the logit lens reads rows of the residual stream"):
        rank(tiny_llama, make_rows(5, d=8, site="attn_z.1.0"), "lens-concentration")


def excess(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._kurtosis
    monkeypatch.setattr(module, "_kurtosis", lambda logits: original(logits) - 3)


def about_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments about 0 instead of the mean."""
    monkeypatch.setattr(module, "_kurtosis", lambda x: x.pow(4).mean(-1) / x.pow(2).mean(-1) ** 2)


def of_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._kurtosis
    monkeypatch.setattr(module, "_kurtosis", lambda logits: original(logits.softmax(-1)))


def norm_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads the row as it is: the norm's weights count."""
    monkeypatch.setattr(module, "lens_logits", lambda model, rows: [model.layout.head(rows)])


@pytest.mark.parametrize("mutation", [excess, about_zero, of_probabilities, norm_left_out])
def test_mutation(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    mutation: Callable[..., None],
) -> None:  # fmt: skip
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "weighted")
    model.layout.final_norm.weight.data.uniform_(0.2, 2, generator=torch.Generator().manual_seed(0))
    check(model, make_rows(40))
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(model, make_rows(40))
