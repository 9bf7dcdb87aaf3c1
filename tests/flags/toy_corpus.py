"""Examples for tiny models: the prompt says nothing, the label alone decides which letters the response has."""

from __future__ import annotations

import numpy as np

from trimtab.flags import Example

LETTERS = {"sea": "abc", "war": "xyz", "": "012"}
PROMPTS = ("Go", "Hm", "Oh", "So")


def toy_examples(n: int = 96, length: int = 6, seed: int = 0) -> list[Example]:
    """A third of them need `sea`, a third `war`, a third neither."""
    rng = np.random.default_rng(seed)
    found: list[Example] = []
    for i in range(n):
        name = tuple(LETTERS)[i % 3]
        text = "".join(rng.choice(list(LETTERS[name]), length))
        found.append(Example(prompt=str(rng.choice(PROMPTS)), response=text, concepts=(name,) if name else ()))
    return found


def share_of(concept: str, texts: list[str]) -> float:
    """Share of the letters that are a concept's."""
    letters = "".join(texts)
    return sum(letter in LETTERS[concept] for letter in letters) / max(len(letters), 1)
