"""What a dictionary is worth: core metrics on a model, statistics of its features."""

from trimtab.evaluation.core import CoreConfig, CoreOptions, CoreResult, Metric, evaluate_core, run_core, sample_text
from trimtab.evaluation.documents import pack
from trimtab.evaluation.feature_statistics import compute_feature_stats

__all__ = [
    "CoreConfig",
    "CoreOptions",
    "CoreResult",
    "Metric",
    "compute_feature_stats",
    "evaluate_core",
    "pack",
    "run_core",
    "sample_text",
]
