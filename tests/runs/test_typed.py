"""Values of declared types out of plain ones: read back as they were written, nothing guessed, mistakes named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from trimtab.errors import UserError
from trimtab.runs import config_dict, json_safe, read_options, read_typed, typed
from trimtab.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Part:
    """Nested."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise UserError(f"share {self.share}", "it is at most 1", "lower it")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A field of every kind."""

    count: int
    rate: float = 1.0
    on: bool = True
    kind: Literal["a", "b"] | None = None
    place: Path | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    dose: float | list[float] | None = None
    part: Part = Part()
    parts: tuple[Part, ...] = ()
    scores: dict[str, float | None] | None = None
    extra: dict[str, Any] | None = None
    interval: Interval | None = None


WHOLE = Whole(
    count=3, rate=math.inf, on=False, kind="b", place=Path("a/b"), sizes=(1, 2), dose=[1.0, 2.0], part=Part(share=1.0),
    parts=(Part(), Part(share=0.25)), scores={"x": 1.0, "y": None}, extra={"n": [1, "z"]},
)  # fmt: skip


def test_a_config_and_a_result_are_read_back_as_they_were_written() -> None:
    assert read_typed(Whole, json.loads(json.dumps(config_dict(WHOLE)))) == WHOLE
    unbounded = Whole(count=1, interval=Interval(estimate=0.5, low=math.nan, high=math.nan, n=1))
    found = read_typed(Whole, json.loads(json.dumps(json_safe(unbounded)))).interval
    assert found is not None
    assert (found.estimate, found.n, math.isnan(found.low), math.isnan(found.high)) == (0.5, 1, True, True)
    assert read_typed(Whole, {"count": 1, "rate": 2, "dose": 3}) == Whole(count=1, rate=2.0, dose=3.0)
    assert type(read_typed(Whole, {"count": 1, "rate": 2}).rate) is float


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Fits where `Move` does."""

    by: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """May have a field that `Shift` has not."""

    by: float
    turns: int = 0


def test_of_several_dataclasses_the_one_that_is_meant_is_read() -> None:
    kind: Any = Shift | Move | None
    for one in (Shift(by=1.0), Move(by=1.0), Move(by=1.0, turns=2)):
        written = config_dict({"one": one})["one"]
        assert read_typed(kind, written) == one
    assert read_typed(kind, {"by": 1, "turns": 2}) == Move(by=1.0, turns=2)
    with pytest.raises(UserError, match="it: it may be Shift or Move; say which as type"):
        read_typed(kind, {"by": 1}, "it")
    with pytest.raises(UserError, match=r"it.by: it must be a number, not 'x'"):
        read_typed(kind, {"type": "Shift", "by": "x"}, "it")


REFUSED: dict[str, dict[str, Any]] = {
    "it.count: it is missing": {},
    "it.count: it must be a whole number, not 1.0": {"count": 1.0},
    "it.count: it must be a whole number, not True": {"count": True},
    "it.count: it must be a whole number, not '1'": {"count": "1"},
    "it.rate: it must be a number, not '2'": {"count": 1, "rate": "2"},
    "it.rate: it must be a number, not False": {"count": 1, "rate": False},
    "it.rate: it must be a number, not 'nan'": {"count": 1, "rate": "nan"},
    "it.rate: it must be a number, not nan": {"count": 1, "rate": math.nan},
    "it.pair: it must be a list of 2: a whole number, a text, not [1, 'a', 'b']": {"count": 1, "pair": [1, "a", "b"]},
    "it.pair: it must be a list of 2: a whole number, a text, not 'ab'": {"count": 1, "pair": "ab"},
    "it.on: it must be true or false, not 1": {"count": 1, "on": 1},
    "it.kind: it must be one of a, b, not 'c'": {"count": 1, "kind": "c"},
    "it.place: it must be a path, not 3": {"count": 1, "place": 3},
    "it.sizes: it must be a list, each a whole number, not '12'": {"count": 1, "sizes": "12"},
    "it.sizes[1]: it must be a whole number, not None": {"count": 1, "sizes": [1, None]},
    "it.dose: it must be a number or a list, each a number, not 'x'": {"count": 1, "dose": "x"},
    "it.part: it must be values by name, not 3": {"count": 1, "part": 3},
    "it.parts[1].share: it must be a number, not 'x'": {"count": 1, "parts": [{}, {"share": "x"}]},
    "it.part: there is no shore; did you mean share?": {"count": 1, "part": {"shore": 1}},
    "it: there is no vww; leave it out": {"count": 1, "vww": 1},
    "it.scores['x']: it must be a number, not 'y'": {"count": 1, "scores": {"x": "y"}},
    "share 2.0: it is at most 1; lower it": {"count": 1, "part": {"share": 2}},
}


def check_refused() -> None:
    for message, value in REFUSED.items():
        with pytest.raises(UserError) as caught:
            read_typed(Whole, value, "it")
        assert caught.value.line == message


def test_nothing_is_guessed_and_mistakes_are_named() -> None:
    check_refused()


def test_a_reader_that_converts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: values are made to fit their type."""
    monkeypatch.setattr(typed, "_exactly", lambda value, kind, *_: kind(value))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_refused()


def test_texts_have_the_types_that_are_asked_for() -> None:
    kinds = {
        "a": int, "b": float | None, "c": bool, "d": Sequence[str] | None, "e": tuple[int, ...], "f": Path,
        "g": Literal["x", 2], "h": str, "i": tuple, "j": object,
        "k": tuple[int, str], "l": int | list[int], "m": tuple[int, str] | None,
    }  # fmt: skip
    texts = ("a=3", "b=0.5", "c=no", "d=x, y", "e=1,2", "f=a/b", "g=2", "h=k=v", "i=p", "k=1,2", "l=1,2", "m=3, a")
    found = read_options(texts, kinds, what="option", owner="it")
    assert found == {
        "a": 3, "b": 0.5, "c": False, "d": ("x", "y"), "e": (1, 2), "f": Path("a/b"), "g": 2, "h": "k=v", "i": ("p",),
        "k": (1, "2"), "l": [1, 2], "m": (3, "a"),
    }  # fmt: skip
    for text, message in (
        ("a", "option 'a': it has no value; write NAME=VALUE"),
        ("b=x", "option b: it must be a number, not 'x'"),
        ("b=nan", "option b: it must be a number, not 'nan'"),
        ("k=1", "option k: it must be a list of 2: a whole number, a text, not [1]"),
        ("k=1,2,3", "option k: it must be a list of 2: a whole number, a text, not [1, '2', '3']"),
        ("k=x,2", "option k: it must be a list of 2: a whole number, a text, not 'x'"),
        ("l=1,x", "option l: it must be a whole number or a list, each a whole number, not '1,x'"),
        ("c=maybe", "option c: it must be true or false, not 'maybe'"),
        ("e=1,x", "option e[1]: it must be a whole number, not 'x'"),
        ("g=y", "option g: it must be one of x, 2, not 'y'"),
        ("j=1", "it must be of the type object, which can only be given in Python"),
        ("z=1", "option 'z': it takes a, b, c, d, e, f, g, h, i, j, k, l, m; choose one of them"),
    ):
        with pytest.raises(UserError) as caught:
            read_options((text,), kinds, what="option", owner="it")
        assert message in caught.value.line
    with pytest.raises(UserError, match="option 'a': it is given twice"):
        read_options(("a=1", "a=2"), kinds, what="option", owner="it")
