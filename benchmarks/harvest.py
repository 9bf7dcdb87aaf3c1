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
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from figures import Taken, arguments, device_options, measured_on, medians, print_result, spread, timed
from torch import nn

from trimtab.activations import Document, HarvestOptions, TokenisedCorpus, harvest, read_documents, tokenise
from trimtab.activations.sequences import SPLITS, batch_order, pack_splits
from trimtab.lm import LanguageModel, Site, capture, load_model
from trimtab.lm.batch import TokenBatch

MODEL, SITES = "smollm2-135m-instruct", ("resid_post.3", "resid_post.7", "resid_post.11", "resid_post.15")


def read_corpus(model: LanguageModel, text: Sequence[str], tokens: int) -> TokenisedCorpus:
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


class Harvests:
    """Harvests of a corpus, and the plain forward passes that they cannot do without.

    Args:
        model: of the Llama family.
        sites: the last one is where the plain passes end.
        corpus: what is read.
        options: how.
        out: directory to write in; None for a temporary one.
    """

    def __init__(
        self, model: LanguageModel, sites: Sequence[Site], corpus: TokenisedCorpus, options: HarvestOptions,
        out: Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.sites, self.corpus, self.options, self.out = model, sites, corpus, options, out
        packed = pack_splits(corpus, options)
        self.batches = [
            packed[split].batch(b).tokens for split in SPLITS for b in batch_order(packed[split], options, split)
        ]
        self.tokens = sum(batch.size for batch in self.batches)
        self._decoder = truncated(model, sites[-1])

    def _forward(self, ids: np.ndarray) -> torch.Tensor:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.options.autocast):
            placed = torch.from_numpy(ids).to(self.model.device, torch.long)
            return self._decoder(input_ids=placed, use_cache=False).last_hidden_state

    def plain(self) -> Taken:
        """The forward passes alone."""

        def run() -> None:
            for ids in self.batches:
                self._forward(ids)

        return timed(run, self.model.device)

    def harvested(self, sites: Sequence[Site]) -> Taken:
        """From tokens to shards of some sites."""
        with tempfile.TemporaryDirectory(dir=self.out) as directory:
            return timed(
                lambda: harvest(self.model, list(sites), self.corpus, directory, self.options), self.model.device
            )

    def same_activations(self) -> bool:
        """Whether the plain passes compute what is harvested."""
        ids = torch.from_numpy(self.batches[0]).to(self.model.device, torch.long)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.options.autocast):
            read = capture(self.model, TokenBatch.full(ids), [self.sites[-1]])[self.sites[-1]]
        return bool(torch.equal(read, self._forward(self.batches[0])))


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
    device_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory to write in, on the disk to measure (default: temporary)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    sites = [model.site(name) for name in args.sites]
    corpus = read_corpus(model, args.text, args.tokens)
    options = HarvestOptions(
        context=args.context, batch_size=args.batch, shard_rows=args.shard_rows, autocast=args.autocast
    )
    harvests = Harvests(model, sites, corpus, options, args.out)
    plain, harvested = harvests.plain, harvests.harvested
    tokens, same = harvests.tokens, harvests.same_activations()
    plain()  # memory is allocated, pages are mapped
    harvested(sites)
    ratio, cpu_ratio, sites_ratio, rates, plain_rates = [], [], [], [], []
    for _ in range(args.repeats):
        before, alone, behind, together = plain(), harvested(sites[-1:]), plain(), harvested(sites)
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
        "tokens": tokens, "batches": len(harvests.batches), "context": args.context, "batch": args.batch,
        "shard_rows": args.shard_rows, "sites": [str(site) for site in sites], "repeats": args.repeats,
        "model": args.model, "dtype": args.dtype, "autocast": args.autocast,
        **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
