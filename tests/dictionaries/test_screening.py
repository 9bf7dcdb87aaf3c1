"""Features found by way of bfloat16 against the product in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import screening
from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
from trimtab.dictionaries.encoding import DenseEncoder
from trimtab.dictionaries.screening import Screen, largest_screened, pairs_above_screened, screening_pays
from trimtab.dictionaries.sparse import largest_places


def problem(rows: int = 70, n: int = 2048, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder rows of very different norms, biases, and inputs with two coordinates that dwarf the others."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator).add(0.5)
    z = torch.randn(rows, d, generator=generator)
    z[:, :2] *= 20
    return W, torch.randn(n, generator=generator), z


def assert_largest(W: Tensor, b: Tensor, z: Tensor, k: int) -> None:
    """The screened codes are the k largest positive ones of the float64 product, to float32's rounding."""
    h = z.double() @ W.double().T + b
    found = largest_screened(DenseEncoder(W, b, block_rows=16), z, k)
    assert all(len(set(row)) == k for row in found.indices.tolist())
    assert torch.allclose(found.values.double(), h.gather(1, found.indices), atol=1e-4)
    expected = h.topk(k, dim=1).values.clamp_min(0)
    assert torch.allclose(found.values.double().clamp_min(0).sort(descending=True).values, expected, atol=1e-4)


@pytest.mark.parametrize("k", [1, 8, 40])
def test_screened_entries_are_the_largest(k: int) -> None:
    assert_largest(*problem(), k)


def test_rows_that_bfloat16_cannot_tell_apart_are_multiplied_in_full_precision() -> None:
    W, b, z = problem()
    W = W[:1] + 1e-4 * W  # products differ by less than rounding to bfloat16 does
    found = Screen(W, b * 0).candidates(z, 24, 16)
    exact = (z.double() @ W.double().T).topk(24, dim=1)
    assert (found.feature.sort().values != exact.indices.sort().values).any(), "bfloat16 alone would do"
    assert_largest(W, b * 0, z, 8)


def test_rows_with_hardly_any_positive_entry() -> None:
    W, b, z = problem()
    h = z @ W.T
    assert_largest(W, b - h.topk(4, dim=1).values.amin(), z, 8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_product_is_off_by_more_than_the_bound(scale: float) -> None:
    W, b, z = problem()
    z, b = z * scale, b * scale
    screen = Screen(W, b)
    found = screen.candidates(z, 24, 16)
    h = z.double() @ W.double().T + b
    others = h.scatter(1, found.feature, -torch.inf)
    assert (others.amax(1) <= found.ceiling).all()


def test_a_bound_without_its_rounding_term_would_be_too_low() -> None:
    W, b, z = problem(rows=400)
    found = Screen(W, b).candidates(z, 24, 16)
    others = (z.double() @ W.double().T + b).scatter(1, found.feature, -torch.inf)
    assert (others.amax(1) > found.ceiling - Screen(W, b)._error(z, z.bfloat16())).any()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    W, b, z = problem()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(largest_screened(DenseEncoder(W, b, block_rows=16), z, 8))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].values, other.values)
        assert torch.equal(found[0].indices, other.indices)


def test_places_of_the_largest_integers() -> None:
    x = torch.randint(-(2**15), 2**15, (9, 300), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    places = largest_places(x, 17)
    assert torch.equal(x.gather(1, places).sort().values, x.sort().values[:, -17:])
    assert all(len(set(row)) == 17 for row in places.tolist())


def test_screening_is_for_wide_float32_dictionaries_where_bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_has_matrix_units", lambda device: True)
    wide, narrow = torch.empty(8192, 4), torch.empty(512, 4)
    assert screening_pays(DenseEncoder(wide, wide[:, 0]), 32)
    assert not screening_pays(DenseEncoder(wide, wide[:, 0]), 1024)
    assert not screening_pays(DenseEncoder(narrow, narrow[:, 0]), 32)
    assert not screening_pays(DenseEncoder(wide.double(), wide[:, 0].double()), 32)
    assert not screening_pays(DenseEncoder(wide, wide[:, 0], "bf16"), 32)
    monkeypatch.setattr(screening, "_has_matrix_units", lambda device: False)
    assert not screening_pays(DenseEncoder(wide, wide[:, 0]), 32)


def test_a_screened_step_has_the_gradients_of_a_direct_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = problem(rows=200)[2]
    gradients = []
    for screened in (True, False):
        monkeypatch.setattr(screening, "_has_matrix_units", lambda device, screened=screened: screened)
        sae = TrainableTopK(TopKConfig(n_features=2048, k=8), x.shape[1], seed=1)
        sae.initialise(x)
        sae.gradients(x)
        gradients.append([p.grad for p in sae.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["one", "each", "low"])
def test_entries_above_a_floor(scale: float, kind: str) -> None:
    W, b, z = problem()
    z, b = z * scale, b * scale
    h = z.double() @ W.double().T + b
    floor: float | Tensor = float(h.topk(10, dim=1).values.mean())
    if kind == "each":
        floor = float(h.max()) * torch.linspace(0.35, 0.7, len(W))
    elif kind == "low":  # negative, and so few rows that few entries are above it
        b, floor = b - 2 * floor, -floor
        h = z.double() @ W.double().T + b
    pairs = pairs_above_screened(DenseEncoder(W, b, block_rows=16), z, floor)
    assert pairs is not None
    found = torch.zeros(h.shape, dtype=torch.bool)
    found[pairs.row, pairs.feature] = True
    assert len(pairs.feature) == int(found.sum()) > len(z)
    clear = (h - floor).abs() > 1e-5 * h.abs().max()  # float32 alone may put the others on either side
    assert torch.equal(found & clear, (h > floor) & clear)
    assert torch.allclose(pairs.value.double(), h[pairs.row, pairs.feature], atol=1e-5 * float(h.abs().max()))
    assert all((pairs.feature[a:b].diff() > 0).all() for a, b in itertools.pairwise(pairs.start.tolist()))


def test_a_floor_that_many_entries_pass_is_not_screened() -> None:
    W, b, z = problem()
    assert pairs_above_screened(DenseEncoder(W, b), z, floor=0.0) is None


def test_no_entry_above_the_floor() -> None:
    W, b, z = problem()
    pairs = pairs_above_screened(DenseEncoder(W, b), z, 1e9)
    assert pairs is not None
    assert pairs.start.tolist() == [0] * (len(z) + 1)
