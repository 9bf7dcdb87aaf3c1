"""Decoding speed: trimtab's loop against `transformers.generate`, and static steering against none.

Both decode the same prompts greedily on the same model with the same number of new tokens; runs alternate, and the
figures are medians of per-pair ratios. `ratio` is trimtab's tokens per second over generate's; `steered_ratio` is
steered over unsteered, both trimtab's. `of_floor` is trimtab's speed over what the device allows: a step reads every
weight once, at the bandwidth that is measured here, and multiplies all rows by it, at the rate of the fastest product
of that size, whichever takes longer.

    python benchmarks/decode.py --json
    python benchmarks/decode.py --device cuda --dtype bfloat16 --json
    python benchmarks/decode.py --random gemma-2-2b --device cuda --dtype bfloat16 --ahead 8 --json

With `--random` the model has a shape's size and random weights, which is all that speed depends on: nothing but the
default model's tokenizer is downloaded.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from figures import bandwidth, measured_on, print_result, product_rate, seconds
from transformers import Gemma2Config, Gemma2ForCausalLM

from trimtab.lm import DecodeConfig, Edit, EditRequest, LanguageModel, PositionRule, Site, decode, load_model

TOPICS = ("my neighbour", "the old lighthouse", "a train to the north", "our first winter", "the long river", "her map")
OPENINGS = ("Yesterday I heard a story about", "Nobody in the village believed what they said about",
            "The letter began with a few words on", "Let me tell you what I learned from",
            "In the middle of the night we talked about", "Every child in the school could draw",
            "It took three years to write a book about", "The best thing I ever read was on",
            "When the rain stopped, they remembered", "Some people spend a whole life looking for",
            "On the wall there was a picture of")  # fmt: skip


SHAPES = {
    "gemma-2-2b": {},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 16,
        "head_dim": 16,
        "vocab_size": 60_000,
    },
}
"""What Gemma 2 configurations change of the 2B model's."""


def random_model(shape: str, device: str, dtype: str) -> LanguageModel:
    """A model of a shape, with random weights."""
    config = Gemma2Config(**SHAPES[shape])
    with torch.device(device):
        torch.manual_seed(0)
        hf = Gemma2ForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return LanguageModel.from_hf(hf, load_model("smollm2-135m-instruct").tokenizer, f"random {shape}")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--random", choices=[*SHAPES])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ahead", type=int, default=1, help="steps that are taken before what they chose is read")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.random:
        model = random_model(args.random, args.device, args.dtype)
    else:
        model = load_model(args.model, dtype=args.dtype, device=args.device)
    texts = [f"{opening} {topic}" for topic in TOPICS for opening in OPENINGS][: args.batch]
    prompts = [model.encode_text(text) for text in texts]
    config = DecodeConfig(max_new_tokens=args.new_tokens, stop_at_eos=False, batch_size=args.batch)
    source = OneDirection(model.site(args.site), model.d_model, model.device)
    model.tokenizer.padding_side = "left"
    padded = model.tokenizer(texts, return_tensors="pt", padding=True).to(model.device)

    def generate() -> object:
        with torch.inference_mode():
            return model.hf.generate(
                **padded, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False,
                pad_token_id=model.pad_id,
            )  # fmt: skip

    def unsteered() -> object:
        return decode(model, prompts, config, ahead=args.ahead)

    def steered() -> object:
        return decode(model, prompts, config, source, ahead=args.ahead)

    arms = {"generate": generate, "unsteered": unsteered, "steered": steered}
    for run in arms.values():  # warm-up
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for pair in range(args.pairs):
        order = list(arms) if pair % 2 == 0 else list(reversed(arms))
        for name in order:
            times[name].append(seconds(arms[name], model.device))
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
        "ahead": args.ahead, "dtype": args.dtype, **measured_on(args.device),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
