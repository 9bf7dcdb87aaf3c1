"""Trainings on the one-letter task."""

from __future__ import annotations

from pathlib import Path

from first_letter import FirstLetter

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.config import PolicyConfig
from trimtab.policies.setup import Setup
from trimtab.policies.train import TrainedPolicy, fit
from trimtab.runs import Run


def letter_config(run: Path, **settings: object) -> PolicyConfig:
    """A small training; settings are of `PolicyConfig`."""
    values: dict[str, object] = {
        "task": "first-letter", "run": run, "dose": 2.0, "options_only": True, "hidden": (16,), "validate_every": 1,
    }  # fmt: skip
    return PolicyConfig(**(values | settings))  # pyright: ignore[reportArgumentType]


def train(model: LanguageModel, sae: Standard, config: PolicyConfig) -> TrainedPolicy:
    assert config.run is not None
    with Run.open(config.run, "policy train", config) as run:
        return fit(Setup.with_parts(config, model, sae, FirstLetter.load()), run)
