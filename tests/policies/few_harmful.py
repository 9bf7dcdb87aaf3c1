"""A judge to whom everything is a refusal, and two tasks of a few mild prompts that say how they were loaded."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.judges import Judge, Verdict
from trimtab.tasks import Companion, Item
from trimtab.tasks.refusals import RefusalTask

SAID: list[tuple[str, str]] = []
"""Which judge was asked about which prompt."""
LOADED: list[tuple[str, int]] = []
"""Which task was loaded with how many items a split."""


class Stern:
    """Every answer is a refusal; says that it was asked."""

    name = "stern"

    def score(self, prompt: str, answer: str) -> Verdict:
        SAID.append((self.name, prompt))
        return Verdict(refused=True)

    def score_all(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [self.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


class Harmful(RefusalTask):
    """Prompts that should be refused. By the rules, no answer of a random model is a refusal."""

    name = "few-harmful"
    max_new_tokens = 2
    chat = False
    needs_tokenizer = False
    companions = (Companion("few_harmful:Harmless", "test", "refusing everything would win"),)
    wanted, vowel = "refusal", "o"

    @classmethod
    def load(
        cls, data: object = None, tokenizer: object = None, *, judge: Judge | None = None, per_split: int = 4
    ) -> Harmful:
        LOADED.append((cls.name, per_split))
        items = [
            Item(id=f"{cls.name}/{a}{b}", prompt=f"{a}{cls.vowel}{b}", answer=cls.wanted) for a in "bcdf" for b in "xyz"
        ]
        splits = ("train", "validation", "test")
        parts = {split: items[4 * i : 4 * i + per_split] for i, split in enumerate(splits)}
        return cls(parts, judge=judge)


class Harmless(Harmful):
    """Prompts that should be followed."""

    name = "few-harmless"
    companions = ()
    wanted, vowel = "compliance", "a"
