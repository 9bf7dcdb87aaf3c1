"""Pins what trimtab computes, so that a change that should move no number can show that it moved none.

Every pin is one command of the command line, run with fixed seeds and one thread in a temporary directory. What it
prints and writes is taken apart into named values, and each name's values are hashed: floats by their bits, tensors by
their bytes, tables by column, JSON by key. Wording, times, paths and versions are left out (`LEFT_OUT`). A pin's hash
is that of its names and their hashes. Readable numbers beside it are means (of tensors, of magnitudes).

    python benchmarks/pinned.py --write benchmarks/pinned.json      # record
    python benchmarks/pinned.py --against benchmarks/pinned.json    # compare; exits with 1 if a value differs
    PYTHONPATH=OTHER_CHECKOUT/src python benchmarks/pinned.py       # another checkout's numbers
    python benchmarks/pinned.py --only 'train-*' policy-evaluate

A comparison looks at the recorded names only, so new keys and columns may appear. Bits may differ between processors
and versions of torch: compare on the machine that recorded, or record the old code anew. `--data-root DIR` names the
directory of the benchmarks' official files; pins that need them are absent without it. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from machine import cpu_name
from safetensors.torch import load_file

TIMES = "seconds tokens_per_second rows_per_second charts/tokens_per_second charts/update_seconds created updated"
PLACES = "versions changed_versions machine made_by resumed config run sae table directory path"
WORDING = "advice convention description dose_note how missing note objective reason warnings why origins level method"
LEFT_OUT = {*TIMES.split(), *PLACES.split(), *WORDING.split(), "adam"}
"""Keys and columns that are not hashed, with all below them. `adam` of checkpoints goes by the order of parameters."""

RANKED = "--batch-size 200 --run @out --feature " + " ".join(map(str, range(0, 5120, 10)))
STEERED = "steer 'Yesterday I went to the' 'The captain' --max-new-tokens 8 --run @out"
TRAINED = "--activations @harvest --n-features 512 --l0 16 --batch-size 128 --rows 25600 --run @out"
POLICY = "--iterations 5 --samples 4 --validate-every 1 --initial-no-edit 0 --run @out"
ITEMS = "--train-items 32 --validation-items 16 --items-per-iteration 16"
EAGER = "--head decoder --headroom-items 0 --ppo.lr 0.01 --ppo.epochs 6"
MASKED = f"{POLICY} {ITEMS} --mask current --hidden 64 --headroom-items 2 --kl-penalty 0.02"
EVALUATED = "--kl-items 4 --n-random 6 --used 6 --finalists 3 --run @out"

PINS = {
    **{
        f"rank-{name}": f"rank --criterion {name} {RANKED}"
        for name in ("delta-confidence", "output-score", "kl", "max-activation", "firing-rate", "random")
    },
    "rank-options": "rank --criterion kl delta-confidence output-score --prefix 'Once upon a time' 'In 1890, the' "
    "--dose 5 --confidence-k 3 --n-tokens 5 --kl-direction base-steered --no-live-only --feature 1 2 3 5 8 13 21 "
    "--run @out",
    "steer-add": f"{STEERED} --feature 3547 329 --sweep 0.2 0.5 --temperature 0.8 --top-p 0.95 --samples 2",
    "steer-clamp": f"{STEERED} --feature 3547 329 --operation clamp --dose 0.5 1 --unit max_activation",
    "steer-ablate": f"{STEERED} --feature 2536 329 1684 --operation ablate",
    "steer-scale": f"{STEERED} --feature 2536 329 1684 --operation scale --dose 3",
    "steer-all": f"{STEERED} --feature 3547 329 --positions all --dose 20 --unit absolute --combine total --chat",
    "steer-replay": "steer --replay @steer-add",
    "harvest": "harvest --text text.jsonl --run @out --context 64 --holdout 0.2",
    **{
        f"train-{name}": f"train --arch {name} {TRAINED}"
        for name in ("topk", "batchtopk", "matryoshka", "relu", "panneal", "gated", "jumprelu")
    },
    "train-bank": "train --text text.jsonl --limit-documents 8 --live --site resid_post.3 --l0 8 16 "
    "--arch topk jumprelu --n-features 256 --batch-size 128 --rows 6400 --holdout 0.2 --seed 1 --run @out",
    "sae-info": "sae info @train-jumprelu/sae",
    "evaluate-core": "evaluate core --limit-tokens 700",
    "evaluate-ground-truth": "evaluate ground-truth --data-sets 1 --rows 20000 --heldout-rows 2000 --d 32 --n-true 48 "
    "--n-features 64 --n-parents 4 --n-children 2 --true-l0 3 --run @out",
    "headroom": "policy headroom --task ioi-mixture --sae @train-topk/sae --items 3 --dose 1",
    "headroom-decoding": "policy headroom --task ioi-mixture --items 2 --dose 1 --max-new-tokens 2 --n-candidates 3 "
    "--mask accumulated",
    "policy-train": f"policy train --task ioi-swapped --dose 1 {POLICY} {EAGER} {ITEMS}",
    "policy-evaluate": f"policy evaluate @policy-train {EVALUATED} --items 8 --train-items 16 --draws 2 "
    "--vector-steps 8 --lora-steps 8",  # all controls; the LoRA and the vector improve on this task
    "policy-seed0": f"policy train --task ioi-mixture --sae @train-topk/sae --dose 1 --seed 0 {MASKED}",
    "policy-seed1": f"policy train --task ioi-mixture --sae @train-topk/sae --dose 1 --seed 1 {MASKED}",
    "policy-evaluate-seeds": f"policy evaluate @policy-seed0 @policy-seed1 {EVALUATED} --items 8 --train-items 16 "
    "--draws 1 --headroom-items 2 --control random static gated corrsteer shuffled",
    "policy-compare": "policy compare @policy-train",
    "policy-analyze": "policy analyze @policy-seed0 --items 8 --branch-items 3 --branch-candidates 2 --branch-draws 2 "
    "--headroom-items 2 --layer-items 4 --dose-factor 0.5 1 --text-rows 512 --live-sample 16 --ablated 2",
    "policy-long": f"policy train --task ioi-mixture --dose 1 --head decoder --mask none {POLICY} --train-items 32 "
    "--max-new-tokens 3 --temperature 0.7 --validation-items 8 --items-per-iteration 8 --ppo.lr 0.003",
    "policy-evaluate-long": f"policy evaluate @policy-long {EVALUATED} --items 4 --train-items 8 --draws 1 "
    "--vector-steps 3 --lora-steps 3 --lora-positions all --control random static vector lora",
    "policy-options": "policy train --task bbq-ambiguous --data @data --task-option categories=Age --options-only "
    f"{POLICY} {EAGER} --train-items 12 --validation-items 8 --items-per-iteration 6",  # answers are letters
    "policy-evaluate-options": f"policy evaluate @policy-options {EVALUATED} --items 4 --train-items 8 --draws 1 "
    "--vector-steps 3 --lora-steps 3 --no-equal-kl --control random vector lora prompting letters",
    "headroom-refusals": "policy headroom --task xstest --data @data --items 3 --dose 0.5 --mask accumulated "
    "--n-candidates 3 --max-new-tokens 6",
}  # fmt: skip
"""Commands by pin. `@out` stands for the pin's own directory, `@PIN` for another's, which is made first, `@data` for
that of the official files."""
WRITES = {"policy-analyze": "policy-seed0/analysis"}
"""Where files are, if elsewhere than in the pin's own directory."""

