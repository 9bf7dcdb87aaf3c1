"""What finetunings with flags do: what flags say and decide, what else says it, what is lost without them, what they
cost."""

from trimtab.flags.evaluation.control import measure_control
from trimtab.flags.evaluation.control_result import FlagControl
from trimtab.flags.evaluation.evaluating import evaluate_flags
from trimtab.flags.evaluation.options import ControlOptions, FlagEvaluationOptions
from trimtab.flags.evaluation.result import FlagEvaluation

__all__ = [
    "ControlOptions",
    "FlagControl",
    "FlagEvaluation",
    "FlagEvaluationOptions",
    "evaluate_flags",
    "measure_control",
]
