"""Speed of the two stages of `find`: gradients of all features, and exact scores by edited forwards.

Pinned: the default model, its shipped SAE (5,120 features at resid_post.15), 20 pairs of texts of 24 tokens out of the
sample text that ships, one dose.

- `ratio`: the time that the exact stage would take for every feature over that of the gradient stage, which gives the
  effects of all of them. The exact stage is timed on `--exact` features, and its time per feature is multiplied.
- `forwards`: the gradient stage's time over that of plain forward passes of the same texts, logits included.
- `of_floor`: the time that the matrix products above the site and of the head would take at the machine's rate, over
  that of the exact stage. The rate is measured before and after, on products of the exact stage's own shapes.

Figures are medians over the repeats of per-repeat ratios.

    python benchmarks/find.py --json
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
from figures import arguments, device_options, measured_on, print_result, seconds
from score_features import MODEL, SITE, MatrixRate, weights_above

from trimtab.activations.text import read_documents, sample_text, split_text
from trimtab.dictionaries import load_dictionary
from trimtab.finding import Texts, first_order
from trimtab.finding.passes import LOGITS, batches, run
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import PromptCache, load_model
from trimtab.steering import DirectionTable

PAIRS, TOKENS, DOSE = 20, 24, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=int, default=56, help="features that are scored exactly per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    device_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_num_threads(args.threads)
    model = load_model(MODEL, dtype=args.dtype, device=args.device)
    sae, site = load_dictionary("default", model=model, device=args.device), model.site(SITE)
    parts = [part for one in read_documents([sample_text()]) for part in split_text(one.text, 400)]
    texts = [text for text in parts if len(text.split()) > TOKENS][: 2 * PAIRS]
    examples = Texts(wanted=tuple(texts[::2]), unwanted=tuple(texts[1::2]), text_tokens=TOKENS).examples(model)
    answered, cache, tables = examples.answered, PromptCache(model), {site: DirectionTable.of(sae)}
    scores = scorer(model, examples, [site], cache)
    edits = [SteeringEdit((Part(site, i, DOSE),)) for i in range(args.exact)]

    @torch.no_grad()
    def forward() -> None:
        for part in batches(model, answered):
            run(model, [answered[i] for i in part], cache)

    def gradient() -> None:
        first_order(model, {site: sae}, examples, cache=cache)

    def exact() -> None:
        scores.effects(tables, edits)

    weights = list(weights_above(model, site.layer))
    tokens = sum(len(one.answer) for one in answered)
    operations = 2 * sum(weight.numel() for weight in weights) * tokens * args.exact
    products = MatrixRate(weights, max(1, min(args.exact, LOGITS // (TOKENS * model.vocab_size))) * TOKENS)
    for warm_up in (forward, gradient, products):
        warm_up()

    ratio, forwards, of_floor, took = [], [], [], []
    for _ in range(args.repeats):
        plain, all_features = seconds(forward, args.device), seconds(gradient, args.device)
        before = seconds(lambda: [products() for _ in range(3)], args.device)
        one_by_one = seconds(exact, args.device)
        after = seconds(lambda: [products() for _ in range(3)], args.device)
        rate = 6 * products.operations / (before + after)
        ratio.append(one_by_one / args.exact * sae.n_features / all_features)
        forwards.append(all_features / plain)
        of_floor.append(operations / rate / one_by_one)
        took.append(all_features)

    result = {
        "ratio": round(statistics.median(ratio), 1),
        "forwards": round(statistics.median(forwards), 2),
        "of_floor": round(statistics.median(of_floor), 3),
        "gradient_seconds": round(statistics.median(took), 3),
        "ratio_range": [round(min(ratio), 1), round(max(ratio), 1)],
        "forwards_range": [round(min(forwards), 2), round(max(forwards), 2)],
        "of_floor_range": [round(min(of_floor), 3), round(max(of_floor), 3)],
        "features": sae.n_features, "examples": len(examples), "tokens": tokens, "exact": args.exact,
        "repeats": args.repeats, "model": MODEL, "site": SITE, "dtype": args.dtype,
        **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
