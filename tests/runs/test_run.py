"""Opening, resuming, refusing and recording."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.errors import UserError
from trimtab.runs import Run, read_metrics, read_record
from trimtab.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Config:
    layer: int = 15
    dose: float = 0.4
    every: int = 10


def start(path: Path, **changes: Any) -> Run:
    return Run.open(path, "rank", Config(**changes))


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    splits = {"validation": ["a", "b"], "test": ["c"]}
    with Run.open(tmp_path / "runs" / "x", "rank", Config(), seeds=[1, 2], splits=splits, device="cuda:0") as run:
        assert not run.resumed
        record = json.loads(run.file("run.json").read_text())
    assert record["schema"] == 1
    assert record["command"] == "rank"
    assert record["config"] == {"layer": 15, "dose": 0.4, "every": 10}
    assert record["status"] == "running"
    assert record["seeds"] == [1, 2]
    assert record["splits"] == splits
    assert record["device"] == "cuda:0"
    assert record["versions"]["trimtab"] == trimtab.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"].keys() >= {"torch", "transformers", "numpy"}
    assert record["machine"]["cpus"] >= 1
    assert record["created"].endswith("Z")
    assert record["test_split_openings"] == []


def test_finishes_and_says_so_when_opened_again(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert not run.done
        run.finish({"rate": Interval(estimate=0.5, low=0.4, high=0.6, n=24)})
        assert run.done
    before = (tmp_path / "run.json").read_bytes()
    with start(tmp_path) as again:
        assert again.done
        assert again.resumed
        assert again.results is not None
        assert again.results["rate"]["high"] == 0.6
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_failure_is_recorded_and_can_be_resumed(tmp_path: Path) -> None:
    def failing(error: Exception) -> None:
        with start(tmp_path):
            raise error

    with pytest.raises(RuntimeError):
        failing(RuntimeError("out of luck"))
    assert read_record(tmp_path)["status"] == "failed"
    assert read_record(tmp_path)["reason"] == "RuntimeError: out of luck"
    with pytest.raises(UserError):
        failing(UserError("dose nan", "a dose is finite"))
    assert read_record(tmp_path)["reason"] == "dose nan: a dose is finite"
    with start(tmp_path) as run:
        assert run.status == "running"
        assert run.resumed
    record = read_record(tmp_path)
    assert record["reason"] is None
    assert [r["changed_versions"] for r in record["resumptions"]] == [{}, {}]


def test_a_changed_version_is_noted_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path).close()
    monkeypatch.setattr(trimtab.version, "__version__", "99.0")
    start(tmp_path).close()
    assert read_record(tmp_path)["resumptions"][0]["changed_versions"] == {"trimtab": "99.0"}


def test_a_changed_config_names_the_field(tmp_path: Path) -> None:
    start(tmp_path).close()
    with pytest.raises(UserError) as caught:
        start(tmp_path, dose=0.8)
    assert caught.value.line == (
        f"run {tmp_path}: dose was 0.4 and is now 0.8; choose another --run directory or go back to the old value"
    )
    with pytest.raises(UserError, match=r"layer was 15 and is now 3 \(1 more changed\)"):
        start(tmp_path, layer=3, dose=0.8)
    start(tmp_path).close()


def test_ignored_fields_may_change(tmp_path: Path) -> None:
    start(tmp_path).close()
    Run.open(tmp_path, "rank", Config(every=99), ignore_fields=["every"]).close()
    with pytest.raises(UserError, match="every was 10 and is now 99"):
        start(tmp_path, every=99)


def test_changed_splits_and_seeds_are_named(tmp_path: Path) -> None:
    Run.open(tmp_path, "rank", Config(), seeds=[1], splits={"test": ["a", "b"]}).close()
    with pytest.raises(UserError, match=r"splits\.test was \['a', 'b'\] and is now \['a'\]"):
        Run.open(tmp_path, "rank", Config(), splits={"test": ["a"]})
    with pytest.raises(UserError, match=r"seeds was \[1\] and is now \[2\]"):
        Run.open(tmp_path, "rank", Config(), seeds=[2])


def test_another_command_is_refused(tmp_path: Path) -> None:
    start(tmp_path).close()
    with pytest.raises(UserError, match="it belongs to `rank`, not `train`; choose another --run directory"):
        Run.open(tmp_path, "train", Config())


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"it holds thesis\.tex but no run\.json; choose another --run directory"):
        start(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match="it is a file, not a directory"):
        start(tmp_path / "f")
    with pytest.raises(UserError, match="not a directory"):
        start(tmp_path / "f" / "below")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is damaged, it is not JSON"),
        ('{"schema": 1, "comm', "is damaged, it is not JSON"),
        ("[1]", "is damaged, it is not an object"),
        ('{"schema": 1}', "its field command is missing"),
        ('{"schema": 1, "command": 3}', "its field command is not str"),
        ('{"schema": 7}', "has schema 7, this version reads 1; use the version of trimtab"),
        ("{}", "has schema None"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=words):
        start(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_bytes_that_are_not_text_are_damage(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged, it is not JSON"):
        start(tmp_path)


def test_reading_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run\.json; name a directory that a command wrote"):
        read_record(tmp_path / "absent")


def test_hashes_may_be_added_but_not_changed(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.record(hashes={"model": "ab12"}, n_features=4096)
        run.record(hashes={"model": "ab12", "dictionary": "cd34"})
    with start(tmp_path) as run:
        with pytest.raises(UserError, match="its model had hash ab12 and now has ef56"):
            run.record(hashes={"model": "ef56"})
        with pytest.raises(ValueError, match="the run itself keeps"):
            run.record(status="done")
    record = read_record(tmp_path)
    assert record["hashes"] == {"model": "ab12", "dictionary": "cd34"}
    assert record["n_features"] == 4096


def test_each_opening_of_a_test_split_is_recorded(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert run.open_split("test", ["a", "b"]) == ["a", "b"]
    with start(tmp_path) as run:
        run.open_split("test", ["a", "b"])
        with pytest.raises(UserError, match=r"split test: .* holds 2 other ids for it"):
            run.open_split("test", ["a", "c"])
    record = read_record(tmp_path)
    assert record["splits"]["test"] == ["a", "b"]
    openings = record["test_split_openings"]
    assert [(o["split"], o["command"], o["n"]) for o in openings] == [("test", "rank", 2)] * 2
    assert openings[0]["ids"] == openings[1]["ids"]
    assert openings[0]["time"].endswith("Z")


def test_metrics_are_whole_lines_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log({"loss": 1.5}, 0)
        run.log({"loss": float("nan"), "name": "é"}, 1)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    expected = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": None, "name": "é"}]
    assert read_metrics(tmp_path) == expected
    with start(tmp_path) as run:
        run.log({"loss": 0.5}, 2)
    assert read_metrics(tmp_path) == [*expected, {"step": 2, "loss": 0.5}]


def test_work_done_again_does_not_log_twice(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for step in range(10):
            run.log({"loss": step}, step)
        run.drop_metrics_after(6)
        run.log({"loss": -1}, 7)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(8))
    assert read_metrics(tmp_path)[-1]["loss"] == -1


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.drop_metrics_after(3)
    assert read_metrics(tmp_path) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(UserError, match="this process already has it open; close it first"):
        start(tmp_path)
    start(tmp_path).close()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    code = (
        "import sys; from trimtab.runs import Run; from trimtab.errors import UserError\n"
        "try: Run.open(sys.argv[1], 'rank', {})\n"
        "except UserError as error: print(error.line)"
    )
    with Run.open(tmp_path, "rank", {}):
        before = (tmp_path / "run.json").read_bytes()
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert (tmp_path / "run.json").read_bytes() == before
    assert done.stdout.strip() == (
        f"run {tmp_path}: process {os.getpid()} has it open; wait for it or choose another --run directory"
    )


def test_a_forgotten_run_frees_its_lock(tmp_path: Path) -> None:
    run = start(tmp_path)
    del run
    gc.collect()
    start(tmp_path).close()


def test_a_full_disk_while_recording_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = start(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*run\.json: the disk is full"):
        run.finish({})
    run.close()
    assert (tmp_path / "run.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "run.json"]


def test_a_disk_full_from_the_start_leaves_a_directory_that_can_be_used_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            start(tmp_path)
    with start(tmp_path) as run:
        assert not run.resumed


@pytest.mark.parametrize(
    ("error", "there", "made", "left"),
    [
        (UserError("model 'typo'", "there is none"), False, False, False),
        (UserError("model 'typo'", "there is none"), False, True, True),
        (UserError("model 'typo'", "there is none"), True, False, True),
        (ZeroDivisionError(), False, False, True),
    ],
    ids=["refused", "refused later", "a directory that was there", "a defect"],
)
def test_a_refused_command_leaves_no_directory(tmp_path: Path, error: Exception, there: bool, made: bool, left: bool):
    path = tmp_path / "run"
    if there:
        path.mkdir()

    def refused() -> None:
        with Run.open(path, "rank", {"model": "typo"}) as run:
            run.file("checkpoints").mkdir()
            if made:
                run.file("table.txt").write_text("made")
            raise error

    with pytest.raises(type(error)):
        refused()
    assert path.exists() == left


def test_a_run_that_failed_before_it_made_anything_is_begun_anew(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), Run.open(tmp_path / "run", "rank", {"model": "typo"}):
        raise ZeroDivisionError
    with Run.open(tmp_path / "run", "rank", {"model": "right"}) as run:
        assert run.config == {"model": "right"}
        run.file("table.txt").write_text("made")
    with pytest.raises(ZeroDivisionError), Run.open(tmp_path / "run", "rank", {"model": "right"}):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="model"):
        Run.open(tmp_path / "run", "rank", {"model": "another"})
