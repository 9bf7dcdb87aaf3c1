"""Everything that must be fast on an accelerator, in one table and under nine minutes.

Rows are synthetic and models have random weights in the shapes of SmolLM2-135M and Gemma 2 2B, so that nothing is
downloaded. Every figure is a rate, followed by its ratios over others that were measured in the same turns, and by
`of_floor`, its share of what the device's products or memory allow.

- `decode`: `generate`, the plain model's steps (one captured graph on CUDA), trimtab step by step and several steps
  ahead, static steering, a policy at every token; `lengths`: behind prompts of several lengths.
- `prompts`: prefill, and prompt caches filled and read, beside one plain forward pass.
- `harvest`, beside the truncated forward passes; `scoring` of features, beside the products above the site.
- `policy`: an iteration of 256 one-token rollouts.
- `launches`: kernels, graphs and waits of a decoding step; on a CPU torch's operations, by module.
- `kernels`: each kernel of trimtab's own beside torch's operations for the same.
- `leak`: what is in memory after 1,000 decodes, or as many as there is time for, beyond what was after 10.
- `training`: steps of every architecture in TF32, bfloat16 and float32, d 2,304, n 16,384, batch 4,096, beside a plain
  dense step (autograd, fused Adam; compiled, too, where that starts in time), trimtab's own that is not replayed as a
  graph and, where they can be imported, SAELens, dictionary_learning and sparsify; steps of the 30 members of a bank.

What fails is said in one line on stderr, and the rest goes on; what does not fit in memory is measured at half its
batch.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only training,decode
    python benchmarks/gpu.py --small --device cpu --dtype float32
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerator import activations, decoding, kernels, policies, prompts, training
from accelerator.sections import SMALL, Row, Section, Setup, Sizes, free_memory, run_section, say
from figures import arguments, device_options, measured_on

import trimtab

LIMIT = 525.0
"""Seconds in all, from the start of the program on."""


class Timed(NamedTuple):
    """A section, and the seconds that it may take."""

    parts: Section
    seconds: float


SECTIONS = {
    "decode": Timed(decoding.parts, 130),
    "lengths": Timed(decoding.length_parts, 25),
    "prompts": Timed(prompts.parts, 20),
    "harvest": Timed(activations.harvest_parts, 40),
    "scoring": Timed(activations.scoring_parts, 25),
    "policy": Timed(policies.parts, 20),
    "launches": Timed(decoding.launch_parts, 40),
    "kernels": Timed(kernels.parts, 25),
    "leak": Timed(decoding.leak_parts, 20),
    "training": Timed(training.parts, LIMIT),  # what the others have left
}


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"comma-separated sections: {', '.join(SECTIONS)}")
    device_options(parser)
    parser.set_defaults(device="cuda", dtype="bfloat16")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a try on any machine")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each section")
    options = arguments(parser, words)
    options.only = options.only.split(",") if options.only else [*SECTIONS]
    if unknown := sorted(set(options.only) - set(SECTIONS)):
        parser.error(f"unknown section: {', '.join(unknown)}")
    return options


def line(section: str, row: Row) -> str:
    """A row of the table."""
    over = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in row.over.items())
    floor = "" if row.of_floor is None else f"{row.of_floor:.3f}"
    more = ", ".join(f"{name} {value}" for name, value in row.more.items())
    rate = f"{row.rate:,.{0 if row.rate >= 100 else 2}f} {row.unit}"
    return f"| {section} | {row.what} | {rate} | {over} | {floor} | {more} |"


def main() -> None:
    began = time.monotonic()
    options = read_options()
    torch.set_grad_enabled(False)
    sizes = SMALL if options.small else Sizes()
    setup = Setup(device=options.device, dtype=options.dtype, sizes=sizes)
    result: dict[str, Any] = {
        "trimtab": trimtab.__version__, "dtype": options.dtype, **measured_on(options.device, options.dtype),
        "sizes": dataclasses.asdict(sizes),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "sizes"}))
    print("\n| section | what | rate | over | of floor | more |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name, section in SECTIONS.items():
        if name not in options.only:
            continue
        left = LIMIT - (time.monotonic() - began)
        result[name] = []
        seconds = left if options.small else min(section.seconds, left)
        for row in run_section(name, [*section.parts(setup)], options.device, seconds):
            print(line(name, row), flush=True)
            result[name].append(dataclasses.asdict(row))
        free_memory(options.device)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))
    say(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
