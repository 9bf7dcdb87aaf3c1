"""First-order ΔC_k against automatic differentiation feature by feature, differences of exact scores, and planted
truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_forward import amplified, next_token
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.selection import (
    DeltaConfidence,
    EntropyChange,
    GradientAttribution,
    KLDivergence,
    OutputScore,
    rank,
    score_features,
    scoring,
)
from trimtab.selection.criterion import ScoringTarget
from trimtab.selection.scorer import LastTokenScorer

PREFIXES = ("The sea is", "From my experience,")


def in_float64(model: LanguageModel) -> LanguageModel:
    return LanguageModel.from_hf(copy.deepcopy(model.hf).double(), model.tokenizer, "float64")


def by_autograd(model: LanguageModel, row: Tensor, k: int) -> float:
    """Mean over prefixes of dC_k/dc at 0, c the coefficient of a unit row, by a full forward and backward pass."""
    slopes = []
    for prefix in PREFIXES:
        c = torch.zeros((), dtype=row.dtype, requires_grad=True)
        with torch.enable_grad():
            confidence = -next_token(model, prefix, 1, c * row).sort(descending=True).values[:k].log().mean()
            slopes.append(float(torch.autograd.grad(confidence, c)[0]))
    return sum(slopes) / len(slopes)


def check_against_autograd(model: LanguageModel, dictionary: Any) -> None:
    criterion = GradientAttribution(k=3, dose=2.0, prefixes=PREFIXES)
    table = rank(model, dictionary, criterion)
    exact = in_float64(model)
    assert sorted(table.feature.tolist()) == list(range(10))
    scores = table.score.tolist()
    assert scores == sorted(scores, reverse=True)
    assert min(scores) < 0 < max(scores)
    for i, score in zip(table.feature.tolist(), scores, strict=True):
        row = dictionary.W_dec[i].double()
        slope = by_autograd(exact, row / row.norm(), 3)
        assert score == pytest.approx(2.0 * float(dictionary.feature_stats.max_activation[i]) * slope, abs=2e-5)


def test_one_backward_pass_gives_what_one_per_feature_gives(
    any_tiny: LanguageModel, make_rows: Callable[..., Any]
) -> None:
    check_against_autograd(any_tiny, make_rows(10))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_it_is_delta_confidence_to_first_order(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], k: int, unit: Any
) -> None:
    """The score at a dose of 1 is the derivative of exact ΔC_k, by differences of fourth order of the tokens that are
    likeliest at first, so that no step goes where others take their place; what is left is rounding in the models'
    norms, which compute in float32."""
    dictionary, step, exact = make_rows(8), 0.02, in_float64(any_tiny)
    prefix = PREFIXES[0]
    likeliest = amplified(exact, prefix, 1, torch.zeros(any_tiny.d_model)).sort(descending=True).indices[:k]
    table = rank(any_tiny, dictionary, GradientAttribution(k=k, dose=1.0, unit=unit, prefixes=(prefix,)))
    x = any_tiny.hf(torch.tensor([any_tiny.encode_text(prefix)]), output_hidden_states=True).hidden_states[2][0, -1]
    length = float(x.norm()) if unit == "relative" else 1.0
    for i, score in zip(table.feature.tolist(), table.score.tolist(), strict=True):
        row = dictionary.W_dec[i].double() / dictionary.W_dec[i].double().norm()
        two_before, before, after, two_after = (
            -float(amplified(exact, prefix, 1, place * step * row)[likeliest].log().mean()) for place in (-2, -1, 1, 2)
        )
        slope = (two_before - 8 * before + 8 * after - two_after) / (12 * step)
        assert score / length == pytest.approx(slope, abs=1e-3)
    assert abs(table.score).max() / length > 0.01


def test_at_a_small_dose_it_is_delta_confidence_itself(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any]
) -> None:
    settings: dict[str, Any] = {"k": 2, "dose": 0.02, "prefixes": PREFIXES}
    target = ScoringTarget(tiny_llama, make_rows(40), torch.arange(40))
    exact, first = score_features(
        target, "resid_post.1", [DeltaConfidence(**settings), GradientAttribution(**settings)]
    )
    assert exact.relative_dose is not None
    assert first.relative_dose is not None
    assert torch.equal(exact.relative_dose, first.relative_dose)
    assert (exact.score - first.score).norm() < 0.05 * exact.score.norm()


def test_where_its_token_is_likely_the_planted_direction_comes_last(planted: Any) -> None:
    """Down: to first order, too, more of u makes the model surer."""
    u = planted.dictionary.directions[planted.feature]

    def add_u(_module: object, _args: object, output: Any) -> Any:
        return (output[0] + 4 * u, *output[1:]) if isinstance(output, tuple) else output + 4 * u

    handle = planted.model.layout.layers[1].module.register_forward_hook(add_u)
    try:
        table = rank(planted.model, planted.dictionary, "gradient-attribution")
    finally:
        handle.remove()
    assert table.bottom(1).feature.tolist() == [planted.feature]
    assert table.bottom(1).direction.tolist() == ["down"]


def test_criteria_share_forward_passes(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    """Counted at the topmost layer: however many criteria read the edits, they are one pass, and the gradient is one
    more of a single row, whatever the number of features."""
    rows: list[int] = []

    def count(_module: object, _args: object, output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output).shape[:-1].numel())

    handle = tiny_llama.layout.layers[-1].module.register_forward_hook(count)
    target = ScoringTarget(tiny_llama, make_rows(50), torch.arange(50))

    def seen(*criteria: Any) -> list[int]:
        rows.clear()
        score_features(target, "resid_post.1", criteria)
        return list(rows)

    try:
        seen(DeltaConfidence())  # tries once which ways of running the model work
        alone = seen(DeltaConfidence())
        together = seen(DeltaConfidence(), EntropyChange(), KLDivergence(), OutputScore(), DeltaConfidence(k=4))
        gradient = seen(GradientAttribution())
        all_of_them = seen(DeltaConfidence(), EntropyChange(), GradientAttribution())
    finally:
        handle.remove()
    assert together == alone
    assert max(alone) >= 50
    assert max(gradient) < 50
    assert all_of_them == [*alone, 1]
    assert len(gradient) == len(alone)  # the row of the gradient instead of those of the features


def wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientAttribution, "quantity", lambda self, _t: lambda p: p.topk(self.k).values.mean())


def always_the_top_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientAttribution, "quantity", lambda _self, _t: lambda p: -p.max())


def rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder rows instead of unit directions."""
    from trimtab.dictionaries import Dictionary

    monkeypatch.setattr(Dictionary, "directions", property(lambda self: self.W_dec.detach()))


