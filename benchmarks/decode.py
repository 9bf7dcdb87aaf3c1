"""Decoding speed: trimtab's loop against `transformers.generate`, and static steering against none.

Both decode the same prompts greedily on the same model with the same number of new tokens; runs alternate, and the
figures are medians of per-pair ratios. `ratio` is trimtab's tokens per second over generate's; `steered_ratio` is
steered over unsteered, both trimtab's.

    python benchmarks/decode.py --json
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from figures import print_result

from trimtab.lm import DecodeConfig, Edit, EditRequest, PositionRule, Site, decode, load_model

TOPICS = ("my neighbour", "the old lighthouse", "a train to the north", "our first winter", "the long river", "her map")
OPENINGS = ("Yesterday I heard a story about", "Nobody in the village believed what they said about",
            "The letter began with a few words on", "Let me tell you what I learned from",
            "In the middle of the night we talked about", "Every child in the school could draw",
            "It took three years to write a book about", "The best thing I ever read was on",
            "When the rain stopped, they remembered", "Some people spend a whole life looking for",
            "On the wall there was a picture of")  # fmt: skip


class OneDirection:
    """The cheapest useful source: one unit direction, the same coefficient at every token of every row."""

    unit, operation, dictionary_hash = "absolute", "add", ""
    positions = PositionRule()

    def __init__(self, site: Site, width: int) -> None:
        self.sites = (site,)
        row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        self.rows = row / row.norm()

    def directions(self, site: Site) -> torch.Tensor:
        return self.rows

    def start(self, start: object) -> None:
        pass

    def choose(self, request: EditRequest) -> Edit:
        count = len(request.row)
        return Edit(torch.zeros(count, 1, dtype=torch.long), torch.full((count, 1), 5.0))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = load_model(args.model)
    texts = [f"{opening} {topic}" for topic in TOPICS for opening in OPENINGS][: args.batch]
    prompts = [model.encode_text(text) for text in texts]
    config = DecodeConfig(max_new_tokens=args.new_tokens, stop_at_eos=False, batch_size=args.batch)
    source = OneDirection(model.site(args.site), model.d_model)
    model.tokenizer.padding_side = "left"
    padded = model.tokenizer(texts, return_tensors="pt", padding=True)

    def generate() -> object:
        with torch.inference_mode():
            return model.hf.generate(
                **padded, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False,
                pad_token_id=model.pad_id,
            )  # fmt: skip

    def unsteered() -> object:
        return decode(model, prompts, config)

    def steered() -> object:
        return decode(model, prompts, config, source)

    arms = {"generate": generate, "unsteered": unsteered, "steered": steered}
    for run in arms.values():  # warm-up
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for pair in range(args.pairs):
        order = list(arms) if pair % 2 == 0 else list(reversed(arms))
        for name in order:
            times[name].append(seconds(arms[name]))
    tokens = len(prompts) * args.new_tokens

    def ratios(of: str, over: str) -> list[float]:
        return [b / a for a, b in zip(times[of], times[over], strict=True)]

    result = {
        "ratio": round(statistics.median(ratios("unsteered", "generate")), 3),
        "ratio_range": [round(f(ratios("unsteered", "generate")), 3) for f in (min, max)],
        "steered_ratio": round(statistics.median(ratios("steered", "unsteered")), 3),
        "steered_ratio_range": [round(f(ratios("steered", "unsteered")), 3) for f in (min, max)],
        "tokens_per_second": {name: round(tokens / statistics.median(t), 1) for name, t in times.items()},
        "batch": len(prompts), "new_tokens": args.new_tokens, "pairs": args.pairs, "model": args.model,
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
