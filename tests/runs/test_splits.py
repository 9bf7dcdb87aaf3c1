from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.runs import split_ids, text_id

SHARES = {"train": 0.7, "validation": 0.2, "test": 0.1}


def test_the_split_of_an_id_is_fixed_for_good() -> None:
    """Places worked out from the definition: the first 53 bits of SHA-256 of salt, NUL, id."""
    splits = split_ids(["a", "b", "c", "d"], {"train": 0.5, "test": 0.5}, "salt")
    for id_ in "abcd":
        place = int(hashlib.sha256(f"salt\0{id_}".encode()).hexdigest()[:14], 16) / 16**14
        assert id_ in splits["train" if place < 0.5 else "test"]


@given(st.sets(st.text(max_size=8), max_size=40), st.sets(st.text(max_size=8), max_size=40))
def test_adding_ids_moves_none(first: set[str], more: set[str]) -> None:
    before = split_ids(sorted(first), SHARES, "s")
    after = split_ids(sorted(first | more), SHARES, "s")
    for name in SHARES:
        assert set(before[name]) == set(after[name]) & first
    assert sorted(id_ for ids in after.values() for id_ in ids) == sorted(first | more)


def test_shares_are_met_on_average_and_salts_are_unrelated() -> None:
    one, two = (split_ids(range(10_000), SHARES, salt) for salt in ("one", "two"))
    assert len(one["train"]) == pytest.approx(7_000, abs=4 * 46)
    assert len(one["test"]) == pytest.approx(1_000, abs=4 * 30)
    assert len(set(one["test"]) & set(two["test"])) == pytest.approx(100, abs=4 * 10)


def test_order_is_kept_and_an_empty_share_stays_empty() -> None:
    splits = split_ids([3, 1, 2], {"train": 1.0, "test": 0.0}, "s")
    assert splits == {"train": ["3", "1", "2"], "test": []}


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="id '7': it occurs twice"):
        split_ids([7, "7"], SHARES, "s")
    with pytest.raises(UserError, match=r"split shares .* sum to 1"):
        split_ids([1], {"train": 0.5, "test": 0.4}, "s")
    with pytest.raises(UserError, match="at least 0"):
        split_ids([1], {"train": 1.5, "test": -0.5}, "s")


def test_text_ids_are_the_hash_of_the_text() -> None:
    assert text_id("") == "e3b0c44298fc1c14"
