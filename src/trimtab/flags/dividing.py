"""Which examples are trained on and which are held out; the same text is never in both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.errors import UserError
from trimtab.flags.examples import Example, check_learnable, check_names
from trimtab.runs import split_ids, text_id


class Divided(NamedTuple):
    """Examples in two parts."""

    train: list[Example]
    heldout: list[Example]

    @property
    def hash(self) -> str:
        """Of texts and labels, in order."""
        return text_id(json.dumps([[[example_id(one), *one.concepts] for one in part] for part in self]))


def divide(
    examples: Sequence[Example], heldout: Sequence[Example] | None, share: float, concepts: Sequence[str]
) -> Divided:
    """Divide examples, and check that every concept can be learned from those that are trained on.

    Args:
        examples: to train on, and to hold out some of.
        heldout: those held out, if they are given; all of `examples` are trained on then.
        share: of `examples` to hold out otherwise; which depends on their text alone.
        concepts: names of the flags.

    Raises:
        UserError: one is no example, names an unknown concept or is in both, or a concept that too few have or lack.
    """
    for given in (examples, heldout or ()):
        for i, example in enumerate(given):
            if not isinstance(example, Example):
                hint = "give trimtab.flags.Example(prompt=…, response=…, concepts=[…])"
                raise UserError(f"example {i}", f"it is a {type(example).__name__}, not an Example", hint)
    ids = [example_id(example) for example in examples]
    if heldout is not None:
        known = set(ids)
        for example in heldout:
            if example_id(example) in known:
                why = "it is among those trained on, too"
                raise UserError(f"held-out example {example.prompt[:40]!r}", why, "leave it out of one of the two")
        found = Divided(list(examples), list(heldout))
    else:
        kept = set(split_ids(dict.fromkeys(ids), {"train": 1 - share, "heldout": share}, "flags")["train"])
        pairs = list(zip(examples, ids, strict=True))
        found = Divided([one for one, id_ in pairs if id_ in kept], [one for one, id_ in pairs if id_ not in kept])
    check_learnable(found.train, concepts)
    for example in found.heldout:
        check_names(example, concepts)
    return found


def example_id(example: Example) -> str:
    """What stands for an example's text."""
    return text_id(f"{example.prompt}\0{example.response}")
