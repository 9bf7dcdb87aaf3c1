from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.errors import UserError
from trimtab.stats import benjamini_hochberg

THROMBOLYSIS = [
    *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344),
    *(0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000),
]
"""The 15 p-values of section 4.1 of Benjamini and Hochberg 1995, who reject the first four at 0.05."""


def test_the_papers_example() -> None:
    assert (benjamini_hochberg(THROMBOLYSIS) <= 0.05).tolist() == [True] * 4 + [False] * 11


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_matches_scipy(p_values: list[float]) -> None:
    np.testing.assert_allclose(benjamini_hochberg(p_values), stats.false_discovery_control(p_values), atol=1e-12)


def test_no_tests_no_values() -> None:
    assert benjamini_hochberg([]).size == 0


def test_impossible_values_are_named() -> None:
    with pytest.raises(UserError, match="p-values: they must be"):
        benjamini_hochberg([0.2, 1.2])
