"""Judges by name: `rules`, `classifier:PATH`, `endpoint:MODEL` or `endpoint:MODEL@URL`."""

from __future__ import annotations

import os

from trimtab.errors import UserError
from trimtab.judges.classifier import ClassifierJudge
from trimtab.judges.endpoint import EndpointConfig, EndpointJudge, import_client
from trimtab.judges.refusal_rules import RuleJudge
from trimtab.judges.transcript import Transcript
from trimtab.judges.verdict import Judge


def make_judge(name: str = "rules", *, transcript: str | os.PathLike[str] | None = None) -> Judge:
    """A judge by name.

    Args:
        name: `rules`; `classifier:PATH` for a local sequence classifier; `endpoint:MODEL` or `endpoint:MODEL@URL` for a
            chat model behind an OpenAI-compatible endpoint.
        transcript: file that keeps an endpoint's replies.

    Raises:
        UserError: no such judge, or what it needs is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "rules" and not rest:
        return RuleJudge()
    if kind == "classifier" and rest:
        return ClassifierJudge(rest)
    if kind == "endpoint" and rest:
        model, _, url = rest.partition("@")
        import_client()
        return EndpointJudge(EndpointConfig(model=model, base_url=url or None), Transcript(transcript))
    raise UserError(
        f"judge {name!r}",
        "there are rules, classifier:PATH and endpoint:MODEL@URL",
        "choose one of them",
    )
