from __future__ import annotations

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.runs import LEFT_OUT_AT_DEFAULT, config_dict, config_difference, json_safe


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    k: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopK:
    k: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    sae: TopK | BatchTopK = TopK()
    texts: tuple[Path, ...] = (Path("a.txt"),)
    limit: float = math.inf
    colour: Colour = Colour.RED
    rate: float = 1e-3
    chat: bool = True
    name: str | None = None


def test_every_value_has_a_plain_form() -> None:
    plain = config_dict(Training(rate=float(np.float32(0.5))))
    assert plain == {
        "sae": {"type": "TopK", "k": 32},
        "texts": ["a.txt"],
        "limit": "inf",
        "colour": "red",
        "rate": 0.5,
        "chat": True,
        "name": None,
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_numpy_sets_and_nan() -> None:
    value = {"a": np.arange(2), "b": np.float32(0.25), "c": {3, 1}, "d": np.nan, 4: np.True_}
    assert json_safe(value) == {"a": [0, 1], "b": 0.25, "c": [1, 3], "d": None, "4": True}
    assert config_dict({"d": np.nan}) == {"d": "nan"}


def test_a_field_that_was_added_later_is_left_out_at_its_default() -> None:
    @dataclasses.dataclass(frozen=True)
    class Before:
        a: int = 1

    @dataclasses.dataclass(frozen=True)
    class Now:
        a: int = 1
        b: tuple[str, ...] = dataclasses.field(default=(), metadata=LEFT_OUT_AT_DEFAULT)

    assert config_dict(Now()) == config_dict(Before()) == {"a": 1}
    assert config_dict(Now(b=("x",))) == {"a": 1, "b": ["x"]}
    assert json_safe(Now()) == {"a": 1, "b": []}


def test_a_value_without_a_plain_form_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="object has no plain form"):
        config_dict({"x": object()})
    with pytest.raises(TypeError, match="a config is a dataclass or a mapping, not int"):
        config_dict(3)


def test_difference_names_the_dotted_field_and_both_values() -> None:
    old, new = config_dict(Training()), config_dict(Training(sae=TopK(k=64), rate=1e-4))
    assert [str(d) for d in config_difference(old, new)] == [
        "sae.k was 32 and is now 64",
        "rate was 0.001 and is now 0.0001",
    ]
    assert [d.field for d in config_difference(old, new, ignore=["sae"])] == ["rate"]
    assert [d.field for d in config_difference(old, new, ignore=["sa", "rate"])] == ["sae.k"]


def test_classes_with_equal_fields_differ() -> None:
    difference = config_difference(config_dict(Training()), config_dict(Training(sae=BatchTopK())))
    assert [str(d) for d in difference] == ["sae.type was 'TopK' and is now 'BatchTopK'"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {"a": 1}, "a was absent and is now 1"),
        ({"a": None}, {}, "a was None and is now absent"),
        ({"a": 1}, {"a": True}, "a was 1 and is now True"),
        ({"a": {"b": 1}}, {"a": 2}, "a was {'b': 1} and is now 2"),
        ({"a": [1]}, {"a": [1, 2]}, "a was [1] and is now [1, 2]"),
    ],
)
def test_what_counts_as_different(old: dict[str, Any], new: dict[str, Any], words: str) -> None:
    assert [str(d) for d in config_difference(old, new)] == [words]


def test_long_values_are_cut() -> None:
    assert len(str(config_difference({"a": "x" * 999}, {"a": 1})[0])) < 100


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), plain_values, max_size=5))
def test_a_config_never_differs_from_what_was_read_back(config: dict[str, Any]) -> None:
    plain = config_dict(config)
    assert config_difference(json.loads(json.dumps(plain, allow_nan=False)), plain) == []
