"""Splits that stay what they are: an id's split depends on the id and the salt, not on what else is there."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping

from trimtab.errors import UserError


def split_ids(ids: Iterable[str | int], shares: Mapping[str, float], salt: str) -> dict[str, list[str]]:
    """Divide ids among named splits by a hash of each id.

    Adding or removing ids moves no other id. Sizes are therefore binomial, not exact.

    Args:
        ids: unique ids of prompts or documents.
        shares: share of each split, such as `{"train": 0.8, "validation": 0.1, "test": 0.1}`; they sum to 1.
        salt: names the division; another salt gives an unrelated one.

    Returns:
        The ids of each split, as text, in the order given.

    Raises:
        UserError: an id that occurs twice, or shares that are negative or do not sum to 1.
    """
    if any(share < 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-9):
        raise UserError(f"split shares {dict(shares)}", "they must be at least 0 and sum to 1")
    bounds = list(itertools.accumulate(shares.values()))
    names = list(shares)
    last = max(i for i, share in enumerate(shares.values()) if share > 0)
    splits: dict[str, list[str]] = {name: [] for name in names}
    seen: set[str] = set()
    for id_ in map(str, ids):
        if id_ in seen:
            raise UserError(f"id {id_!r}", "it occurs twice, so that it could be in two splits", "make ids unique")
        seen.add(id_)
        digest = hashlib.sha256(f"{salt}\0{id_}".encode()).digest()
        place = (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # in [0, 1)
        index = next((i for i, bound in enumerate(bounds) if place < bound), last)
        splits[names[index]].append(id_)
    return splits


def text_id(text: str) -> str:
    """An id made from a text (16 hex characters of its SHA-256), equal wherever the text is."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
