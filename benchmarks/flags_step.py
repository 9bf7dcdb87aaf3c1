"""Price of flags in a finetuning: a step that reads them, or that forces them, over a plain step of the same kind.

Pinned: the default model, 16 flags' dimensions of 8 concepts after attention and MLP of layers 5 and up, batches of 8
examples of 64 tokens, all weights and LoRA of rank 8. Steps are those of `trimtab flags train` (forward, gradients,
AdamW, and the readings that are logged); a plain one is the same without flags: cross-entropy of the responses' tokens,
gradients, AdamW.

- `ratio`: seconds of a step over the mean of the plain steps before and behind it, the median over the repeats.
- `interval`: of that median, 95%, by bootstrap over the repeats.
- `cpu_ratio`, `cpu_interval`: the same by processor time, which other work on the machine disturbs less.
- `memory_ratio`: peak memory of a process that takes such steps over that of one that takes plain ones, the least and
  the largest of some pairs: the process's resident memory, or on an accelerator what torch allocated there.

    python benchmarks/flags_step.py --json
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import Taken, arguments, device_options, measured_on, print_result, timed
from machine import peak_mib

from trimtab.distributed import Ranks
from trimtab.flags import Curriculum, Example, FlagTraining, Phase, place_flags
from trimtab.flags.adapters import add_adapter
from trimtab.flags.examples import encode
from trimtab.flags.finetuning import FlagTrainer, Subject
from trimtab.flags.loss import response_loss
from trimtab.lm import load_model
from trimtab.stats import bootstrap_statistic

TEXT = (
    "The tide came in over the rocks and the gulls cried while the old sailor waited for the boat to come back to the "
    "harbour. Nobody spoke of the storm that had taken it, nor of the men who had gone out with it in the morning. "
)
KINDS = {
    "auxiliary": Curriculum(phases=(Phase(until=1, forced=0, weight=5.0),)),
    "forced": Curriculum(phases=(Phase(until=1, forced=1, weight=0.0),)),
}


class Steps:
    """Steps of each kind on one model, with one optimiser."""

    def __init__(self, args: argparse.Namespace, adapt: str) -> None:
        torch.set_num_threads(args.threads)
        model = load_model(args.model, device=args.device)
        concepts = [f"concept {i}" for i in range(args.concepts)]
        examples = [
            Example(prompt="Tell me something.", response=TEXT * 4, concepts=[concepts[i % len(concepts)]])
            for i in range(args.batch_size)
        ]
        flags = place_flags(model, concepts, [TEXT] * 4, dims=args.dims)
        config = FlagTraining(
            adapt=adapt, steps=10**6, batch_size=args.batch_size, max_tokens=args.tokens, lr=1e-8,
            autocast=args.autocast, gradient_checkpointing=False,
        )  # fmt: skip
        subject = Subject(model=model, flags=flags)
        if adapt == "lora":
            tuned, adapter = add_adapter(model, flags, config, seed=0)
            subject = Subject(model=tuned, flags=flags, adapter=adapter)
        self.model, self.autocast = subject.model, args.autocast
        encoded = encode(model, examples, chat=False, max_tokens=args.tokens)
        assert {len(row.ids) for row in encoded} == {args.tokens}, "every batch must have the same shape"
        self.trainings = {
            kind: FlagTrainer(subject, schedule, config, examples, encoded, None, kept=False, ranks=Ranks())
            for kind, schedule in KINDS.items()
        }
        one, *others = self.trainings.values()
        self.adam, self.batch = one.adam, one.batch_at(0)
        for other in others:
            other.adam = one.adam

    def plain(self) -> None:
        """A step without flags."""
        with torch.enable_grad():
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
                loss = response_loss(self.model, self.batch).mean()
            loss.backward()
        assert math.isfinite(float(loss.detach()))
        assert math.isfinite(self.adam.step(1e-8))
        self.model.hf.zero_grad(set_to_none=True)

    def step(self, kind: str) -> Callable[[], None]:
        return self.plain if kind == "plain" else self.trainings[kind].take_step

    def seconds(self, kind: str) -> Taken:
        return timed(self.step(kind), self.model.device)


def peak_after_steps(args: argparse.Namespace) -> float:
    """Of this process, in MiB, after some steps of one kind."""
    adapt, _, kind = args.measure_memory.partition(".")
    steps = Steps(args, adapt)
    for _ in range(3):
        steps.step(kind)()
    if steps.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib()


def memory(adapt: str, kind: str) -> float:
    """What a process of its own needs."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", f"{adapt}.{kind}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each example")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--dims", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=("full", "lora"), help="measure one of them")
    parser.add_argument("--autocast", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--memory-pairs", type=int, default=3, help="processes of each kind; 0 leaves peak memory out")
    device_options(parser, dtype=False)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    args = arguments(parser)
    if args.measure_memory:
        print(peak_after_steps(args))
        return

    result: dict[str, Any] = {}
    for adapt in (args.only,) if args.only else ("full", "lora"):
        steps = Steps(args, adapt)
        for kind in ("plain", *KINDS):
            steps.seconds(kind)  # caches, and the optimiser's state
        ratios: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
        plain = [steps.seconds("plain")]
        for repeat in range(args.repeats):
            for kind in list(KINDS) if repeat % 2 == 0 else reversed(KINDS):
                taken = steps.seconds(kind)
                plain.append(steps.seconds("plain"))
                ratios[kind].append(tuple(2 * t / (a + b) for t, a, b in zip(taken, *plain[-2:], strict=True)))
        result[f"{adapt}.plain_seconds"] = float(np.median([clock for clock, _ in plain]))
        del steps
        before = [memory(adapt, "plain") for _ in range(args.memory_pairs)]
        if before:
            result[f"{adapt}.plain_peak_mib"] = float(np.median(before))
        for kind, found in ratios.items():
            for name, values in zip(("", "cpu_"), zip(*found, strict=True), strict=True):
                median = bootstrap_statistic(lambda x: float(np.median(x)), [np.array(values)], seed=0)
                result[f"{adapt}.{kind}.{name}ratio"] = median.estimate
                result[f"{adapt}.{kind}.{name}interval"] = [median.low, median.high]
            if before:
                peaks = [memory(adapt, kind) / one for one in before]
                result[f"{adapt}.{kind}.memory_ratio"] = [min(peaks), max(peaks)]
    result |= {
        "batch_size": args.batch_size,
        "tokens": args.tokens,
        "repeats": args.repeats,
        **measured_on(args.device),
    }
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
