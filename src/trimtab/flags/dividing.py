"""Which examples are trained on and which are held out: whole prompts and whole documents are, by a fixed rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from trimtab.errors import UserError
from trimtab.flags.examples import Example, check_learnable, check_names
from trimtab.runs import split_ids, text_id

HOLDOUT = 0.1
"""Share of prompts and documents that is held out unless told otherwise."""
HoldoutKind = Literal["held-out prompts", "held-out responses", "training examples"]
"""Prompts and documents that were not trained on; responses to prompts, or of documents, that were; or neither."""


def is_held_out(text: str, share: float = HOLDOUT) -> bool:
    """Whether a prompt or a document is held out. The name alone decides; a larger share holds out more besides."""
    return bool(split_ids([text], {"train": 1 - share, "heldout": share}, "flags")["heldout"])


class Divided(NamedTuple):
    """Examples in two parts."""

    train: list[Example]
    heldout: list[Example]
    left_out: int = 0
    """Examples of neither part: their prompt is held out and their document is not, or the other way round."""

    @property
    def hash(self) -> str:
        """Of texts and labels, in order."""
        parts = [[[example_id(one), *one.concepts] for one in part] for part in (self.train, self.heldout)]
        return text_id(json.dumps(parts))

    @property
    def measured_on(self) -> HoldoutKind:
        """What the result of a finetuning is measured on."""
        if not self.heldout:
            return "training examples"
        prompts, units = ({getattr(one, name) for one in self.train} - {None} for name in ("prompt", "unit"))
        met = any(one.prompt in prompts or one.unit in units for one in self.heldout)
        return "held-out responses" if met else "held-out prompts"


def divide(
    examples: Sequence[Example], heldout: Sequence[Example] | None, share: float, concepts: Sequence[str]
) -> Divided:
    """Divide examples, and check that every concept can be learned from those that are trained on.

    Prompts and documents are held out. Where they are so few that one part would have none, documents alone are, or
    examples where no document is known, as `Divided.measured_on` says.

    Args:
        examples: to train on, and to hold out some of.
        heldout: those held out, if they are given; all of `examples` are trained on then.
        share: of prompts and of documents to hold out otherwise; see `is_held_out`.
        concepts: names of the flags.

    Raises:
        UserError: one is no example, names an unknown concept or is in both, or a concept that too few have or lack.
    """
    for given in (examples, heldout or ()):
        for i, example in enumerate(given):
            if not isinstance(example, Example):
                hint = "give trimtab.flags.Example(prompt=…, response=…, concepts=[…])"
                raise UserError(f"example {i}", f"it is a {type(example).__name__}, not an Example", hint)
    if heldout is not None:
        known = {example_id(example) for example in examples}
        for example in heldout:
            if example_id(example) in known:
                why = "it is among those trained on, too"
                raise UserError(f"held-out example {example.prompt[:40]!r}", why, "leave it out of one of the two")
        found = Divided(list(examples), list(heldout))
    else:
        sides = [side_of(one, share) for one in examples]
        if not {True, False} <= {*sides}:
            sides = [is_held_out(one.unit or example_id(one), share) for one in examples]
        train, held = ([one for one, out in zip(examples, sides, strict=True) if out is side] for side in (False, True))
        found = Divided(train, held, len(examples) - len(train) - len(held))
    check_learnable(found.train, concepts)
    for example in found.heldout:
        check_names(example, concepts)
    return found


def side_of(example: Example, share: float = HOLDOUT) -> bool | None:
    """Whether an example is held out; None if its prompt is and its document is not, or the other way round."""
    sides = {is_held_out(name, share) for name in (example.prompt, example.unit or example.prompt)}
    return sides.pop() if len(sides) == 1 else None


def group_id(example: Example) -> str:
    """What an example is divided and resampled by: its document, where it is a passage of one, or else its prompt."""
    return text_id(f"prompt\0{example.prompt}" if example.unit is None else f"unit\0{example.unit}")


def example_id(example: Example) -> str:
    """What stands for an example's text."""
    return text_id(f"{example.prompt}\0{example.response}")
