"""Which features bring a wish about: wishes as scored examples, first-order effects of all features, exact ones of a
few."""

from trimtab.finding.exact import Candidate, agreement, exact_scores, shortlist
from trimtab.finding.examples import Example, Examples, divide
from trimtab.finding.first_order import FirstOrder, first_order
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.finding.wishes import Contrast, TaskReward, Texts, Want, Wish, Words

__all__ = [
    "Candidate",
    "Contrast",
    "Example",
    "Examples",
    "FirstOrder",
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
    "first_order",
    "scorer",
    "shortlist",
]
