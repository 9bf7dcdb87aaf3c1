"""Judges say whether an answer refuses its prompt, complies or is gibberish: by rules, a classifier or an endpoint."""

from trimtab.judges.chat_client import ChatClient, ChatConfig, ChatJudge, NoReply
from trimtab.judges.classifier import ClassifierJudge
from trimtab.judges.concept_quality import JudgeQuality
from trimtab.judges.concepts import ConceptJudge
from trimtab.judges.endpoint import EndpointConfig, EndpointJudge
from trimtab.judges.gibberish import GibberishRules, find_gibberish
from trimtab.judges.refusal_rules import RuleJudge
from trimtab.judges.registry import judge_options, make_judge
from trimtab.judges.transcript import Transcript
from trimtab.judges.verdict import Judge, Unjudged, Verdict, only_verdicts
from trimtab.judges.word_weights import word_weights

__all__ = [
    "ChatClient",
    "ChatConfig",
    "ChatJudge",
    "ClassifierJudge",
    "ConceptJudge",
    "EndpointConfig",
    "EndpointJudge",
    "GibberishRules",
    "Judge",
    "JudgeQuality",
    "NoReply",
    "RuleJudge",
    "Transcript",
    "Unjudged",
    "Verdict",
    "find_gibberish",
    "judge_options",
    "make_judge",
    "only_verdicts",
    "word_weights",
]
