"""Which features steer: one file per criterion, and the last-token scorer that they share."""

from trimtab.selection.command import RankConfig, RankResult, run_rank
from trimtab.selection.criterion import (
    NEUTRAL_PREFIX,
    Criterion,
    EffectCriterion,
    GradientCriterion,
    ScoringTarget,
    StatisticCriterion,
)
from trimtab.selection.delta_confidence import DeltaConfidence
from trimtab.selection.edited_distributions import BaseDistribution, EditedDistributions
from trimtab.selection.entropy_change import EntropyChange
from trimtab.selection.explanation_score import ExplanationScore
from trimtab.selection.feature_table import FeatureTable, read_feature_tables, side_by_side, write_feature_tables
from trimtab.selection.firing_rate import FiringRate
from trimtab.selection.gradient_attribution import GradientAttribution
from trimtab.selection.input_score import InputScore
from trimtab.selection.kl import KLDivergence
from trimtab.selection.lens_concentration import LensConcentration
from trimtab.selection.logit_lens import logit_lens
from trimtab.selection.max_activation import MaxActivation
from trimtab.selection.output_score import OutputScore
from trimtab.selection.random_scores import Random
from trimtab.selection.ranking import rank, rank_by
from trimtab.selection.registry import CRITERIA, make_criteria
from trimtab.selection.scorer import LastTokenScorer
from trimtab.selection.scoring import score_features

__all__ = [
    "CRITERIA",
    "NEUTRAL_PREFIX",
    "BaseDistribution",
    "Criterion",
    "DeltaConfidence",
    "EditedDistributions",
    "EffectCriterion",
    "EntropyChange",
    "ExplanationScore",
    "FeatureTable",
    "FiringRate",
    "GradientAttribution",
    "GradientCriterion",
    "InputScore",
    "KLDivergence",
    "LastTokenScorer",
    "LensConcentration",
    "MaxActivation",
    "OutputScore",
    "Random",
    "RankConfig",
    "RankResult",
    "ScoringTarget",
    "StatisticCriterion",
    "logit_lens",
    "make_criteria",
    "rank",
    "rank_by",
    "read_feature_tables",
    "run_rank",
    "score_features",
    "side_by_side",
    "write_feature_tables",
]
