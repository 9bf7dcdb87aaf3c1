"""What features mean to a judge, and whether steering with them brings that about."""

from trimtab.interpreting.agreement import RankAgreement, rank_agreement
from trimtab.interpreting.judge import Exemplars, FeatureJudge, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.nested_selection import NestedSelection, mean_lifts, select_nested
from trimtab.interpreting.scored_sae import ScoredSAE, read_scored_saes, simulate_saes

__all__ = [
    "Exemplars",
    "FeatureJudge",
    "Meaning",
    "NestedSelection",
    "Passage",
    "RankAgreement",
    "Rating",
    "ScoredSAE",
    "ToRate",
    "mean_lifts",
    "rank_agreement",
    "read_scored_saes",
    "select_nested",
    "simulate_saes",
]
