"""Speed of a harvest: from tokens to checked shards on disk, against the forward passes that it cannot do without.

Pinned: the default model, the sample text that the package ships (over and over), context 256, batches of 8 sequences.

- `ratio`: tokens per second of `harvest`, over those of a plain Hugging Face model on the same batches: its layers cut
  off behind the last site, no final norm, no head, no hooks, nothing kept. A harvest does those passes and also packs,
  filters, converts to bfloat16, shuffles, writes, syncs and checksums; 1 would be all of that for nothing.
- `cpu_ratio`: the same by processor time, which a machine that is shared with others does not distort; what the harvest
  waits for (the disk) is not in it.
- `sites_ratio`: tokens per second of a harvest of several sites in one pass, over those of the last of them alone,
  by processor time.

Both sides compute in the same dtype on the same threads (--autocast: bfloat16 matrix products on both). Measurements
alternate (plain, one site, several sites, plain) and figures are medians over the repeats of per-repeat ratios, a
harvest being compared with the mean of the plain passes before and behind it.

    python benchmarks/harvest.py --json
    python benchmarks/harvest.py --autocast --json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from figures import measured_on, medians, print_result, spread
from torch import nn

from trimtab.activations import Document, HarvestOptions, TokenisedCorpus, harvest, read_documents, tokenise
from trimtab.activations.sequences import SPLITS, batch_order, pack_splits
from trimtab.lm import LanguageModel, Site, capture, load_model
from trimtab.lm.batch import TokenBatch

MODEL, SITES = "smollm2-135m-instruct", ("resid_post.3", "resid_post.7", "resid_post.11", "resid_post.15")


class Taken(NamedTuple):
    """Seconds that something took."""

    wall: float
    cpu: float


def timed(run: Callable[[], object]) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def read_corpus(model: LanguageModel, text: list[str], tokens: int) -> TokenisedCorpus:
    if text:
        return tokenise(read_documents(text), model.tokenizer, limit_tokens=tokens)
    with resources.as_file(resources.files("trimtab") / "assets" / "sample_text") as sample:
        documents = list(read_documents([sample]))
    copies = (Document(f"copy-{n}-{d.id}", d.text, d.source) for n in itertools.count() for d in documents)
    return tokenise(copies, model.tokenizer, limit_tokens=tokens)


def truncated(model: LanguageModel, site: Site) -> nn.Module:
    """The model's own decoder without the layers above the site, its last norm and its head; weights are shared."""
    decoder = copy.copy(model.hf.base_model)
    decoder._modules = dict(decoder._modules)
    decoder.layers = nn.ModuleList(list(decoder.layers)[: site.layer + 1])
    decoder.norm = nn.Identity()
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="catalogue name or directory, of the Llama family")
    parser.add_argument("--sites", nargs="+", default=SITES, help="the last one is harvested alone, too")
    parser.add_argument("--text", nargs="*", default=[], help="other text than the sample")
    parser.add_argument("--tokens", type=int, default=32_000, help="tokens of text per measurement")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard-rows", type=int, default=HarvestOptions.shard_rows)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 matrix products on both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory to write in, on the disk to measure (default: temporary)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    sites = [model.site(name) for name in args.sites]
    corpus = read_corpus(model, args.text, args.tokens)
    options = HarvestOptions(
        context=args.context, batch_size=args.batch, shard_rows=args.shard_rows, autocast=args.autocast
    )
    packed = pack_splits(corpus, options)
    batches = [packed[split].batch(b).tokens for split in SPLITS for b in batch_order(packed[split], options, split)]
    tokens = sum(batch.size for batch in batches)
    decoder = truncated(model, sites[-1])

    def forward(ids: np.ndarray) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.autocast):
            placed = torch.from_numpy(ids).to(model.device, torch.long)
            return decoder(input_ids=placed, use_cache=False).last_hidden_state

    def plain() -> None:
        for ids in batches:
            forward(ids)

    def harvested(chosen: list[Site]) -> Taken:
        with tempfile.TemporaryDirectory(dir=args.out) as directory:
            return timed(lambda: harvest(model, chosen, corpus, directory, options))

    ids = torch.from_numpy(batches[0]).to(model.device, torch.long)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.autocast):
        read = capture(model, TokenBatch.full(ids), [sites[-1]])[sites[-1]]
    same = bool(torch.equal(read, forward(batches[0])))  # the plain model computes what is harvested

    plain()  # memory is allocated, pages are mapped
    harvested(sites)
    ratio, cpu_ratio, sites_ratio, rates, plain_rates = [], [], [], [], []
    for _ in range(args.repeats):
        before, alone, behind, together = timed(plain), harvested(sites[-1:]), timed(plain), harvested(sites)
        ratio.append((before.wall + behind.wall) / 2 / alone.wall)
        cpu_ratio.append((before.cpu + behind.cpu) / 2 / alone.cpu)
        sites_ratio.append(alone.cpu / together.cpu)
        rates.append(tokens / alone.wall)
        plain_rates.append(2 * tokens / (before.wall + behind.wall))

    result = {
        **medians({
            "ratio": (ratio, 3), "cpu_ratio": (cpu_ratio, 3), "sites_ratio": (sites_ratio, 3),
            "tokens_per_second": (rates, 0),
        }),
        "plain_tokens_per_second": spread(plain_rates, 0),
        "same_activations": same,
        "tokens": tokens, "batches": len(batches), "context": args.context, "batch": args.batch,
        "shard_rows": args.shard_rows, "sites": [str(site) for site in sites], "repeats": args.repeats,
        "model": args.model, "dtype": args.dtype, "autocast": args.autocast, "device": args.device,
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(),
        **measured_on(model.device.type),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
