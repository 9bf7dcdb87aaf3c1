"""Which features bring a wish about: wishes as scored examples, first-order effects of all features, exact ones of a
few."""

from trimtab.finding.command import FindConfig, run_find
from trimtab.finding.exact import Candidate, agreement, exact_scores, shortlist
from trimtab.finding.examples import Example, Examples, divide
from trimtab.finding.finding import find
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.options import FindOptions
from trimtab.finding.result import Found
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.finding.wishes import Contrast, TaskReward, Texts, Want, Wish, Words

__all__ = [
    "Candidate",
    "Contrast",
    "Example",
    "Examples",
    "FindConfig",
    "FindOptions",
    "FirstOrder",
    "Found",
    "Part",
    "SteeringEdit",
    "TaskReward",
    "Texts",
    "Want",
    "Wish",
    "Words",
    "agreement",
    "divide",
    "exact_scores",
    "find",
    "first_order",
    "run_find",
    "scorer",
    "shortlist",
]
