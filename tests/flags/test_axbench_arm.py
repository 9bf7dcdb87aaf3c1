"""Flags beside other arms of AxBench: the row of each concept under its own switch, at its strength."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.flags import TrainedFlags, switched
from trimtab.flags.axbench_arm import FlagArm, load_flag_arm
from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.axbench import AxBenchOptions, Concept, axbench
from trimtab.interpreting.instructions import Instructions
from trimtab.lm import DecodeConfig, LanguageModel, decode

INSTRUCTIONS = Instructions(choosing=("the end", "a sea"), reporting=("her hat", "an inn"))


class Alike:
    """Rates all texts alike."""

    name, version = "alike", "1"

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning]:
        return [Meaning(name=one.name, text=one.name) for one in exemplars]

    def fires(self, meanings: Any, passages: Any) -> list[Any]:
        return []

    def rate(self, texts: Sequence[ToRate]) -> list[Rating]:
        return [Rating(1.0, 1.0, 1.0) for _ in texts]


def test_each_concept_is_written_under_its_own_switch(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    """Mutation: give rows of a concept the switch of the next one, or all the first strength."""
    trained = finetuned["forced"]
    passages = tuple(Passage(tokens=(f"{a} ", f"{a} ")) for a in "abcd")
    concepts = [Concept(exemplars=Exemplars(name=name, has=passages, lacks=passages[::-1])) for name in ("war", "sea")]
    arm = FlagArm(model=trained.model, flags=trained.flags, factors=(0.5, 1.0))
    options = AxBenchOptions(arm=("prompt",), temperature=0, max_new_tokens=5, batch_size=3)
    found = axbench(
        tiny_llama, concepts, Alike(), INSTRUCTIONS, site="resid_post.1", own_arms=[arm], options=options,
        say=lambda line: None,
    )  # fmt: skip
    texts = found.by_arm["flags"].texts
    prompts = [tiny_llama.encode_text(text, chat=True) for text in INSTRUCTIONS.all]
    for c, concept in enumerate(("war", "sea")):
        for d, strength in enumerate(arm.factors):
            with switched(trained.model, trained.flags, **{concept: strength}):
                expected = decode(trained.model, prompts, DecodeConfig(temperature=0, max_new_tokens=5))
            written = texts[c][d]
            assert any(written)  # to choose by; what is reported is written at the chosen strength alone
            assert list(written) == [own and text for own, text in zip(written, expected.texts, strict=True)]
        assert any(all(of_factor) for of_factor in texts[c])
    assert texts[0] != texts[1]
    assert [one.arm for one in found.arms] == ["prompt", "flags"]


def test_a_concept_without_a_flag_is_refused(finetuned: dict[str, TrainedFlags], tmp_path: Path) -> None:
    trained = finetuned["forced"]
    with pytest.raises(UserError, match="hill"):
        FlagArm(model=trained.model, flags=trained.flags).source([("hill", 1.0)])
    with pytest.raises(UserError, match=r"flags\.json"):
        load_flag_arm(tmp_path, trained.model)
