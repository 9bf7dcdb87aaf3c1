"""Speed of SAE training: trimtab beside SAELens, dictionary_learning and sparsify, and beside the floor.

Every library trains with its own loop, in its own environment (`peers/README.md`), on the same rows in memory, with the
same sizes, threads, batches, float32, learning rates (Adam) and number of rows. They take turns of a few steps; ratios
are medians over the pairs of turns. After equal rows every SAE is measured on the same held-out rows by one function.

- `topk`: one TopK SAE. `of_floor` is the time of the encoder's product alone over that of the whole step.
- `<architecture>`: each other architecture beside SAELens's own.
- `bank`: 30 SAEs, five architectures at six sparsities, from text to files, beside SAELens's MultiSAETrainingRunner.
- `density`: sparse and dense execution of a step's products, by the share of active pairs.

On an accelerator `gpu.py` compares in less time.

    python benchmarks/train_sae.py --json
    python benchmarks/train_sae.py --shards runs/harvest --only topk
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from figures import arguments as read_arguments
from figures import device_options, measured_on
from sae_training.bank import bank_table, measure_bank
from sae_training.density import density_table, measure_density
from sae_training.job import Job
from sae_training.rows import write_rows
from sae_training.tables import training_table
from sae_training.turns import BENCHMARKS, Measured, Trainer, ratios, take_turns

import trimtab

PEERS = ("saelens", "dictionary_learning", "sparsify")
OWN = {"ours": "ours.py", "floor": "floor.py"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One comparison."""

    name: str
    architecture: str
    d: int
    n: int
    k: int
    peers: tuple[str, ...]
    floor: bool = False
    precision: str = "auto"


SECTIONS = (
    Section(name="topk", architecture="topk", d=576, n=8192, k=32, peers=PEERS, floor=True),
    Section(name="topk640", architecture="topk", d=640, n=8192, k=32, peers=PEERS, floor=True),
    *(
        Section(name=name, architecture=name, d=576, n=8192, k=32, peers=("saelens",))
        for name in ("batchtopk", "matryoshka", "relu", "gated", "jumprelu")
    ),
)

WHOLE = {"bank": (measure_bank, bank_table), "density": (measure_density, density_table)}
"""Sections of another kind: how each is measured and shown."""


def trainer(name: str) -> Trainer | None:
    """A library's script and Python; None if its environment is not there."""
    if name in OWN:
        return Trainer(Path(sys.executable), BENCHMARKS / "sae_training" / OWN[name])
    peer = BENCHMARKS / "peers"
    python = peer / ".venvs" / name / "bin" / "python"
    return Trainer(python, peer / name / "train_saes.py") if python.exists() else None


