"""Curricula are schedules of forced share and weight over progress, and steps follow them."""

from __future__ import annotations

import re

import pytest

from trimtab.errors import UserError
from trimtab.flags import CURRICULA, Curriculum, Phase

PUBLISHED = [
    # steps of 50,000 up to which, forced share, λ
    (5_000, 1.0, 0), (10_000, 0.9, 2), (15_000, 0.8, 5), (20_000, 0.7, 10), (30_000, 0.5, 20), (50_000, 0.5, 30),
]  # fmt: skip


def test_forced_is_the_published_schedule() -> None:
    start = 0
    for end, share, weight in PUBLISHED:
        for step in (start, (start + end) // 2, end - 1):
            phase = CURRICULA["forced"].at(step / 50_000)
            assert (phase.forced, phase.weight) == (share, weight), step
        start = end


def test_auxiliary_has_its_weights_and_never_forces_and_plain_has_neither() -> None:
    for i in range(100):
        forced, auxiliary, plain = (CURRICULA[name].at(i / 100) for name in ("forced", "auxiliary", "plain"))
        assert auxiliary.weight == forced.weight
        assert auxiliary.forced == plain.forced == plain.weight == 0


def test_steps_are_forced_as_often_as_the_schedule_says() -> None:
    steps, curriculum = 5_000, CURRICULA["forced"]
    start = 0
    for end, share, _ in PUBLISHED:
        part = range(start * steps // 50_000, end * steps // 50_000)
        found = sum(curriculum.forces(step, steps, seed=3) for step in part) / len(part)
        assert found == pytest.approx(share, abs=0 if share == 1 else 0.05)
        start = end
    assert not any(CURRICULA["auxiliary"].forces(step, steps, seed=3) for step in range(0, steps, 7))


def test_which_steps_are_forced_depends_on_the_seed_and_on_nothing_else() -> None:
    half = Curriculum(phases=(Phase(until=1, forced=0.5, weight=1),))
    drawn = [[half.forces(step, 100, seed) for step in range(100)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


WRONG = {
    "an unknown name": (lambda: Curriculum.named("force"), "curriculum 'force': there is plain, auxiliary, forced"),
    "out of order": (
        lambda: Curriculum(phases=(Phase(until=0.5, forced=0, weight=0), Phase(until=0.2, forced=0, weight=0))),
        "phases that end at [0.5, 0.2]: each ends later, the last at 1; give them in order",
    ),
    "too short": (lambda: Curriculum(phases=(Phase(until=0.5, forced=0, weight=0),)), "phases that end at [0.5]: each"),
    "none": (lambda: Curriculum(phases=()), "phases that end at []: each ends later"),
    "a share": (lambda: Phase(until=1, forced=1.5, weight=0), "forced 1.5 of a phase: it is a share, from 0 to 1"),
    "a weight": (lambda: Phase(until=1, forced=1, weight=-1), "weight -1 of a phase: it must be at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(UserError, match=re.escape(message)):
        make()
