"""Which features bring a wish about: wishes as scored examples, first-order effects of all features, exact ones of a
few."""

from trimtab.finding.command import FindConfig, run_find
from trimtab.finding.finding import find
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.options import FindOptions
from trimtab.finding.result import Found
from trimtab.finding.wishes import Contrast, TaskReward, Texts, Want, Wish, Words

__all__ = [
    "Contrast",
    "FindConfig",
    "FindOptions",
    "FirstOrder",
    "Found",
    "TaskReward",
    "Texts",
    "Want",
    "Wish",
    "Words",
    "find",
    "first_order",
    "run_find",
]
