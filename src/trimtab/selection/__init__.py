"""Which features steer: one file per criterion, and the last-token scorer that they share."""

from trimtab.lm.logit_lens import LensTokens, logit_lens, token_texts
from trimtab.selection.command import RankConfig, RankResult, run_rank
from trimtab.selection.criterion import (
    NEUTRAL_PREFIX,
    Criterion,
    EffectCriterion,
    ScoringTarget,
    StatisticCriterion,
)
from trimtab.selection.delta_confidence import DeltaConfidence
from trimtab.selection.distribution import BaseDistribution, EditedDistributions, Reducer
from trimtab.selection.firing_rate import FiringRate
from trimtab.selection.kl import KLDivergence
from trimtab.selection.max_activation import MaxActivation
from trimtab.selection.output_score import OutputScore
from trimtab.selection.random import Random
from trimtab.selection.ranking import rank, rank_by
from trimtab.selection.registry import CRITERIA, make_criteria
from trimtab.selection.scorer import LastTokenScorer
from trimtab.selection.scoring import Scores, score_features
from trimtab.selection.table import FeatureTable, read_feature_tables, write_feature_tables

__all__ = [
    "CRITERIA",
    "NEUTRAL_PREFIX",
    "BaseDistribution",
    "Criterion",
    "DeltaConfidence",
    "EditedDistributions",
    "EffectCriterion",
    "FeatureTable",
    "FiringRate",
    "KLDivergence",
    "LastTokenScorer",
    "LensTokens",
    "MaxActivation",
    "OutputScore",
    "Random",
    "RankConfig",
    "RankResult",
    "Reducer",
    "Scores",
    "ScoringTarget",
    "StatisticCriterion",
    "logit_lens",
    "make_criteria",
    "rank",
    "rank_by",
    "read_feature_tables",
    "run_rank",
    "score_features",
    "token_texts",
    "write_feature_tables",
]
