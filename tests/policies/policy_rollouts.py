"""What the policy tests share: prompts, the site, a rollout and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.control.setting import Setting
from trimtab.dictionaries import Dictionary
from trimtab.lm import Decoded, LanguageModel
from trimtab.policies.source import PolicySource

SITE = "resid_post.1"
PROMPTS = [[7, 20, 33, 9], [8, 21, 40, 52, 61, 13, 30], [11, 12]]


@dataclass
class Rollout:
    """A source after decoding, and what was decoded."""

    source: PolicySource
    decoded: Decoded


RollOut = Callable[..., Rollout]


def setting(model: LanguageModel, dictionary: Dictionary, site: str = SITE, **values: object) -> Setting:
    """A dictionary's features at a site, at dose 1 unless said otherwise."""
    given: dict[str, object] = {"dose": 1.0, **values}
    return Setting(model=model, dictionary=dictionary, site=model.site(site), **given)  # pyright: ignore[reportArgumentType]
