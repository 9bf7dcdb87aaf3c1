"""Benchmarks run and print what they say: training without peers, rollouts on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.dictionaries import DictionaryInfo, Standard, save_dictionary
from trimtab.features import examples
from trimtab.lm import LanguageModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "train_sae.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--peers", "", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_train_sae_prints_its_keys() -> None:
    done = run("--only", "topk,relu,density", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["topk.of_floor"] < 1
    for section in ("topk", "relu"):
        ours = found[f"{section}.trainers"]["ours"]
        assert ours["rows_per_second"] > 0
        assert ours["explained_variance"] < 1
        assert ours["peak_mib"] >= ours["baseline_mib"]
    assert found["topk.trainers"]["ours"]["explained_variance"] > 0
    assert abs(found["topk.trainers"]["ours"]["l0"] - 8) < 1
    assert 0 < found["density.switch"] < 1
    assert set(found["machine"]) >= {"device_name", "threads", "torch", "load_average", "floors"}


def test_train_sae_refuses_what_it_does_not_know() -> None:
    assert "unknown section: topkk" in run("--only", "topkk").stderr
    assert "unknown peer: saelense" in run("--peers", "saelense").stderr


@pytest.mark.slow
def test_rollout_prints_its_keys(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    save_dictionary(Standard(rows.T, torch.zeros(40), rows, torch.zeros(32), info=info), tmp_path / "sae")
    sizes = {"batch": 3, "new-tokens": 4, "sentences": 2, "copies": 3, "repeats": 2, "calls": 1, "threads": 1}
    command = [sys.executable, str(BENCHMARKS / "rollout.py"), "--json"]
    command += ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae")]
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for batch, rows_decoded in (("", 3), ("one_token.", 6)):
        copies = [("copies_ratio", "unsteered_copies")] if batch else []  # the long batch has none
        for name in ("ratio", "none_ratio", "kl_ratio", *(figure for figure, _ in copies)):
            for figure in (f"{batch}{name}", f"{batch}cpu.{name}"):
                low, high = found[f"{figure}_range"]
                assert 0 < low <= found[figure] <= high
        assert found[f"{batch}rows"] == rows_decoded
        assert 0.5 < found[f"{batch}edited_share"] <= 1
        assert found[f"{batch}kl_per_token"] > 0
        assert set(found[f"{batch}tokens_per_second"]) == {
            "unsteered", "ratio", "none_ratio", "kl_ratio", *(rate for _, rate in copies),
        }  # fmt: skip
    assert set(found) >= {"device_name", "threads", "torch", "load_average"}


@pytest.mark.slow
def test_decode_prints_its_keys(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path)
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, str(BENCHMARKS / "decode.py"), "--json", "--model", str(tmp_path), "--batch=3"]
    command += ["--new-tokens=4", "--pairs=1", "--site=resid_post.1", "--dtype=bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    speeds = found["tokens_per_second"]
    assert set(speeds) == {"generate", "unsteered", "steered", "floor"}
    assert found["of_floor"] == pytest.approx(speeds["unsteered"] / speeds["floor"], abs=2e-3)
    assert 0 < found["of_floor"] < 1
    assert found["dtype"] == "bfloat16"


@pytest.mark.slow
def test_flags_step_prints_its_keys(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"batch-size": 2, "tokens": 24, "concepts": 2, "dims": 4, "repeats": 7, "threads": 1, "memory-pairs": 1}
    command = [sys.executable, str(BENCHMARKS / "flags_step.py"), "--json", "--model", str(tmp_path / "model")]
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run([*command, "--only=lora"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind in ("auxiliary", "forced"):
        low, high = found[f"lora.{kind}.interval"]
        assert 0 < low <= found[f"lora.{kind}.ratio"] <= high
        assert 0.5 < found[f"lora.{kind}.memory_ratio"][0] <= found[f"lora.{kind}.memory_ratio"][1] < 2
    assert found["lora.plain_seconds"] > 0
    assert set(found) >= {"threads", "torch", "load_average", "repeats"}


@pytest.mark.slow
def test_examples_prints_its_keys(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    save_dictionary(Standard(rows.T, torch.zeros(40), rows, torch.zeros(32), info=info), tmp_path / "sae")
    sizes = {"tokens": 2000, "context": 40, "windows": 2, "repeats": 1, "threads": 1}
    command = [sys.executable, str(BENCHMARKS / "examples.py"), "--json"]
    command += ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae")]
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["forwards"] < 1
    for name in ("ratio", "cpu_ratio", "rows_ratio", "tokens_per_second"):
        assert 0 < found[f"{name}_range"]["min"] <= found[name]
    assert found["windows"] == 6
    assert set(found) >= {"threads", "torch", "load_average", "device_name"}


@pytest.mark.slow
def test_axbench_prints_its_keys_and_writes_what_generate_does(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    sae = Standard(rows.T, torch.zeros(40), rows, torch.zeros(32), info=info)
    save_dictionary(sae, tmp_path / "sae")
    texts = [f"{letter} in the {letter}" for letter in "abcdefghijklmnop"]
    windows = examples(tiny_llama, sae, texts, context=16, window=6)
    windows.write(tmp_path / "sae" / "feature_examples.parquet")
    sizes = {"features": 3, "looped": 2, "instructions": 3, "tokens": 5, "batch": 7, "repeats": 2, "threads": 1}
    command = [sys.executable, str(BENCHMARKS / "axbench.py"), "--json"]
    command += ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae")]
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("ratio", "batched_ratio", "ours_features_per_second", "loop_features_per_second"):
        assert 0 < found[f"{name}_range"]["min"] <= found[name]
    assert found["same_texts"] == 1
    assert found["features"] == 3
    assert set(found) >= {"threads", "torch", "load_average", "device_name"}
