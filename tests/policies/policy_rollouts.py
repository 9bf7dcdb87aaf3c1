"""What the policy tests share: prompts, the site, a rollout and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.lm import Decoded
from trimtab.policies.source import PolicySource

SITE = "resid_post.1"
PROMPTS = [[7, 20, 33, 9], [8, 21, 40, 52, 61, 13, 30], [11, 12]]


@dataclass
class Rollout:
    """A source after decoding, and what was decoded."""

    source: PolicySource
    decoded: Decoded


RollOut = Callable[..., Rollout]
