"""Policies that pick a feature at each token: headroom, training, evaluation beside controls, analyses.

Names are loaded when they are first asked for: what only reads runs needs no torch. What commands run is in the modules
that are called after them.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.policies.config import PolicyConfig
    from trimtab.policies.networks import Policy
    from trimtab.policies.on_prompts import LearnedPolicy, train_policy
    from trimtab.policies.ppo import PPOConfig
    from trimtab.policies.setup import Setup
    from trimtab.policies.source import PolicySource

# torchrl imports Ray where it is installed, which in notebooks asks for widgets that nothing here draws.
logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)

__all__ = ["LearnedPolicy", "PPOConfig", "Policy", "PolicyConfig", "PolicySource", "Setup", "train_policy"]

_MODULES = {
    "LearnedPolicy": "on_prompts",
    "PPOConfig": "ppo",
    "Policy": "networks",
    "PolicyConfig": "config",
    "PolicySource": "source",
    "Setup": "setup",
    "train_policy": "on_prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
