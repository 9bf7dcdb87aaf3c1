"""Training that is killed and started again ends with the same bits as training that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from planted_rows import MemorySource, Planted
from safetensors.torch import load_file

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.errors import UserError
from trimtab.runs import Run, read_metrics, read_record
from trimtab.training import TrainConfig, train
from trimtab.training.checkpoint import Checkpoint, checkpoint_files, latest_checkpoint, write_checkpoint

ARCHITECTURES = ("topk", "batchtopk")


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Directory with a killed and a whole run of each architecture, and the number of kills of each."""
    root = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("killed_training.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return root, dict(zip(ARCHITECTURES, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    killed_runs: tuple[Path, dict[str, int]], arch: str
) -> None:
    root, kills = killed_runs
    assert kills[arch] >= 2, "too few children were alive when they were to be killed"
    killed, whole = root / arch / "killed", root / arch / "whole"
    assert len(read_record(killed)["resumptions"]) == kills[arch]
    ours, expected = (load_file(path / "sae" / "sae_weights.safetensors") for path in (killed, whole))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    state, expected_state = (latest_checkpoint(path / "checkpoints") for path in (killed, whole))
    assert state is not None
    assert expected_state is not None
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected_state.tensors.items())
    assert [m["step"] for m in read_metrics(killed)] == [m["step"] for m in read_metrics(whole)]
    assert [m["lr"] for m in read_metrics(killed)] == [m["lr"] for m in read_metrics(whole)]


def test_a_bank_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_bank.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    assert kills >= 3, "too few children were alive when they were to be killed"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert len(read_record(killed)["resumptions"]) >= kills
    names = sorted(path.name for path in (whole / "members").iterdir())
    assert len(names) == 2 * (len(TRAINABLE) + 1)
    for name in names:
        ours, expected = (
            load_file(root / "members" / name / "sae/sae_weights.safetensors") for root in (killed, whole)
        )
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[part], tensor) for part, tensor in expected.items()), name
        steps, expected_steps = (read_metrics(root / "members" / name) for root in (killed, whole))
        for line in (*steps, *expected_steps):
            line.pop("rows_per_second")
        assert steps == expected_steps, name
    tables = [pq.read_table(root / "bank.parquet").drop_columns(["path", "seconds"]) for root in (killed, whole)]
    assert tables[0].equals(tables[1])


def test_only_the_last_two_checkpoints_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, Checkpoint(step, {"w": torch.full((2,), float(step))}, {"input_scale": 0.5}))
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "step-000000010.safetensors",
        "step-000000015.safetensors",
    ]
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.facts, found.tensors["w"].tolist()) == (15, {"input_scale": 0.5}, [15.0, 15.0])
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path, Checkpoint(5, {"w": torch.zeros(100)}, {}))
    path.write_bytes(path.read_bytes()[:-50] if damage == "truncated" else b"PK\x03\x04 not safetensors")
    with pytest.raises(UserError, match=r"step-000000005.safetensors: it is damaged .* delete it to go on"):
        latest_checkpoint(tmp_path)


def test_another_source_in_an_existing_run_is_refused(tmp_path: Path) -> None:
    planted = Planted(12, 8, 2.0)
    config = TrainConfig(n_features=16, k=2, rows=512, batch_size=64, heldout_rows=64)
    with Run.open(tmp_path / "run", "train", config) as run:
        train(config, MemorySource(planted.rows(300)), run)
    with Run.open(tmp_path / "run", "train", config) as run, pytest.raises(UserError, match="its source had hash"):
        train(config, MemorySource(planted.rows(300), seed=5), run)


def test_a_finished_training_only_exports_again(tmp_path: Path) -> None:
    planted = Planted(12, 8, 2.0)
    config = TrainConfig(n_features=16, k=2, rows=512, batch_size=64, heldout_rows=64, log_every=2)
    results = []
    for _ in range(2):
        with Run.open(tmp_path / "run", "train", config) as run:
            results.append(train(config, MemorySource(planted.rows(300)), run))
            planted = Planted(12, 8, 2.0)
    assert results[0].fingerprint == results[1].fingerprint
    assert [json.dumps(m["step"]) for m in read_metrics(tmp_path / "run")] == ["2", "4", "6", "8"]
