"""What features mean to a judge, and whether steering with them brings that about."""

from trimtab.interpreting.judge import Exemplars, FeatureJudge, Meaning, Passage, Rating, ToRate

__all__ = ["Exemplars", "FeatureJudge", "Meaning", "Passage", "Rating", "ToRate"]
