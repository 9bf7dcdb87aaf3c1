"""Texts of a model with flags under switches: conditions × prompts × samples in one decode stream, read by the judge.

Random draws are keyed by prompt and sample alone, so that the texts of a prompt differ by the switches and not by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switched_rows import SwitchedRows
from trimtab.flags.switches import Switch
from trimtab.lm import DecodeConfig, LanguageModel, decode

NEUTRAL, ASKED, CONFLICT = "neutral", "asked", "conflict"
"""Kinds of prompts: for a text about nothing in particular; about a concept; about a concept while another is on."""
FREE, ON, OFF = "free", "on", "off"


@dataclass(frozen=True)
class Condition:
    """Prompts under switches."""

    kind: str
    concept: str
    """The one that is switched or asked for; empty where all flags are free on neutral prompts."""
    state: str
    """Of its flag."""
    switches: Mapping[str, Switch]
    prompts: Sequence[str]

    @property
    def key(self) -> tuple[str, str, str]:
        """Names it among those of one evaluation."""
        return self.kind, self.concept, self.state


class Written(NamedTuple):
    """What a condition's prompts led to."""

    texts: list[list[str]]
    """By prompt and sample."""
    has: Bool[NDArray[np.bool_], "P S C"]
    """Whether the judge finds each concept."""
    fluent: Bool[NDArray[np.bool_], "P S"]


Texts = dict[tuple[str, str, str], Written]
"""By the keys of conditions."""


def conditions_of(
    concepts: Sequence[str], neutral: Sequence[str], asking: Mapping[str, Sequence[str]]
) -> list[Condition]:
    """Every concept on and off beside all free on neutral prompts; free and off where it is asked for; and there off
    with the next concept on. Concepts that are not named are free.

    Args:
        concepts: of the flags.
        neutral: prompts.
        asking: prompts for each concept.
    """
    found = [Condition(NEUTRAL, "", FREE, {}, neutral)]
    for i, concept in enumerate(concepts):
        found += [Condition(NEUTRAL, concept, state, {concept: state == ON}, neutral) for state in (ON, OFF)]
        asked = asking[concept]
        found += [Condition(ASKED, concept, FREE, {}, asked), Condition(ASKED, concept, OFF, {concept: False}, asked)]
        if len(concepts) > 1:
            other = concepts[(i + 1) % len(concepts)]
            found.append(Condition(CONFLICT, concept, OFF, {concept: False, other: True}, asked))
    return found


def write_texts(
    model: LanguageModel,
    flags: FlagSpec,
    conditions: Sequence[Condition],
    reader: TextReader,
    decoding: DecodeConfig,
    *,
    samples: int = 1,
    chat: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Texts:
    """Write and read the texts of all conditions.

    Args:
        model: with flags.
        flags: its flags.
        conditions: prompts under switches.
        reader: finds concepts.
        decoding: how tokens are chosen.
        samples: texts per prompt.
        chat: whether prompts are turns in the model's chat template.
        progress: told of the texts that have ended.
    """
    ids = {
        prompt: model.encode_text(prompt, chat=chat and bool(model.tokenizer.chat_template))
        for one in conditions
        for prompt in one.prompts
    }
    keys = {prompt: i for i, prompt in enumerate(ids)}
    rows = [(one, prompt, sample) for one in conditions for prompt in one.prompts for sample in range(samples)]
    decoded = decode(
        model,
        [ids[prompt] for _, prompt, _ in rows],
        decoding,
        SwitchedRows(flags, [one.switches for one, _, _ in rows]),
        samples=[keys[prompt] * samples + sample for _, prompt, sample in rows],
        branches=[0] * len(rows),
        progress=progress,
    )
    has, fluent = reader.read(decoded.texts)
    found: Texts = {}
    start = 0
    for one in conditions:
        shape = len(one.prompts), samples
        part = slice(start, start := start + shape[0] * shape[1])
        texts = [decoded.texts[part][i : i + samples] for i in range(0, shape[0] * samples, samples)]
        found[one.key] = Written(texts, has[part].reshape(*shape, -1), fluent[part].reshape(shape))
    return found
