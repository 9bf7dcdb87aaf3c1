"""What a dictionary is worth: core metrics on a model, scores where its features are known."""

from trimtab.evaluation.core import CoreConfig, CoreOptions, CoreResult, Metric, evaluate, evaluate_core, run_core
from trimtab.evaluation.documents import pack
from trimtab.evaluation.ground_truth import GroundTruthConfig, run_ground_truth
from trimtab.evaluation.ground_truth_result import GroundTruthResult, Scored
from trimtab.evaluation.ground_truth_scores import GroundTruthScores, score
from trimtab.evaluation.sae_stats import SAEStats, SAEStatsConfig, measure_stats

__all__ = [
    "CoreConfig",
    "CoreOptions",
    "CoreResult",
    "GroundTruthConfig",
    "GroundTruthResult",
    "GroundTruthScores",
    "Metric",
    "SAEStats",
    "SAEStatsConfig",
    "Scored",
    "evaluate",
    "evaluate_core",
    "measure_stats",
    "pack",
    "run_core",
    "run_ground_truth",
    "score",
]
