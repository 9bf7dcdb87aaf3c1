"""Processor time of commands on this checkout over that on another, for changes that should slow nothing down.

Each job is one command of the command line, with fixed seeds and one thread. Both checkouts run it at the same time,
each on a core of its own, and change cores after every pair; `ratio` is the median of the pairs' ratios of processor
seconds (this checkout over the other), beside the least and the greatest. Start-up, which is part of both, is the job
`start`. Options that an older checkout knows by an earlier name are given by that.

    git worktree add ../before REVISION
    python benchmarks/side_by_side.py ../before
    python benchmarks/side_by_side.py ../before --only 'train-*' --pairs 5
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from pinned import write_text

from trimtab.runs.renamed import RENAMED

TRAIN = "train --activations @harvest --n-features 2048 --l0 32 --batch-size 512 --rows 204800 --run @out"
POLICY = "policy train --task ioi-swapped --dose 1 --headroom-items 0 --train-items 32 --validation-items 8 --run @out"
JOBS = {
    "start": "rank --help",
    "harvest": "harvest --text text.jsonl --site resid_post.15 --holdout 0.2 --run @out",
    **{
        f"train-{name}": f"{TRAIN} --arch {name}"
        for name in ("topk", "batchtopk", "matryoshka", "relu", "panneal", "gated", "jumprelu")
    },
    "rank": "rank --criterion delta-confidence --batch-size 200 --run @out --feature "
    + " ".join(str(feature) for feature in range(0, 5120, 4)),
    "steer": "steer 'Yesterday I went to the' --samples 64 --temperature 1 --max-new-tokens 96 --feature 3547 "
    "--dose 0.3 --run @out",
    "rollout": f"{POLICY} --iterations 12 --items-per-iteration 32 --samples 8",
    "evaluate-core": "evaluate core --limit-tokens 6000",
}
"""Commands by job. `@out` stands for the job's own directory, `@harvest` for that of the job `harvest`."""


def words_of(job: str, checkout: Path) -> list[str]:
    """A job's words, with the names that options have on a checkout."""
    words = shlex.split(JOBS[job].replace("@out", job).replace("@harvest", "harvest"))
    recorded = json.loads((checkout / "tests" / "test_configs.json").read_text(encoding="utf-8"))["flags"]
    command = next(name for name in (" ".join(words[:2]), words[0]) if name in recorded)
    known = {option for flag in recorded[command] for option in re.findall(r"--[\w.-]+", flag)}
    earlier = {new: old for old, new in RENAMED.get(command, {}).items()}
    for i, word in enumerate(words):
        if word.startswith("--") and word not in known:
            name = word[2:].replace("-", "_")
            words[i] = f"--{earlier.get(name, name)}".replace("_", "-")
    return words


def start(checkout: Path, job: str, directory: Path, core: int) -> int:
    """Start a job's command in `directory` on one core; its process."""
    shutil.rmtree(directory / job, ignore_errors=True)
    words = words_of(job, checkout)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | threads | {"PYTHONPATH": str(checkout / "src")}
    process = os.fork()
    if process == 0:
        os.sched_setaffinity(0, {core})
        os.chdir(directory)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.execve(sys.executable, [sys.executable, "-m", "trimtab", *words], environment)
    return process


def pair(checkouts: list[Path], job: str, directories: list[Path], cores: list[int]) -> list[float]:
    """Processor seconds of a job on each checkout, run at the same time."""
    processes = [start(*each) for each in zip(checkouts, [job] * 2, directories, cores, strict=True)]
    seconds = []
    for process, checkout, directory in zip(processes, checkouts, directories, strict=True):
        _, status, used = os.wait4(process, 0)
        if status:
            raise SystemExit(f"{job} failed on {checkout}: {(directory / 'output.txt').read_text()[-800:]}")
        seconds.append(used.ru_utime + used.ru_stime)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", metavar="JOB", default=["*"], help="jobs by name or pattern")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed")
    checkouts = [Path(__file__).resolve().parents[1], args.other.resolve()]
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        directories = [Path(scratch, name) for name in ("this", "other")]
        for directory in directories:
            directory.mkdir()
            write_text(directory / "text.jsonl")
        wanted = [job for job in JOBS if any(fnmatch.fnmatch(job, word) for word in args.only)]
        if "harvest" not in wanted and any("@harvest" in JOBS[job] for job in wanted):
            pair(checkouts, "harvest", directories, cores)
        for job in wanted:
            seconds = [pair(checkouts, job, directories, cores[:: 1 - 2 * (n % 2)]) for n in range(args.pairs)]
            ratios = [this / other for this, other in seconds]
            this, other = (statistics.median(column) for column in zip(*seconds, strict=True))
            results[job] = {"ratio": statistics.median(ratios), "ratios": ratios, "this_s": this, "other_s": other}
            spread = f"[{min(ratios):.3f}, {max(ratios):.3f}]"
            text = f"{job:<18}{statistics.median(ratios):6.3f} {spread}  {this:6.1f} s against {other:6.1f} s"
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
