"""What features mean to a judge, and whether steering with them brings that about."""

from trimtab.interpreting.agreement import RankAgreement, rank_agreement
from trimtab.interpreting.autointerp import AutointerpResult, autointerp, read_scores
from trimtab.interpreting.autointerp_command import AutointerpConfig, run_autointerp
from trimtab.interpreting.calibration import JudgeCalibration, calibrate
from trimtab.interpreting.calibration_command import CalibrationConfig, run_calibration
from trimtab.interpreting.judge import Exemplars, FeatureJudge, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.judge_config import FeatureJudgeConfig
from trimtab.interpreting.judges import make_feature_judge
from trimtab.interpreting.labelled_texts import read_axbench
from trimtab.interpreting.nested_selection import NestedSelection, mean_lifts, mean_pairs, select_nested
from trimtab.interpreting.scored_sae import ScoredSAE, read_scored_saes, simulate_saes

__all__ = [
    "AutointerpConfig",
    "AutointerpResult",
    "CalibrationConfig",
    "Exemplars",
    "FeatureJudge",
    "FeatureJudgeConfig",
    "JudgeCalibration",
    "Meaning",
    "NestedSelection",
    "Passage",
    "RankAgreement",
    "Rating",
    "ScoredSAE",
    "ToRate",
    "autointerp",
    "calibrate",
    "make_feature_judge",
    "mean_lifts",
    "mean_pairs",
    "rank_agreement",
    "read_axbench",
    "read_scored_saes",
    "read_scores",
    "run_autointerp",
    "run_calibration",
    "select_nested",
    "simulate_saes",
]
