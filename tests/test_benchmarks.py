"""The training benchmark runs and prints what it says, without peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_sae.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--peers", "", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_train_sae_prints_its_keys() -> None:
    done = run("--only", "topk,relu,density,accelerator", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["topk.of_floor"] < 1
    for section in ("topk", "relu"):
        ours = found[f"{section}.trainers"]["ours"]
        assert ours["rows_per_second"] > 0
        assert ours["explained_variance"] < 1
        assert ours["peak_mib"] >= ours["baseline_mib"]
    assert found["topk.trainers"]["ours"]["explained_variance"] > 0
    assert abs(found["topk.trainers"]["ours"]["l0"] - 8) < 1
    assert 0 < found["density.switch"] < 1
    assert set(found["machine"]) >= {"cpu", "threads", "torch", "load_average"}


def test_train_sae_refuses_what_it_does_not_know() -> None:
    assert "unknown section: topkk" in run("--only", "topkk").stderr
    assert "unknown peer: saelense" in run("--peers", "saelense").stderr
