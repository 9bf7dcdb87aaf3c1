"""Intervals, bootstrap, rank agreement, comparisons corrected for their number. No torch.

Prompts (or documents, or items) are what is resampled; seeds stay inside their prompt, and tokens are
never units. Every random draw follows from the `seed` given.
"""

from trimtab.stats.best_of import best_of_some
from trimtab.stats.bootstrap import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio_of_sums,
    bootstrap_statistic,
)
from trimtab.stats.interval import Interval, interval_of, number_text
from trimtab.stats.kendall import PermutationTest, RankScores, highest_tau
from trimtab.stats.multiple import benjamini_hochberg
from trimtab.stats.proportion import wilson_interval
from trimtab.stats.resamples import Resampled, Resamples
from trimtab.stats.student import crossed_mean, student_mean

__all__ = [
    "Interval",
    "PermutationTest",
    "RankScores",
    "Resampled",
    "Resamples",
    "benjamini_hochberg",
    "best_of_some",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio_of_sums",
    "bootstrap_statistic",
    "crossed_mean",
    "highest_tau",
    "interval_of",
    "number_text",
    "student_mean",
    "wilson_interval",
]
