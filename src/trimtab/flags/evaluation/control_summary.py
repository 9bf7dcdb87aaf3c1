"""What was written, summarised: rates, differences and divergences, by concept and as means over concepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.flags.evaluation.control_comparison import REFERENCES, ComparedConcept, Key
from trimtab.flags.evaluation.control_rates import Counts, difference, fluency, mean_difference, mean_rate, rate
from trimtab.flags.evaluation.control_result import ALL, ArmRate, BoardRow, ConceptControl, SampleText
from trimtab.flags.evaluation.control_texts import ASKED, CONFLICT, FREE, NEUTRAL, OFF, ON, Texts, Written
from trimtab.stats import Interval, bootstrap_ratio_of_sums

SHOWN_PROMPTS = 2
"""Prompts of each concept whose texts are shown."""


class Board:
    """Rates of texts under switches.

    Args:
        concepts: of the flags.
        texts: of all `conditions_of` them.
        seed: of the bootstrap.
    """

    def __init__(self, concepts: Sequence[str], texts: Texts, seed: int) -> None:
        self.names, self.texts, self.seed = concepts, texts, seed

    def counts(self, kind: str, switched: str, state: str, concept: int) -> Counts:
        """Of a concept under a condition."""
        return counts_of(self.texts[kind, switched, state], concept)

    def pair(self, i: int) -> tuple[Counts, Counts]:
        """Of a concept on neutral prompts, its flag on and off."""
        on, off = (self.counts(NEUTRAL, self.names[i], state, i) for state in (ON, OFF))
        return on, off

    def difference(self) -> Interval | None:
        """On minus off, mean over concepts."""
        return mean_difference([self.pair(i) for i in range(len(self.names))], self.seed)

    def concept(self, i: int) -> ConceptControl:
        """What one flag does."""
        name, seed = self.names[i], self.seed
        (on, off), free = self.pair(i), self.counts(NEUTRAL, "", FREE, i)
        asked_free, asked_off = (self.counts(ASKED, name, state, i) for state in (FREE, OFF))
        other = (i + 1) % len(self.names)
        conflict = (CONFLICT, name, OFF) if other != i else None
        return ConceptControl(
            concept=name,
            on=rate(on, seed),
            off=rate(off, seed),
            free=rate(free, seed),
            difference=difference(on, off, seed),
            asked_free=rate(asked_free, seed),
            asked_off=rate(asked_off, seed),
            suppressed=difference(asked_free, asked_off, seed),
            other=self.names[other] if conflict else "",
            conflict_asked=rate(self.counts(*conflict, i), seed) if conflict else None,
            conflict_other=rate(self.counts(*conflict, other), seed) if conflict else None,
        )

    def rows(self) -> list[BoardRow]:
        """Every concept's rate under every switch."""
        keys = [("", FREE), *((name, state) for name in self.names for state in (ON, OFF))]
        return [
            BoardRow(
                switch=f"{name} {state}" if name else "all free",
                rates=tuple(rate(self.counts(NEUTRAL, name, state, i), self.seed) for i in range(len(self.names))),
                fluent=fluency([self.texts[NEUTRAL, name, state].fluent], self.seed),
            )
            for name, state in keys
        ]

    def samples(self, prompts: Sequence[str]) -> list[SampleText]:
        """First texts of the first prompts, by concept."""
        free = self.texts[NEUTRAL, "", FREE].texts
        found: list[SampleText] = []
        for name in self.names:
            on, off = (self.texts[NEUTRAL, name, state].texts for state in (ON, OFF))
            for p, prompt in enumerate(prompts[:SHOWN_PROMPTS]):
                found.append(SampleText(concept=name, prompt=prompt, free=free[p][0], on=on[p][0], off=off[p][0]))
        return found


def arm_rates(compared: Mapping[str, ComparedConcept], seed: int) -> list[ArmRate]:
    """Of several concepts the mean of each way that all have, on as many prompts, then each concept's ways."""
    every = list(compared.values())
    common = [
        key for key, first in every[0].written.items()
        if all(key in one.written and len(one.written[key].texts) == len(first.texts) for one in every)
    ]  # fmt: skip
    parts = [(ALL, key, every) for key in common if len(every) > 1]
    parts += [(concept, key, [one]) for concept, one in compared.items() for key in one.written]
    found: list[ArmRate] = []
    for concept, key, members in parts:
        written, against = [one.written[key] for one in members], Key(key.prompts, REFERENCES[key.prompts])
        counts, reference = ([counts_of(one.written[at], one.column) for one in members] for at in (key, against))
        doses = [one.dose for one in written if not math.isnan(one.dose)]
        chosen = [one.chosen.get(key.way, {}) for one in members]
        matched = [about["within"] for about in chosen if key.prompts == NEUTRAL and "within" in about]
        found.append(
            ArmRate(
                prompts=key.prompts,
                concept=concept,
                arm=key.way,
                scale=key.scale,
                rate=mean_rate(counts, seed),
                fluent=fluency([one.fluent for one in written], seed),
                difference=None if key == against else mean_difference([*zip(reference, counts, strict=True)], seed),
                kl=_kl(written, seed) if key.prompts == NEUTRAL else None,
                equal_kl=f"{sum(matched)} of {len(matched)}" if matched else "",
                relative_dose=float(np.mean(doses)) if doses else None,
                chosen={} if concept == ALL else chosen[0],
            )
        )
    return found


def counts_of(written: Written, concept: int) -> Counts:
    """Of the texts that have one of the judge's concepts."""
    return Counts.of(written.has[:, :, concept], written.fluent)


def _kl(written: Sequence[Written], seed: int) -> Interval | None:
    """Nats per token, prompts resampled with the texts of all concepts; None where it was not measured."""
    nats = [one.nats.sum(axis=1) for one in written if one.nats is not None]
    if len(nats) < len(written):
        return None
    tokens = np.sum([one.tokens.sum(axis=1) for one in written], axis=0).astype(float)
    return bootstrap_ratio_of_sums(np.sum(nats, axis=0), tokens, seed=seed)
