"""The distribution of firing rates, for rates whose distribution is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trimtab.dictionaries.density import feature_density
from trimtab.runs import json_safe


def test_rates_by_decade():
    rate = np.array([0, 0, 1e-3, 1e-2, 1e-2, 1e-1, 1])
    found = feature_density(rate, 1_000)
    assert found.log10_edges[0] == -3
    assert found.log10_edges[-1] == 0
    assert found.never == 2
    assert dict(zip(found.log10_edges, found.counts, strict=False))[-3] == 1
    assert dict(zip(found.log10_edges, found.counts, strict=False))[-2] == 2
    assert dict(zip(found.log10_edges, found.counts, strict=False))[-1] == 1
    assert found.counts[-1] == 1
    assert sum(found.counts) == 5
    assert found.quantiles["0.5"] == pytest.approx(-2)


def test_every_feature_is_in_a_bin_or_never_fired():
    draw = np.random.default_rng(0)
    n_rows = 12_345
    rate = draw.binomial(n_rows, 10 ** draw.uniform(-5, 0, 500)) / n_rows
    found = feature_density(rate, n_rows)
    assert sum(found.counts) + found.never == 500
    assert found.never == (rate == 0).sum() > 0
    assert found.log10_edges[0] <= np.log10(1 / n_rows) < found.log10_edges[1]
    assert found.quantiles["0.95"] == pytest.approx(np.quantile(np.log10(rate[rate > 0]), 0.95))


def test_nothing_fired():
    found = feature_density(np.zeros(4), 100)
    assert found.never == 4
    assert found.quantiles == {}
    assert found.render() == "no feature fired"


def test_json_and_text():
    found = feature_density(np.array([0.5, 0.01, 0.001]), 10_000)
    restored = json.loads(json.dumps(json_safe(found)))
    assert restored["quantiles"]["0.5"] == pytest.approx(-2)
    assert len(restored["log10_edges"]) == len(restored["counts"]) + 1
    assert "50% -2.00" in found.render()
    assert found.render().count("█") == 3
