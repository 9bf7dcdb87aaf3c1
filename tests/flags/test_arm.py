"""Flags as an arm beside others on a task."""

from __future__ import annotations

import pytest
from letter_judge import LetterJudge
from toy_corpus import PROMPTS

from trimtab.control import Choosing, Setting, TaskPrompts, compare
from trimtab.errors import UserError
from trimtab.flags import TrainedFlags
from trimtab.flags.arm import SwitchedFlags
from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.flags.evaluation.control_task import ConceptTask
from trimtab.lm import LanguageModel
from trimtab.tasks import Task

MORE = ("Ho", "Gm", "Og", "Sm", "Hh", "SS", "GG", "OO")


def sea_task() -> Task:
    reader = TextReader(LetterJudge(), ("sea", "war"))
    splits = {"train": PROMPTS, "validation": MORE[:4], "test": MORE[4:]}
    return ConceptTask(splits, "sea", reader, max_new_tokens=6)


def of(model: LanguageModel, task: Task) -> dict[str, TaskPrompts]:
    return {split: TaskPrompts.of(model, task, task.items(split)) for split in ("train", "validation", "test")}


def test_flags_of_the_settings_model_are_switched(finetuned: dict[str, TrainedFlags]) -> None:
    """Of on and off of each concept, the one that earns the reward on validation."""
    trained = finetuned["forced"]
    setting = Setting(model=trained.model, dictionary=None, site=trained.model.site("resid_post.1"), temperature=0.5)
    arm = SwitchedFlags(flags=trained.flags)
    comparison = compare(setting, of(trained.model, sea_task()), [arm], equal_kl=None)
    found = comparison.result.arm("flags")
    assert found.chosen[0]["switches"] == {"sea": 1.0}
    assert found.chosen[0]["tried"] == 4
    assert found.reward.estimate == 1
    assert found.kl is not None
    assert found.kl > 0
    assert comparison.result.arm("unsteered").reward.estimate < 1


def test_flags_of_another_model_stand_beside(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    trained = finetuned["forced"]
    setting = Setting(model=tiny_llama, dictionary=None, site=None, temperature=0.5)
    arm = SwitchedFlags(model=trained.model, flags=trained.flags, switches={"sea": 0.0})
    comparison = compare(setting, of(tiny_llama, sea_task()), [arm], equal_kl=None)
    assert comparison.result.arm("flags").reward.estimate <= 0.25
    assert comparison.result.arm("flags").chosen[0] == {"switches": {"sea": 0.0}}
    assert arm.effort(Choosing.of(setting, of(tiny_llama, sea_task()))) == {}


def test_a_model_without_flags_lacks_the_arm(tiny_llama: LanguageModel) -> None:
    setting = Setting(model=tiny_llama, dictionary=None, site=None)
    with pytest.raises(UserError, match=r"flags\.json: there is no such file"):
        SwitchedFlags().arms(Choosing.of(setting, of(tiny_llama, sea_task())))
    comparison = compare(setting, of(tiny_llama, sea_task()), [SwitchedFlags()], equal_kl=None)
    assert "there is no such file" in comparison.missing["flags"]
