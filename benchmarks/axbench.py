"""Features steered and judged per second, against loops of `transformers.generate` with a forward hook.

Pinned: the default model and its shipped SAE at resid_post.15, features that have examples, relative doses, shipped
instructions, greedy answers of equally many tokens. Both sides add the direction at the same positions, read how likely
the unsteered model finds each answer, and give it to the same judge (`rules`).

- `ratio`: features per second over those of a loop that writes one answer at a time.
- `batched_ratio`: the same over a loop that writes the answers to all instructions side by side, a call for each
  feature and dose.
- `same_texts`: share of answers that equal the loop's, letter for letter; others part at near-ties.

Figures are medians over the repeats of per-repeat ratios; loops are timed on `--looped` features.

    python benchmarks/axbench.py --json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from figures import arguments, device_options, measured_on, medians, print_result, seconds

from trimtab.dictionaries import load_dictionary
from trimtab.interpreting import Meaning, ToRate, make_feature_judge
from trimtab.interpreting.axbench import Aim, feature_concepts
from trimtab.interpreting.axbench.writing import Writer
from trimtab.interpreting.instructions import read_instructions
from trimtab.judges import Unjudged
from trimtab.lm import DecodeConfig, LanguageModel, load_model


class Loop:
    """What one writes by hand: a hook on a layer, `generate`, and a forward pass for the likelihood.

    Args:
        model: the model.
        layer: whose output is steered.
        prompts: token ids.
        tokens: of each answer.
    """

    def __init__(self, model: LanguageModel, layer: int, prompts: Sequence[list[int]], tokens: int) -> None:
        self.model, self.layer, self.prompts, self.tokens = model, layer, prompts, tokens

    @torch.no_grad()
    def answers(self, prompts: Sequence[list[int]], direction: torch.Tensor, dose: float) -> list[str]:
        """Answers to some prompts side by side."""
        model = self.model
        longest = max(map(len, prompts))
        ids = torch.tensor([[model.pad_id] * (longest - len(row)) + row for row in prompts], device=model.device)
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
        mask = torch.tensor(mask, device=model.device)

        def add(_module: object, _inputs: object, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x[:, -1] += dose * x[:, -1].norm(dim=-1, keepdim=True) * direction
            return output

        handle = model.layout.layers[self.layer].module.register_forward_hook(add)
        try:
            ids = model.hf.generate(
                ids, attention_mask=mask, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False,
                pad_token_id=model.pad_id,
            )  # fmt: skip
        finally:
            handle.remove()
        new = ids[:, longest:]
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        logits = model.hf(ids, attention_mask=mask, logits_to_keep=self.tokens + 1).logits[:, :-1]
        logits.float().log_softmax(-1).gather(-1, new[..., None]).mean(1)
        return [model.decode_ids(row) for row in new.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="default")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--looped", type=int, default=1, help="features that the loops are timed on")
    parser.add_argument("--dose", type=float, nargs="+", default=[0.2, 0.4, 0.8])
    parser.add_argument("--instructions", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    device_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    sae = load_dictionary(args.sae, model=model, any_model=True, device=args.device)
    assert sae.feature_examples is not None
    ids = sae.feature_examples.live[:: max(1, len(sae.feature_examples.live) // args.features)][: args.features]
    judge = make_feature_judge("rules", disjoint=False)
    explained = judge.explain([concept.exemplars for concept in feature_concepts(sae.feature_examples, ids.tolist())])
    kept = [(i, meaning) for i, meaning in zip(ids.tolist(), explained, strict=True) if isinstance(meaning, Meaning)]
    instructions, site = read_instructions(n=args.instructions), model.site(sae.info.site)
    config = DecodeConfig(max_new_tokens=args.tokens, temperature=0, batch_size=args.batch, stop_at_eos=False)
    writer = Writer(model, site, instructions, config, chat=True, positions="generated", unit="relative")
    unsteered = writer.unsteered
    _ = writer.ordinary
    directions = sae.directions.detach().float()
    loop = Loop(model, site.layer, writer.prompts, args.tokens)
    written: dict[str, list[str]] = {}

    def rate(meaning: Meaning, texts: Sequence[str]) -> None:
        asked = [
            ToRate(meaning=meaning, instruction=instruction, text=text, unsteered=own)
            for instruction, text, own in zip(instructions.all, texts, unsteered, strict=True)
        ]
        assert not any(isinstance(one, Unjudged) for one in judge.rate(asked))

    def ours() -> None:
        aims = [Aim(directions[i], 1.0) for i, _ in kept]
        found = writer.under_directions(aims, [args.dose] * len(aims))
        for (_, meaning), by_dose in zip(kept, found, strict=True):
            for texts in by_dose:
                rate(meaning, [one.text for one in texts])
        written["ours"] = [one.text for by_dose in found[: args.looped] for texts in by_dose for one in texts]

    def looped(side_by_side: bool) -> None:
        written["loop"] = []
        for i, meaning in kept[: args.looped]:
            for dose in args.dose:
                groups = [loop.prompts] if side_by_side else [[prompt] for prompt in loop.prompts]
                texts = [text for some in groups for text in loop.answers(some, directions[i], dose)]
                rate(meaning, texts)
                written["loop"] += texts

    sides: dict[str, tuple[Callable[[], None], int]] = {
        "ours": (ours, len(kept)),
        "loop": (lambda: looped(False), min(args.looped, len(kept))),
        "batched_loop": (lambda: looped(True), min(args.looped, len(kept))),
    }
    per_second: dict[str, list[float]] = {name: [] for name in sides}
    same: list[float] = []
    for repeat in range(args.repeats):
        for name in list(sides) if repeat % 2 == 0 else list(reversed(sides)):
            run, count = sides[name]
            per_second[name].append(count / seconds(run, args.device))
            if name == "loop" and "ours" in written:
                pairs = list(zip(written["ours"], written["loop"], strict=True))
                same.append(sum(a == b for a, b in pairs) / len(pairs))
    figures = {
        "ratio": ([a / b for a, b in zip(per_second["ours"], per_second["loop"], strict=True)], 2),
        "batched_ratio": ([a / b for a, b in zip(per_second["ours"], per_second["batched_loop"], strict=True)], 2),
        **{f"{name}_features_per_second": (rates, 4) for name, rates in per_second.items()},
    }
    result = {
        **medians(figures), "same_texts": round(min(same), 3) if same else None, "features": len(kept),
        "doses": len(args.dose), "instructions": args.instructions, "tokens": args.tokens, "batch": args.batch,
        "repeats": args.repeats, "dtype": args.dtype, **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
