"""SAEs that other libraries saved, one file per format.

Each module names the file that holds the weights (`WEIGHTS_FILE`) and the one that describes them (`CONFIG_FILE`, empty
if there is none); its `read` turns a directory into a `FoundSAE`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from trimtab.dictionaries import saelens_layout
from trimtab.dictionaries.foreign import dictionary_learning, gemma_scope, gemma_scope_2, llama_scope, sparsify

FORMATS = (saelens_layout, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, llama_scope)
"""Every layout that can be read; the first one that a directory fits is taken."""


def directories(pattern: str, below: Path) -> set[Path]:
    """Directories below one that hold some format's weights, at depths that `pattern` says (`**`, `*/*`)."""
    found = ((file, known.WEIGHTS_FILE) for known in FORMATS for file in below.glob(f"{pattern}/{known.WEIGHTS_FILE}"))
    return {file.parents[name.count("/")] for file, name in found}


def format_of(path: Path) -> ModuleType:
    """The format of a directory: the one whose files are there; SAELens's if none are, so that its reader says so."""
    by_weights = [known for known in FORMATS if (path / known.WEIGHTS_FILE).exists()]
    whole = [known for known in by_weights if (path / known.CONFIG_FILE).exists()]
    if not whole and (path / saelens_layout.CONFIG_FILE).exists():
        return saelens_layout
    return [*whole, *by_weights, saelens_layout][0]