SHOWN = {
    "rank": "features.score features.relative_dose",
    "steer --replay": "printed.n_edits printed.max_logp_difference",
    "steer": "tokens.token_logp tokens.kl_total edits.applied_dose",
    "harvest": "train-00000.resid_post.15.rows printed.train_rows",
    "train": "sae_weights.W_enc sae_weights.W_dec bank.explained_variance printed.explained_variance",
    "sae info": "printed.firing.l0 printed.firing.live",
    "evaluate core": "printed.metrics.ce_increase.estimate printed.metrics.explained_variance.estimate",
    "evaluate ground-truth": "printed.scored.scores.f1 printed.scored.scores.l0",
    "policy headroom": "printed.lines.unsteered.estimate printed.lines.random_ceiling.estimate",
    "policy train": "metrics.charts/reward metrics.losses/value_loss metrics.validation/reward",
    "policy evaluate": "evaluation_items.reward evaluation_items.kl edits.value",
    "policy compare": "printed.runs.reward printed.runs.unsteered",
    "policy analyze": "branch_forks.kl_local critic_curve.mean layer_doses.kl",
}
"""Names whose means are shown, by the first words of the command."""


class Commands:
    """Runs pins' commands in one directory, each once."""

    def __init__(self, directory: Path, data: Path | None) -> None:
        self.directory, self.data, self.values = directory, data and data.resolve(), functools.cache(self._values)
        paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)}
        write_text(directory / "text.jsonl")

    def _values(self, name: str) -> dict[str, list[Any]]:
        """A pin's values by name: of what its command prints and of the files that it writes."""
        for word in re.findall(r"@([\w-]+)", PINS[name]):
            if word in PINS:
                self.values(word)
        text = PINS[name].replace("@out", name).replace("@data", shlex.quote(str(self.data)))
        words = [word.removeprefix("@") for word in shlex.split(text)]
        print(f"  {name}: trimtab {shlex.join(words)}", file=sys.stderr)
        command, options = [sys.executable, "-m", "trimtab", *words, "--json"], {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=self.directory, env=self.environment, check=True, **options)
        found: defaultdict[str, list[Any]] = defaultdict(list)
        add_values(json.loads(done.stdout), "printed", found)
        for file in sorted((self.directory / WRITES.get(name, name)).rglob("*")):
            if file.suffix in READERS:
                add_values(READERS[file.suffix](file), file.stem, found)
        return found