def one_prefix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    original = scoring.passes
    monkeypatch.setattr(scoring, "passes", lambda criteria: original(criteria)[:1])


def dose_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "coefficients", lambda _unit, dose, _x, _m=None: torch.ones_like(dose))


def of_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient in the last layer's output instead of the site's."""

    def gradient(self: LastTokenScorer, quantity: Any) -> Tensor:
        with torch.enable_grad():
            hidden = self.continuation.hidden[None].clone().requires_grad_()
            log_probs = self.unembedding.logits(hidden)[0].log_softmax(-1)
            return torch.autograd.grad(quantity(log_probs), hidden)[0][0]

    monkeypatch.setattr(LastTokenScorer, "gradient", gradient)


@pytest.mark.parametrize(
    "mutation", [wrong_sign, always_the_top_token, rows_as_they_are, one_prefix_only, dose_left_out, of_another_place]
)
def test_mutation(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    mutation: Callable[..., None],
) -> None:  # fmt: skip
    dictionary = make_rows(10)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check_against_autograd(tiny_llama, dictionary)


def test_bad_settings(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="k 0: confidence is averaged over at least 1 token"):
        GradientAttribution(k=0)
    with pytest.raises(UserError, match="161 tokens: there are 1 to 160 to choose from"):
        rank(tiny_llama, make_rows(3), GradientAttribution(k=161))
    dictionary = make_rows(3)
    dictionary.feature_stats = None
    with pytest.raises(UserError, match=r"criterion gradient-attribution: .*trimtab sae stats"):
        rank(tiny_llama, dictionary, "gradient-attribution")
