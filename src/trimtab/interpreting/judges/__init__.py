"""Judges of features, one file each, and what they are made of."""

from trimtab.interpreting.judges.endpoint import EndpointFeatureJudge
from trimtab.interpreting.judges.exemplar import ExemplarJudge
from trimtab.interpreting.judges.local_model import LocalModelJudge
from trimtab.interpreting.judges.registry import feature_judge_options, make_feature_judge
from trimtab.interpreting.judges.rules import RuleFeatureJudge

__all__ = [
    "EndpointFeatureJudge",
    "ExemplarJudge",
    "LocalModelJudge",
    "RuleFeatureJudge",
    "feature_judge_options",
    "make_feature_judge",
]
