"""The input score against a slow loop over windows, by hand, and its refusal where there are no examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.dictionaries.feature_examples import KINDS, FeatureExamples
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.selection import InputScore, rank
from trimtab.selection import input_score as module

WIDTH = 5


def promoted(model: LanguageModel, row: torch.Tensor, count: int) -> list[str]:
    """Texts of the tokens that the logit lens puts first."""
    with torch.no_grad():
        logits = model.layout.head(model.layout.final_norm(row.detach()[None, None]))[0, 0]
    return [model.tokenizer.decode([i]) for i in logits.argsort(descending=True)[:count].tolist()]


def put_examples(dictionary: Any, path: Path, windows: list[tuple[int, str, list[str], int]]) -> None:
    """A table beside the dictionary of (feature, kind, texts of `WIDTH` tokens, place where it is strongest)."""
    windows = sorted(windows, key=lambda one: (one[0], KINDS.index(one[1])))  # type: ignore[arg-type]
    vocabulary = sorted({token for _, _, tokens, _ in windows for token in tokens})
    n = len(windows)
    place = np.array([place for *_, place in windows], np.int32)
    activations = np.full((n, WIDTH), 0.5, np.float32)
    activations[np.arange(n), place] = 2.0
    FeatureExamples(
        feature=np.array([f for f, *_ in windows], np.int32),
        kind=np.array([KINDS.index(kind) for _, kind, *_ in windows], np.int8),  # type: ignore[arg-type]
        document=np.zeros(n, np.int32),
        position=np.arange(n, dtype=np.int32),
        place=place,
        tokens=np.array([[vocabulary.index(t) for t in tokens] for _, _, tokens, _ in windows], np.int32),
        activations=activations,
        documents=("a",),
        vocabulary=tuple(vocabulary),
        n_features=dictionary.n_features,
        n_tokens=1000,
    ).write(path)
    dictionary.examples_file = path


def drawn(model: LanguageModel, dictionary: Any, path: Path) -> None:
    """Windows of tokens that a feature promotes and of others, each kind; features 3 and 7 have none."""
    rng = np.random.default_rng(0)
    every = [model.tokenizer.decode([i]) for i in range(6, 100)]
    windows: list[tuple[int, str, list[str], int]] = []
    for f in set(range(dictionary.n_features)) - {3, 7}:
        own = [text for text in promoted(model, dictionary.W_dec[f], 30) if text in every]
        for kind in KINDS:
            for _ in range(int(rng.integers(1, 7))):
                place = int(rng.integers(WIDTH))
                tokens = [str(t) for t in rng.choice(every, WIDTH)]
                if rng.random() < 0.6:
                    tokens[place] = str(rng.choice(own))
                windows.append((f, kind, tokens, place))
    put_examples(dictionary, path, windows)


def check(model: LanguageModel, dictionary: Any, n_tokens: int) -> None:
    table = rank(model, dictionary, InputScore(n_tokens=n_tokens))
    assert sorted(table.feature.tolist()) == list(range(12))
    for f, score in zip(table.feature.tolist(), table.score.tolist(), strict=True):
        own, hits, windows = promoted(model, dictionary.W_dec[f], n_tokens), 0, 0
        for window in dictionary.feature_examples[f].windows:
            if window.kind != "top":
                continue
            windows += 1
            strongest = max(range(WIDTH), key=lambda i: window.activations[i])
            hits += window.tokens[strongest] in own
        assert score == pytest.approx(hits / windows if windows else 0.0, abs=1e-9)
    assert 0 < table.score.mean() < 1


@pytest.mark.parametrize("n_tokens", [20, 4])
def test_it_equals_its_definition(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, n_tokens: int
) -> None:
    dictionary = make_rows(12)
    drawn(any_tiny, dictionary, tmp_path / "feature_examples.parquet")
    check(any_tiny, dictionary, n_tokens)


def test_by_hand(tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path) -> None:
    """Three of four top windows fire most on one of the M tokens; one of M elsewhere in a window does not count, nor
    does the (M + 1)-th token, and a feature without windows has 0."""
    dictionary = make_rows(6)
    own = promoted(tiny_llama, dictionary.W_dec[2], 20)
    first, second = [text for text in own if text][:2]  # rows of the head behind the tokenizer's tokens read as nothing
    other = next(text for text in map(chr, range(97, 123)) if text not in own)
    every = promoted(tiny_llama, dictionary.W_dec[4], 60)
    outside = next(text for text in every[20:] if text not in every[:20])
    put_examples(
        dictionary,
        tmp_path / "feature_examples.parquet",
        [
            (2, "top", [other, first, other, other, other], 1),
            (2, "top", [second, first, first, first, first], 0),
            (2, "top", [other, other, other, other, first], 4),
            (2, "top", [first, first, other, first, first], 2),
            (2, "random", [first, first, other, first, first], 2),
            (4, "top", [outside, outside, outside, outside, outside], 3),
        ],
    )
    table = rank(tiny_llama, dictionary, "input-score", features=[2, 4, 5])
    assert dict(zip(table.feature.tolist(), table.score.tolist(), strict=True)) == {2: 0.75, 4: 0.0, 5: 0.0}


def test_parts_of_characters_are_no_tokens_of_a_feature(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of different characters read the same, so that an equal text is no equal token."""
    dictionary = make_rows(3)
    put_examples(dictionary, tmp_path / "feature_examples.parquet", [(1, "top", ["\ufffd"] * WIDTH, 0)])
    monkeypatch.setattr(module, "token_texts", lambda _model, ids: [["\ufffd", "x"] for _ in ids])
    assert rank(tiny_llama, dictionary, "input-score", features=[1]).score.tolist() == [0.0]


