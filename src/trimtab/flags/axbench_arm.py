"""Flags as an arm of `trimtab evaluate axbench`: the model that has them, under the switch of each concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.flags.files import load_flagged
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import SwitchedRows
from trimtab.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class FlagArm:
    """A model with flags, one of them on in each row."""

    model: LanguageModel
    flags: FlagSpec
    name: str = "flags"
    factors: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Strengths: 1 is on."""

    def source(self, rows: Sequence[tuple[str, float]]) -> SwitchedRows:
        """Switches of rows: a concept by its name, and its strength.

        Raises:
            UserError: a concept is none of the flags.
        """
        return SwitchedRows(self.flags, [{concept: strength} for concept, strength in rows])


def load_flag_arm(path: Path, model: LanguageModel) -> FlagArm:
    """The arm of a saved model with flags, or of an adapter that was trained on the given model.

    Raises:
        UserError: as `load_flagged` says.
    """
    flagged, flags = load_flagged(path, device=model.device, dtype=model.dtype)
    return FlagArm(model=flagged, flags=flags)
