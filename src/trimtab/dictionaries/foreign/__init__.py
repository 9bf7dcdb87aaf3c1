"""SAEs that other libraries saved, one file per format. Each reader turns a directory into a `FoundSAE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trimtab.dictionaries.foreign import dictionary_learning, gemma_scope, sparsify
from trimtab.dictionaries.reading import FoundSAE
from trimtab.dictionaries.saelens_layout import CONFIG_FILE, WEIGHTS_FILE, read_saelens


class Format(NamedTuple):
    """A way to keep an SAE on disk."""

    writer: str
    weights: str
    """The file that holds the weights, by which the format is known."""
    config: str
    """The file that describes them; empty if there is none."""
    read: Callable[[Path], FoundSAE]


FORMATS: tuple[Format, ...] = (
    Format("SAELens", WEIGHTS_FILE, CONFIG_FILE, read_saelens),
    Format("sparsify", sparsify.WEIGHTS_FILE, sparsify.CONFIG_FILE, sparsify.read),
    Format(
        "dictionary_learning",
        dictionary_learning.WEIGHTS_FILE,
        dictionary_learning.CONFIG_FILE,
        dictionary_learning.read,
    ),
    Format("Gemma Scope", gemma_scope.WEIGHTS_FILE, "", gemma_scope.read),
)
"""Every layout that can be read; the first one that a directory fits is taken."""


def format_of(path: Path) -> Format:
    """The format of a directory: the one whose files are there; SAELens's if none are, so that its reader says so."""
    by_weights = [known for known in FORMATS if (path / known.weights).exists()]
    whole = [known for known in by_weights if not known.config or (path / known.config).exists()]
    if whole:
        return whole[0]
    if (path / CONFIG_FILE).exists():
        return FORMATS[0]
    return by_weights[0] if by_weights else FORMATS[0]


def is_weights_file(path: Path) -> bool:
    """Whether a file can stand for the directory it lies in."""
    return any(path.name == known.weights and format_of(path.parent) is known for known in FORMATS)
