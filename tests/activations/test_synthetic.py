"""Synthetic activations: what was asked for is what fires, and any row is found from its place alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trimtab.activations import SyntheticConfig, SyntheticSource
from trimtab.errors import UserError

CONFIG = SyntheticConfig(d=16, n_true=64, true_l0=4.0, n_parents=4, n_children=3)
ROWS = 40_960


def test_rows_are_the_sums_that_they_are_said_to_be():
    rows = SyntheticSource(CONFIG).labelled(3_000)
    planted = SyntheticSource(CONFIG).features
    rest = rows.x - rows.codes @ planted.directions - planted.offset
    assert rows.x.shape == (3_000, 16)
    assert float(rest.std()) == pytest.approx(planted.noise_sd, rel=0.02)
    assert float(rest.mean()) == pytest.approx(0, abs=4 * planted.noise_sd / (3_000 * 16) ** 0.5)
    torch.testing.assert_close(planted.directions.norm(dim=1), torch.ones(64))


def test_blocks_are_the_same_rows():
    rows = SyntheticSource(CONFIG).labelled(1_500)
    blocks = list(rows.blocks(400))
    assert [len(block.x) for block in blocks] == [400, 400, 400, 300]
    assert torch.equal(torch.cat([block.x for block in blocks]), rows.x)
    assert torch.equal(torch.cat([block.codes for block in blocks]), rows.codes)


def test_features_fire_at_their_rates_with_their_magnitudes():
    source = SyntheticSource(CONFIG)
    codes, planted = source.labelled(ROWS).codes.double().numpy(), source.features
    assert planted.rate.sum() == pytest.approx(4.0, rel=1e-6)
    assert planted.rate.max() <= CONFIG.max_rate
    error = (codes > 0).mean(0) - planted.rate
    assert np.abs(error / np.sqrt(planted.rate * (1 - planted.rate) / ROWS)).max() < 4.5
    fires = codes > 0
    count = fires.sum(0)
    mean = codes.sum(0) / count
    sd = np.sqrt(np.where(fires, (codes - mean) ** 2, 0).sum(0) / count)
    assert np.abs((mean - planted.magnitude_mean) / planted.magnitude_sd * np.sqrt(count)).max() < 4.5
    np.testing.assert_allclose(sd, planted.magnitude_sd, rtol=0.25)
    assert (codes >= 0).all()


def test_rates_fall_as_zipf_says_below_the_cap():
    rate = SyntheticSource(SyntheticConfig(n_parents=0, zipf_exponent=0.7, true_l0=6)).features.rate
    free = rate < 0.25 * 0.999
    assert 0 < free.sum() < len(rate)
    slope = np.diff(np.log(rate[free])) / np.diff(np.log(np.arange(1, len(rate) + 1)[free]))
    np.testing.assert_allclose(slope, -0.7, rtol=1e-6)


def test_children_fire_only_with_their_parent_and_never_two_at_once():
    source = SyntheticSource(CONFIG)
    fires, planted = source.labelled(ROWS).codes.numpy() > 0, source.features
    children = np.flatnonzero(planted.parent >= 0)
    assert len(children) == 12
    for child in children:
        assert fires[:, planted.parent[child]][fires[:, child]].all()
    for parent in np.unique(planted.parent[children]):
        of_parent = fires[:, planted.parent == parent]
        assert of_parent.sum(1).max() == 1
        share = of_parent.any(1)[fires[:, parent]].mean()
        assert share == pytest.approx(CONFIG.child_share, abs=0.03)


def test_topics_correlate_features_and_leave_rates_alone():
    config = SyntheticConfig(d=16, n_true=32, true_l0=4, n_parents=0, correlation=0.8, n_topics=2, topic_share=0.4)
    source = SyntheticSource(config)
    fires, planted = (source.labelled(ROWS).codes.numpy() > 0).astype(float), source.features
    assert np.abs(fires.mean(0) - planted.rate).max() < 0.02
    off_diagonal = ~np.eye(32, dtype=bool)
    same = (planted.topic[:, None] == planted.topic) & off_diagonal
    # P(both) = p_i p_j E[(1 + c(on/q − 1))²] = p_i p_j (1 + c²(1 − q)/q)
    lift = (fires.T @ fires / ROWS) / np.outer(planted.rate, planted.rate)
    assert lift[same].mean() == pytest.approx(1 + 0.64 * 0.6 / 0.4, rel=0.03)
    assert lift[~same & off_diagonal].mean() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("batch_size", [100, 1024, 1500])
def test_any_step_is_found_whatever_the_start(batch_size: int):
    source = SyntheticSource(CONFIG)
    first = list(itertools.islice(source.batches(batch_size), 5))
    for step in range(5):
        assert torch.equal(next(source.batches(batch_size, step)), first[step])
        assert first[step].shape == (batch_size, 16)
    whole = torch.cat(first)
    assert torch.equal(next(source.batches(3 * batch_size)), whole[: 3 * batch_size])
    assert len(whole.unique(dim=0)) == len(whole)


def test_sample_and_splits_share_features_but_no_rows():
    train, heldout = SyntheticSource(CONFIG), SyntheticSource(CONFIG, split="holdout")
    assert torch.equal(train.features.directions, heldout.features.directions)
    parts = [train.sample(2_000), heldout.sample(2_000), next(train.batches(2_000)), next(heldout.batches(2_000))]
    assert len(torch.cat(parts).unique(dim=0)) == 8_000
    assert torch.equal(train.sample(2_000)[:700], train.sample(700))


def test_another_seed_gives_other_features_and_rows():
    other = SyntheticSource(SyntheticConfig(d=16, n_true=64, true_l0=4.0, n_parents=4, n_children=3, data_seed=1))
    assert not torch.allclose(other.features.directions, SyntheticSource(CONFIG).features.directions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_l0": 80.0}, r"true_l0 80\.0: with max_rate 0\.25 it must lie between 0 and"),
        ({"n_parents": 50}, r"n_parents 50 with 4 children each: of 256 features, 56 are left"),
        ({"correlation": 1.0, "topic_share": 0.1}, r"correlation 1\.0: a feature of rate 0\.25 would have to fire"),
        ({"max_rate": 0.0}, r"max_rate 0\.0: it must be above 0"),
    ],
)
def test_impossible_features_say_so(changes: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        SyntheticConfig(**changes)  # type: ignore[arg-type]
