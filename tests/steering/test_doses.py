"""Doses: closed forms, hypothesis, and the messages for bad ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.steering import check_doses, coefficients

finite = st.floats(-100, 100, allow_nan=False, width=32)


@given(dose=finite, x=st.lists(finite, min_size=1, max_size=6), m=st.floats(0, 100, width=32))
def test_units_follow_their_definitions(dose: float, x: list[float], m: float) -> None:
    row, doses, maxima = torch.tensor([x]), torch.tensor([[dose]]), torch.tensor([[m]])
    assert float(coefficients("absolute", doses, row)) == dose
    assert float(coefficients("max_activation", doses, row, maxima)) == pytest.approx(dose * m, rel=1e-6)
    norm = math.sqrt(math.fsum(v * v for v in x))  # in float32 the squares of values below 1e-19 underflow
    assert float(coefficients("relative", doses, row)) == pytest.approx(
        dose * norm, rel=1e-5, abs=1e-15
    )  # squares below 1e-38 underflow


def test_every_row_and_slot_has_its_own_dose() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    doses = torch.tensor([[1.0, -0.5], [2.0, 0.0]])
    assert coefficients("relative", doses, x).tolist() == [[5.0, -2.5], [4.0, 0.0]]
    maxima = torch.tensor([[2.0, 4.0], [1.0, 8.0]])
    assert coefficients("max_activation", doses, x, maxima).tolist() == [[2.0, -2.0], [2.0, 0.0]]


def test_half_precision_activations_get_float32_coefficients() -> None:
    x = torch.full((1, 4096), 8.0, dtype=torch.bfloat16)
    found = coefficients("relative", torch.tensor([[0.4]]), x)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(0.4 * 8 * 64, rel=1e-6)


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, [0.1, math.nan], torch.tensor([1.0, math.inf]), "0.4", True]
)
def test_a_dose_that_is_no_number_is_refused(bad: object) -> None:
    with pytest.raises(UserError, match="a dose is a finite number; give one like"):
        check_doses(bad)  # type: ignore[arg-type]


def test_numbers_of_any_kind_are_doses() -> None:
    for good in (1, -0.5, np.float32(0.4), [1, 2.0], torch.tensor([[0.1]]), (np.int64(3),)):
        check_doses(good)  # type: ignore[arg-type]


def test_unknown_units_and_missing_statistics_are_refused() -> None:
    x, dose = torch.ones(1, 2), torch.ones(1, 1)
    with pytest.raises(UserError, match="unit 'percent': allowed are absolute, max_activation, relative"):
        coefficients("percent", dose, x)
    with pytest.raises(UserError, match="without feature statistics"):
        coefficients("max_activation", dose, x)
