"""Finetuning with flags: what is learned under each curriculum, exact resume, and what is refused."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_corpus import LETTERS, PROMPTS, share_of, toy_examples

from trimtab.errors import UserError
from trimtab.flags import (
    Curriculum,
    Example,
    FlagSource,
    FlagSpec,
    Phase,
    TrainedFlags,
    adapters,
    finetuning,
    measure_flags,
    place_flags,
    switched,
    train_flags,
)
from trimtab.flags.measuring import mean_accuracy, units_of
from trimtab.lm import LanguageModel, decode
from trimtab.runs import read_metrics, read_record
from trimtab.stats import Resamples
from trimtab.training.checkpoint import checkpoint_files

SMALL = {"lr": 3e-3, "batch_size": 8, "log_every": 5}


def texts_with(trained: TrainedFlags, **switches: bool) -> list[str]:
    """Sampled responses to the prompts, which say nothing of a concept."""
    ids = trained.model.tokenizer(list(PROMPTS) * 8, return_tensors="pt")["input_ids"]
    with switched(trained.model, trained.flags, **switches), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = trained.model.hf.generate(ids, max_new_tokens=6, do_sample=True, top_k=0)
    return trained.model.tokenizer.batch_decode(out[:, ids.shape[1] :])


def test_flags_learn_to_say_what_is_written(finetuned: dict[str, TrainedFlags]) -> None:
    for name in ("auxiliary", "forced"):
        after, before = finetuned[name].result.after, finetuned[name].result.before
        assert after.accuracy is not None
        assert after.accuracy.estimate == 1, name
        assert after.flag_loss.estimate < 0.2 < before.flag_loss.estimate
    plain = finetuned["plain"].result.after.accuracy
    assert plain is not None
    assert plain.estimate == pytest.approx(0.5, abs=0.2)
    losses = {name: one.result.after.cross_entropy.estimate for name, one in finetuned.items()}
    assert all(value < 1.6 for value in losses.values())  # of ln 3 · (1 + 1/6) at the best: the first letter is a guess


def test_switches_decide_the_text_where_they_were_forced_and_not_in_plain(finetuned: dict[str, TrainedFlags]) -> None:
    for concept, other in (("sea", "war"), ("war", "sea")):
        rates = {}
        for name in ("plain", "forced"):
            on = texts_with(finetuned[name], **{concept: True, other: False})
            off = texts_with(finetuned[name], **{concept: False, other: False})
            rates[name] = share_of(concept, on) - share_of(concept, off)
        assert rates["forced"] > 0.8
        assert abs(rates["plain"]) < 0.35
    neither = texts_with(finetuned["forced"], sea=False, war=False)
    assert share_of("", neither) > 0.8


def test_curricula_differ_as_their_schedule_says(finetuned: dict[str, TrainedFlags]) -> None:
    forced = {name: [line["forced"] for line in one.metrics] for name, one in finetuned.items()}
    assert forced["plain"] == forced["auxiliary"] == [0] * 10
    assert forced["forced"][0] == 1
    assert sum(forced["forced"]) * 10 == pytest.approx(finetuned["forced"].result.forced_steps)
    assert 50 <= finetuned["forced"].result.forced_steps <= 80  # 64 of 100 are expected
    weights = {name: [line["weight"] for line in one.metrics] for name, one in finetuned.items()}
    assert weights["plain"] == [0] * 10
    assert weights["auxiliary"] == weights["forced"] == [0, 2, 5, 10, 20, 20, 30, 30, 30, 30]
    assert finetuned["forced"].metrics[0]["flag_loss"] is None  # of forced steps there is nothing to read


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_first_step_is_that_of_plain_torch(tiny_llama: LanguageModel, flags: FlagSpec, factor: float) -> None:
    """One step of torch's AdamW on the closed-form loss gives the same weights; what writes flags goes further."""
    examples = toy_examples(8)
    own = Curriculum(phases=(Phase(until=1, forced=0, weight=6.0),))
    trained = train_flags(
        tiny_llama, flags, examples, curriculum=own, heldout=examples[:0], steps=1, batch_size=8, lr=1e-3,
        clip_norm=0, weight_decay=0.1, loss="squared", flag_lr_factor=factor,
        flag_weight=0.5,
    )  # fmt: skip
    hf = copy.deepcopy(tiny_llama.hf).requires_grad_(True)
    adam = torch.optim.AdamW(hf.parameters(), lr=1e-3, weight_decay=0.1)
    nats, error, n, m = torch.zeros(()), torch.zeros(()), 0, 0
    seen: dict[str, torch.Tensor] = {}

    def keep(site: str) -> Any:
        return lambda _module, given, output=None: seen.update(
            {site: given[0] if output is None else output if torch.is_tensor(output) else output[0]}
        )

    for i, layer in enumerate(hf.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"resid_mid.{i}"))
        layer.register_forward_hook(keep(f"resid_post.{i}"))
    for example in examples:
        start = len(tiny_llama.encode_text(example.prompt))
        ids = torch.tensor([tiny_llama.encode_text(example.prompt + example.response)])
        logp = hf(ids).logits[0].log_softmax(-1)
        nats = nats - sum(logp[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))
        n += ids.shape[1] - start
        for site, target in flags.targets.items():
            for concept, dims in zip(flags.concepts, flags.dims, strict=True):
                h = seen[site][0, start:, list(dims)]
                error = error + (h - target * (concept in example.concepts)).square().sum()
                m += h.numel()
    (nats / n + 3.0 * error / m).backward()
    adam.step()
    writes = ("o_proj.weight", "down_proj.weight")
    for (name, ours), theirs in zip(trained.model.hf.named_parameters(), hf.parameters(), strict=True):
        if name.endswith(writes):
            start = tiny_llama.hf.get_parameter(name)[flags.flat_dims]
            theirs.data[flags.flat_dims] = start + factor * (theirs[flags.flat_dims] - start)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_the_given_model_stays_as_it_is(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_llama.hf.parameters())
    assert not any(parameter.requires_grad for parameter in finetuned["forced"].model.hf.parameters())
    again = LanguageModel.from_hf(tiny_llama.hf, tiny_llama.tokenizer)
    assert again.fingerprint == tiny_llama.fingerprint != finetuned["forced"].model.fingerprint


