"""A harvest by several processes: the same bytes as by one, and no hang when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.activations import Document, HarvestOptions, HarvestProgress, harvest
from trimtab.activations.shards import read_index
from trimtab.lm import LanguageModel

Start = Callable[..., list[subprocess.Popen[str]]]
OPTIONS = HarvestOptions(context=16, batch_size=4, shard_rows=500, holdout=0.2, seed=3)
SITES = ["resid_post.1", "attn_z.2"]
SCRIPT = """
import json, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from trimtab.activations import Document, HarvestOptions, harvest
from trimtab.distributed import RankLostError, Ranks
from trimtab.lm import LanguageModel
home = Path({home!r})
ranks = Ranks.from_environment()
model = LanguageModel.from_hf(AutoModelForCausalLM.from_pretrained(home / "model"),
                              AutoTokenizer.from_pretrained(home / "model"), "tiny-llama")
documents = [Document(*d) for d in json.loads((home / "documents.json").read_text())]
options = HarvestOptions(context=16, batch_size=4, shard_rows=500, holdout=0.2, seed=3)
def run(out, progress=None):
    return harvest(model, {sites!r}, documents, home / out, options, progress, ranks)
"""


class Stopped(Exception):  # noqa: N818 - no error
    pass


def stop_behind(sequences: int) -> Callable[[HarvestProgress], None]:
    def stop(progress: HarvestProgress) -> None:
        if progress.sequences >= sequences:
            raise Stopped

    return stop


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture
def home(tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document]) -> Path:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    harvest(tiny_llama, SITES, documents, tmp_path / "alone", OPTIONS)
    return tmp_path


def test_the_files_are_those_of_one_process(
    home: Path, tiny_llama: LanguageModel, documents: list[Document], start_ranks: Start
) -> None:
    """Begun and finished by two; begun by one, with a damaged shard, and finished by two; the other way about."""
    with pytest.raises(Stopped):
        harvest(tiny_llama, SITES, documents, home / "one-two", OPTIONS, stop_behind(150))
    assert not read_index(home / "one-two").complete
    (home / "one-two" / "train-00000.attn_z.2.safetensors").unlink()
    script = """
with ranks:
    print(json.dumps([str(run("two")), str(run("one-two"))]))
    def stop(progress):
        if progress.sequences >= 150:
            raise KeyError("enough")
    run("two-one", stop)
"""
    first, second = start_ranks(SCRIPT.format(home=str(home), sites=SITES) + script)
    (first_out, first_err), (second_out, second_err) = first.communicate(timeout=200), second.communicate(timeout=200)
    assert "KeyError: 'enough'" in first_err, first_err
    assert "RankLostError: rank 0: it stopped: KeyError: 'enough'; start the same command again" in second_err
    assert first.returncode == second.returncode == 1
    assert first_out == second_out  # every rank is told the result
    assert not read_index(home / "two-one").complete
    assert read_index(home / "two-one").of("train")
    harvest(tiny_llama, SITES, documents, home / "two-one", OPTIONS)
    for name in ("two", "one-two", "two-one"):
        assert files_of(home / name) == files_of(home / "alone"), name


@pytest.mark.slow
def test_ranks_with_different_texts_are_told_apart(home: Path, start_ranks: Start) -> None:
    script = """
documents = documents[ranks.rank:]
with ranks:
    run("out")
"""
    first, second = start_ranks(SCRIPT.format(home=str(home), sites=SITES) + script)
    assert "UserError: rank 1: its corpus_hash is" in first.communicate(timeout=200)[1]
    assert "RankLostError: rank 0: it stopped: rank 1: its corpus_hash is" in second.communicate(timeout=200)[1]
    assert not (home / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_a_rank(
    home: Path, tiny_llama: LanguageModel, documents: list[Document], start_ranks: Start, killed: int
) -> None:
    script = """
with ranks:
    run("out", lambda progress: time.sleep(0.2))
"""
    processes = start_ranks(SCRIPT.format(home=str(home), sites=SITES) + script)
    deadline = time.monotonic() + 100
    while not (home / "out" / "train-00000.parquet").exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[killed].send_signal(signal.SIGKILL)
    survivor = processes[1 - killed]
    assert f"RankLostError: rank {killed}: it is gone" in survivor.communicate(timeout=60)[1]
    assert survivor.returncode == 1
    assert not read_index(home / "out").complete
    harvest(tiny_llama, SITES, documents, home / "out", OPTIONS)
    expected, found = files_of(home / "alone"), files_of(home / "out")
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
def test_torchrun(home: Path, tiny_llama: LanguageModel, documents: list[Document]) -> None:
    """The command itself: one line of output, one run, the files of one process."""
    text = home / "text.jsonl"
    text.write_text("\n".join(json.dumps(d._asdict()) for d in documents))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["--text", text, "--model", home / "model", "--site", "resid_post.1", "--context", 16, "--batch-size", 4]
    words += ["--shard-rows", 500, "--holdout", 0.2, "--seed", 3, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "--", "trimtab", "harvest", *map(str, words), "--run", str(home / "run")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    index = read_index(home / "run")
    assert (result["train_rows"], result["holdout_rows"]) == (index.rows("train"), index.rows("holdout"))
    assert json.loads((home / "run" / "run.json").read_text())["status"] == "done"
    harvest(tiny_llama, ["resid_post.1"], documents, home / "one", OPTIONS)
    for name, data in files_of(home / "one").items():
        if name.startswith(("train", "holdout")):
            assert (home / "run" / name).read_bytes() == data, name