def needs_data(name: str) -> bool:
    """Whether a pin's command, or one that it builds on, reads the official files."""
    words = re.findall(r"@([\w-]+)", PINS[name])
    return "data" in words or any(needs_data(word) for word in words if word in PINS)


WORDS = """the a old young grey quiet river house captain teacher garden letter winter ship road child village voice she
he they we walked found wrote saw kept lost gave never under with without and but when 17 1890 Paris Anna Tom money"""


def write_text(path: Path) -> None:
    """Documents of random words, which no version of trimtab changes."""
    draw, words = random.Random(0), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(40):
            sentences = [" ".join(draw.choice(words) for _ in range(draw.randint(5, 15))) for _ in range(14)]
            file.write(json.dumps({"text": ". ".join(sentence.capitalize() for sentence in sentences)}) + "\n")


READERS = {
    ".safetensors": load_file,
    ".parquet": lambda file: pq.read_table(file).to_pylist(),
    ".jsonl": lambda file: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()],
}


def add_values(value: Any, name: str, found: defaultdict[str, list[Any]]) -> None:
    """Take lists and mappings apart; what the parts of a list call the same goes under one name, in order."""
    if isinstance(value, dict):
        for key, part in value.items():
            paths = key == "runs" and all(isinstance(run, str) for run in part)
            if key.split(".")[0] not in LEFT_OUT and not paths:
                add_values(part, f"{name}.{key}", found)
    elif isinstance(value, list):
        for part in value:
            add_values(part, name, found)
    else:
        found[name].append(value)


