"""A new architecture is one file in the folder of architectures; commands, banks and benchmarks find it there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import trimtab
from trimtab.dictionaries import Standard, load_dictionary

OWN = Path(__file__).with_name("own_architecture.py")
SIZES = shlex.split(
    "--site resid_post.1 --n-features 48 --l0 4 --batch-size 64 --rows 25600 --context 32 --heldout-rows 256 "
    "--sample-rows 256"
)
GROUND_TRUTH = shlex.split(
    "evaluate ground-truth --arch rootrelu topk --root-floor 0.2 --d 24 --n-true 24 --true-l0 3 --n-parents 0 "
    "--n-features 24 --data-sets 1 --rows 96000 --batch-size 64 --heldout-rows 500 --json --run"
)
BANK = """
[defaults]
n_features = 48
batch_size = 64
rows = 640
context = 32
heldout_rows = 256
sample_rows = 256
site = "resid_post.1"
l0 = 4
[[member]]
arch = "rootrelu"
root_floor = [0.1, 0.3]
[[member]]
arch = "relu"
"""
RUN_ALL = """
import contextlib, io, json, sys
from trimtab.cli import main
for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, said.getvalue()]))
"""


class Said(NamedTuple):
    """What a command ended with and printed."""

    status: int
    text: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.status == 0, self.text
        return json.loads(self.text.splitlines()[-1])


@pytest.fixture(scope="module")
def said(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """What commands say of a trimtab that is as it is, but for one more file."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(Path(trimtab.__file__).parent, folder / "trimtab", copy_function=os.symlink)
    shutil.copy(OWN, folder / "trimtab" / "dictionaries" / "architectures" / "rootrelu.py")
    (folder / "bank.toml").write_text(BANK)
    train = ["train", *data, *SIZES, "--run"]
    commands = {
        "help": ["train", "--help"],
        "one": [*train, str(folder / "one"), "--arch", "rootrelu", "--root-floor", "0.2", "--json"],
        "other": [*train, str(folder / "other"), "--arch", "relu", "--json"],
        "mistake": [*train, str(folder / "mistake"), "--arch", "relu", "--root-floor", "0.2"],
        "bank": ["train", *data, "--bank", str(folder / "bank.toml"), "--run", str(folder / "bank"), "--json"],
        "ground truth": [*GROUND_TRUTH, str(folder / "truth")],
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(list(commands.values())),
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "300", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, (Said(*json.loads(line)) for line in done.stdout.splitlines()), strict=True))


def config(said: Said) -> dict[str, Any]:
    return json.loads((Path(said.json["run"]) / "run.json").read_text())["config"]


def test_it_is_one_short_file() -> None:
    assert len(OWN.read_text().splitlines()) < 40


def test_its_option_is_in_the_help_with_what_its_file_says(said: dict[str, Said]) -> None:
    assert "--root-floor" in said["help"].text
    assert "rootrelu: c, which keeps the slope finite at 0. By default 0.01." in said["help"].text
    assert "Architecture: batchtopk, gated, jumprelu, matryoshka, panneal, relu, rootrelu, topk;" in said["help"].text


def test_it_is_trained_and_its_file_opens_as_that_of_any_other(said: dict[str, Said]) -> None:
    one = said["one"].json
    assert one["explained_variance"] > 0.2
    assert one["l0"] == pytest.approx(4, rel=0.5)
    sae = load_dictionary(one["sae"])
    assert type(sae) is Standard
    assert sae.info.metadata["training"]["architecture"] == "rootrelu"
    assert config(said["one"])["root_floor"] == sae.info.metadata["training"]["root_floor"] == 0.2


def test_its_option_changes_no_run_of_another(said: dict[str, Said]) -> None:
    assert said["other"].json["steps"] == 400
    assert "root_floor" not in config(said["other"])
    assert said["mistake"].status == 2
    assert "root_floor 0.2: only rootrelu has it; leave it out" in said["mistake"].text


def test_a_bank_file_sets_its_option(said: dict[str, Said]) -> None:
    members = said["bank"].json["members"]
    assert [row["name"].removeprefix("resid_post.1-") for row in members] == [
        "rootrelu-n48-l0_4-seed0-root_floor0.1",
        "rootrelu-n48-l0_4-seed0-root_floor0.3",
        "relu-n48-l0_4-seed0",
    ]
    assert [json.loads(row["config"]).get("root_floor") for row in members] == [0.1, 0.3, None]
    assert len({load_dictionary(row["path"]).fingerprint for row in members}) == 3


def test_it_is_ranked_where_the_truth_is_known(said: dict[str, Said]) -> None:
    found = said["ground truth"].json
    f1 = {entry["dictionary"]: entry["scores"]["f1"]["estimate"] for entry in found["ranking"]["3"]}
    assert f1["rootrelu"] > 1.5 * f1["random directions"]
    (run,) = (Path(found["run"]) / "data0" / "members").glob("*-rootrelu-*")
    assert load_dictionary(run / "sae").info.metadata["training"]["root_floor"] == 0.2