def test_without_examples(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(
        UserError,
        match=r"criterion input-score: .*feature_examples\.parquet.*`trimtab examples --sae SAE --text FILE --i",
    ):
        rank(tiny_llama, make_rows(3), "input-score")


def test_rows_of_attention_heads_have_no_lens(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path
) -> None:
    dictionary = make_rows(5, d=8, site="attn_z.1.0")
    put_examples(dictionary, tmp_path / "feature_examples.parquet", [(1, "top", ["a"] * WIDTH, 0)])
    with pytest.raises(UserError, match=r"features of width 8: the logit lens reads rows of the residual stream"):
        rank(tiny_llama, dictionary, "input-score")


def windows_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FeatureExamples.read

    def read(*args: Any, **kwargs: Any) -> FeatureExamples:
        found = original(*args, **kwargs)
        found.kind[:] = 0
        return found

    monkeypatch.setattr(FeatureExamples, "read", read)


def first_token_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FeatureExamples.read

    def read(*args: Any, **kwargs: Any) -> FeatureExamples:
        found = original(*args, **kwargs)
        found.place[:] = 0
        return found

    monkeypatch.setattr(FeatureExamples, "read", read)


def tokens_of_the_next_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.token_texts
    monkeypatch.setattr(module, "token_texts", lambda model, ids: original(model, ids.roll(1, 0)))


def a_quarter_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.ScoringTarget.lens_tokens
    monkeypatch.setattr(module.ScoringTarget, "lens_tokens", lambda self, count: original(self, count // 4))


@pytest.mark.parametrize(
    "mutation", [windows_of_any_kind, first_token_of_the_window, tokens_of_the_next_feature, a_quarter_of_the_tokens]
)
def test_mutation(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mutation: Callable[..., None],
) -> None:  # fmt: skip
    dictionary = make_rows(12)
    drawn(tiny_llama, dictionary, tmp_path / "feature_examples.parquet")
    table = rank(tiny_llama, dictionary, InputScore())
    expected = dict(zip(table.feature.tolist(), table.score.tolist(), strict=True))
    mutation(monkeypatch)
    del dictionary.__dict__["feature_examples"]
    again = rank(tiny_llama, dictionary, InputScore())
    assert dict(zip(again.feature.tolist(), again.score.tolist(), strict=True)) != expected
