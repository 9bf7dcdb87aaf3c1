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
import sys
from collections.abc import Iterator

import torch
from figures import arguments, device_options, measured_on, medians, print_result, seconds, spread

from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site, edited, load_model
from trimtab.selection import NEUTRAL_PREFIX, DeltaConfidence, LastTokenScorer
from trimtab.selection.criterion import ScoringTarget
from trimtab.selection.scorer import BATCH_SIZE

MODEL, SITE, ALPHA, RANDOM_LENGTH = "smollm2-135m-instruct", "resid_post.15", 10.0, 20.0


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
    """Products of the same shapes as the scorer's, on the weights' device and in their dtype, and nothing else."""

    def __init__(self, weights: list[torch.Tensor], rows: int) -> None:
        shapes: dict[tuple[int, int], int] = {}
        like = weights[0]
        for weight in weights:
            shape = (weight.shape[0], weight.shape[1])
            shapes[shape] = shapes.get(shape, 0) + 1
        self.products = [
            (like.new_zeros(rows, k).normal_(), like.new_zeros(n, k).normal_(), like.new_empty(rows, n), times)
            for (n, k), times in shapes.items()
        ]
        self.operations = 2 * rows * sum(n * k * times for (n, k), times in shapes.items())

    def __call__(self) -> None:
        for x, weight, out, times in self.products:
            for _ in range(times):
                torch.mm(x, weight.t(), out=out)


class Scored:
    """Features scored by the batch and the naive way, and the matrix products that neither can do without.

    Args:
        model: the model.
        site: where they are added to the last token.
        ids: of the prefix.
        directions, coefficients: the features and how much of each.
        batch: features that go through the layers together.
        naive: features scored the naive way.
    """

    def __init__(
        self, model: LanguageModel, site: Site, ids: list[int], directions: torch.Tensor, coefficients: torch.Tensor,
        *, batch: int, naive: int,
    ) -> None:  # fmt: skip
        self.model, self.site, self.ids, self.count = model, site, ids, naive
        self.directions, self.coefficients = directions.to(model.device), coefficients.to(model.device)
        self.batch = batch
        target = ScoringTarget(model, None, torch.arange(len(directions)))  # type: ignore[arg-type]
        self.reducers = {"score": DeltaConfidence().reducer(target)}
        weights = list(weights_above(model, site.layer))
        self.operations = 2 * sum(weight.numel() for weight in weights)
        """Per feature."""
        self.products = MatrixRate(weights, batch)
        self._prompt = torch.tensor([ids], device=model.device)
        self._base = self._confidence()
        self.scores: dict[str, torch.Tensor] = {}

    def batched(self) -> None:
        """All features."""
        scorer = LastTokenScorer(self.model, self.site, self.ids, batch_size=self.batch)  # the prefix counts, too
        self.scores["batched"] = scorer.score(self.directions, self.coefficients, self.reducers)["score"]

    def one_by_one(self, count: int) -> torch.Tensor:
        """Scores of the first features by the same scorer, one at a time."""
        scorer = LastTokenScorer(self.model, self.site, self.ids, batch_size=1)
        return scorer.score(self.directions[:count], self.coefficients[:count], self.reducers)["score"]

    def naive(self) -> None:
        """The first features, a forward pass of the whole prompt for each."""
        found = []
        device = self.model.device
        row, place = torch.tensor([0], device=device), torch.tensor([len(self.ids) - 1], device=device)
        for i in range(self.count):
            change = RowDelta(row, place, (self.coefficients[i] * self.directions[i])[None].to(self.model.dtype))
            with edited(self.model, {self.site: lambda _x, change=change: change}):
                found.append(self._base - self._confidence())
        self.scores["naive"] = torch.tensor(found)

    def _confidence(self) -> float:
        logits = self.model.hf(self._prompt, use_cache=False, logits_to_keep=1).logits[0, -1]
        return float(logits.float().log_softmax(-1).max())

    def rates(self, repeats: int) -> dict[str, list[float]]:
        """Features per second both ways, and operations per second of products alone, around each batched pass."""
        device = self.model.device
        found: dict[str, list[float]] = {"batched": [], "naive": [], "operations": []}
        for _ in range(repeats):
            found["naive"].append(self.count / seconds(self.naive, device))
            before = seconds(lambda: [self.products() for _ in range(4)], device)
            found["batched"].append(len(self.directions) / seconds(self.batched, device))
            after = seconds(lambda: [self.products() for _ in range(4)], device)
            found["operations"].append(8 * self.products.operations / (before + after))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="catalogue name or directory (the figures are for the default)")
    parser.add_argument("--random", type=int, default=0, help="score this many random directions, not the SAE's")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help="features that go through the layers together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--naive", type=int, default=32, help="features scored the naive way per repeat")
    parser.add_argument("--check", type=int, default=128, help="features also scored one by one")
    device_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    site, ids = model.site(SITE), model.encode_text(NEUTRAL_PREFIX)
    directions, coefficients, source = edits(model, args.random)
    scored = Scored(model, site, ids, directions, coefficients, batch=args.batch, naive=args.naive)
    for run in (scored.naive, scored.products, scored.batched):  # warm-up
        run()
    scores = {name: found.cpu() for name, found in scored.scores.items()}
    difference = float((scored.one_by_one(args.check).cpu() - scores["batched"][: args.check]).abs().max())
    difference_naive = float((scores["naive"] - scores["batched"][: args.naive]).abs().max())
    rates = scored.rates(args.repeats)
    rate, naive_rate, matrix_rate = rates["batched"], rates["naive"], rates["operations"]

    result = {
        **medians({
            "ratio": ([a / b for a, b in zip(rate, naive_rate, strict=True)], 2),
            "of_floor": ([r * scored.operations / m for r, m in zip(rate, matrix_rate, strict=True)], 3),
            "features_per_second": (rate, 1),
        }),
        "max_abs_difference": difference,
        "max_abs_difference_naive": difference_naive,
        "naive_features_per_second": spread(naive_rate, 2),
        "matrix_gflops": spread([m / 1e9 for m in matrix_rate], 1),
        "operations_per_feature": scored.operations,
        "features": len(directions), "source": source, "batch": args.batch, "repeats": args.repeats,
        "model": args.model, "site": SITE, "prefix": NEUTRAL_PREFIX, "prefix_tokens": len(ids),
        "dtype": args.dtype, **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
