"""Judges by name: `rules`, `classifier:PATH`, `endpoint:MODEL` or `endpoint:MODEL@URL`."""

from __future__ import annotations

import os
from typing import Any

from trimtab.errors import UserError
from trimtab.judges.classifier import ClassifierJudge
from trimtab.judges.endpoint import EndpointConfig, EndpointJudge, import_client
from trimtab.judges.refusal_rules import RuleJudge
from trimtab.judges.transcript import Transcript
from trimtab.judges.verdict import Judge
from trimtab.runs import field_types


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
            chat model behind an OpenAI-compatible endpoint.
        transcript: file that keeps an endpoint's replies.
        keep_requests: whether that file holds what was asked, too.
        options: further fields of `ClassifierJudge` or `EndpointConfig`.

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
    model, _, url = rest.partition("@")
    import_client()
    config = EndpointConfig(model=model, base_url=url or None, **options)
    return EndpointJudge(config, Transcript(transcript, keep_requests=keep_requests))


def judge_options(name: str) -> dict[str, Any]:
    """The options of a judge beside what its name says: types by name.

    Raises:
        UserError: no such judge.
    """
    kind, _, rest = name.partition(":")
    if kind == "rules" and not rest:
        return {}
    if kind == "classifier" and rest:
        return {option: hint for option, hint in field_types(ClassifierJudge).items() if option != "path"}
    if kind == "endpoint" and rest:
        return {
            option: hint for option, hint in field_types(EndpointConfig).items() if option not in ("model", "base_url")
        }
    raise UserError(
        f"judge {name!r}",
        "there are rules, classifier:PATH and endpoint:MODEL@URL",
        "choose one of them",
    )
