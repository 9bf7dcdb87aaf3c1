"""A finished run answers only for the files that it read; its relative paths start where it was made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.runs import Run, path_of_run, paths_of_run, read_record
from trimtab.runs import run as run_module
from trimtab.runs.inputs import input_files


@dataclass(frozen=True, kw_only=True)
class Config:
    text: tuple[str, ...] = ("t.jsonl",)
    model: str = "m"
    site: str = "resid_post.1"
    text_field: str = "text"
    seed: int = 0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "t.jsonl").write_text('{"text": "the red fox"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(40_000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(path: str = "r", **changes: Any) -> Path:
    with Run.open(path, "train", Config(**changes)) as run:
        assert not run.done
        run.finish({"n": 1})
    return Path(path)


def opened_again(path: str | Path = "r", **changes: Any) -> bool:
    with Run.open(path, "train", Config(**changes)) as run:
        return run.done


def change(file: str) -> None:
    """One byte, the length and the time of change as before."""
    path = Path(file)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


CHANGES = {
    "text": (lambda: change("t.jsonl"), "t.jsonl"),
    "longer text": (lambda: Path("t.jsonl").write_text("more\n" * 20), "t.jsonl"),
    "weights": (lambda: change("m/model.safetensors"), "m"),
    "config": (lambda: Path("m/config.json").write_text('{"a": 1}'), "m"),
    "another file in the directory": (lambda: Path("m/adapter.safetensors").write_bytes(b"1"), "m"),
    "no file in the directory": (lambda: Path("m/config.json").unlink(), "m"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_run_is_not_done_before_once_what_it_read_has_changed(name: str) -> None:
    finished()
    assert opened_again()
    make, said = CHANGES[name]
    make()
    with pytest.raises(UserError) as caught:
        opened_again()
    assert f"{said} has changed since this run was made of it; choose another --run directory" in caught.value.line
    finished("another")  # as the hint says
    assert read_record("r")["status"] == "done"


def test_going_back_to_the_old_file_works_as_the_hint_says() -> None:
    before = Path("t.jsonl").read_bytes()
    finished()
    change("t.jsonl")
    with pytest.raises(UserError, match="go back to the old file"):
        opened_again()
    Path("t.jsonl").write_bytes(before)
    assert opened_again()


def test_mutation_no_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    finished()
    change("t.jsonl")
    monkeypatch.setattr(run_module, "check_unchanged", lambda *_: None)
    assert opened_again()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda: os.utime("t.jsonl", ns=(1, 1)),
        lambda: Path("t.jsonl").unlink(),
        lambda: Path("m/run.json").write_text("{}"),
        lambda: Path("m/.lock").write_text("1"),
        lambda: Path("resid_post.1").write_text("an SAE's directory may be called so"),
        lambda: Path("r/more.txt").write_text("the run's own"),
    ],
)
def test_what_says_nothing_else_is_no_change(harmless: Any) -> None:
    finished()
    harmless()
    assert opened_again()


def test_a_run_that_another_command_writes_into_is_the_same_until_its_result_changes() -> None:
    finished("trained")
    finished("r", model="trained")
    Path("trained/analysis.parquet").write_bytes(b"1")
    assert opened_again("r", model="trained")
    with Run.open("trained", "train", Config()) as run:
        run.finish({"n": 2})
    with pytest.raises(UserError, match="trained has changed since this run was made of it"):
        opened_again("r", model="trained")


def test_a_run_that_is_not_done_goes_on() -> None:
    with Run.open("r", "train", Config()) as run:
        run.log({"x": 1}, step=0)
    change("t.jsonl")  # what reads the text says so, or does not mind
    assert not opened_again()


def test_weights_are_read_in_pieces_that_cover_both_ends(here: Path) -> None:
    big = here / "m" / "model.safetensors"
    big.write_bytes(bytes(20 << 20))

    def digest() -> str:
        return input_files({"model": "m"}, here / "r")["m"]["digest"]

    found = {digest()}
    for place in (0, 30_000, (20 << 20) - 1):
        data = bytearray(20 << 20)
        data[place] = 1
        big.write_bytes(data)
        found.add(digest())
    assert len(found) == 4


def test_paths_start_where_the_run_was_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / finished()
    record = read_record(run)
    assert path_of_run(record, "m") == "m"
    (here / "elsewhere" / "m").mkdir(parents=True)  # another model of that name
    monkeypatch.chdir(here / "elsewhere")
    assert path_of_run(record, "m") == str(here / "m")
    assert path_of_run(record, "smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert path_of_run(record, "/m") == "/m"
    assert path_of_run({}, "m") == "m"  # a run of an older version
    assert paths_of_run(record, ("model", "text", "sae")) == {"model": str(here / "m"), "text": [str(here / "t.jsonl")]}


def test_the_same_file_by_another_path_is_the_same_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / finished()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert opened_again(run, model="../m")
    (here / "n").mkdir()
    with pytest.raises(UserError, match=r"model was 'm' and is now '\.\./n'"):
        opened_again(run, model="../n")
    change("../m/config.json")
    with pytest.raises(UserError, match=r"\.\./m has changed"):
        opened_again(run, model="../m")


def test_what_is_no_file_has_not_changed_where_a_folder_has_its_name() -> None:
    """Mutation: take every text of a config for a path."""
    Path("text").mkdir()
    finished()
    Path("text/new.txt").write_text("new")
    assert opened_again()
    assert "text" not in read_record(Path("r"))["inputs"]
