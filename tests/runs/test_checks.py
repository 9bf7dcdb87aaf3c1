"""What a config's fields must be: bounds and choices, named where they are broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from trimtab.errors import UserError
from trimtab.runs import check_choices, check_least, check_values, checks

Kind = Literal["a", "b"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A field of every kind that is checked."""

    count: int | None = 1
    shares: tuple[float, ...] = (0.5,)
    kind: Kind | None = None
    kinds: tuple[Kind, ...] = ("a",)

    def __post_init__(self) -> None:
        check_least(self, 1, "count")
        check_values(self, "from 0 to 1", lambda share: 0 <= share <= 1, "shares")
        check_choices(self)


REFUSED: dict[str, dict[str, Any]] = {
    "count 0: it must be at least 1; change it": {"count": 0},
    "shares 1.5: it must be from 0 to 1; change it": {"shares": (0.5, 1.5)},
    "kind 'c': it is one of a, b; choose one": {"kind": "c"},
    "kinds 'c': it is one of a, b; choose one": {"kinds": ("a", "c")},
}


def check_refused() -> None:
    for message, values in REFUSED.items():
        with pytest.raises(UserError) as caught:
            Config(**values)
        assert caught.value.line == message


def test_a_broken_rule_is_named_with_its_field_and_value() -> None:
    assert Config(count=None, shares=(), kinds=()).count is None
    check_refused()


def test_a_check_of_the_first_value_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: of several values only the first is looked at."""
    monkeypatch.setattr(checks, "_each", lambda value: value[:1] if isinstance(value, tuple) else (value,))
    with pytest.raises(pytest.fail.Exception):
        check_refused()
