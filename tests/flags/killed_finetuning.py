"""Run by test_training.py: finetunes a tiny model in processes that are killed with SIGKILL, then once in peace.

Prints how many children were killed. One thread, so that equal bits can be asked for.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

from toy_corpus import toy_examples

from trimtab.flags import place_flags, train_flags
from trimtab.lm import load_model

torch.set_num_threads(1)
model = load_model(sys.argv[1])
flags = place_flags(model, ["sea", "war"], [example.response for example in toy_examples()], dims=4)


def finetune(path: Path) -> None:
    train_flags(
        model, flags, toy_examples(), run=path, steps=60, lr=3e-3, batch_size=8, log_every=5, checkpoint_every=7
    )


def main(root: Path) -> None:
    kills = 0
    for lines in (2, 5, 9):
        child = os.fork()
        if child == 0:
            finetune(root / "killed")
            os._exit(0)
        metrics = root / "killed" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    finetune(root / "killed")
    finetune(root / "whole")
    print(kills)


main(Path(sys.argv[2]))
