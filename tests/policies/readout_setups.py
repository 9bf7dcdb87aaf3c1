"""A policy's setup on the planted readout."""

from __future__ import annotations

from planted_readout import Planted

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.config import PolicyConfig
from trimtab.policies.setup import Setup


def readout_setup(model: LanguageModel, sae: Standard, task: type[Planted], **settings: object) -> Setup:
    """A task under any policy; settings are of `PolicyConfig`."""
    values: dict[str, object] = {"task": task.name, "mask": "none", "dose": 2.0, "options_only": True, "hidden": (8,)}
    config = PolicyConfig(**(values | settings))  # pyright: ignore[reportArgumentType]
    return Setup.with_parts(config, model, sae, task.load())
