from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path

import pytest

from trimtab.runs import machine, sha256_file, utc_now, versions


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_time_is_utc_to_the_second() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


def test_a_package_that_is_absent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert versions()["numpy"] == metadata.version("numpy")
    monkeypatch.setattr(metadata, "version", absent)
    assert versions().keys() == {"python", "trimtab"}


def test_machine_counts_the_cpus_this_process_may_use() -> None:
    assert machine()["cpus"] >= 1
