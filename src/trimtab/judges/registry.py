"""Judges by name: `rules`, `classifier:PATH`, `endpoint:MODEL@URL`, or `module:Class` of your own."""

from __future__ import annotations

import os
from typing import Any

from trimtab.errors import UserError
from trimtab.judges.chat_client import import_client
from trimtab.judges.classifier import ClassifierJudge
from trimtab.judges.endpoint import EndpointConfig, EndpointJudge
from trimtab.judges.refusal_rules import RuleJudge
from trimtab.judges.transcript import Transcript
from trimtab.judges.verdict import Judge
from trimtab.runs import field_types, find_class, keyword_types


def make_judge(
    name: str = "rules",
    *,
    transcript: str | os.PathLike[str] | None = None,
    keep_requests: bool = True,
    **options: Any,
) -> Judge:
    """A judge by name.

    Args:
        name: `rules`; `classifier:PATH` for a local sequence classifier; `endpoint:MODEL` or `endpoint:MODEL@URL` for a
            chat model behind an OpenAI-compatible endpoint; `module:Class` for one's own (see `runs.find_class`), which
            takes the options that its constructor takes by keyword alone.
        transcript: file that keeps an endpoint's replies.
        keep_requests: whether that file holds what was asked, too.
        options: further fields of `ClassifierJudge` or `EndpointConfig`, or of your own judge.

    Raises:
        UserError: no such judge or option, or what it needs is not installed.
    """
    known = judge_options(name)
    for option in options:
        if option not in known:
            raise UserError(
                f"judge option {option!r}", f"judge {name} takes {', '.join(known) or 'none'}", "leave it out"
            )
    kind, _, rest = name.partition(":")
    if kind == "rules":
        return RuleJudge()
    if kind == "classifier":
        return ClassifierJudge(rest, **options)
    if kind != "endpoint":
        judge = find_class(name, "judge")(**options)
        if not isinstance(judge, Judge):
            raise UserError(f"judge {name!r}", "it is no judge", "give its class name, score and score_all")
        return judge
    model, _, url = rest.partition("@")
    import_client()
    config = EndpointConfig(model=model, base_url=url or None, **options)
    return EndpointJudge(config, Transcript(transcript, keep_requests=keep_requests))


def judge_options(name: str) -> dict[str, Any]:
    """The options of a judge beside what its name says: types by name.

    Raises:
        UserError: no such judge.
    """
    kind, colon, rest = name.partition(":")
    if kind == "rules" and not colon:
        return {}
    if kind == "classifier" and rest:
        return {option: hint for option, hint in field_types(ClassifierJudge).items() if option != "path"}
    if kind == "endpoint" and rest:
        own = ("model", "base_url")
        return {option: hint for option, hint in field_types(EndpointConfig).items() if option not in own}
    if kind not in ("rules", "classifier", "endpoint") and rest:
        return keyword_types(find_class(name, "judge"))
    raise UserError(
        f"judge {name!r}",
        "there are rules, classifier:PATH and endpoint:MODEL@URL",
        "choose one of them, or name your own as module:Class",
    )
