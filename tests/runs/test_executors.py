"""Stages over shards, here and in processes: what is done, fails, dies. `on_ray.py` asks the same of a real cluster.

Ray's driver can end its whole process when a cluster stops, so that it has one of its own, which is tried again then.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.runs import Done, Failed, OnRay, Processes, executors, run_stage

sys.path.insert(0, str(Path(__file__).parent))

from stages import Squares, began, forgetful, square

WITHOUT_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra scale)")


@pytest.fixture(params=["in-process", "processes"])
def executor(request: pytest.FixtureRequest) -> Any:
    return None if request.param == "in-process" else Processes(workers=2)


def done(config: Squares, number: int, *, skipped: bool = False) -> Done:
    return Done((config.out / f"{number}.txt",), skipped)


def test_results_are_in_order_and_a_users_mistake_fails_alone(executor: Any, tmp_path: Path) -> None:
    config = Squares(out=tmp_path)
    found = run_stage(square, config, [7, 4, 2], records=tmp_path / "records", executor=executor)
    mistake = "shard 4: four is not allowed; choose another number"
    assert found == [done(config, 7), Failed(mistake), done(config, 2)]
    assert [(tmp_path / f"{n}.txt").read_text() for n in (7, 2)] == ["49", "4"]


def check_only_what_is_not_done_runs(executor: Any, place: Path) -> None:
    config, records = Squares(out=place), place / "records"
    run_stage(square, config, [1, 2, 6], records=records, executor=executor)
    (place / "1.txt").write_text("")  # cut short
    (place / "2.txt").unlink()
    found = run_stage(square, config, [1, 2, 6, 7], records=records, executor=executor)
    assert found == [done(config, 1), done(config, 2), done(config, 6, skipped=True), done(config, 7)]
    assert began(config) == {1: 2, 2: 2, 6: 1, 7: 1}
    assert (place / "1.txt").read_text() == "1"
    other = replace(config, add=1)
    assert run_stage(square, other, [6], records=records, executor=executor) == [done(config, 6)]
    assert (place / "6.txt").read_text() == "37"


def test_only_what_is_not_done_runs(executor: Any, tmp_path: Path) -> None:
    check_only_what_is_not_done_runs(executor, tmp_path)


def test_mutation_files_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_size", lambda file: 1)
    with pytest.raises(AssertionError):
        check_only_what_is_not_done_runs(None, tmp_path)


def check_a_process_that_dies_takes_no_other_shard_along(place: Path) -> None:
    config = Squares(out=place)
    executor = Processes(workers=2, tries=2)
    found = run_stage(square, config, [5, 2, 3, 4, 6], records=place / "records", executor=executor)
    mistake = "shard 4: four is not allowed; choose another number"
    assert isinstance(found[0], Failed)
    assert found[0].reason.startswith("its process died 2 times, ")
    assert found[1:] == [done(config, 2), done(config, 3), Failed(mistake), done(config, 6)]
    assert began(config)[5] in (2, 3)  # twice by itself, and beside others if it was begun then


def test_a_process_that_dies_takes_no_other_shard_along(tmp_path: Path) -> None:
    check_a_process_that_dies_takes_no_other_shard_along(tmp_path)


def test_mutation_what_a_dead_process_left_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, pooled = [], Processes._pooled

    def first(self: Processes, function: Any, things: Any) -> Any:
        once.append(1)
        return pooled(self, function, things) if len(once) == 1 else iter(())

    monkeypatch.setattr(Processes, "_pooled", first)
    with pytest.raises(AssertionError):
        check_a_process_that_dies_takes_no_other_shard_along(tmp_path)


def test_a_file_that_a_stage_did_not_write_is_a_bug(executor: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"the stage says that it wrote .*1\.none, which is not there"):
        run_stage(forgetful, Squares(out=tmp_path), [1], records=tmp_path / "records", executor=executor)


def test_what_is_done_is_recorded_in_plain_words(tmp_path: Path) -> None:
    run_stage(square, Squares(out=tmp_path), [2], records=tmp_path / "records")
    (record,) = (tmp_path / "records").iterdir()
    assert record.name.startswith("square-")
    assert json.loads(record.read_text()) == {
        "stage": "stages.square",
        "config": {"type": "Squares", "out": str(tmp_path), "add": 0},
        "shard": 2,
        "files": {str(tmp_path / "2.txt"): 1},
    }


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray: it is not installed; install it: pip install 'trimtab\[scale\]'"):
        run_stage(square, Squares(out=tmp_path), [1], records=tmp_path / "records", executor=OnRay())


@WITHOUT_RAY
def test_an_address_without_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Ray cluster 127\.0\.0\.1:9: there is none"):
        run_stage(
            square, Squares(out=tmp_path), [1], records=tmp_path / "records", executor=OnRay(address="127.0.0.1:9")
        )


@pytest.mark.slow
@WITHOUT_RAY
def test_all_of_it_on_ray() -> None:
    asked = str(Path(__file__).with_name("on_ray.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", asked]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode >= 0:  # else a signal ended it, which no check of ours does
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
