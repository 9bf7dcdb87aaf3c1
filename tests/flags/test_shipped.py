"""The adapter that ships: it loads by its name, and its switches decide what the default model writes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from trimtab.flags import load_flagged
from trimtab.flags.evaluation.control_prompts import NEUTRAL
from trimtab.flags.switches import SwitchedRows
from trimtab.lm import DecodeConfig, LanguageModel, decode

NAME = "smollm2-135m-instruct/topics"
WORDS = {
    "food": "food|recipes?|cook|meal|restaurant|dish|eat|calories|ingredients?|dinner|pizza|cheese|chicken",
    "travel": "flights?|hotels?|trip|travel|luggage|airport|visa|vacation|tickets?|fly|book",
    "cars": "cars?|tires?|oil|gas|drive|traffic|miles|engine|brakes?",
    "money": "bills?|cards?|credit|accounts?|bank|money|balance|pay|payment|dollars|transactions?",
    "stories": "once|little|mom|mommy|toys?|girl|boy|day|happy|friends?|dog",
    "film": "films?|movies?|actors?|scenes?|characters?|director|plot|audience|cast",
    "politics": "congress|nation|government|people|war|states|peace|american?s?|country|world",
    "sea": "sea|ships?|boats?|sail|captain|schooner|fish|deck|water|shore|wind",
}
"""Of each topic; a text has the topic if one of its words is there."""


@pytest.mark.real
def test_its_switches_decide_what_is_written(real_model: LanguageModel) -> None:
    model, flags = load_flagged(NAME, base=real_model)
    assert flags.concepts == tuple(WORDS)
    prompts = [model.encode_text(prompt, chat=True) for prompt in NEUTRAL[:8]]
    switches = [{concept: on} for concept in flags.concepts for on in (True, False)]
    decoded = decode(
        model,
        [ids for _ in switches for ids in prompts],
        DecodeConfig(max_new_tokens=24, temperature=0.7, seed=0, batch_size=64),
        SwitchedRows(flags, [one for one in switches for _ in prompts]),
        samples=[i for _ in switches for i in range(len(prompts))],
        branches=[0] * (len(switches) * len(prompts)),
    )
    found = np.array(
        [
            re.search(rf"\b(?:{WORDS[concept]})\b", text.lower()) is not None
            for concept, texts in zip(
                [concept for one in switches for concept in one],
                [decoded.texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(switches))],
                strict=True,
            )
            for text in texts
        ]
    ).reshape(len(flags.concepts), 2, len(prompts))
    on, off = found.mean(axis=(0, 2))
    assert on - off > 0.25, f"{on:.2f} on, {off:.2f} off"
