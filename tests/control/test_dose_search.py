"""Searches for equal divergence, on curves that are known."""

from __future__ import annotations

import math

import pytest

from trimtab.control.dose_search import match_kl, match_kls


def test_equal_kl_is_found_on_a_curve_that_is_known() -> None:
    for kl in (lambda s: 0.3 * s**2, lambda s: 2 * (1 - math.exp(-((s / 3) ** 4))), lambda s: 1e-4 * s**2):
        found = match_kl(kl, 0.2, tolerance=0.05, tries=20)
        assert found.within
        assert kl(found.scale) == pytest.approx(0.2, rel=0.05)
        assert found.reached == kl(found.scale)
    never = match_kl(lambda s: 0.1 * (1 - math.exp(-s)), 0.2, tries=20)
    assert not never.within
    assert never.reached == pytest.approx(0.1, abs=1e-6)


def test_searches_side_by_side_find_what_each_finds_alone() -> None:
    """Those that have ended are asked again where they ended, however long the others go on."""
    curves = [lambda s: 0.3 * s**2, lambda s: 2 * (1 - math.exp(-((s / 3) ** 4))), lambda s: 0.1 * (1 - math.exp(-s))]
    targets, asked = [0.2, 0.4, 0.2], []

    def kl(scales: list[float]) -> list[float]:
        asked.append(scales)
        return [curve(scale) for curve, scale in zip(curves, scales, strict=True)]

    found = match_kls(kl, targets, tries=14)
    assert found == [match_kl(curve, target, tries=14) for curve, target in zip(curves, targets, strict=True)]
    assert [match.within for match in found] == [True, True, False]
    assert len(asked) == max(match.tries for match in found) > min(match.tries for match in found)
    assert asked[-1][0] == found[0].scale


def test_differences_that_are_too_small_to_matter_are_allowed() -> None:
    (match,) = match_kls(lambda scales: [1e-7 * scales[0]], [0.0], least=1e-6)
    assert match.within
    assert (match.scale, match.tries) == (1.0, 1)
    (match,) = match_kls(lambda scales: [1e-7 * scales[0]], [0.0], tries=4)
    assert not match.within
    assert match.scale < 1
