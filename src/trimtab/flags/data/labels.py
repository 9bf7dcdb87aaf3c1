"""What the labels of a source mean: concepts by their names, by their descriptions, or as they are renamed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from trimtab.errors import UserError, did_you_mean

Others = Literal["refuse", "none", "drop"]
NONE = "none"
"""Label of texts that have none of the concepts."""
NEAR = 0.8
"""Similarity from which a label is taken for a misspelt concept."""


class Labels:
    """Reads labels as concepts, and remembers which there were.

    Args:
        concepts: names with descriptions; a label that is a description means the concept, too.
        rename: texts like `LABEL=CONCEPT`; `LABEL=none` for texts that have none of the concepts.
        others: what becomes of texts whose labels are no concepts: `refuse`; `none`, they have none of the concepts; or
            `drop`, they are left out. A label that is no concept beside one that is says nothing.

    Raises:
        UserError: a text is no `LABEL=CONCEPT`, renames a label twice, or to what is no concept.
    """

    def __init__(self, concepts: Mapping[str, str], rename: Sequence[str] = (), others: Others = "refuse") -> None:
        if NONE in concepts:
            raise UserError(f"concept {NONE!r}", "it is the label of texts that have none", "call it otherwise")
        self.concepts, self.others = concepts, others
        self.rename: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        known = [*concepts, NONE]
        for text in rename:
            label, given, concept = text.rpartition("=")
            if not given:
                raise UserError(f"rename {text!r}", "it has no =", "write LABEL=CONCEPT")
            if concept not in known:
                hint = did_you_mean(concept, known, "name one of them")
                raise UserError(f"rename {text!r}", f"the concepts are {', '.join(concepts)}, or none", hint)
            if self.rename.get(label, concept) != concept:
                raise UserError(f"rename {text!r}", f"{label!r} means {self.rename[label]}, too", "rename it once")
            self.rename[label] = concept
        self._meaning: dict[str, str] = {NONE: NONE, **{text: name for name, text in concepts.items()}}
        self._meaning |= {name: name for name in concepts} | self.rename

    def concepts_of(self, labels: Sequence[str], where: str) -> tuple[str, ...] | str:
        """The concepts that a text with these labels has, in the order of the concepts; or why it is left out.

        Raises:
            UserError: a label means no concept, and such are refused.
        """
        self.seen.update(labels)
        found = {self._meaning.get(label, "") for label in labels}
        if "" in found and self.others == "refuse":
            label = next(label for label in labels if label not in self._meaning)
            hint = "say which it is with --rename, or what becomes of such texts with --others"
            why = f"the concepts are {', '.join(self.concepts)}"
            raise UserError(f"{where}: label {label!r}", why, did_you_mean(label, [*self.concepts, NONE], hint))
        having = tuple(name for name in self.concepts if name in found)
        if "" in found and not having and self.others == "drop":
            return "a label that is no concept"
        return "labels that contradict each other" if having and NONE in found else having

    def check(self) -> None:
        """Look back on all labels.

        Raises:
            UserError: a label to be renamed was not there, or one that is no concept is written nearly like one.
        """
        for label in self.rename:
            if label not in self.seen:
                hint = did_you_mean(label, self.seen, f"there is {', '.join(list(self.seen)[:20])}")
                raise UserError(f"rename {label!r}", "no text has this label", hint)
        names = {name.casefold(): name for name in self.concepts}
        unknown = {label: n for label, n in self.seen.items() if label not in self._meaning}
        for label, n in unknown.items():
            if near := difflib.get_close_matches(label.casefold(), names, n=1, cutoff=NEAR):
                why = f"{n} texts have it, which is no concept but nearly {names[near[0]]!r}"
                hint = f"say what is meant: --rename {label}={names[near[0]]}, or {label}=none"
                raise UserError(f"label {label!r}", why, hint)
