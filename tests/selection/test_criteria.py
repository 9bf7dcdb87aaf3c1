"""Criteria against planted truth, closed forms and slow references written from their definitions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_forward import amplified
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.selection import (
    CRITERIA,
    NEUTRAL_PREFIX,
    BaseDistribution,
    DeltaConfidence,
    EditedDistributions,
    FiringRate,
    KLDivergence,
    MaxActivation,
    OutputScore,
    Random,
    make_criteria,
    rank,
    score_features,
    scoring,
)
from trimtab.selection.criterion import ScoringTarget


@pytest.mark.parametrize("criterion", ["output-score", "kl"])
def test_the_planted_direction_comes_first(planted: Any, criterion: str) -> None:
    table = rank(planted.model, planted.dictionary, criterion)
    assert len(table) == 400
    assert table.feature[0] == planted.feature
    assert table.score[0] > table.score[1]


def test_the_planted_direction_sharpens_most(planted: Any) -> None:
    table = rank(planted.model, planted.dictionary, "delta-confidence")
    assert table.bottom(1).feature[0] == planted.feature
    assert table.bottom(1).direction[0] == "down"


def test_the_planted_direction_flattens_most_where_its_token_was_sure(planted: Any) -> None:
    """Where u is in the residual already and its token sure, taking u away is what unsettles the model most: UP."""
    u = planted.dictionary.directions[planted.feature]

    def add_u(_module: object, _args: object, output: Any) -> Any:
        return (output[0] + 15 * u, *output[1:]) if isinstance(output, tuple) else output + 15 * u

    handle = planted.model.layout.layers[1].module.register_forward_hook(add_u)
    try:
        table = rank(planted.model, planted.dictionary, DeltaConfidence(dose=-10.0))
    finally:
        handle.remove()
    assert table.feature[0] == planted.feature
    assert table.direction[0] == "up"


def test_random_scores_do_not_know_the_planted_direction(planted: Any) -> None:
    tables = [rank(planted.model, planted.dictionary, Random(seed=seed)) for seed in (0, 1, 2)]
    places = [table.feature.tolist().index(planted.feature) for table in tables]
    assert len(set(places)) == 3
    assert max(places) > 20


def test_delta_confidence_closed_form() -> None:
    """From the uniform distribution over four tokens (C_1 = ln 4) to halves (C_1 = ln 2, C_2 = 1.5 ln 2)."""
    base = BaseDistribution(torch.zeros(4))
    halves = EditedDistributions(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.tensor([0]), base)
    target: Any = ScoringTarget(_FakeModel(), None, torch.tensor([0]))  # type: ignore[arg-type]
    assert float(DeltaConfidence().reducer(target)(halves)) == pytest.approx(math.log(2) - math.log(4), abs=1e-6)
    found = float(DeltaConfidence(k=2).reducer(target)(halves))
    assert found == pytest.approx(1.5 * math.log(2) - math.log(4), abs=1e-6)


class _FakeModel:
    vocab_size = 4


@pytest.mark.parametrize(("k", "dose"), [(3, 4.0), (1, -4.0), (160, 0.5), (7, 0.0)])
def test_delta_confidence_equals_its_definition(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], k: int, dose: float
) -> None:
    """Of any k, up to the whole vocabulary, any α, taken away as well as added, and averaged over prefixes."""
    dictionary, prefixes = make_rows(12), ("The sea is", "From my experience,", "Nobody knows")
    table = rank(any_tiny, dictionary, DeltaConfidence(k=k, dose=dose, prefixes=prefixes))

    def c_k(p: Tensor) -> float:
        return -sum(math.log(v) for v in sorted(p.tolist(), reverse=True)[:k]) / k

    nothing = torch.zeros(any_tiny.d_model)
    base = [c_k(amplified(any_tiny, prefix, 1, nothing)) for prefix in prefixes]
    assert sorted(table.feature) == list(range(12))
    for i, score, direction in zip(table.feature, table.score, table.direction, strict=True):
        row = dictionary.W_dec[i] / dictionary.W_dec[i].norm()
        delta = dose * float(dictionary.feature_stats.max_activation[i]) * row
        changes = [c_k(amplified(any_tiny, prefix, 1, delta)) - b for prefix, b in zip(prefixes, base, strict=True)]
        assert score == pytest.approx(sum(changes) / 3, abs=1e-4)
        assert direction == ("down" if score < 0 else "up")


@pytest.mark.parametrize("unit", ["relative", "absolute"])
def test_a_dose_that_needs_no_statistics_is_of_the_norm_or_as_it_is(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], unit: Any
) -> None:
    dictionary, prefix = make_rows(12), "The sea is"
    dictionary.feature_stats = None
    table = rank(
        any_tiny, dictionary, KLDivergence(dose=0.3, unit=unit, prefixes=(prefix,)), site="resid_post.1", top_tokens=3
    )
    assert sorted(table.feature) == list(range(12))  # which ones are dead is unknown
    x = any_tiny.hf(torch.tensor([any_tiny.encode_text(prefix)]), output_hidden_states=True).hidden_states[2][0, -1]
    strength = 0.3 * float(x.norm()) if unit == "relative" else 0.3
    base = amplified(any_tiny, prefix, 1, torch.zeros(any_tiny.d_model))
    for i, score, relative in zip(table.feature, table.score, table.relative_dose, strict=True):
        p = amplified(any_tiny, prefix, 1, strength * dictionary.W_dec[i] / dictionary.W_dec[i].norm())
        assert score == pytest.approx(float((p * (p / base).log()).sum()), abs=1e-5)
        assert relative == pytest.approx(strength / float(x.norm()), rel=1e-5)


def test_output_score_equals_its_definition(any_tiny: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary, prefix, m = make_rows(12), "From my experience,", 20
    found = score_features(ScoringTarget(any_tiny, dictionary, torch.arange(12)), "resid_post.1", [OutputScore()])[
        0
    ].score
    vocabulary = any_tiny.hf.config.vocab_size
    for i in range(12):
        with torch.no_grad():
            lens = any_tiny.layout.head(any_tiny.layout.final_norm(dictionary.W_dec[i][None, None]))[0, 0].softmax(-1)
        own = sorted(range(vocabulary), key=lambda v: -float(lens[v]))[:m]
        row = dictionary.W_dec[i] / dictionary.W_dec[i].norm()
        p = amplified(any_tiny, prefix, 1, 10 * float(dictionary.feature_stats.max_activation[i]) * row).tolist()
        order = sorted(range(vocabulary), key=lambda v: -p[v])
        expected = (1 - min(order.index(v) for v in own) / vocabulary) * max(p[v] for v in own)
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("direction", ["steered-base", "base-steered"])
def test_kl_equals_its_definition(any_tiny: LanguageModel, make_rows: Callable[..., Any], direction: Any) -> None:
    dictionary, prefix = make_rows(8), "From my experience,"
    criterion = KLDivergence(kl_direction=direction, dose=2.0)
    found = score_features(ScoringTarget(any_tiny, dictionary, torch.arange(8)), "resid_post.1", [criterion])[0].score
    base = amplified(any_tiny, prefix, 1, torch.zeros(any_tiny.d_model))
    for i in range(8):
        row = dictionary.W_dec[i] / dictionary.W_dec[i].norm()
        steered = amplified(any_tiny, prefix, 1, 2 * float(dictionary.feature_stats.max_activation[i]) * row)
        p, q = (steered, base) if direction == "steered-base" else (base, steered)
        assert float(found[i]) == pytest.approx(float((p * (p / q).log()).sum()), abs=2e-4)


def test_statistics_and_random(make_rows: Callable[..., Any]) -> None:
    dictionary, fake = make_rows(30), _FakeModel()
    some, one = (ScoringTarget(fake, dictionary, torch.tensor(ids)) for ids in ([4, 2, 29], [2]))  # type: ignore[arg-type]
    stats = dictionary.feature_stats
    assert MaxActivation().scores(some).tolist() == stats.max_activation[[4, 2, 29]].tolist()
    assert FiringRate().scores(some).tolist() == stats.firing_rate[[4, 2, 29]].tolist()
    alone = Random(seed=3).scores(one)
    assert float(alone) == float(Random(seed=3).scores(some)[1])
    assert float(alone) != float(Random(seed=4).scores(one))


def test_prefixes_are_averaged(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary, ids = make_rows(6), torch.arange(6)
    one, two = "One day", "Nobody knows"
    found = [
        score_features(ScoringTarget(tiny_llama, dictionary, ids), "resid_post.1", [DeltaConfidence(prefixes=p)])[0]
        for p in ((one,), (two,), (one, two))
    ]
    torch.testing.assert_close(found[2].score, (found[0].score + found[1].score) / 2)
    assert found[0].relative_dose is not None
    x = scoring.LastTokenScorer(tiny_llama, "resid_post.1", tiny_llama.encode_text(one)).continuation.x
    expected = 10 * torch.as_tensor(dictionary.feature_stats.max_activation) / x.norm()
    torch.testing.assert_close(found[0].relative_dose, expected)


def test_criteria_of_one_dose_and_prefix_share_a_pass(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    original = scoring.LastTokenScorer

    def counted(*args: Any, **kwargs: Any) -> object:
        made.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(scoring, "LastTokenScorer", counted)
    dictionary, ids = make_rows(5), torch.arange(5)
    criteria = [DeltaConfidence(), OutputScore(), Random(), KLDivergence(), DeltaConfidence(dose=2.0)]
    together = score_features(ScoringTarget(tiny_llama, dictionary, ids), "resid_post.1", criteria)
    assert len(made) == len(scoring.passes(criteria)) == 2
    for criterion, result in zip(criteria, together, strict=True):
        alone = score_features(ScoringTarget(tiny_llama, dictionary, ids), "resid_post.1", [criterion])[0]
        assert result.criterion == criterion
        torch.testing.assert_close(result.score, alone.score)


def test_labels_name_what_is_not_the_default() -> None:
    assert DeltaConfidence().label == "delta-confidence"
    assert DeltaConfidence(dose=10).label == "delta-confidence"
    assert DeltaConfidence(k=3, dose=0.5).label == "delta-confidence(dose=0.5, k=3)"
    assert OutputScore(prefixes=("I think", "We saw")).label == "output-score(prefixes=I think|We saw)"
    assert KLDivergence(kl_direction="base-steered").label == "kl(kl_direction=base-steered)"
    assert Random(seed=2).label == "random(seed=2)"
    assert MaxActivation().label == "max-activation"


def test_criteria_by_name_take_the_settings_that_they_have() -> None:
    made = make_criteria(list(CRITERIA), {"k": 2, "seed": 5, "dose": None, "explanations": "a"})
    assert [criterion.name for criterion in made] == list(CRITERIA)
    assert made[0] == DeltaConfidence(k=2)
    assert made[-1] == Random(seed=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_criteria(["delta"]), r"criterion 'delta': there are delta-confidence, output-score, kl, "),
        (lambda: make_criteria([]), r"the criteria: there is none"),
        (lambda: make_criteria(["kl", "kl"]), r"criterion 'kl': it is given twice"),
        (lambda: make_criteria(["kl", "random"], {"k": 3}), r"setting k: none of the criteria kl, random has it"),
        (lambda: DeltaConfidence(k=0), r"k 0: confidence is averaged over at least 1 token"),
        (lambda: DeltaConfidence(dose=math.nan), r"dose nan: a dose is a finite number"),
        (lambda: DeltaConfidence(prefixes=()), r"the prefixes: there is none"),
        (lambda: KLDivergence(prefixes=("",)), r"a prefix: it is empty"),
        (lambda: KLDivergence(prefixes=("a", "a")), r"the prefixes: one occurs twice"),
        (lambda: KLDivergence(kl_direction="both"), r"KL direction 'both': allowed are steered-base, base-steered"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("criterion", [DeltaConfidence(k=161), OutputScore(n_tokens=161), OutputScore(n_tokens=0)])
def test_more_tokens_than_the_vocabulary_has(
    tiny_llama: LanguageModel, make_rows: Callable[..., Any], criterion: Any
) -> None:
    with pytest.raises(UserError, match=r"tokens: there are 1 to 160 to choose from"):
        score_features(ScoringTarget(tiny_llama, make_rows(3), torch.arange(3)), "resid_post.1", [criterion])


@pytest.mark.parametrize("criterion", [DeltaConfidence(), MaxActivation(), FiringRate()])
def test_missing_statistics(tiny_llama: LanguageModel, make_rows: Callable[..., Any], criterion: Any) -> None:
    dictionary = make_rows(3)
    dictionary.feature_stats = None
    with pytest.raises(UserError, match=rf"criterion {criterion.name}: .*feature_stats\.parquet.*trimtab sae stats"):
        score_features(ScoringTarget(tiny_llama, dictionary, torch.arange(3)), "resid_post.1", [criterion])


def test_scores_that_overflow(tiny_llama: LanguageModel, make_rows: Callable[..., Any]) -> None:
    dictionary = make_rows(3)
    dictionary.feature_stats.max_activation[1] = 3e38
    with pytest.raises(
        UserError, match=r"criterion kl: .* not finite: .* overflow, feature 1's dose being the largest"
    ):
        score_features(ScoringTarget(tiny_llama, dictionary, torch.arange(3)), "resid_post.1", [KLDivergence()])


def test_a_criterion_of_ones_own_is_one_class_in_a_file(
    any_tiny: LanguageModel, make_rows: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of docs/ranking.md, against its definition."""
    page = (Path(__file__).parents[2] / "docs" / "ranking.md").read_text("utf-8")
    (tmp_path / "my_own_criteria.py").write_text(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], "utf-8")
    monkeypatch.chdir(tmp_path)
    dictionary = make_rows(12)
    (criterion,) = make_criteria(["my_own_criteria:TopProbability"], {"dose": 3.0})
    table = rank(any_tiny, dictionary, criterion)
    assert table.criterion == "top-probability(dose=3)"
    base = amplified(any_tiny, NEUTRAL_PREFIX, 1, torch.zeros(any_tiny.d_model)).max()
    for feature, score in zip(table.feature, table.score, strict=True):
        delta = 3.0 * float(dictionary.feature_stats.max_activation[feature]) * dictionary.directions[feature]
        expected = amplified(any_tiny, NEUTRAL_PREFIX, 1, delta).max() - base
        assert score == pytest.approx(float(expected), abs=1e-5)
    for name, why in (
        ("my_own_criteria:Other", "has no class Other"),
        ("pathlib:Path", r"no subclass of trimtab\.selection\.EffectCriterion or "),
    ):
        with pytest.raises(UserError, match=why):
            make_criteria([name])
