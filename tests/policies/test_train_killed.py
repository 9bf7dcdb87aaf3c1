"""`trimtab policy train`, killed with SIGKILL and started again by the same command, ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from killed_policy import EVERY, ITERATIONS, MOMENTS, MUTATIONS
from planted_readout import planted_sae

from trimtab.dictionaries import Standard, save_dictionary
from trimtab.lm import LanguageModel
from trimtab.policies.train import CHECKPOINTS
from trimtab.runs import read_metrics, read_record
from trimtab.training.checkpoint import checkpoint_files, latest_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL"),
]
TIMES = ("charts/tokens_per_second", "charts/update_seconds")


@dataclass(frozen=True)
class Killed:
    """Directories of runs, and how the children of each ended, in order."""

    root: Path
    ends: dict[str, list[str]]


@pytest.fixture(scope="module")
def killed(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    root = tmp_path_factory.mktemp("killed")
    tiny_llama.hf.save_pretrained(root / "model")
    tiny_llama.tokenizer.save_pretrained(root / "model")
    sae = planted_sae(tiny_llama, "resid_post.1")
    info = replace(sae.info, model=str(root / "model"))
    save_dictionary(Standard(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, info=info), root / "sae")
    script = Path(__file__).with_name("killed_policy.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return Killed(root, json.loads(done.stdout))


def check_same_bits(run: Path, whole: Path) -> None:
    """Metrics but for times, checkpoints and results are those of a run that was never stopped."""
    ours, expected = (
        [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(path)]
        for path in (run, whole)
    )
    assert ours == expected
    assert [p.name for p in checkpoint_files(run / CHECKPOINTS)] == [
        p.name for p in checkpoint_files(whole / CHECKPOINTS)
    ]
    mine, reference = (latest_checkpoint(path / CHECKPOINTS) for path in (run, whole))
    assert mine is not None
    assert reference is not None
    assert mine.step == reference.step == ITERATIONS
    assert mine.facts == reference.facts
    assert mine.tensors.keys() == reference.tensors.keys()
    for name, tensor in reference.tensors.items():
        assert torch.equal(mine.tensors[name], tensor), name
    results, expected_results = (read_record(path)["results"] for path in (run, whole))
    assert results | {"seconds": 0} == expected_results | {"seconds": 0}


def test_killed_at_named_moments_it_ends_with_the_same_bits(killed: Killed) -> None:
    ends = dict(zip([*MOMENTS, "in peace"], killed.ends["moments"], strict=True))
    assert ends == dict.fromkeys(MOMENTS, "killed") | {"in peace": "0"}
    run = killed.root / "moments"
    assert len(read_record(run)["resumptions"]) == len(MOMENTS)
    check_same_bits(run, killed.root / "whole")
    assert (run / "report.html").exists()
    assert not [path.name for path in run.rglob("*") if "partial" in path.name]


def test_killed_at_random_moments_it_ends_with_the_same_bits(killed: Killed) -> None:
    assert killed.ends["random"].count("killed") >= 2, "too few children were alive when they were to be killed"
    assert killed.ends["random"][-1] == "0"
    check_same_bits(killed.root / "random", killed.root / "whole")


def test_the_whole_run_has_something_to_lose(killed: Killed) -> None:
    """Several checkpoints, iterations between them, and rewards that differ."""
    assert killed.ends["whole"] == ["0"]
    assert 2 * EVERY < ITERATIONS
    rewards = [line["charts/reward"] for line in read_metrics(killed.root / "whole") if "charts/reward" in line]
    assert len(rewards) == ITERATIONS
    assert len(set(rewards)) > 2


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_resumption_that_forgets_is_noticed(killed: Killed, mutation: str) -> None:
    assert killed.ends["forgetting"] == ["killed"]
    assert killed.ends[mutation] == ["0"]
    with pytest.raises(AssertionError):
        check_same_bits(killed.root / mutation, killed.root / "whole")
