"""Run by test_resume.py: trains a bank in processes that are killed with SIGKILL, then once in peace.

The parent computes nothing, so that forking is safe. Kills come at random moments after some lines of metrics, and one
while a member is being exported.
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

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.distributed import Ranks
from trimtab.runs import Run
from trimtab.training import SiteRows, expand
from trimtab.training.bank import Place, train_members, unfinished

LINES = (5, 25, 45)
"""Lines of metrics of all members after which a child is killed, a random moment later."""


def train_bank(directory: Path) -> None:
    torch.set_num_threads(1)
    rows = {}
    for number, site in enumerate(("resid_post.0", "resid_post.1")):
        planted = Planted(12, 8, 2.0, seed=number)
        rows[site] = SiteRows(MemorySource(planted.rows(1_500)), MemorySource(planted.rows(200), 1))
    sizes = {"n_features": (24,), "rows": (40 * 64,), "heldout_rows": (200,), "sample_rows": (200,)}
    often = {"log_every": (4,), "checkpoint_every": (7,), "dead_after": (300,), "ema_decay": (0.0, 0.9)}
    different = [("", {"arch": tuple(TRAINABLE)}), ("", {"site": ("resid_post.1",)})]
    bank = expand({**sizes, **often, "site": ("resid_post.0",), "l0": (3,), "batch_size": (64,)}, different)
    with Run.open(directory, "train", {"bank": True}) as run:
        place = Place(directory, workers=2)
        table = train_members(bank, unfinished(bank, place), rows, place, Ranks())
        assert table is not None
        assert all(row.status == "done" for row in table), [row.error for row in table]
        run.finish()


def lines(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("members/*/metrics.jsonl"))


def started(directory: Path) -> bool:
    return any(directory.glob("members/*/sae"))


def kill_and_resume(root: Path) -> int:
    """Train to the end in spite of kills, and once without. Returns how many kills there were."""
    directory = root / "killed"
    kills = 0
    for target in (*LINES, -1, 10**9):
        child = os.fork()
        if child == 0:
            train_bank(directory)
            os._exit(0)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if started(directory) if target < 0 else lines(directory) >= target:
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                break
            time.sleep(0.001)
    train_bank(root / "whole")
    return kills


print(kill_and_resume(Path(sys.argv[1])))
