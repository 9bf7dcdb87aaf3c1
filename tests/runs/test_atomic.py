"""Files appear whole or not at all, whatever fails."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from trimtab.errors import UserError
from trimtab.runs import atomic_directory, atomic_path, write_bytes, write_json, write_table, write_text
from trimtab.runs.atomic import append_line, remove_partial_files


def fails_with(number: int):
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "text.txt"
    write_text(target, "één")
    assert target.read_bytes() == "één".encode()
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(target.parent) == ["text.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_file_gets_the_umasks_mode_whatever_its_writer_gives_it(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "x") as partial:
            assert not partial.exists()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"nan": math.nan, "n": np.int64(3), "path": Path("a/b"), "pair": (1, 2)})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"nan": None, "n": 3, "path": "a/b", "pair": [1, 2]}


def test_table_from_columns_and_from_arrow(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", {"feature": [1, 2], "text": ["a", None]})
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert table.to_pydict() == {"feature": [1, 2], "text": ["a", None]}
    write_table(tmp_path / "u.parquet", table)
    assert pyarrow.parquet.read_table(tmp_path / "u.parquet").equals(table)


def test_the_partial_file_lies_beside_with_the_same_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "weights.safetensors") as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".safetensors"
        partial.write_bytes(b"x")
        assert not (tmp_path / "weights.safetensors").exists()
    assert (tmp_path / "weights.safetensors").read_bytes() == b"x"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_error_in_the_body_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "f", "old")

    def body() -> None:
        with atomic_path(tmp_path / "f") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        body()
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(text: str, error: BaseException | None = None) -> None:
        with atomic_directory(tmp_path / "d") as partial:
            (partial / "f").write_text(text)
            assert not (tmp_path / "d" / "f").exists()
            if error is not None:
                raise error

    for error in (RuntimeError("bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write("half", error)
        assert os.listdir(tmp_path) == []
    (tmp_path / "d.saving").mkdir()
    (tmp_path / "d.saving" / "half").touch()  # of a killed writer
    (tmp_path / "d").mkdir()
    write("whole")
    assert os.listdir(tmp_path) == ["d"]
    assert os.listdir(tmp_path / "d") == ["f"]


def test_a_directory_that_holds_something_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "d" / "mine", "old")

    def write() -> None:
        with atomic_directory(tmp_path / "d") as partial:
            (partial / "f").touch()

    with pytest.raises(UserError, match=r"cannot write .*/d: directory not empty; choose a writable path"):
        write()
    assert os.listdir(tmp_path) == ["d"]
    assert (tmp_path / "d" / "mine").read_text() == "old"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota is used up")])
def test_a_full_disk_is_the_users_to_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, words: str
) -> None:
    write_text(tmp_path / "f", "old")
    monkeypatch.setattr(os, function, fails_with(number))
    with pytest.raises(UserError) as caught:
        write_text(tmp_path / "f", "new")
    assert caught.value.line.startswith(f"cannot write {tmp_path / 'f'}: the disk")
    assert words in caught.value.line
    assert caught.value.hint == "free some space or write elsewhere"
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_reported_by_a_library_in_the_body(tmp_path: Path, error: Exception) -> None:
    def body() -> None:
        with atomic_path(tmp_path / "f") as partial:
            partial.write_bytes(b"half")
            raise ValueError("could not save") from error

    with pytest.raises(UserError, match="the disk is full"):
        body()
    assert os.listdir(tmp_path) == []


def test_other_system_errors_are_not_disguised(tmp_path: Path) -> None:
    def body() -> None:
        with atomic_path(tmp_path / "f"):
            (tmp_path / "absent").read_bytes()

    with pytest.raises(FileNotFoundError):
        body()


def test_a_path_through_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/x: .*; choose a writable path"):
        write_text(tmp_path / "file" / "x", "")


def test_a_directory_in_the_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/d: is a directory"):
        write_text(tmp_path / "d", "")
    assert os.listdir(tmp_path) == ["d"]


SMALL_FILES_ONLY = """
import os, resource, sys
import numpy as np
from pathlib import Path
from trimtab.errors import UserError
from trimtab.runs import atomic_directory, atomic_path, write_bytes, write_table
from trimtab.runs.atomic import append_line
from safetensors.numpy import save_file

folder = Path(sys.argv[1])
write_bytes(folder / "f", b"old")
append_line(folder / "lines", "x" * 4000)
noise = np.random.default_rng(0).random(5000)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

def save_tensors():
    with atomic_path(folder / "t.safetensors") as partial:
        save_file({"x": noise}, partial)

writers = [
    lambda: write_bytes(folder / "f", bytes(100_000)),
    lambda: write_table(folder / "t.parquet", {"x": noise}),
    lambda: append_line(folder / "lines", "y" * 4000),
    save_tensors,
]
for write in writers:
    try:
        write()
    except UserError as error:
        print(error.line)
assert (folder / "f").read_bytes() == b"old"
assert (folder / "lines").read_text() == "x" * 4000 + "\\n"
assert sorted(os.listdir(folder)) == ["f", "lines"], os.listdir(folder)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_a_disk_that_really_takes_no_more(tmp_path: Path) -> None:
    """A limit on file sizes makes the system itself cut writes short, in Python, Arrow and safetensors alike."""
    command = [sys.executable, "-c", SMALL_FILES_ONLY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["f", "t.parquet", "lines", "t.safetensors"]
    expected = [
        f"cannot write {tmp_path / name}: it grew too large; free some space or write elsewhere" for name in names
    ]
    assert done.stdout.splitlines() == expected


def test_append_keeps_whole_lines_when_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(tmp_path / "lines", "one")
    real_open = open

    class FillsUp:
        def __init__(self, path: Path) -> None:
            self.file = real_open(path, "ab", buffering=0)

        def __enter__(self) -> FillsUp:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def seek(self, *where: int) -> int:
            return self.file.seek(*where)

        def write(self, data: bytes) -> int:
            if len(data) > 2:
                return self.file.write(data[:2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: FillsUp(path))
    with pytest.raises(UserError, match="the disk is full"):
        append_line(tmp_path / "lines", "two")
    monkeypatch.undo()
    assert (tmp_path / "lines").read_text() == "one\n"


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    writing = atomic_path(tmp_path / "f")
    writing.__enter__().write_text("half")
    write_text(tmp_path / "whole", "")
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == ["whole"]