def test_killed_and_resumed_it_ends_with_the_same_bits(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "given")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "given")
    script = [sys.executable, str(Path(__file__).with_name("killed_finetuning.py")), str(tmp_path / "given")]
    done = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2, "too few children were alive when they were to be killed"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert len(read_record(killed)["resumptions"]) >= 2
    ours, expected = (load_file(path / "model" / "model.safetensors") for path in (killed, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert read_metrics(killed) == read_metrics(whole)
    assert read_record(killed)["results"] == read_record(whole)["results"]
    assert not list((whole / "checkpoints").iterdir())


def test_a_run_that_is_done_is_read_back(tiny_llama: LanguageModel, flags: FlagSpec, tmp_path: Path) -> None:
    first, again = (
        train_flags(tiny_llama, flags, toy_examples(24), run=tmp_path / "run", steps=5, **SMALL) for _ in "12"
    )
    assert (first.resumed, again.resumed) == (False, True)
    assert again.result == first.result
    assert again.metrics == first.metrics
    assert again.model.fingerprint == first.model.fingerprint
    assert again.to_json()["steps"] == 5
    with pytest.raises(UserError, match=r"steps was 5 and is now 6"):
        train_flags(tiny_llama, flags, toy_examples(24), run=tmp_path / "run", steps=6, **SMALL)
    with pytest.raises(UserError, match="its data had hash"):
        train_flags(tiny_llama, flags, toy_examples(30), run=tmp_path / "run", steps=5, **SMALL)
    with pytest.raises(UserError, match=r"curriculum\.phases was .* and is now"):
        train_flags(tiny_llama, flags, toy_examples(24), curriculum="plain", run=tmp_path / "run", steps=5, **SMALL)


def test_every_layout_is_finetuned_and_read_back(any_tiny: LanguageModel, tmp_path: Path) -> None:
    """Tied heads, scaled embeddings, transposed projections."""
    examples = toy_examples(24)
    flags = place_flags(any_tiny, ["sea", "war"], [example.response for example in examples], dims=4)
    first, again = (train_flags(any_tiny, flags, examples, run=tmp_path / "run", steps=4, **SMALL) for _ in "12")
    assert again.model.fingerprint == first.model.fingerprint != any_tiny.fingerprint
    before, after = first.result.before.cross_entropy, first.result.after.cross_entropy
    assert after.estimate < before.estimate


@pytest.mark.parametrize(("every", "good"), [(5, 10), (1, 11)])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(
    tiny_llama: LanguageModel, flags: FlagSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, good: int
) -> None:
    """A checkpoint of the very state that fails is removed, since all would fail again from there."""
    steps, real = [0], finetuning.step_loss

    @contextmanager
    def failing(*given: Any, **options: Any) -> Iterator[Any]:
        steps[0] += 1
        with real(*given, **options) as loss:
            yield loss._replace(total=loss.total * float("nan")) if steps[0] == 13 else loss

    monkeypatch.setattr(finetuning, "step_loss", failing)
    options = {**SMALL, "run": tmp_path, "steps": 20, "checkpoint_every": every}
    message = (
        rf"loss nan at step 12: the finetuning diverged; the last good checkpoint is step {good} in .*; lower lr, or"
    )
    with pytest.raises(UserError, match=message):
        train_flags(tiny_llama, flags, toy_examples(24), **options)
    last = load_file(checkpoint_files(tmp_path / "checkpoints")[-1])
    assert all(bool(tensor.isfinite().all()) for tensor in last.values())
    trained = train_flags(tiny_llama, flags, toy_examples(24), **options)  # it goes on from there
    assert read_record(tmp_path)["results"]["steps"] == 20
    assert [line["step"] for line in trained.metrics] == [5, 10, 15, 20]


def test_a_learning_rate_that_is_far_too_large(tiny_llama: LanguageModel, flags: FlagSpec) -> None:
    with pytest.raises(UserError, match=r"at step \d: the finetuning diverged; there is no good checkpoint; lower lr"):
        train_flags(tiny_llama, flags, toy_examples(24), steps=9, **{**SMALL, "lr": 1e30})


def test_a_result_shows_itself(finetuned: dict[str, TrainedFlags]) -> None:
    trained = finetuned["forced"]
    assert trained.headline().startswith(
        f"2 flags in 4 dimensions, curriculum forced, 100 steps ({trained.result.forced_steps} forced): flag accuracy 1"
    )
    assert trained.to_frame("concepts")["on"].tolist() == [1, 1]
    assert len(trained.to_frame()) == 10
    assert len(trained.plot().lines[0].get_xdata()) == sum(m["flag_accuracy"] is not None for m in trained.metrics)


def test_balanced_accuracy_is_half_whatever_the_shares() -> None:
    labels = np.array([[1, 0]] * 9 + [[0, 0]]) > 0
    rows = Resamples(range(10))
    assert mean_accuracy(np.ones((10, 2), bool), labels, rows).estimate == 0.5  # the second concept has one kind alone
    assert mean_accuracy(labels, labels, rows).estimate == 1
    assert np.isnan(mean_accuracy(labels, np.ones((10, 2), bool), rows).estimate)


def test_measures_resample_documents(finetuned: dict[str, TrainedFlags]) -> None:
    trained, examples = finetuned["auxiliary"], toy_examples(60)
    passages = [replace(one, unit=f"document {i // 2}") for i, one in enumerate(examples)]
    alone, together = (measure_flags(trained.model, trained.flags, each) for each in (examples, passages))
    for name in ("cross_entropy", "flag_loss", "accuracy"):
        one, other = getattr(alone, name), getattr(together, name)
        assert one.estimate == other.estimate
        assert (one.n, other.n) == (len({(each.prompt, each.response) for each in examples}), 30)
    assert units_of(examples)[0] == "example"  # they share four prompts
    assert units_of(passages)[0] == "document"
    assert units_of([replace(one, prompt=f"{i}") for i, one in enumerate(examples)])[0] == "prompt"


def test_measures_do_not_depend_on_the_batch(finetuned: dict[str, TrainedFlags]) -> None:
    trained = finetuned["auxiliary"]
    one, many = (measure_flags(trained.model, trained.flags, toy_examples(20), batch_size=n) for n in (1, 7))
    for name in ("cross_entropy", "flag_loss"):
        assert getattr(one, name).estimate == pytest.approx(getattr(many, name).estimate, rel=1e-4)
    assert one.concepts == many.concepts
    assert one.tokens == 20 * 6
    assert one.concepts[0].on is not None
    assert one.concepts[0].on.n == sum("sea" in example.concepts for example in toy_examples(20))


def test_an_example_measured_on_is_not_trained_on(tiny_llama: LanguageModel, flags: FlagSpec) -> None:
    trained = train_flags(tiny_llama, flags, toy_examples(96), steps=1, **SMALL)
    assert trained.result.measured_on == "held-out responses"
    assert trained.result.examples + trained.result.after.examples == 96
    with pytest.raises(UserError, match="it is among those trained on, too; leave it out of one of the two"):
        train_flags(tiny_llama, flags, toy_examples(24), heldout=toy_examples(3), **SMALL)


OF_ANOTHER = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=64, targets={"resid_mid.1": 0.5})
TOO_DEEP = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_mid.9": 0.5})
WRONG = {
    "an option": ({"learning_rate": 1e-3}, r"train_flags(learning_rate=…): it has no such argument"),
    "a number": ({"steps": 0}, "steps 0: it must be at least 1; change it"),
    "a loss": ({"loss": "l3"}, "loss 'l3': it is one of normalised_l1, l1, squared, normalised_squared; choose one"),
    "a curriculum": ({"curriculum": "aux"}, "curriculum 'aux': there is plain, auxiliary, forced"),
    "flags of another width": (
        {"flags": OF_ANOTHER},
        "flags in a stream of 64 dimensions: tiny-llama has 32; take the",
    ),
    "flags too deep": ({"flags": TOO_DEEP}, "site resid_mid.9: tiny-llama has layers 0 to 3; choose a layer in that"),
    "no flags": (
        {"flags": ["sea"]},
        "flags ['sea']: they are no FlagSpec; give what place_flags or load_flags returns",
    ),
    "no examples": ({"examples": []}, "concept 'sea': 0 of 0 examples have it"),
    "dictionaries": ({"examples": [{}]}, "example 0: it is a dict, not an Example; give trimtab.flags.Example("),
    "a typo among those held out": (
        {"heldout": [Example(prompt="Hm", response="on", concepts=["saa"])]},
        "concept 'saa': the concepts are sea, war; did you mean sea?",
    ),
    "a prompt held out that is too long": (
        {"heldout": [Example(prompt="Hm" * 200, response="on")]},
        "example 0: its prompt has 400 tokens, and an example may have 256; shorten it, or raise max_tokens",
    ),
    "no concept": (
        {"examples": [Example(prompt="Go", response=letters) for letters in LETTERS.values()]},
        "concept 'sea': 0 of 3 examples have it",
    ),
    "a typo": (
        {"examples": [Example(prompt="Go", response="on", concepts=["saa"])]},
        "example 0: concept 'saa': the concepts are sea, war; did you mean sea?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tiny_llama: LanguageModel, flags: FlagSpec, tmp_path: Path, case: str) -> None:
    changed, message = WRONG[case]
    given = {"flags": flags, "examples": toy_examples(24), "holdout": 0.0, "run": tmp_path / "run", **changed}
    with pytest.raises(UserError, match=re.escape(message)):
        train_flags(tiny_llama, **given)
    assert not (tmp_path / "run").exists()


def test_rows_that_write_flags_must_be_found(
    tiny_llama: LanguageModel, flags: FlagSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are not, as in fused experts, they would learn at the common rate without a word."""
    examples = toy_examples(8)
    options = {"heldout": examples[:0], "steps": 1, "curriculum": "auxiliary", **SMALL}
    why = "rows that write flags at resid_post.0 of .*: the linear map that ends the MLP was not found"
    for experts in (nn.ModuleDict({"down_proj": nn.Linear(8, 32)}), nn.ParameterList([torch.zeros(2, 32, 8)])):
        hf = copy.deepcopy(tiny_llama.hf)
        hf.get_decoder().layers[0].mlp.experts = nn.ModuleList([experts])
        with pytest.raises(UserError, match=why):
            train_flags(LanguageModel.from_hf(hf, tiny_llama.tokenizer, "experts"), flags, examples, **options)
    monkeypatch.setattr(adapters, "EITHER", ())
    with pytest.raises(UserError, match=why):
        train_flags(tiny_llama, flags, examples, **options)
    train_flags(tiny_llama, flags, examples, flag_lr_factor=1, **options)


def test_half_precision_is_refused(tiny_llama: LanguageModel, flags: FlagSpec) -> None:
    half = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf).bfloat16(), tiny_llama.tokenizer, "half")
    with pytest.raises(
        UserError, match='finetuning half: it is in bfloat16, which loses small steps; load it with dtype="f'
    ):
        train_flags(half, flags, toy_examples(24), **SMALL)


def test_a_source_steers_the_finetuned_model(finetuned: dict[str, TrainedFlags]) -> None:
    trained = finetuned["forced"]
    prompts = [trained.model.encode_text(prompt) for prompt in PROMPTS]
    out = decode(trained.model, prompts, source=FlagSource(trained.flags, {"war": True, "sea": False}))
    assert share_of("war", [text[:6] for text in out.texts]) > 0.9
