"""What finetunings with flags do: what flags say, what else says it, what is lost without them, what they cost."""

from trimtab.flags.evaluation.evaluating import evaluate_flags
from trimtab.flags.evaluation.options import FlagEvaluationOptions
from trimtab.flags.evaluation.result import FlagEvaluation

__all__ = ["FlagEvaluation", "FlagEvaluationOptions", "evaluate_flags"]
