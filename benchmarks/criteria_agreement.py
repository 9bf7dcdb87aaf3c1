"""How alike criteria rank features: delta-confidence against its gradient at several doses, and against the others.

    python benchmarks/criteria_agreement.py

No timing: the numbers are those of docs/ranking.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from figures import arguments, device_options
from scipy import stats

from trimtab import load_model, load_sae
from trimtab.selection import CRITERIA, DeltaConfidence, GradientAttribution, rank_by

DOSES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LEFT_OUT = ("delta-confidence", "gradient-attribution", "explanation-score")
"""Of the others: the reference, what has a table of its own, and what needs explanations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=400, help="live ones of the default SAE, drawn at random")
    device_options(parser)
    args = arguments(parser)
    model = load_model("smollm2-135m-instruct", dtype=args.dtype, device=args.device)
    sae = load_sae("default", model=model, device=args.device)
    assert sae.feature_stats is not None
    live = np.flatnonzero(sae.feature_stats.live)
    ids = sorted(np.random.default_rng(0).choice(live, args.features, replace=False).tolist())

    def scores(*criteria: Any) -> list[np.ndarray]:
        """Of each criterion, features ascending."""
        return [table.score[np.argsort(table.feature)] for table in rank_by(model, sae, criteria, features=ids)]

    print("dose   tau_b  correlation")
    for dose in DOSES:
        exact, first = scores(DeltaConfidence(dose=dose), GradientAttribution(dose=dose))
        print(f"{dose:5g} {stats.kendalltau(exact, first).statistic:6.3f} {np.corrcoef(exact, first)[0, 1]:12.3f}")
    others = [name for name in CRITERIA if name not in LEFT_OUT]
    exact, *found = scores("delta-confidence", *others)
    print("tau_b with delta-confidence at its own dose")
    for name, values in zip(others, found, strict=True):
        print(f"{name:20s} {stats.kendalltau(exact, values).statistic:+.3f}")


if __name__ == "__main__":
    main()
