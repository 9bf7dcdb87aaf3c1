"""The part of a command's config that names a judge of features."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from trimtab.interpreting.judge import FeatureJudge
from trimtab.interpreting.judges import feature_judge_options, make_feature_judge
from trimtab.runs import SourceName, read_options

TRANSCRIPT = "transcript.jsonl"
"""File of a run that keeps what an endpoint replied."""


@dataclass(frozen=True, kw_only=True)
class FeatureJudgeConfig:
    """Who says what features mean and whether texts have it."""

    judge: SourceName = "exemplar"
    """`exemplar` or `rules`, which need no network, `endpoint:MODEL@URL`, `local-model:MODEL`, or `module:Class` of
    your own."""
    judge_option: tuple[SourceName, ...] = ()
    """Options of the judge, each NAME=VALUE: `embeddings=gemma-3-270m` of `exemplar`, `budget=2`, `price_sent=0.15`
    and `price_received=0.6` of an endpoint."""

    def load_judge(self, transcript: os.PathLike[str] | None = None) -> FeatureJudge:
        """The judge.

        Args:
            transcript: file that keeps an endpoint's replies.

        Raises:
            UserError: there is no such judge or option.
        """
        return make_feature_judge(self.judge, transcript=transcript, **self.check())

    def check(self) -> dict[str, Any]:
        """The judge's options. Raises a `UserError` if there is no such judge or option; nothing is loaded."""
        known = feature_judge_options(self.judge)
        return read_options(self.judge_option, known, what="judge option", owner=f"judge {self.judge}")
