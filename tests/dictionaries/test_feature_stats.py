"""Statistics against direct formulas; the table on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.dictionaries import FeatureStats, FeatureStatsAccumulator, SparseCodes
from trimtab.errors import UserError

NORMS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])


def random_codes(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(rows, 5, generator=generator).relu() * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    f[:, 4] *= torch.rand(rows, generator=generator) < 0.1
    return f


def sparse(f: torch.Tensor) -> SparseCodes:
    values, indices = f.topk(4, dim=-1, sorted=False)
    return SparseCodes(values, indices)


def check(stats: FeatureStats, f: np.ndarray) -> None:
    in_model_units = f.astype(np.float64) * NORMS.double().numpy()
    np.testing.assert_allclose(stats.max_activation, in_model_units.max(0), rtol=1e-6)
    np.testing.assert_allclose(stats.firing_rate, (f > 0).mean(0), rtol=1e-12)
    for i in range(5):
        firing = in_model_units[f[:, i] > 0, i]
        np.testing.assert_allclose(stats.mean_activation[i], firing.mean() if len(firing) else 0, rtol=1e-6)
    np.testing.assert_array_equal(stats.live, (f > 0).any(0))
    assert stats.n_tokens == len(f)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99), dense=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_statistics_of_the_whole(sizes, seed, dense):
    f = random_codes(max(sum(sizes), 1), seed)
    accumulator = FeatureStatsAccumulator(NORMS)
    for part in f.split([*sizes, len(f) - sum(sizes)]):
        accumulator.update(part if dense else sparse(part))
    check(accumulator.result(), f.numpy())


def test_more_dimensions_than_two_are_rows():
    f = random_codes(24, 0)
    dense, few = FeatureStatsAccumulator(NORMS), FeatureStatsAccumulator(NORMS)
    dense.update(f.reshape(2, 12, 5))
    few.update(SparseCodes(*(part.reshape(2, 12, 4) for part in sparse(f))))
    check(dense.result(), f.numpy())
    check(few.result(), f.numpy())


def test_codes_of_zero_or_less_do_not_fire():
    accumulator = FeatureStatsAccumulator(torch.ones(3))
    accumulator.update((torch.tensor([[0.0, -2.0], [1.0, 0.0]]), torch.tensor([[0, 1], [2, 0]])))
    accumulator.update(torch.tensor([[-1.0, 0.0, 0.0]]))
    stats = accumulator.result()
    assert stats.firing_rate.tolist() == [0, 0, 1 / 3]
    assert stats.max_activation.tolist() == [0, 0, 1]


def test_no_tokens_at_all_give_zeros():
    stats = FeatureStatsAccumulator(NORMS).result()
    assert stats.n_tokens == 0
    assert not stats.live.any()


@pytest.fixture
def stats() -> FeatureStats:
    accumulator = FeatureStatsAccumulator(NORMS)
    accumulator.update(random_codes(50, 1))
    return accumulator.result(corpus_hash="c0ffee", sink_filter="position 0; norm > 10 × median")


def test_the_table_comes_back_bit_for_bit(stats, tmp_path):
    stats.write(tmp_path / "s.parquet")
    read = FeatureStats.read(tmp_path / "s.parquet", n_features=5)
    for name in ("max_activation", "mean_activation", "firing_rate"):
        np.testing.assert_array_equal(getattr(read, name), getattr(stats, name), strict=True)
    assert (read.n_tokens, read.corpus_hash) == (50, "c0ffee")
    assert read.sink_filter == "position 0; norm > 10 × median"
    assert pq.read_table(tmp_path / "s.parquet").column("feature").to_pylist() == [0, 1, 2, 3, 4]


def refused(path, *parts, **expected):
    with pytest.raises(UserError) as caught:
        FeatureStats.read(path, **expected)
    for part in (str(path), *parts):
        assert part in caught.value.line
    assert "compute the statistics again" in caught.value.line


def test_bad_tables_are_named(stats, tmp_path):
    path = tmp_path / "s.parquet"
    refused(path, "no such file")
    stats.write(path)
    refused(path, "5 features, not 6", n_features=6)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "not readable")
    path.write_bytes(b"")
    refused(path, "not readable")
    pq.write_table(pa.table({"x": [1]}), path)
    refused(path, "not readable as feature statistics")
    table = stats.to_table()
    pq.write_table(table.drop_columns(["firing_rate"]), path)
    refused(path, "firing_rate")
    pq.write_table(table.replace_schema_metadata({"trimtab.feature_stats": '{"format": 99}'}), path)
    refused(path, "format 99")
    bad = pa.array([1.0, 2.0, float("nan"), 0.0, 0.0])
    pq.write_table(table.set_column(table.column_names.index("firing_rate"), "firing_rate", bad), path)
    refused(path, "column firing_rate", "not finite")


def test_a_path_that_cannot_be_written_is_named(stats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*s.parquet"):
        stats.write(tmp_path / "file" / "s.parquet")