def sha256(values: list[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update((value.hex() if isinstance(value, float) else json.dumps(value)).encode() + b"\n")
    return digest.hexdigest()


def mean(values: list[Any]) -> float | None:
    """Mean of the numbers among the values; of tensors, of magnitudes."""
    numbers = [float(v.abs().double().mean()) if isinstance(v, torch.Tensor) else v for v in values]
    numbers = [n for n in numbers if isinstance(n, int | float) and math.isfinite(n)]
    return sum(numbers) / len(numbers) if numbers else None


def pinned(pin: str, values: dict[str, list[Any]], names: list[str]) -> dict[str, Any]:
    """A pin's record: its hash, readable numbers, and the hash of each of the names."""
    shown = next(shown for start, shown in SHOWN.items() if PINS[pin].startswith(f"{start} ")).split()
    hashes = {name: sha256(values[name])[:12] for name in sorted(names) if name in values}
    numbers = {name.partition(".")[2]: number for name in shown if (number := mean(values.get(name, []))) is not None}
    return {"hash": sha256([*hashes.items()])[:16], "numbers": numbers, "names": hashes}


def difference(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What differs between two records of a pin, one line each."""
    lines = [f"{name} is gone" for name in old["names"] if name not in new["names"]]
    lines += [f"{name} differs" for name, was in old["names"].items() if new["names"].get(name, was) != was]
    lines = [*lines[:8], f"and {len(lines) - 8} more"] if len(lines) > 9 else lines
    both = [(name, was, new["numbers"][name]) for name, was in old["numbers"].items() if name in new["numbers"]]
    return lines + [f"mean {n}: {was:.9g} → {now:.9g} ({now - was:+.2g})" for n, was, now in both if now != was]


def facts() -> dict[str, Any]:
    """What bits may depend on besides the code."""
    packages = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "torchrl")
    return {
        "cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1,
        "python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages},
    }  # fmt: skip


def as_text(record: dict[str, Any]) -> str:
    """The record as JSON with one line for each pin."""
    pins = ",\n".join(f"  {json.dumps(name)}: {json.dumps(pin)}" for name, pin in record["pins"].items())
    return f'{{\n "facts": {json.dumps(record["facts"])},\n "pins": {{\n{pins}\n }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="pins by name or pattern")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="directory of the benchmarks' official files")
    parser.add_argument("--json", action="store_true", help="print the record, and the table to stderr")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the record")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a record")
    args = parser.parse_args()
    if unknown := [word for word in args.only if not fnmatch.filter(PINS, word)]:
        parser.error(f"no pin is called {unknown[0]}; there is {', '.join(PINS)}")
    old = json.loads(args.against.read_text(encoding="utf-8")) if args.against else {"facts": facts(), "pins": {}}
    record: dict[str, Any] = {"facts": facts(), "pins": {}}
    differences: dict[str, list[str]] = {}
    package, table = importlib.util.find_spec("trimtab"), sys.stderr if args.json else sys.stdout
    print(f"pinning {package and package.origin}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        commands = Commands(Path(directory), args.data_root)
        for name in [name for name in PINS if any(fnmatch.fnmatch(name, word) for word in args.only)]:
            before = sum(os.times()[2:4])  # of finished child processes
            if args.data_root is None and needs_data(name):
                print(f"{name:<24}absent", file=table)
                continue
            try:
                values = commands.values(name)
            except subprocess.CalledProcessError as error:
                differences[name] = [f"trimtab {shlex.join(error.cmd[3:])[:60]}…", *error.stderr.splitlines()[-1:]]
                continue
            was = old["pins"].get(name)
            pin = record["pins"][name] = pinned(name, values, list(was["names"] if was else values))
            if was and pin["hash"] != was["hash"]:
                differences[name] = difference(pin, was)
            numbers = "  ".join(f"{key} {value:.6g}" for key, value in pin["numbers"].items())
            seconds = sum(os.times()[2:4]) - before
            print(f"{name:<24}{pin['hash']:<18}{seconds:5.1f} s  {numbers}", file=table, flush=True)
    if args.json:
        print(json.dumps(record | ({"differences": differences} if args.against else {})))
    if args.write:
        args.write.write_text(as_text(record), encoding="utf-8")
    for name, lines in differences.items():
        print("\n  ".join([f"{name}:", *lines]), file=sys.stderr)
    if args.against:
        then, now = old["facts"], record["facts"]
        if other := [f"{key} {then.get(key)} → {now[key]}" for key in now if now[key] != then.get(key)]:
            print(f"bits may differ, since the record was made elsewhere: {', '.join(other)}", file=sys.stderr)
        same = len(old["pins"].keys() & record["pins"].keys() - differences.keys())
        print(f"{same} of {len(old['pins'])} recorded pins are the same, {len(differences)} differ", file=sys.stderr)
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
