"""What features mean to a judge, and whether steering with them brings that about."""

from trimtab.interpreting.agreement import RankAgreement, rank_agreement
from trimtab.interpreting.judge import Exemplars, FeatureJudge, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.scored_sae import ScoredSAE, read_scored_saes, simulate_saes

__all__ = [
    "Exemplars",
    "FeatureJudge",
    "Meaning",
    "Passage",
    "RankAgreement",
    "Rating",
    "ScoredSAE",
    "ToRate",
    "rank_agreement",
    "read_scored_saes",
    "simulate_saes",
]
