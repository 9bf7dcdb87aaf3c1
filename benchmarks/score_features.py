"""Speed of the last-token scorer: against one full forward pass per feature, and against the machine's matrix rate.

Pinned: the default model, resid_post.15, the prefix "From my experience,", delta-confidence with k = 1, every live
feature of the shipped SAE (random unit directions where there is none, or with --random N).

- `ratio`: features per second of the batched scorer over those of the naive way, one float32 forward pass of the whole
  prompt per feature, at batch 1, with the edit in a hook and only the last logits computed.
- `of_floor`: the time that the upper layers' and the head's matrix products alone would take at the machine's rate,
  over the time taken. The operations are counted from the weights' shapes, 2 per weight and feature; the rate is
  measured before and after each timed pass, on products of those shapes at the scorer's own batch size.
- `max_abs_difference`: largest difference in score, in nats, between the batch and one edit at a time.

Measurements alternate (naive, matrix products, batched) and figures are medians over the repeats of per-repeat ratios.

    python benchmarks/score_features.py --json
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator

import torch
from figures import measured_on, medians, print_result, spread

from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, edited, load_model
from trimtab.selection import NEUTRAL_PREFIX, DeltaConfidence, LastTokenScorer
from trimtab.selection.criterion import ScoringTarget
from trimtab.selection.scorer import BATCH_SIZE

MODEL, SITE, ALPHA, RANDOM_LENGTH = "smollm2-135m-instruct", "resid_post.15", 10.0, 20.0


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def edits(model: LanguageModel, count: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Unit directions, coefficients, and where they are from."""
    if not count:
        try:
            dictionary = load_dictionary("default", model=model)
        except UserError as error:
            print(f"no shipped SAE ({error.line}); random directions instead", file=sys.stderr)
        else:
            assert dictionary.feature_stats is not None
            live = torch.as_tensor(dictionary.feature_stats.live)
            strength = torch.as_tensor(dictionary.feature_stats.max_activation)[live]
            return dictionary.directions[live], ALPHA * strength, "shipped SAE"
    directions = torch.randn(count or 4096, model.d_model, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return directions, torch.full((len(directions),), ALPHA * RANDOM_LENGTH), "random"


def weights_above(model: LanguageModel, layer: int) -> Iterator[torch.Tensor]:
    """Every matrix that a feature's row is multiplied by: the upper layers' and the head's."""
    for block in model.layout.layers[layer + 1 :]:
        yield from (parameter for parameter in block.module.parameters() if parameter.ndim == 2)
    yield model.layout.head.weight  # type: ignore[misc]


class MatrixRate:
    """Products of the same shapes as the scorer's, and nothing else."""

    def __init__(self, weights: list[torch.Tensor], rows: int) -> None:
        shapes: dict[tuple[int, int], int] = {}
        for weight in weights:
            shape = (weight.shape[0], weight.shape[1])
            shapes[shape] = shapes.get(shape, 0) + 1
        self.products = [
            (torch.randn(rows, k), torch.randn(n, k), torch.empty(rows, n), times) for (n, k), times in shapes.items()
        ]
        self.operations = 2 * rows * sum(n * k * times for (n, k), times in shapes.items())

    def __call__(self) -> None:
        for x, weight, out, times in self.products:
            for _ in range(times):
                torch.mm(x, weight.t(), out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="catalogue name or directory (the figures are for the default)")
    parser.add_argument("--random", type=int, default=0, help="score this many random directions, not the SAE's")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help="features that go through the layers together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--naive", type=int, default=32, help="features scored the naive way per repeat")
    parser.add_argument("--check", type=int, default=128, help="features also scored one by one")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    site, ids = model.site(SITE), model.encode_text(NEUTRAL_PREFIX)
    directions, coefficients, source = edits(model, args.random)
    reducer = DeltaConfidence().reducer(ScoringTarget(model, None, torch.arange(len(directions))))  # type: ignore[arg-type]
    scores: dict[str, torch.Tensor] = {}

    def batched() -> None:
        scorer = LastTokenScorer(model, site, ids, batch_size=args.batch)  # the prefix counts, too
        scores["batched"] = scorer.score(directions, coefficients, {"score": reducer})["score"]

    prompt = torch.tensor([ids])
    base = float(model.hf(prompt, use_cache=False, logits_to_keep=1).logits[0, -1].log_softmax(-1).max())

    def naive() -> None:
        found = []
        for i in range(args.naive):
            change = RowDelta(torch.tensor([0]), torch.tensor([len(ids) - 1]), (coefficients[i] * directions[i])[None])
            with edited(model, {site: lambda _x, change=change: change}):
                logits = model.hf(prompt, use_cache=False, logits_to_keep=1).logits[0, -1]
            found.append(base - float(logits.log_softmax(-1).max()))
        scores["naive"] = torch.tensor(found)

    weights = list(weights_above(model, site.layer))
    operations = 2 * sum(weight.numel() for weight in weights)
    products = MatrixRate(weights, args.batch)
    for run in (naive, products, batched):  # warm-up
        run()
    one_by_one = LastTokenScorer(model, site, ids, batch_size=1)
    checked = one_by_one.score(directions[: args.check], coefficients[: args.check], {"score": reducer})["score"]
    difference = float((checked - scores["batched"][: args.check]).abs().max())
    difference_naive = float((scores["naive"] - scores["batched"][: args.naive]).abs().max())

    rate, naive_rate, matrix_rate = [], [], []
    for _ in range(args.repeats):
        naive_rate.append(args.naive / seconds(naive))
        before = seconds(lambda: [products() for _ in range(4)])
        rate.append(len(directions) / seconds(batched))
        after = seconds(lambda: [products() for _ in range(4)])
        matrix_rate.append(8 * products.operations / (before + after))

    result = {
        **medians({
            "ratio": ([a / b for a, b in zip(rate, naive_rate, strict=True)], 2),
            "of_floor": ([r * operations / m for r, m in zip(rate, matrix_rate, strict=True)], 3),
            "features_per_second": (rate, 1),
        }),
        "max_abs_difference": difference,
        "max_abs_difference_naive": difference_naive,
        "naive_features_per_second": spread(naive_rate, 2),
        "matrix_gflops": spread([m / 1e9 for m in matrix_rate], 1),
        "operations_per_feature": operations,
        "features": len(directions), "source": source, "batch": args.batch, "repeats": args.repeats,
        "model": args.model, "site": SITE, "prefix": NEUTRAL_PREFIX, "prefix_tokens": len(ids),
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(), **measured_on(),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
