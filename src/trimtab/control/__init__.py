"""Compare ways of control: arms, their choice on validation, equal dose and equal KL, paired differences.

Names are loaded when they are first asked for: what only reads results needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.control.answers import Answers, ItemSet
    from trimtab.control.arm import Arm, ArmKind, Choosing, register
    from trimtab.control.comparison import Comparison, compare
    from trimtab.control.replicates import EqualKl
    from trimtab.control.setting import Setting
    from trimtab.control.task_prompts import TaskPrompts

__all__ = [
    "Answers", "Arm", "ArmKind", "Choosing", "Comparison", "EqualKl", "ItemSet", "Setting", "TaskPrompts", "compare",
    "register",
]  # fmt: skip

_MODULES = {
    **dict.fromkeys(("Answers", "ItemSet"), "answers"),
    **dict.fromkeys(("Arm", "ArmKind", "Choosing", "register"), "arm"),
    **dict.fromkeys(("Comparison", "compare"), "comparison"),
    "EqualKl": "replicates",
    "Setting": "setting",
    "TaskPrompts": "task_prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
