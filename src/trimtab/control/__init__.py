"""Compare ways of control: arms, their choice on validation, equal dose and equal KL, paired differences.

Names are loaded when they are first asked for: what only reads results needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.control.answers import Answers, EditSchedule, ItemSet, MatchedSource
    from trimtab.control.arm import ARM_KINDS, Arm, ArmKind, Choosing, register
    from trimtab.control.comparison import Comparison, compare
    from trimtab.control.masks import MASKS, MaskKind, PromptFirings, build_mask
    from trimtab.control.replicates import EqualKl
    from trimtab.control.setting import Setting
    from trimtab.control.task_prompts import TaskPrompts

_PLACES = {
    "answers": ("Answers", "EditSchedule", "ItemSet", "MatchedSource"),
    "arm": ("ARM_KINDS", "Arm", "ArmKind", "Choosing", "register"),
    "comparison": ("Comparison", "compare"),
    "masks": ("MASKS", "MaskKind", "PromptFirings", "build_mask"),
    "replicates": ("EqualKl",),
    "setting": ("Setting",),
    "task_prompts": ("TaskPrompts",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "ARM_KINDS",
    "MASKS",
    "Answers",
    "Arm",
    "ArmKind",
    "Choosing",
    "Comparison",
    "EditSchedule",
    "EqualKl",
    "ItemSet",
    "MaskKind",
    "MatchedSource",
    "PromptFirings",
    "Setting",
    "TaskPrompts",
    "build_mask",
    "compare",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
