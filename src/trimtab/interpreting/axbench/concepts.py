"""What is to be brought about: a concept that some texts have and others lack, or what a feature fires on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trimtab.dictionaries.feature_examples import LEFT_OUT, FeatureExamples, Window
from trimtab.errors import UserError
from trimtab.finding.wishes.files import read_rows
from trimtab.interpreting.judge import Exemplars, Passage
from trimtab.interpreting.judges.combining import LEAST
from trimtab.interpreting.judges.rating import as_passage
from trimtab.interpreting.judges.rules import divide
from trimtab.judges import Unjudged
from trimtab.runs import text_id

FITTED = ("mean-difference", "probe", "rank-one")
"""Arms whose directions are fitted on exemplars."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something that a text may have, by examples."""

    exemplars: Exemplars
    feature: int | None = None
    """The feature whose windows the exemplars are; None where a feature is yet to be found for it."""

    @property
    def name(self) -> str:
        return self.exemplars.name

    @property
    def fingerprint(self) -> str:
        """Of all that it is made of."""
        kinds = (self.exemplars.has, self.exemplars.lacks)
        passages = [[[p.tokens, p.activations] for p in kind] for kind in kinds]
        return text_id(json.dumps([self.name, self.feature, passages]))


def are_fitted(arms: Sequence[str], concepts: Sequence[Concept]) -> bool:
    """Whether an arm is fitted on exemplars: the feature that a concept is of, and a random one, are not."""
    found_by_texts = "features" in arms and any(concept.feature is None for concept in concepts)
    return found_by_texts or not set(FITTED).isdisjoint(arms)


def share_out(concepts: Sequence[Concept], *, halved: bool) -> list[tuple[Concept, Exemplars] | Unjudged]:
    """Concepts as arms see them, each with the exemplars that the judge sees.

    Args:
        concepts: with all their exemplars.
        halved: give every second exemplar to the judge and the others to arms; both see all of them otherwise.

    Returns:
        In order; a gap where a concept has too few exemplars to be halved.
    """
    found: list[tuple[Concept, Exemplars] | Unjudged] = []
    for one in concepts:
        has, lacks = len(one.exemplars.has), len(one.exemplars.lacks)
        if halved and min(has, lacks) < 2 * LEAST:
            why = f"{has} texts have it and {lacks} lack it, where {2 * LEAST} of each are needed"
            found.append(Unjudged(f"{why}: half for arms, half for the judge"))
        else:
            judges, arms = divide(one.exemplars, halved)
            found.append((replace(one, exemplars=arms), judges))
    return found


def feature_concepts(
    examples: FeatureExamples, features: Sequence[int], *, has: int = 30, lacks: int = 30, seed: int = 0
) -> list[Concept]:
    """What each of some features fires on, as a concept.

    Args:
        examples: windows in which features fire.
        features: ids.
        has: windows of a feature at most, the strongest first, then those drawn by activation, then those drawn evenly;
            of the same place only the first.
        lacks: windows of other features, out of other documents; the feature does not fire in all but a few of them, as
            any one feature fires seldom.
        seed: of which ones.

    Raises:
        UserError: there is no such feature, or it never fired.
    """
    rng = np.random.default_rng(seed)
    found: list[Concept] = []
    for feature in features:
        own = examples[feature].windows
        if not own:
            raise UserError(f"feature {feature}", "there is no window in which it fires", "leave it out")
        documents, others = {window.document for window in own}, list[Window]()
        for other in rng.permutation(examples.live).tolist():
            more = [] if other == feature else examples[other].windows
            others += [window for window in more[-1:] if window.document not in documents]
            if len(others) == lacks:
                break
        found.append(
            Concept(
                exemplars=Exemplars(
                    name=f"feature {feature}", has=tuple(map(_passage, _once(own)[:has])),
                    lacks=tuple(Passage(tokens=_passage(window).tokens) for window in others),
                ),
                feature=feature,
            )
        )  # fmt: skip
    return found


def labelled_concepts(path: Path, *, most: int = 30, seed: int = 0) -> list[Concept]:
    """Concepts by texts that are labelled with them; a text of one label lacks the others, and counts once.

    Args:
        path: JSONL of `text` and `label`.
        most: texts that have a concept, and that lack it, at most.
        seed: of which ones.

    Raises:
        UserError: the file cannot be read or holds something else, or all labels are one.
    """
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path), start=1):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not isinstance(label, str) or not text.strip():
            raise UserError(f"{path}, record {number}", "it has no text and label", 'write {"text": "…", "label": "…"}')
        if text not in (own := texts.setdefault(label, [])):
            own.append(text)
    if len(texts) < 2:
        raise UserError(str(path), f"it has {len(texts)} labels", "label texts with two concepts or more")
    rng, found = np.random.default_rng(seed), list[Concept]()
    for label, own in texts.items():
        others = [text for other, some in texts.items() if other != label for text in some]
        has, lacks = ([some[i] for i in rng.permutation(len(some))[:most]] for some in (own, others))
        exemplars = Exemplars(name=label, has=tuple(map(as_passage, has)), lacks=tuple(map(as_passage, lacks)))
        found.append(Concept(exemplars=exemplars))
    return found


def _once(windows: Sequence[Window]) -> list[Window]:
    """Windows without those around a place that an earlier one is around: a strongest one is often drawn again."""
    found: dict[tuple[str, int], Window] = {}
    for window in windows:
        found.setdefault((window.document, window.position), window)
    return list(found.values())


def _passage(window: Window) -> Passage:
    """A window's tokens at which something was read."""
    kept = [i for i, token in enumerate(window.tokens) if token != LEFT_OUT]
    return Passage(tokens=tuple(window.tokens[i] for i in kept), activations=tuple(window.activations[i] for i in kept))
