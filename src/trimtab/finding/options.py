"""How a search goes about it: what it tries, on how many examples, at which doses and at what price."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.runs import check_least, check_values

WAYS = (
    "activation-difference", "delta-confidence", "output-score", "mean-difference", "learned-vector", "prompting",
)  # fmt: skip
"""What is shown beside the features that are found; random features always are."""
SPLITS = ("candidates", "choice", "report")
"""What gradients and shortlists are made of, what is chosen on, and what chose nothing."""
LEAST = {"candidates": 4, "choice": 4, "report": 6}
"""Fewest examples of each split."""


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """What a search tries, and how it chooses."""

    dose: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Doses to choose from, in units of the activation's norm."""
    budget: str = "KL=0.5"
    """Choose the strongest effect within a price: `KL=0.3` is in nats per token on neutral text; `none` for any."""
    set_size: int = 16
    """Features of a set at most; 1 for single ones alone."""
    shortlist: int = 6
    """Features, of all SAEs together, that the gradient puts first and exact effects decide between; half as many that
    read the wish, too, and a quarter as many removals."""
    tried: int = 3
    """Candidates of each other way of choosing features, and of each draw of random ones."""
    way: tuple[str, ...] = WAYS
    """Alternatives that are shown beside: activation-difference, delta-confidence, output-score, mean-difference,
    learned-vector, prompting."""
    examples: tuple[int, int, int] = (40, 18, 32)
    """Examples of each split at most: to make candidates from, to choose on, to report on."""
    n_neutral: tuple[int, int] = (8, 12)
    """Neutral prompts to measure the price on, in choosing and in the report."""
    max_new_tokens: int = 24
    """Tokens of the texts on neutral prompts, on which the price is measured."""
    seed: int = 0
    """Of random features, texts and intervals."""

    def __post_init__(self) -> None:
        check_values(self, "above 0 and at most 8", lambda value: 0 < value <= 8, "dose")
        check_least(self, 1, "set_size", "shortlist", "tried", "max_new_tokens")
        check_least(self, 2, "n_neutral")
        for split, n in zip(SPLITS, self.examples, strict=True):
            if n < LEAST[split]:
                why = f"at least {LEAST[split]} are needed"
                raise UserError(f"{n} examples for {split}", why, "allow more (examples)")
        if not self.dose or list(self.dose) != sorted(set(self.dose)):
            raise UserError(f"dose {' '.join(map(str, self.dose))}", "doses rise from one to the next", "sort them")
        for name in self.way:
            if name not in WAYS:
                raise UserError(f"way {name!r}", f"there are {', '.join(WAYS)}", "choose among them")
        _ = self.most_kl

    @property
    def most_kl(self) -> float:
        """The price that may be paid; infinite for any."""
        found = re.fullmatch(r"KL=(\d*\.?\d+)", self.budget.strip(), re.IGNORECASE)
        if self.budget == "none":
            return math.inf
        if not found or float(found[1]) <= 0:
            raise UserError(f"budget {self.budget!r}", "it is KL=NATS, or none", "write KL=0.3")
        return float(found[1])
