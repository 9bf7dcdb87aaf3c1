"""Texts under switches: conditions × prompts × samples in one decode stream, read by the judge.

Random draws are keyed by prompt and sample alone, so that the texts of a prompt differ by the switches and not by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from trimtab.control import Answers
from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import Switch, SwitchedRows
from trimtab.lm import DecodeConfig, Decoded, LanguageModel, PromptCache, decode
from trimtab.steering import DivergenceRecorder, dose_summary

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
    """What P prompts led to, S texts each."""

    texts: list[list[str]]
    """By prompt and sample."""
    has: Bool[np.ndarray, "P S C"]
    """Whether the judge finds each concept."""
    fluent: Bool[np.ndarray, "P S"]
    nats: Float[np.ndarray, "P S"] | None
    """KL to the original model, summed over a text's tokens; None where it was not measured."""
    tokens: Int[np.ndarray, "P S"]
    dose: float = math.nan
    """Mean ‖Δ‖/‖x‖ over edited places and sites; NaN where nothing is edited."""

    @classmethod
    def of(cls, reader: TextReader, draws: Sequence[Answers], dose: float | None = None) -> Written:
        """Answers to the same prompts, each draw a sample; by default the dose is what the first one's log says."""
        decoded = [one.decoded for one in draws if one.decoded is not None]
        texts = [list(row) for row in zip(*(one.texts for one in decoded), strict=True)]
        nats = [one.kl.double().numpy() for one in draws if one.kl is not None]
        edits = draws[0].edits
        dose = dose if dose is not None else dose_summary(edits).relative if len(edits) else math.nan
        tokens = np.stack([_lengths(one) for one in decoded], axis=1)
        return cls.read(reader, texts, np.stack(nats, axis=1) if nats else None, tokens, dose)

    @classmethod
    def read(cls, reader: TextReader, texts: list[list[str]], nats: Any, tokens: Any, dose: float) -> Written:
        """Texts by prompt and sample, read by the judge."""
        shape = len(texts), len(texts[0])
        flat = [text for row in texts for text in row]
        has, fluent = reader.has(flat).reshape(*shape, -1), reader.fluent(flat).reshape(shape)
        return cls(texts, has, fluent, nats, tokens, dose)


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


class Writer(NamedTuple):
    """Writes and reads the texts of an evaluation."""

    reader: TextReader
    decoding: DecodeConfig
    samples: int
    """Texts per prompt."""
    chat: bool
    """Whether prompts are turns in the model's chat template."""
    keys: Mapping[str, int]
    """Number of each prompt, for random draws."""
    cache: PromptCache | None = None
    """Of the original model."""
    progress: Callable[[int], None] | None = None
    """Told of the texts that have ended."""

    def write(
        self, model: LanguageModel, flags: FlagSpec, conditions: Sequence[Condition], kl_to: LanguageModel | None = None
    ) -> Texts:
        """The texts of some conditions.

        Args:
            model: with flags, or any other one where nothing is switched.
            flags: its flags.
            conditions: prompts under switches.
            kl_to: the original model, if the divergence from it is to be measured.
        """
        if not conditions:
            return {}
        rows = [(one, prompt, i) for one in conditions for prompt in one.prompts for i in range(self.samples)]
        chat = self.chat and bool(model.tokenizer.chat_template)
        ids = {prompt: model.encode_text(prompt, chat=chat) for _, prompt, _ in rows}
        switched = any(one.switches for one in conditions)
        source = SwitchedRows(flags, [one.switches for one, _, _ in rows]) if switched else None
        recorder = None
        if kl_to is not None and (source is not None or kl_to is not model):
            recorder = DivergenceRecorder(model, source, to=None if kl_to is model else kl_to)
        decoded = decode(
            model, [ids[prompt] for _, prompt, _ in rows], self.decoding, source,
            samples=[self.keys[prompt] + i * len(self.keys) for _, prompt, i in rows],
            branches=[0] * len(rows), progress=self.progress, observe=recorder,
        )  # fmt: skip
        tokens = _lengths(decoded)
        nats = None if kl_to is None else np.zeros(len(rows))
        if recorder is not None:
            nats = recorder.measure(decoded, self.cache).double().sum(1).numpy()
        found: Texts = {}
        start = 0
        for one in conditions:
            shape = len(one.prompts), self.samples
            part = slice(start, start := start + shape[0] * shape[1])
            texts = decoded.texts[part]
            found[one.key] = Written.read(
                self.reader, [texts[i : i + self.samples] for i in range(0, len(texts), self.samples)],
                None if nats is None else nats[part].reshape(shape), tokens[part].reshape(shape),
                math.nan if source is None else source.relative_dose(part),
            )  # fmt: skip
        return found


def _lengths(decoded: Decoded) -> NDArray[np.int64]:
    return np.array([len(ids) for ids in decoded.token_ids])
