"""A study file: TOML that says which SAEs are trained, and how they are interpreted, ranked, steered and judged.

[study]                        # any field of `UtilityPlan`
features = 20
judge = "exemplar"

[[bank]]                       # any option of `trimtab train`; lists multiply
model = "smollm2-135m-instruct"
text = ["my_texts"]
arch = ["topk", "jumprelu"]
l0 = [20, 40, 80]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import UserError, check_one_of, did_you_mean
from trimtab.interpreting.calibration_command import CalibratedJudgeConfig
from trimtab.interpreting.instructions import read_instructions
from trimtab.interpreting.nested_selection import FEWEST
from trimtab.lm.loading import DTYPES
from trimtab.runs import check_least, check_values, field_types
from trimtab.selection.explanation_score import ExplanationScore
from trimtab.selection.input_score import InputScore
from trimtab.selection.registry import make_criteria
from trimtab.training.bank_file import read_options
from trimtab.training.command import BankConfig, TrainCommand, TrainTextConfig

TABLES = ("study", "bank")


@dataclass(frozen=True, kw_only=True)
class UtilityPlan(CalibratedJudgeConfig):
    """What is done with each SAE."""

    features: int = 20
    """Live features of each SAE, drawn at random: they are interpreted, ranked and steered with."""
    criterion: tuple[str, ...] = ("delta-confidence", "output-score")
    """By which features are selected; random ones stand beside each."""
    factor: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6, 2.0)
    """Doses, times the largest activation of a feature."""
    instructions: Path | None = None
    """JSON or text file of instructions; by default those shipped."""
    n_instructions: int = 10
    """Instructions that are answered: one half chooses, the other is reported."""
    max_new_tokens: int = 48
    """Of each answer."""
    batch_size: int = 96
    """Answers that are written side by side."""
    dtype: str = "float32"
    """What the model writes answers in; bfloat16 is nearly twice as fast on processors with products of it."""
    windows: tuple[int, int] = (12, 20)
    """Windows of each feature with its largest activations, and drawn by activation, some of which are the same; the
    judge reads at most 15, and is tested on 4 others. A feature with too few is not drawn."""
    limit_examples: int | None = 200_000
    """Tokens of each half of the training text that windows are taken from."""
    resamples: int = 10_000
    """Of bootstrap and permutation."""
    seed: int = 0
    """Of features, text and resampling."""

    def __post_init__(self) -> None:
        check_least(self, FEWEST, "features")
        check_least(self, 2, "n_instructions")
        check_least(self, 1, "max_new_tokens", "batch_size", "resamples")
        check_one_of("dtype", self.dtype, DTYPES)
        check_values(self, "above 0", lambda dose: dose > 0, "factor")
        for name in ("criterion", "factor"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                why = "one occurs twice" if values else "there is none"
                raise UserError(f"{name} {list(values)}", why, "give at least one, each once")


@dataclass(frozen=True)
class StudyFile:
    """What a study file says."""

    path: Path
    plan: UtilityPlan
    banks: tuple[BankConfig, ...]
    """Each with a run of its own under that of the study."""


def read_study(path: Path, run: Path, models: Mapping[str, Any] | None = None) -> StudyFile:
    """Read a study file.

    Args:
        path: of the file.
        run: directory of the study, under which banks are trained.
        models: fields of `ModelConfig` for every bank, such as the device.

    Raises:
        UserError: it cannot be read, is no TOML, or holds a wrong table, key, type or name.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {path}", f"it cannot be read ({error})", "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"study file {path}", f"it is not TOML ({error})", "correct it") from error
    for table in content:
        if table not in TABLES:
            raise UserError(
                f"{path}: {table}", "a study file holds [study] and [[bank]]", did_you_mean(table, TABLES, "remove it")
            )
    stated, banks = content.get("study", {}), content.get("bank", [])
    if not isinstance(stated, dict):
        raise UserError(f"{path}: study", "it is no table", "write [study]")
    if not isinstance(banks, list) or not banks or not all(isinstance(one, dict) for one in banks):
        raise UserError(f"{path}: bank", "it is no list of tables", "write [[bank]] for each model")
    kinds = field_types(UtilityPlan)
    plan = UtilityPlan(**read_options(f"{path}: [study]", stated, kinds, f"there are {', '.join(kinds)}"))
    if plan.instructions is not None:
        plan = replace(plan, instructions=plan.instructions.absolute())
    if plan.calibration is not None:
        plan = replace(plan, calibration=plan.calibration.absolute())
    _check_names(plan)
    return StudyFile(
        path,
        plan,
        tuple(
            _bank(f"{path}: [[bank]] {n}", one, run / "banks" / str(n), models or {}) for n, one in enumerate(banks, 1)
        ),
    )


def _bank(place: str, table: Mapping[str, Any], run: Path, models: Mapping[str, Any]) -> BankConfig:
    left_out = ("bank", "run", "device", "activations")
    kinds = {name: kind for name, kind in field_types(TrainCommand).items() if name not in left_out}
    given = read_options(place, table, kinds)
    given["text"] = tuple(_absolute(text) for text in given.get("text", ()))
    found = TrainCommand(**{**given, **models}, run=run).expanded()
    if isinstance(found, TrainTextConfig):
        raise UserError(
            place, "it is one SAE", "give several values of arch, l0, site or seed: a rank needs several SAEs"
        )
    for member in found.members:
        if member.error is not None:
            raise UserError(f"{place}, {member.name}: {member.error.what}", member.error.why, member.error.hint)
    return found


def _absolute(text: str) -> str:
    """A path that workers elsewhere find, too."""
    return str(Path(text).expanduser().absolute()) if Path(text).expanduser().exists() else text


def _check_names(plan: UtilityPlan) -> None:
    """Raise a `UserError` if something is named that does not exist, before hours of training."""
    make_criteria(plan.criterion)
    for name in plan.criterion:
        if name in (InputScore.name, ExplanationScore.name):
            why = "it reads windows or explanations, which are made after training and are not its own"
            raise UserError(f"criterion {name}", why, "rank by it afterwards, with trimtab rank on an SAE of the run")
    plan.check()
    plan.load_calibration()
    read_instructions(plan.instructions, plan.n_instructions)
