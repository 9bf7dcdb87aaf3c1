"""Ways of control summarised: rates, differences to flags and divergences, by concept and as means over concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.control import Answers
from trimtab.flags.evaluation.control_comparison import REFERENCES, ConceptAnswers
from trimtab.flags.evaluation.control_rates import Counts, fluency, mean_difference, mean_rate
from trimtab.flags.evaluation.control_result import ALL, ArmRate, FrontierPoint
from trimtab.flags.evaluation.control_texts import NEUTRAL
from trimtab.stats import Interval, bootstrap_ratio_of_sums


def arm_rates(compared: Mapping[str, ConceptAnswers], seed: int) -> list[ArmRate]:
    """Of several concepts the mean of each way of control that all have, then each concept's ways."""
    every = list(compared.values())
    common = [key for key in every[0].answers if all(key in one.answers for one in every)]
    parts = [(ALL, key, every) for key in common if len(every) > 1]
    parts += [(concept, key, [one]) for concept, one in compared.items() for key in one.answers]
    found: list[ArmRate] = []
    for concept, (prompts, label), members in parts:
        answers = [one.answers[prompts, label] for one in members]
        counts = [_counts(one) for one in answers]
        reference = [_counts(one.answers[prompts, REFERENCES[prompts]]) for one in members]
        doses = [one.doses[label] for one in members if prompts == NEUTRAL and label in one.doses]
        is_reference = label == REFERENCES[prompts]
        found.append(
            ArmRate(
                prompts=prompts,
                concept=concept,
                arm=label,
                rate=mean_rate(counts, seed),
                fluent=_fluent(answers, seed),
                difference=None if is_reference else mean_difference([*zip(reference, counts, strict=True)], seed),
                kl=_kl(answers, seed),
                relative_dose=float(np.mean(doses)) if doses else None,
                chosen={} if concept == ALL else members[0].chosen.get(label, {}),
            )
        )
    return found


def frontier_points(compared: Mapping[str, ConceptAnswers], seed: int) -> list[FrontierPoint]:
    """Means over concepts, by way and strength; of ways that all concepts have."""
    every = list(compared.values())
    found: list[FrontierPoint] = []
    for arm, scale in every[0].frontier:
        answers = [one.frontier[arm, scale] for one in every if (arm, scale) in one.frontier]
        kl = _kl(answers, seed)
        if len(answers) < len(every) or kl is None:
            continue
        counts = [_counts(one) for one in answers]
        rate, fluent = mean_rate(counts, seed), _fluent(answers, seed)
        found.append(FrontierPoint(arm=arm, scale=scale, rate=rate, fluent=fluent, kl=kl))
    return found


def _counts(draws: Sequence[Answers]) -> Counts:
    """Of prompts, over draws."""
    right, malformed = (
        np.array([[bool(getattr(outcome, name)) for outcome in one.outcomes] for one in draws]).T
        for name in ("correct", "malformed")
    )
    return Counts.of(right, ~malformed)


def _fluent(answers: Sequence[Sequence[Answers]], seed: int) -> Interval:
    """Share of fluent texts over concepts, whose prompts are as many."""
    texts = sum(len(draws) for draws in answers)
    return fluency(np.sum([_counts(draws).fluent for draws in answers], axis=0), texts, seed)


def _kl(answers: Sequence[Sequence[Answers]], seed: int) -> Interval | None:
    """Nats per token, prompts resampled with the texts of all concepts and draws; None where it was not measured."""
    nats, tokens = list[Any](), list[Any]()
    for one in (one for draws in answers for one in draws):
        if one.kl is None or one.decoded is None:
            return None
        nats.append(one.kl.double().numpy())
        tokens.append([len(ids) for ids in one.decoded.token_ids])
    return bootstrap_ratio_of_sums(np.sum(nats, axis=0), np.sum(tokens, axis=0).astype(float), seed=seed)
