"""Judges of features by name: `exemplar`, `rules`, `endpoint:MODEL@URL`, `local-model:MODEL`, or one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trimtab.errors import UserError
from trimtab.interpreting.judge import FeatureJudge
from trimtab.interpreting.judges.endpoint import EndpointFeatureJudge, FeatureEndpointConfig
from trimtab.interpreting.judges.exemplar import ExemplarJudge
from trimtab.interpreting.judges.local_model import LocalModelJudge
from trimtab.interpreting.judges.rules import RuleFeatureJudge
from trimtab.judges import Transcript
from trimtab.judges.chat_client import import_client
from trimtab.runs import field_types, find_class, keyword_types

_CLASSES: dict[str, type[Any]] = {"exemplar": ExemplarJudge, "rules": RuleFeatureJudge}

_NAMED: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "endpoint": (FeatureEndpointConfig, ("model", "base_url")),
    "local-model": (LocalModelJudge, ("model",)),
}
"""Judges whose name says which model: what holds their options, and which of these the name says."""


def make_feature_judge(
    name: str = "exemplar", *, transcript: str | os.PathLike[str] | None = None, **options: Any
) -> FeatureJudge:
    """A judge of features by name.

    Args:
        name: `exemplar` or `rules`, which need no network; `endpoint:MODEL` or `endpoint:MODEL@URL` for a chat model
            behind an OpenAI-compatible endpoint; `local-model:MODEL` for one that is loaded here; `module:Class` for
            one's own, which takes the options that its constructor takes by keyword alone.
        transcript: file that keeps an endpoint's replies.
        options: fields of the judge's class, or of `FeatureEndpointConfig`.

    Raises:
        UserError: no such judge or option, or what it needs is not installed.
    """
    known = feature_judge_options(name)
    for option in options:
        if option not in known:
            why = f"judge {name} takes {', '.join(known) or 'none'}"
            raise UserError(f"judge option {option!r}", why, "leave it out")
    if name in _CLASSES:
        return _CLASSES[name](**options)
    kind, _, rest = name.partition(":")
    if kind == "local-model":
        return LocalModelJudge(model=rest, **options)
    if kind == "endpoint":
        model, _, url = rest.partition("@")
        import_client()
        config = FeatureEndpointConfig(model=model, base_url=url or None, **options)
        return EndpointFeatureJudge(config, Transcript(transcript))
    judge = find_class(name, "judge")(**options)
    if not isinstance(judge, FeatureJudge):
        hint = "give its class name, version, explain, fires and rate"
        raise UserError(f"judge {name!r}", "it is no judge of features", hint)
    return judge


def feature_judge_options(name: str) -> Mapping[str, Any]:
    """The options of a judge: types by name.

    Raises:
        UserError: no such judge.
    """
    if name in _CLASSES:
        return field_types(_CLASSES[name])
    kind, _, rest = name.partition(":")
    if kind in _NAMED and rest:
        cls, own = _NAMED[kind]
        return {option: hint for option, hint in field_types(cls).items() if option not in own}
    if kind in _NAMED or not rest:
        known = [*_CLASSES, "endpoint:MODEL@URL", "local-model:MODEL"]
        hint = "choose one of them, or name your own as module:Class"
        raise UserError(f"judge {name!r}", f"there are {', '.join(known)}", hint)
    return keyword_types(find_class(name, "judge"))
