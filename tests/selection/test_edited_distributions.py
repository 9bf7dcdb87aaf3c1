"""Quantities of edited distributions: closed forms, and float64 where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.selection import BaseDistribution, EditedDistributions, edited_distributions

HALVES = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
SKEWED = torch.tensor([0.1, 0.2, 0.3, 0.4])


def block(probs: torch.Tensor, base: torch.Tensor, shift: float = 3.0) -> EditedDistributions:
    """Logits are log-probabilities plus a constant, which must not matter."""
    return EditedDistributions(probs.log() + shift, torch.arange(len(probs)), BaseDistribution(base.log() - shift))


def test_mean_top_log_prob_of_halves() -> None:
    found = block(HALVES, SKEWED)
    assert float(found.mean_top_log_prob(1)) == pytest.approx(-math.log(2), abs=1e-6)
    assert float(found.mean_top_log_prob(2)) == pytest.approx(-1.5 * math.log(2), abs=1e-6)
    assert float(found.mean_top_log_prob(4)) == pytest.approx(-2.25 * math.log(2), abs=1e-6)


def test_ranks_and_log_probs() -> None:
    found = block(HALVES, SKEWED)
    assert found.log_prob(torch.tensor([[1, 0]])).exp()[0].tolist() == pytest.approx([0.25, 0.5])
    assert [int(found.rank(torch.tensor([token]))) for token in range(4)] == [0, 1, 2, 2]  # the tie shares a rank
    assert found.top_tokens(2).tolist() == [[0, 1]]


def test_kl_in_both_directions() -> None:
    found = block(HALVES, SKEWED)
    p, q = HALVES[0].double(), SKEWED.double()
    assert float(found.kl()) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert float(found.kl("base-steered")) == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-6)
    assert float(found.kl()) != pytest.approx(float(found.kl("base-steered")), abs=1e-2)


def test_kl_to_itself_is_zero_and_never_negative() -> None:
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)) * 8
    for row in logits:
        same = EditedDistributions(row[None], torch.tensor([0]), BaseDistribution(row))
        for direction in ("steered-base", "base-steered"):
            assert 0 <= float(same.kl(direction)) < 1e-5


@pytest.mark.parametrize("cache_bytes", [1, 3 * 700 * 4, 1 << 20])
def test_wide_vocabularies_against_float64(monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    monkeypatch.setattr(edited_distributions, "CACHE_BYTES", cache_bytes)
    generator = torch.Generator().manual_seed(1)
    logits, base = torch.randn(11, 700, generator=generator) * 9, torch.randn(700, generator=generator) * 3
    before = logits.clone()
    found = EditedDistributions(logits, torch.arange(11), BaseDistribution(base))
    log_p, log_q = logits.double().log_softmax(-1), base.double().log_softmax(-1)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.normaliser, logits.double().logsumexp(-1), **close)
    torch.testing.assert_close(found.mean_top_log_prob(5), log_p.sort(-1, descending=True)[0][:, :5].mean(-1), **close)
    torch.testing.assert_close(found.kl(), (log_p.exp() * (log_p - log_q)).sum(-1), **close)
    torch.testing.assert_close(found.kl("base-steered"), (log_q.exp() * (log_q - log_p)).sum(-1), **close)
    tokens = torch.randint(700, (11,), generator=generator)
    ranks = [sorted(range(700), key=lambda v: -row[v]).index(t) for row, t in zip(logits.tolist(), tokens, strict=True)]
    assert found.rank(tokens).tolist() == ranks
    assert torch.equal(logits, before)
