"""Run by test_resume.py: trains in child processes that are killed with SIGKILL at random moments, then once in peace.

The parent computes nothing, so that forking is safe.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from planted_rows import MemorySource, Planted

from trimtab.runs import Run
from trimtab.training import TrainConfig, train

LINES = (3, 17, 30)
"""Lines of metrics after which a child is killed, a random moment later."""


def run_training(directory: Path, arch: str) -> None:
    torch.set_num_threads(1)
    planted = Planted(12, 8, 2.0)
    config = TrainConfig(
        arch=arch,  # pyright: ignore[reportArgumentType]
        n_features=24,
        k=3,
        k_start=5,
        rows=40 * 256,
        batch_size=64,
        lr=3e-3,
        dead_after=300,
        ema_decay=0.9,
        log_every=4,
        checkpoint_every=7,
        heldout_rows=200,
        sample_rows=200,
    )
    source, heldout = MemorySource(planted.rows(1_500)), MemorySource(planted.rows(200), 1)
    with Run.open(directory, "train", config) as run:
        run.finish(train(config, source, run, heldout=heldout))


def lines(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_and_resume(root: Path, arch: str) -> int:
    """Train to the end in spite of kills, and once without. Returns how many kills there were."""
    directory = root / "killed"
    kills = 0
    for target in (*LINES, 10**9):
        child = os.fork()
        if child == 0:
            run_training(directory, arch)
            os._exit(0)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if lines(directory) >= target:
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                break
            time.sleep(0.001)
    run_training(root / "whole", arch)
    return kills


for arch in ("topk", "batchtopk"):
    print(kill_and_resume(Path(sys.argv[1]) / arch, arch))
