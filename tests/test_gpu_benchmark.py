"""`benchmarks/gpu.py`: its sections run on a CPU at tiny sizes, and what can be wrong in them is held against others.

Mutations that must fail: a plain loss without its penalty, or with one nested dictionary too few; a part that is not
repeated at half its batch, or whose error ends the others; a time limit that an inner one forgets; counts that take
graphs for launches; a peer's time that includes the warm-up.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.training import TrainConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_all_sections_run_at_tiny_sizes(tmp_path: Path) -> None:
    done = run("gpu.py", "--small", "--device=cpu", "--dtype=float32", f"--json={tmp_path / 'gpu.json'}")
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = {
        "decode": 12, "lengths": 2, "prompts": 5, "harvest": 1, "scoring": 1, "policy": 1, "launches": 3, "leak": 1,
        "kernels": 10, "training": 15,
    }  # fmt: skip
    assert {name: len(found[name]) for name in names} == names
    for row in (row for name in names for row in found[name]):
        assert row["rate"] > 0
        assert all(ratio > 0 for ratio in row["over"].values())
        assert row["what"] in done.stdout
    assert found["harvest"][0]["more"]["same_activations"]
    (policy,) = [row for row in found["decode"] if row["what"] == "tiny 3 rows, policy"]
    assert set(policy["over"]) == {"generate", "unsteered"}
    for row in found["decode"] + found["training"] + found["scoring"] + found["kernels"]:
        assert row["of_floor"] > 0  # which was measured at another moment
    assert found["floors"]["gigabytes_per_second"] > 0
    assert set(found["floors"]["gigaflops_per_second"]) == {"float32"}


@pytest.mark.slow
def test_decode_with_random_weights_needs_nothing_else() -> None:
    done = run(
        "decode.py", "--random=tiny", "--batch=3", "--new-tokens=4", "--pairs=1", "--site=resid_post.3", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "random tiny"
    assert 0 < found["of_floor"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_in_one_line() -> None:
    done = run("decode.py", "--random=tiny", "--device=cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("decode.py: device 'cuda': ")
    assert len(done.stderr.splitlines()) == 1


def counterpart(sae: TrainableSAE, name: str) -> torch.nn.Parameter:
    """trimtab's parameter for one of a plain step's."""
    own = {"W_enc": "W_enc_rows", "b_enc": sae.vectors[0]}
    return sae.get_parameter(own.get(name, name))


def trained(architecture: str, plain: Any) -> TrainableSAE:
    """trimtab's SAE with the weights of a plain step, and settings for which both have the same loss."""
    d, n = plain.learnt["W_enc"].shape
    options: dict[str, Any] = {"sparsity_weight": 1.0, "sparsity_warmup_share": 0.0}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        options = {"k": plain.k}
    elif architecture == "jumprelu":
        options |= {"penalty": "l0", "bandwidth": 0.5}
    sae = TrainConfig(arch=architecture, n_features=n, **options).build(d, steps=100)
    with torch.no_grad():
        for name, value in plain.learnt.items():
            counterpart(sae, name).copy_((value.T if name == "W_enc" else value) / unit(name, d))
        if architecture == "panneal":
            sae.get_buffer("p").fill_(0.5)
            sae.get_buffer("linear_below").fill_(float(plain.weights["linear_below"]))
    return sae


