"""Decoding speed: trimtab's loop against `transformers.generate`, and static steering against none.

Both decode the same prompts greedily on the same model with the same number of new tokens; runs alternate, and the
figures are medians of per-pair ratios. `ratio` is trimtab's tokens per second over generate's; `steered_ratio` is
steered over unsteered, both trimtab's. `of_floor` is trimtab's speed over what the device allows: a step reads every
weight once, at the bandwidth that is measured here, and multiplies all rows by it, at the rate of the fastest product
of that size, whichever takes longer.

    python benchmarks/decode.py --json
    python benchmarks/decode.py --device cuda --dtype bfloat16 --json
    python benchmarks/decode.py --random gemma-2-2b --device cuda --dtype bfloat16 --ahead 8 --json

With `--random` the model has a shape's size and random weights, which is all that speed depends on; prompts are then of
bytes, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from figures import (
    arguments,
    bandwidth,
    device_options,
    in_turn,
    measured_on,
    print_result,
    product_rate,
)
from shapes import SHAPES, random_model

from trimtab.lm import DecodeConfig, Edit, EditRequest, LanguageModel, PositionRule, Site, decode, load_model
from trimtab.lm.batch import TokenBatch

TOPICS = ("my neighbour", "the old lighthouse", "a train to the north", "our first winter", "the long river", "her map")
OPENINGS = ("Yesterday I heard a story about", "Nobody in the village believed what they said about",
            "The letter began with a few words on", "Let me tell you what I learned from",
            "In the middle of the night we talked about", "Every child in the school could draw",
            "It took three years to write a book about", "The best thing I ever read was on",
            "When the rain stopped, they remembered", "Some people spend a whole life looking for",
            "On the wall there was a picture of")  # fmt: skip


class OneDirection:
    """The cheapest useful source: one unit direction, the same coefficient at every token of every row."""

    unit, operation, dictionary_hash, asks_nothing = "absolute", "add", "", True
    positions = PositionRule()

    def __init__(self, site: Site, width: int, device: torch.device) -> None:
        self.sites = (site,)
        row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        self.rows = (row / row.norm()).to(device)

    def directions(self, site: Site) -> torch.Tensor:
        return self.rows

    def start(self, start: object) -> None:
        pass

    def choose(self, request: EditRequest) -> Edit:
        count = len(request.row)
        device = request.x.device
        return Edit(torch.zeros(count, 1, dtype=torch.long, device=device), torch.full((count, 1), 5.0, device=device))


def floor(model: LanguageModel, rows: int) -> float:
    """Tokens per second that reading and multiplying a model's weights would allow."""
    weights = [module.weight for module in model.hf.modules() if isinstance(module, torch.nn.Linear)]
    largest = max(weights, key=torch.Tensor.numel)
    number = sum(weight.numel() for weight in weights)
    step = max(
        number * largest.element_size() / bandwidth(model.device), 2 * number * rows / product_rate(rows, largest)
    )
    return rows / step


def generate_of(model: LanguageModel, prompts: Sequence[list[int]], new_tokens: int) -> Callable[[], object]:
    """`transformers.generate` on the same prompts, greedily, padded on the left."""
    batch = TokenBatch.pad(prompts, model.pad_id, model.device)

    def generate() -> object:
        with torch.inference_mode():
            return model.hf.generate(
                batch.ids, attention_mask=batch.attention_mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=model.pad_id,
            )  # fmt: skip

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--random", choices=[*SHAPES])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--site", default="resid_post.15")
    device_options(parser)
    parser.add_argument("--ahead", type=int, help="steps taken before what they chose is read; by default 8 on a GPU")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)
    if args.random:
        model = random_model(args.random, args.device, args.dtype)
    else:
        model = load_model(args.model, dtype=args.dtype, device=args.device)
    texts = [f"{opening} {topic}" for topic in TOPICS for opening in OPENINGS][: args.batch]
    prompts = [model.encode_text(text) for text in texts]
    config = DecodeConfig(max_new_tokens=args.new_tokens, stop_at_eos=False, batch_size=args.batch)
    source = OneDirection(model.site(args.site), model.d_model, model.device)
    arms = {
        "generate": generate_of(model, prompts, args.new_tokens),
        "unsteered": lambda: decode(model, prompts, config, ahead=args.ahead),
        "steered": lambda: decode(model, prompts, config, source, ahead=args.ahead),
    }
    for run in arms.values():  # warm-up
        run()
    times = in_turn(arms, args.pairs, model.device)
    tokens, limit = len(prompts) * args.new_tokens, floor(model, len(prompts))

    def ratios(of: str, over: str) -> list[float]:
        return [b / a for a, b in zip(times[of], times[over], strict=True)]

    result = {
        "ratio": round(statistics.median(ratios("unsteered", "generate")), 3),
        "ratio_range": [round(f(ratios("unsteered", "generate")), 3) for f in (min, max)],
        "steered_ratio": round(statistics.median(ratios("steered", "unsteered")), 3),
        "steered_ratio_range": [round(f(ratios("steered", "unsteered")), 3) for f in (min, max)],
        "of_floor": round(tokens / statistics.median(times["unsteered"]) / limit, 3),
        "tokens_per_second": {
            **{name: round(tokens / statistics.median(t), 1) for name, t in times.items()}, "floor": round(limit, 1),
        },
        "batch": len(prompts), "new_tokens": args.new_tokens, "pairs": args.pairs, "model": model.name,
        "ahead": args.ahead, "dtype": args.dtype, **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