def run_section(section: Section, options: argparse.Namespace, folder: Path) -> dict[str, Measured]:
    """Let everyone train what the section says."""
    steps = options.warmup_steps + options.repeats * options.turn_steps + 1
    job = Job(
        rows=str(folder / f"rows{section.d}"),
        architecture=section.architecture,
        d=section.d,
        n=section.n,
        k=section.k,
        batch=options.batch,
        steps=steps,
        rising_steps=max(1, steps // 16),
        threads=options.threads,
        device=options.device,
        precision=section.precision,
    )
    if not Path(job.rows).exists():
        write_rows(Path(job.rows), d=job.d, count=job.steps * job.batch, heldout=options.heldout, shards=options.shards)
    names = ["ours", *(("floor",) if section.floor else ()), *(p for p in section.peers if p in options.peers)]
    found = {name: trainer(name) for name in names}
    for name, one in found.items():
        if one is None:
            print(f"{name}: no environment in benchmarks/peers/.venvs, left out (see its README)", file=sys.stderr)
    present = {name: one for name, one in found.items() if one is not None}
    return take_turns(present, job, folder, warmup_steps=options.warmup_steps, turn_steps=options.turn_steps)


def figures(section: str, measured: dict[str, Measured]) -> dict[str, object]:
    """The section's figures under the names that `--json` prints."""
    ours = measured["ours"]
    found: dict[str, object] = {}
    for name, other in measured.items():
        if name == "floor":
            ratio = ratios(ours, other)
            found |= {f"{section}.of_floor": round(ratio.median, 3), f"{section}.of_floor_range": _rounded(ratio)}
        elif name != "ours":
            ratio = ratios(ours, other)
            found |= {f"{section}.vs_{name}": round(ratio.median, 2), f"{section}.vs_{name}_range": _rounded(ratio)}
    found[f"{section}.trainers"] = {
        name: {
            "rows_per_second": round(m.rate.median, 1),
            "rows_per_second_range": _rounded(m.rate, 1),
            "rows_per_cpu_second": round(m.cpu_rate, 1),
            **{key: round(v, 4) if isinstance(v, float) else v for key, v in dataclasses.asdict(m.outcome).items()},
        }
        for name, m in measured.items()
    }
    return found


def measure_section(section: Section, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """A comparison's figures; shown, too, unless they are to be JSON."""
    if options.quick:
        section = dataclasses.replace(section, d=section.d // 8, n=section.n // 16, k=8)
    if options.n:
        section = dataclasses.replace(section, n=options.n)
    measured = run_section(section, options, folder)
    if not options.json:
        print(training_table(section.name, measured), flush=True)
    return figures(section.name, measured)


def machine(options: argparse.Namespace) -> dict[str, object]:
    """What the figures were measured on, and with what."""
    return {
        **measured_on(options.device), "threads": options.threads, "trimtab": trimtab.__version__,
        "batch": options.batch, "n": options.n, "turns": options.repeats,
        "turn_steps": options.turn_steps, "warmup_steps": options.warmup_steps,
        "rows": "synthetic" if options.shards is None else "real", "heldout_rows": options.heldout,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*(section.name for section in SECTIONS), *WHOLE)
    parser.add_argument("--only", default="", help=f"comma-separated sections: {', '.join(known)}")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; empty: none")
    parser.add_argument("--shards", type=Path, help="a harvest's directory; without it, synthetic rows")
    parser.add_argument("--repeats", type=int, default=6, help="turns per library")
    parser.add_argument("--turn-steps", type=int, default=4)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--n", type=int, help="features, instead of each section's own")
    parser.add_argument("--heldout", type=int, default=16_384, help="held-out rows")
    parser.add_argument("--bank-tokens", type=int, default=20_480, help="activations that the bank is trained on")
    parser.add_argument("--bank-n", type=int, default=2048, help="features of every member of the bank")
    parser.add_argument("--bank-repeats", type=int, default=2, help="whole runs of the bank per library")
    parser.add_argument("--density-repeats", type=int, default=7, help="turns of sparse and dense execution")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    device_options(parser, dtype=False)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--json", action="store_true")
    options = read_arguments(parser)
    options.peers = tuple(p for p in options.peers.split(",") if p)
    options.only = set(filter(None, options.only.split(","))) or set(known)
    for what, unknown in (("section", options.only - set(known)), ("peer", set(options.peers) - set(PEERS))):
        if unknown:
            parser.error(f"unknown {what}: {', '.join(sorted(unknown))}")
    if options.quick:
        options.batch, options.heldout, options.repeats, options.turn_steps = 256, 512, 2, 2
        options.bank_tokens, options.bank_repeats, options.density_repeats = 4096, 1, 1
    return options


def measurements(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    """The figures of every section that was asked for, one after the other."""
    for section in SECTIONS:
        if section.name in options.only:
            yield measure_section(section, options, folder)
    for name, (measure, table) in WHOLE.items():
        if name in options.only:
            found = measure(options, folder)
            if found and not options.json:
                print(table(found), flush=True)
            yield found


def main() -> None:
    options = arguments()
    result: dict[str, object] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for found in measurements(options, Path(folder)):
                result |= found
    except KeyboardInterrupt:
        print("stopped; what was measured until now follows", file=sys.stderr)
    result["machine"] = machine(options)
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result["machine"]))


def _rounded(values: tuple[float, ...], digits: int = 2) -> list[float]:
    return [round(value, digits) for value in values[1:]]


if __name__ == "__main__":
    main()
