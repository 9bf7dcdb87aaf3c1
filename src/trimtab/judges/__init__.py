"""Judges say whether an answer refuses its prompt, complies or is gibberish: by rules, a classifier or an endpoint."""

from trimtab.judges.classifier import ClassifierJudge
from trimtab.judges.endpoint import EndpointConfig, EndpointJudge
from trimtab.judges.gibberish import GibberishRules, find_gibberish
from trimtab.judges.refusal_rules import RuleJudge
from trimtab.judges.registry import judge_options, make_judge
from trimtab.judges.transcript import Transcript
from trimtab.judges.verdict import Judge, Verdict

__all__ = [
    "ClassifierJudge",
    "EndpointConfig",
    "EndpointJudge",
    "GibberishRules",
    "Judge",
    "RuleJudge",
    "Transcript",
    "Verdict",
    "find_gibberish",
    "judge_options",
    "make_judge",
]
