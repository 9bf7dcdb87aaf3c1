"""`trimtab train` on a tiny model: one SAE, a bank, mistakes, and two processes."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab import cli
from trimtab.runs import read_metrics

SITES = ("resid_post.1", "resid_post.2")
SIZES = (
    "--n-features",
    "64",
    "--batch-size",
    "128",
    "--context",
    "32",
    "--heldout-rows",
    "256",
    "--sample-rows",
    "256",
)
PRODUCT = ("--site", *SITES, "--arch", "topk", "relu", "--l0", "4")
NAMES = [f"{site}-{arch}-n64-l0_4-seed0" for site in SITES for arch in ("topk", "relu")]


@pytest.fixture(scope="module")
def bank(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of two architectures at two sites."""
    run = tmp_path_factory.mktemp("bank") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["train", *data, *SIZES, *PRODUCT, "--run", str(run)]) == 0
    finally:
        torch.set_num_threads(threads)
    return run


def train(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert cli.main(["train", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main(["train", *map(str, words)]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("trimtab: error: ")


def test_a_bank_has_one_harvest_and_a_run_for_each_member(
    bank: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(path.name for path in (bank / "members").iterdir()) == sorted(NAMES)
    widths = json.loads((bank / "activations" / "shards.json").read_text())["widths"]
    assert list(widths) == list(SITES)
    again = train(capsys, *data, *SIZES, *PRODUCT, "--run", bank)
    assert [row["name"] for row in again["members"]] == NAMES
    assert json.loads((bank / "run.json").read_text())["results"]["members"] == again["members"]
    for row in again["members"]:
        assert 0 < row["l0"] <= 64
        assert row["status"] == "done"
        cfg = json.loads((Path(row["path"]) / "cfg.json").read_text())
        assert cfg["metadata"]["hook_name"].startswith(f"blocks.{row['site'][-1]}.")
    assert cli.main(["train", *data, *SIZES, *PRODUCT, "--run", str(bank)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert "4 of 4 members done" in shown


def test_a_member_equals_the_single_training_of_its_settings(
    bank: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    one = train(capsys, *data, *SIZES, "--site", SITES[1], "--l0", "4", "--run", tmp_path / "one")
    assert one["l0_target"] == 4
    assert (tmp_path / "one" / "metrics.jsonl").exists()
    ours = load_file(bank / "members" / NAMES[2] / "sae" / "sae_weights.safetensors")
    for name, tensor in load_file(tmp_path / "one" / "sae" / "sae_weights.safetensors").items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.slow
def test_two_processes_train_the_same_bank(
    bank: Path, data: list[str], tmp_path: Path, start_ranks: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    words = ["train", *data, *SIZES, *PRODUCT, "--run", str(tmp_path / "run"), "--json"]
    processes = start_ranks(f"import sys\nfrom trimtab.cli import main\nsys.exit(main({words!r}))")
    outs = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        outs.append(out)
    assert [row["name"] for row in json.loads(outs[0])["members"]] == NAMES
    assert outs[1] == ""
    for name in NAMES:
        one, two = (root / "members" / name for root in (bank, tmp_path / "run"))
        weights = load_file(one / "sae" / "sae_weights.safetensors")
        for part, tensor in load_file(two / "sae" / "sae_weights.safetensors").items():
            assert torch.equal(weights[part], tensor), (name, part)
        losses, expected = ([line["loss"] for line in read_metrics(root)] for root in (two, one))
        assert losses == expected


def test_a_failed_member_is_told_behind_the_table(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--activations", bank / "activations", *SIZES, "--site", SITES[0], "--k", "4", "64", "--run", tmp_path]
    line = failure(capsys, *words)
    assert line.startswith("1 of 2 members failed (resid_post.1-topk-n64-l0_64-seed0): the reasons are in ")
    assert cli.main(["train", *map(str, words), "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)["members"]
    assert [row["status"] for row in rows] == ["done", "failed"]


def test_a_truncated_shard_is_named(
    bank: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in (bank / "activations").iterdir():
        content = file.read_bytes()
        (shards / file.name).write_bytes(
            content[:-9] if file.name == f"train-00000.{SITES[1]}.safetensors" else content
        )
    line = failure(capsys, "--activations", shards, *SIZES, *PRODUCT, "--run", tmp_path / "run")
    assert f"{shards / 'train-00000'}.{SITES[1]}.safetensors: it has " in line
    assert "it is truncated; run the same harvest again" in line


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_the_next_command_takes_the_model_from_the_sae(
    tiny: str, data: list[str], request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = request.getfixturevalue(tiny), data[data.index("--text") + 1]
    model.hf.save_pretrained(tmp_path / tiny)
    model.tokenizer.save_pretrained(tmp_path / tiny)
    words = ["--model", str(tmp_path / tiny), "--text", text, *SIZES, "--site", SITES[0], "--rows", "256", "--l0", "4"]
    assert cli.main(["train", *words, "--run", str(tmp_path / "run")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    _, following = last.split("next: trimtab ")
    assert cli.main([*shlex.split(following), "--limit-tokens", "600"]) == 0
    assert f"at {SITES[0]} of {tmp_path / tiny}" in capsys.readouterr().out


@pytest.mark.parametrize("l0", [["4"], ["4", "8"]], ids=["one", "bank"])
def test_activations_in_a_run_are_told_and_can_be_dropped(
    l0: list[str], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        *data,
        *SIZES,
        "--site",
        SITES[0],
        "--limit-documents",
        "12",
        "--rows",
        "256",
        "--l0",
        *l0,
        "--run",
        str(run),
    ]
    assert cli.main(["train", *words]) == 0
    size = sum(file.stat().st_size for file in (run / "activations").iterdir())
    told = f"kept {size / 1e6:,.1f} MB of activations in {run}/activations (--no-keep-harvest drops them)"
    assert "".join(told.split()) in "".join(capsys.readouterr().out.split())  # lines break anywhere in a long path
    assert train(capsys, *words)["harvest_bytes"] == size
    assert train(capsys, *words, "--no-keep-harvest")["harvest_bytes"] == 0
    assert not (run / "activations").exists()
    assert cli.main(["train", *words]) == 0
    assert "activations" not in "".join(capsys.readouterr().out.split()).replace(str(tmp_path), "")


def test_a_harvest_of_one_site_needs_no_site(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sites in (("one", SITES[1:]), ("two", SITES)):
        words = [*data, "--site", *sites, "--context", "32", "--limit-documents", "12", "--run", str(tmp_path / name)]
        assert cli.main(["harvest", *words]) == 0
    capsys.readouterr()
    sizes = [*SIZES[:4], *SIZES[6:], "--rows", "256", "--l0", "4", "--run", tmp_path / "run"]
    assert train(capsys, "--activations", tmp_path / "one", *sizes)["resumed"] is False
    assert train(capsys, "--activations", tmp_path / "one", "--site", SITES[1], *sizes)["resumed"] is True
    line = failure(capsys, "--activations", tmp_path / "two", *sizes[:-1], tmp_path / "other")
    assert line == f"site resid_post.15: the shards hold {', '.join(SITES)}; choose one"


def test_too_few_documents_to_hold_any_out_are_told(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *data, *SIZES, "--site", SITES[0], "--limit-documents", "12", "--rows", "256", "--l0", "4"]
    assert cli.main([*words, "--holdout", "0.001", "--run", str(tmp_path / "none")]) == 0
    found = capsys.readouterr()
    assert "trimtab: warning: no document is held out" in found.err
    assert "training rows" in found.out
    assert cli.main([*words, "--holdout", "0.5", "--run", str(tmp_path / "some")]) == 0
    assert "warning: no document" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arch", "topc"], "arch 'topc': it is one of"),
        (["--arch", "topk", "--k", "4", "--l0", "4"], "k 4 and l0 4: they say the same thing twice"),
        (["--arch", "relu", "--k", "4"], "k 4: architecture relu has no k; give l0"),
        (["--arch", "relu", "--l0", "4", "--sparsity-weight", "2"], "give one of the two"),
        (["--bank", "nowhere.toml"], "bank file nowhere.toml: it cannot be read"),
        (["--live", "--site", *SITES], f"--live with sites {', '.join(SITES)}: a live stream runs the model for one"),
        (["--device", "cuda:99"], "device 'cuda:99': "),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], says: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in failure(capsys, *data, *words, "--run", tmp_path / "run")


def test_live_members_of_one_site_share_the_stream(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*data, *SIZES, "--site", SITES[0], "--l0", "4", "--seed", "0", "1", "--live", "--rows", "1280"]
    rows = train(capsys, *words, "--run", tmp_path / "run")["members"]
    assert [(row["status"], row["steps"]) for row in rows] == [("done", 10)] * 2
