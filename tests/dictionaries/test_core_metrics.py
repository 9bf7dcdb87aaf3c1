"""Core metrics against the formulas on all rows at once, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.dictionaries import CoreMetricsAccumulator, SparseCodes
from trimtab.stats import bootstrap_ratio_of_sums

D, N = 6, 11


def corpus(rows: int, seed: int, mean: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=generator) + mean * torch.tensor([1.0, -2.0, 0.0, 5.0, 0.0, 1.0])
    x_hat = x + 0.4 * torch.randn(rows, D, generator=generator)
    f = torch.randn(rows, N, generator=generator).relu()
    f[:, 2] = 0
    f[:, 3] = torch.where(torch.rand(rows, generator=generator) < 0.05, 1.0, 0.0)
    documents = torch.randint(0, 4, (rows,), generator=generator) * 10
    return x, x_hat, f, documents


def direct(x, x_hat, f, documents):
    x, x_hat, f = (t.double().numpy() for t in (x, x_hat, f))
    residual, mean = ((x - x_hat) ** 2).sum(1), x.mean(0)
    variance = ((x - mean) ** 2).sum(1)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
    return {
        "explained_variance": 1 - residual.sum() / variance.sum(),
        "normalised_mse": residual.sum() / (x**2).sum(),
        "cosine": ((x * x_hat).sum(1) / norms).mean(),
        "l0": (f > 0).sum(1).mean(),
        "dead_share": ((f > 0).sum(0) == 0).mean(),
        "dense_share": ((f > 0).mean(0) > 0.1).mean(),
        "n_rows": len(x),
        "n_documents": len(np.unique(documents.numpy())),
    }


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    dense=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_metrics_of_the_whole(sizes, seed, dense):
    x, x_hat, f, documents = corpus(sum(sizes) + 2, seed)
    accumulator = CoreMetricsAccumulator(D, N)
    start = 0
    for size in [*sizes, 2]:
        part = slice(start, start + size)
        codes = f[part] if dense else SparseCodes(*f[part].topk(N - 1, dim=1))
        accumulator.update(x[part], x_hat[part], codes, documents[part])
        start += size
    expected = direct(x, x_hat, f, documents)
    for name, value in accumulator.metrics()._asdict().items():
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_totals_are_those_of_each_document():
    x, x_hat, f, documents = corpus(200, 0)
    accumulator = CoreMetricsAccumulator(D, N)
    for part in torch.arange(200).split(33):
        accumulator.update(x[part], x_hat[part], f[part], documents[part])
    totals = accumulator.totals()
    assert sorted(totals.document.tolist()) == [0, 10, 20, 30]
    mean = x.double().mean(0)
    for i, document in enumerate(totals.document):
        mine = documents == int(document)
        rows, rebuilt = x[mine].double(), x_hat[mine].double()
        assert totals.rows[i] == mine.sum()
        assert totals.active[i] == (f[mine] > 0).sum()
        np.testing.assert_allclose(totals.residual[i], (rows - rebuilt).square().sum(), rtol=1e-12)
        np.testing.assert_allclose(totals.variance[i], (rows - mean).square().sum(), rtol=1e-10)
        np.testing.assert_allclose(totals.energy[i], rows.square().sum(), rtol=1e-12)
        np.testing.assert_allclose(totals.cosine[i], torch.cosine_similarity(rows, rebuilt).sum(), rtol=1e-12)
    np.testing.assert_array_equal(totals.firings, (f > 0).sum(0).numpy())


def test_a_mean_far_above_the_spread_does_not_cancel():
    x, x_hat, f, documents = corpus(300, 1, mean=1e5)
    accumulator = CoreMetricsAccumulator(D, N)
    for part in torch.arange(300).split(7):
        accumulator.update(x[part], x_hat[part], f[part], documents[part])
    expected = direct(x, x_hat, f, documents)["explained_variance"]
    assert accumulator.metrics().explained_variance == pytest.approx(expected, rel=1e-9)


def test_totals_feed_the_bootstrap_over_documents():
    x, x_hat, f, documents = corpus(400, 2)
    accumulator = CoreMetricsAccumulator(D, N)
    accumulator.update(x, x_hat, f, documents)
    totals = accumulator.totals()
    interval = bootstrap_ratio_of_sums(totals.residual, totals.variance, transform=lambda r: 1 - r, n_resamples=500)
    assert interval.estimate == pytest.approx(accumulator.metrics().explained_variance, rel=1e-12)


def test_a_perfect_reconstruction_of_constant_rows():
    x = torch.ones(4, D)
    accumulator = CoreMetricsAccumulator(D, N)
    accumulator.update(x, x, torch.zeros(4, N), torch.zeros(4, dtype=torch.long))
    metrics = accumulator.metrics()
    assert metrics.explained_variance == 1
    assert metrics.normalised_mse == 0
    assert metrics.cosine == pytest.approx(1)
    assert (metrics.l0, metrics.dead_share, metrics.dense_share) == (0, 1, 0)


def test_zero_rows_have_cosine_zero():
    accumulator = CoreMetricsAccumulator(D, N)
    accumulator.update(torch.zeros(1, D), torch.ones(1, D), torch.zeros(1, N), torch.zeros(1, dtype=torch.long))
    assert accumulator.metrics().cosine == 0


def test_nothing_counted_has_no_metrics():
    with pytest.raises(ValueError, match="no rows were counted"):
        CoreMetricsAccumulator(D, N).metrics()