def unit(name: str, d: int) -> float:
    """What trimtab's parameter is multiplied by: thresholds are kept in units of the rows' mean norm."""
    return d**0.5 if name == "theta" else 1.0


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "gated", "relu", "matryoshka", "panneal"])
def test_plain_steps_have_the_papers_loss(load: Load, name: str) -> None:
    plain = load("accelerator.plain_steps").PlainStep(name, d=16, n=64, k=5, device="cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 16, generator=generator) * 1.5
    with torch.no_grad():
        for value in plain.learnt.values():
            if value.ndim == 1:  # vectors are all alike at first
                value.add_(torch.rand(value.shape, generator=generator))
    loss = plain.loss(x, plain.weights, plain.k, plain.weight)
    sae = trained(name, plain)
    expected = sae.loss(x)
    assert float(loss.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-5)
    loss.backward()
    expected.total.backward()
    for own, value in plain.learnt.items():
        gradient = (value.grad.T if own == "W_enc" else value.grad) * unit(own, 16)
        torch.testing.assert_close(gradient, counterpart(sae, own).grad, rtol=1e-4, atol=1e-5)


def test_a_plain_step_lowers_its_loss_and_keeps_rows_at_norm_1(load: Load) -> None:
    plain = load("accelerator.plain_steps").PlainStep("topk", d=16, n=64, k=5, device="cpu")
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    before = plain.loss(x, plain.weights, plain.k, plain.weight).item()
    for _ in range(50):
        plain(x)
    assert plain.loss(x, plain.weights, plain.k, plain.weight).item() < before
    norms = plain.learnt["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_what_does_not_fit_is_measured_at_half_the_batch(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    sections, tried = load("accelerator.sections"), []

    def measure(batch: int) -> Any:
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield sections.Row(what="fits", rate=1.0, unit="rows/s")

    (row,) = sections.run_section("some", [sections.Part(name="one", measure=measure, batch=8)], "cpu", 60)
    assert tried == [8, 4, 2]
    assert row.more == {"batch": 2}
    said = capsys.readouterr().err
    assert "some one: out of memory with a batch of 8 (of the host); again with 4\n" in said
    assert "some one: a batch of 2 fits\n" in said

    def never(batch: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert list(sections.run_section("some", [sections.Part(name="one", measure=never, batch=2)], "cpu", 60)) == []
    assert "out of memory with a batch of 1 " in capsys.readouterr().err


def test_a_part_that_fails_is_said_in_one_line_and_the_others_go_on(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = load("accelerator.sections")

    def fails(batch: int) -> Any:
        yield sections.Row(what="first", rate=1.0, unit="rows/s")
        raise ValueError("two\nlines")

    def works(batch: int) -> Any:
        yield sections.Row(what="second", rate=1.0, unit="rows/s")

    parts = [sections.Part(name=name, measure=run, batch=4) for name, run in (("a", fails), ("b", works))]
    assert [row.what for row in sections.run_section("some", parts, "cpu", 60)] == ["first", "second"]
    assert capsys.readouterr().err == "some a: ValueError: two lines\n"


def test_what_takes_too_long_ends_and_the_rest_is_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, now = load("accelerator.sections"), [0.0]
    monkeypatch.setattr(sections.time, "monotonic", lambda: now[0])

    def endless(batch: int) -> Any:
        yield sections.Row(what="first", rate=1.0, unit="rows/s")
        while True:
            try:
                now[0] = 100.0
                signal.raise_signal(signal.SIGALRM)  # the time is over
            except Exception:  # code on the way that goes on after any error
                continue

    parts = [sections.Part(name=name, measure=endless, batch=4) for name in "abc"]
    assert [row.what for row in sections.run_section("some", parts, "cpu", 60)] == ["first"]
    assert capsys.readouterr().err == "some a: not done within its time\nsome: no time left for b, c\n"


def test_a_limit_within_a_limit_leaves_the_outer_one(load: Load) -> None:
    sections = load("accelerator.sections")
    with sections.time_limit(600):
        with sections.time_limit(6000):
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        with pytest.raises(sections.OutOfTime), sections.time_limit(1):
            signal.raise_signal(signal.SIGALRM)
        assert 1 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        with pytest.raises(sections.OutOfTime):
            signal.raise_signal(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_launches_graphs_and_waits_are_told_apart(load: Load) -> None:
    counted = load("accelerator.launches").counted
    events = [
        SimpleNamespace(key=key, count=count, self_device_time_total=time)
        for key, count, time in (
            ("cudaLaunchKernel", 30, 0.0), ("cuLaunchKernelEx", 4, 0.0), ("cudaGraphLaunch", 7, 0.0),
            ("cudaStreamSynchronize", 2, 0.0), ("cudaMemcpyAsync", 9, 0.0), ("a_kernel", 34, 1500.0),
        )
    ]  # fmt: skip
    assert counted(events) == (34, 7, 2, 1.5)


def test_a_peers_loop_is_timed_behind_its_warm_up(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, job = load("accelerator.peers"), load("sae_training.job").Job
    one = job(rows="", architecture="topk", d=4, n=8, k=2, batch=5, steps=6)
    seen: list[Any] = []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: 2.0 * len(seen))  # a step takes two seconds

    def fit(paced: Any) -> None:
        for x in paced.batches():
            seen.append(x)

    monkeypatch.setattr(peers, "_fit_of", lambda name: fit)
    found = peers.train("some", one, torch.arange(80.0).reshape(20, 4), warmup=2, autocast=False)
    assert found == (3 * 5 / 6.0, None)  # three steps in six seconds
    assert [len(x) for x in seen] == [5] * 6


def test_saelens_is_measured_at_the_middle_sparsity(load: Load) -> None:
    """Of each architecture of a bank; mutation: at the last one."""
    bank = load("accelerator.training")
    members = [(architecture, l0) for architecture in bank.BANK for l0 in (8, 16, 24, 32, 48, 64)]
    assert bank.middle(members) == [(architecture, 32) for architecture in bank.BANK]
