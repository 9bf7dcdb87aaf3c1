"""Speed of examples: windows of all features of an SAE in one pass over text, against a harvest of the same text.

Pinned: the default model and its SAE (5,120 features), the sample text that the package ships (over and over), context
256, batches of 8 sequences, 30 windows of 32 tokens per feature.

- `ratio`: tokens per second of `examples_of_text`, over those of `harvest` at the same site. Both run the same forward
  passes; a harvest then writes its rows to disk, examples encode them and keep windows and statistics.
- `cpu_ratio`: the same by processor time, which a machine that is shared with others does not distort.
- `forwards`: the share of the examples' processor time that is spent in forward passes. It is measured within the same
  passes, so that load that comes and goes does not matter; `ratio` is at least this where a harvest writes for nothing.
- `rows_ratio`: rows per second of `examples_of_harvest`, over those of the encoder alone on the same rows.

Both sides compute in the same dtype on the same threads. Measurements alternate (harvest, examples, harvest); figures
are medians over the repeats of per-repeat ratios, examples being compared with the mean of the harvests before and
behind them.

    python benchmarks/examples.py --json
    python benchmarks/examples.py --autocast --json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from figures import Taken, arguments, device_options, measured_on, medians, print_result, spread, timed
from harvest import MODEL, read_corpus

from trimtab.activations import HarvestOptions, harvest
from trimtab.activations.forwards import Forwards
from trimtab.activations.packing import SequenceBatch
from trimtab.dictionaries import load_dictionary
from trimtab.features import ExampleOptions, examples_of_harvest, examples_of_text
from trimtab.features.example_rows import ShardBlocks
from trimtab.lm import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="catalogue name or directory")
    parser.add_argument("--sae", default="default", help="an SAE of the model")
    parser.add_argument("--text", nargs="*", default=[], help="other text than the sample")
    parser.add_argument("--tokens", type=int, default=64_000, help="tokens of text per measurement")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--windows", type=int, default=10, help="of each of three kinds, per feature")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 matrix products on both sides")
    device_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory to write in, on the disk to measure (default: temporary)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    sae = load_dictionary(args.sae, model=model, device=args.device)
    site = sae.info.site
    corpus = read_corpus(model, args.text, args.tokens)
    read = {"context": args.context, "batch_size": args.batch, "autocast": args.autocast}
    options = ExampleOptions(top=args.windows, weighted=args.windows, random=args.windows, **read)

    def harvested(directory: str) -> Taken:
        return timed(lambda: harvest(model, [site], corpus, directory, HarvestOptions(holdout=0, **read)), args.device)

    def harvested_anew() -> Taken:
        with tempfile.TemporaryDirectory(dir=args.out) as directory:
            return harvested(directory)

    def collected() -> Taken:
        return timed(lambda: examples_of_text(model, [sae], corpus, options), args.device)

    in_forwards = 0.0
    forward = Forwards._run

    def timed_forward(self: Forwards, batch: SequenceBatch) -> object:
        nonlocal in_forwards
        start = time.process_time()
        rows = forward(self, batch)
        in_forwards += time.process_time() - start
        return rows

    Forwards._run = timed_forward  # type: ignore[assignment, method-assign]
    ratio, cpu_ratio, rows_ratio, rates, harvest_rates, forwards = [], [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=args.out) as kept:
        harvested(kept)  # memory is allocated, pages are mapped
        collected()
        blocks = [block for step in ShardBlocks([Path(kept)], [site]).read(0) for block in step]
        rows = [block.rows[site].to(args.device, torch.float32) for block in blocks]
        for _ in range(args.repeats):
            before, in_forwards = harvested_anew(), 0.0
            mine = collected()
            forwards.append(in_forwards / mine.cpu)
            behind = harvested_anew()
            ratio.append((before.wall + behind.wall) / 2 / mine.wall)
            cpu_ratio.append((before.cpu + behind.cpu) / 2 / mine.cpu)
            rates.append(len(corpus.tokens) / mine.wall)
            harvest_rates.append(2 * len(corpus.tokens) / (before.wall + behind.wall))
            encoded = timed(lambda: [sae.encode(x) for x in rows], args.device)
            read_back = timed(
                lambda: examples_of_harvest([Path(kept)], [sae], options, tokenizer=model.tokenizer), args.device
            )
            rows_ratio.append(encoded.wall / read_back.wall)

    result = {
        **medians({
            "ratio": (ratio, 3), "cpu_ratio": (cpu_ratio, 3), "forwards": (forwards, 3),
            "rows_ratio": (rows_ratio, 3),
            "tokens_per_second": (rates, 0),
        }),
        "harvest_tokens_per_second": spread(harvest_rates, 0),
        "rows": sum(map(len, rows)), "tokens": len(corpus.tokens), "features": sae.n_features,
        "windows": 3 * args.windows, "context": args.context, "batch": args.batch, "site": site, "model": args.model,
        "sae": args.sae, "autocast": args.autocast, "dtype": args.dtype, "repeats": args.repeats,
        **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
