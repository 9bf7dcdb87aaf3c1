"""How often intervals of Kendall's τ_b hold the truth, in simulated tables of SAEs: no timing, but coverage.

    python benchmarks/tau_coverage.py

For each number of SAEs (of three models, but for 30, which are of one) and each kind of scores (normal; of few levels;
heavy-tailed; of models that differ) and τ it prints how many of the tables' 95% and 90% intervals hold the τ of the
whole population, which is that of 60,000 SAEs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trimtab.stats import RankScores

Scores = tuple[NDArray[np.float64], NDArray[np.float64]]
MODELS = {15: 3, 18: 3, 30: 1, 90: 3}
TAUS = (0.0, 0.3, 0.6)
SHIFTS = np.array([[0.0, 1.0, 2.0], [0.0, 1.5, 0.5]])
"""Of each model's scores, where models differ."""


def few_levels(x: NDArray[np.float64], y: NDArray[np.float64], _model: NDArray[np.int64], _rng: object) -> Scores:
    return np.round(1.5 * x), np.round(y)


def heavy_tails(
    x: NDArray[np.float64], y: NDArray[np.float64], _model: NDArray[np.int64], rng: np.random.Generator
) -> Scores:
    scale = np.sqrt(2 / rng.chisquare(2, size=len(x)))
    return x * scale, y * scale


def models_differ(x: NDArray[np.float64], y: NDArray[np.float64], model: NDArray[np.int64], _rng: object) -> Scores:
    return x + SHIFTS[0][model], y + SHIFTS[1][model]


KINDS: dict[str, Callable[..., Scores]] = {
    "normal": lambda x, y, _model, _rng: (x, y),
    "few levels": few_levels,
    "heavy tails": heavy_tails,
    "models differ": models_differ,
}


def draw(kind: str, tau: float, n: int, models: int, rng: np.random.Generator) -> tuple[Scores, NDArray[np.int64]]:
    """Scores of n SAEs and their models."""
    r = math.sin(math.pi * tau / 2)
    model = np.repeat(np.arange(models), n // models)
    x, noise = rng.normal(size=(2, n))
    return KINDS[kind](x, r * x + math.sqrt(1 - r * r) * noise, model, rng), model


@cache
def truth(kind: str, tau: float, models: int) -> float:
    rng = np.random.default_rng(1)
    (x, y), _ = draw(kind, tau, 60_000, models, rng)
    return float(stats.kendalltau(x, y).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=400, help="simulated for each line")
    parser.add_argument("--resamples", type=int, default=600, help="of each bootstrap")
    parser.add_argument("--saes", type=int, nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for n in args.saes:
        models = MODELS[n]
        for kind in KINDS:
            if kind == "models differ" and models == 1:
                continue
            for tau in TAUS:
                rng, held, widths = np.random.default_rng(3), {0.95: 0, 0.9: 0}, list[float]()
                for _ in range(args.tables):
                    (x, y), model = draw(kind, tau, n, models, rng)
                    scores = RankScores({"x": x, "y": y}, within=model, n_resamples=args.resamples)
                    tau_b = scores.tau("x", "y")
                    for level in held:
                        interval = scores.interval(tau_b, level)
                        held[level] += interval.low <= truth(kind, tau, models) <= interval.high
                    widths.append(scores.interval(tau_b).high - scores.interval(tau_b).low)
                line = {f"held_{level:.2f}": count / args.tables for level, count in held.items()}
                line["width"] = float(np.mean(widths))
                found[f"{n} {kind} {tau:g}"] = line
                print(
                    f"{n:3d} {kind:13s} τ {tau:.1f}: " + ", ".join(f"{k} {v:.3f}" for k, v in line.items()), flush=True
                )
    for n in args.saes:
        mine = [line for name, line in found.items() if name.startswith(f"{n} ")]
        spans = [f"{min(m[k] for m in mine):.2f} to {max(m[k] for m in mine):.2f}" for k in ("held_0.95", "held_0.90")]
        print(f"{n} SAEs: 95% {spans[0]}, 90% {spans[1]}, width {found[f'{n} normal 0.3']['width']:.2f}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
