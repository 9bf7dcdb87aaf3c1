"""Flags by LoRA: what an adapter learns, saves and loads, and which modules it must have."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from toy_corpus import PROMPTS, share_of, toy_examples
from transformers import AutoModelForCausalLM

from trimtab.errors import UserError
from trimtab.flags import (
    FlagSpec,
    TrainedFlags,
    load_flagged,
    load_flags,
    measure_flags,
    place_flags,
    switched,
    train_flags,
)
from trimtab.flags.adapters import add_adapter, check_lora
from trimtab.flags.arm import SwitchedFlags
from trimtab.flags.config import LoraOptions
from trimtab.lm import LanguageModel, load_model, pull

SMALL = {"lr": 1e-2, "batch_size": 8, "log_every": 5, "adapt": "lora"}
FLAGS = FlagSpec(
    concepts=("sea", "war"),
    dims=((3, 17), (8,)),
    d_model=32,
    targets={"resid_mid.1": 0.5, "resid_post.1": 0.75, "resid_mid.2": 1.5, "resid_post.2": 2.0},
)


@pytest.fixture(scope="module")
def named(finetuned: dict[str, TrainedFlags], tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny Llama that knows the corpus, loaded from a directory."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    finetuned["plain"].model.hf.save_pretrained(path)
    finetuned["plain"].model.tokenizer.save_pretrained(path)
    return load_model(path)


@pytest.fixture(scope="module")
def trained(named: LanguageModel) -> TrainedFlags:
    texts = [example.response for example in toy_examples()]
    flags = place_flags(named, ["sea", "war"], texts, dims=4, from_layer=1, ramp_scale=3.0)
    return train_flags(
        named, flags, toy_examples(), adapt="lora", steps=150, lr=1e-2, batch_size=12, lora_rank=8, log_every=10
    )


def test_an_adapter_learns_flags_that_decide(named: LanguageModel, trained: TrainedFlags) -> None:
    after = trained.result.after
    assert after.accuracy is not None
    assert after.accuracy.estimate == 1
    ids = named.tokenizer(list(PROMPTS) * 8, return_tensors="pt")["input_ids"]
    for concept, other in (("sea", "war"), ("war", "sea")):
        with switched(trained.adapter, trained.flags, **{concept: True, other: False}), torch.random.fork_rng([]):
            torch.manual_seed(0)
            out = trained.adapter.generate(ids, max_new_tokens=6, do_sample=True, top_k=0)
        assert share_of(concept, named.tokenizer.batch_decode(out[:, ids.shape[1] :])) > 0.8
    assert f"150 steps ({trained.result.forced_steps} forced), LoRA of " in trained.headline()
    added = sum(p.numel() for name, p in trained.model.hf.named_parameters() if ".lora_" in name)
    assert trained.result.trained_weights == added == 4 * 8 * (2 * 64 + 2 * 48 + 3 * 96)


def test_only_the_adapter_is_trained(named: LanguageModel, trained: TrainedFlags) -> None:
    before = named.hf.state_dict()
    for name, tensor in trained.model.hf.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer.", ".")]), name
    assert not any(".lora_" in name for name in before)


def test_it_is_saved_and_loaded_by_plain_peft(named: LanguageModel, trained: TrainedFlags, tmp_path: Path) -> None:
    where = trained.save(tmp_path / "adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "flags.json"}
    assert {file.name for file in where.iterdir()} == names
    said = json.loads((where / "adapter_config.json").read_text())
    assert (
        said["base_model_name_or_path"] == named.name == json.loads((where / "flags.json").read_text())["base"]["name"]
    )
    assert load_flags(where) == trained.flags
    batch = named.tokenizer(list(PROMPTS), return_tensors="pt")
    theirs = [
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named.name), where),
        peft.AutoPeftModelForCausalLM.from_pretrained(where),
    ]
    for model in theirs:
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, trained.model.hf(**batch).logits)
            with switched(model, where, sea=True):
                ours = model.generate(**batch, max_new_tokens=5, do_sample=False)
            with switched(trained.model, trained.flags, sea=True):
                assert torch.equal(ours, trained.model.hf.generate(**batch, max_new_tokens=5, do_sample=False))
        assert load_flags(where, model) == trained.flags
        with pytest.raises(UserError, match=r"there is no flags\.json beside its files"), switched(model, sea=True):
            pass


def test_it_is_loaded_with_its_base(named: LanguageModel, trained: TrainedFlags, tmp_path: Path) -> None:
    where = trained.save(tmp_path / "adapter")
    ids = torch.tensor([named.encode_text("over the hills")])
    for model, flags in (load_flagged(where), load_flagged(where, base=named)):
        assert flags == trained.flags
        assert torch.equal(model.hf(ids).logits, trained.model.hf(ids).logits)
        with switched(model, sea=True):  # flags.json lies where it was loaded from
            model.hf(ids)
    loaded, flags = load_flagged(where)
    assert SwitchedFlags(model=loaded).flags_of(loaded) == flags
    half, _ = load_flagged(where, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert not any(".lora_" in name for name, _ in named.hf.named_parameters())


def test_it_is_saved_in_half_the_bytes(named: LanguageModel, trained: TrainedFlags, tmp_path: Path) -> None:
    """What is measured is what is saved, rounded."""
    options = {**SMALL, "steps": 10, "save_dtype": "bfloat16", "run": tmp_path / "run"}
    short = train_flags(named, trained.flags, toy_examples(48), **options)
    sizes = []
    for one, name in ((trained, "float32"), (short, "bfloat16")):
        sizes.append((one.save(tmp_path / name) / "adapter_model.safetensors").stat().st_size)
    assert sizes[1] < 0.65 * sizes[0]  # the rest is the header
    model, flags = load_flagged(tmp_path / "run" / "model")
    assert all(torch.equal(p, p.bfloat16().float()) for n, p in model.hf.named_parameters() if ".lora_" in n)
    again = train_flags(named, flags, toy_examples(48), **options)
    assert again.resumed
    assert again.model.fingerprint == short.model.fingerprint == model.fingerprint
    assert again.adapter is not None
    one, other = (measure_flags(each, flags, toy_examples(6)) for each in (model, short.model))
    assert one == other


def test_adapters_of_others_are_refused(named: LanguageModel, trained: TrainedFlags, tmp_path: Path) -> None:
    where = trained.save(tmp_path / "adapter")
    hf = copy.deepcopy(named.hf)
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight[0, 0] += 0.1
    other = LanguageModel.from_hf(hf, named.tokenizer, "other")
    for part in (hf, named.tokenizer):
        part.save_pretrained(tmp_path / "changed")
    message = (
        r"adapter .*: other has other weights than the model that it was trained on; give that one, .*tiny, as base"
    )
    with pytest.raises(UserError, match=message):
        load_flagged(where, base=other)
    with pytest.raises(
        UserError, match=r"flags\.json: it is another model's: .*; put the adapter that lies beside it on"
    ):
        load_flags(where, peft.PeftModel.from_pretrained(hf, where))
    merged = copy.deepcopy(trained.adapter).merge_and_unload()
    with pytest.raises(UserError, match=r"it is another model's: .*; put the adapter that lies beside it on its model"):
        load_flags(where, merged)
    fields = json.loads((where / "flags.json").read_text())
    for name, message in (
        (
            "changed",
            r"adapter .*: .*changed has other weights than .* trained on; put that one there, or give it as base",
        ),
        ("gone", r"the model that .*adapter adapts: model .*gone: .*; load that model and give it"),
    ):
        fields["base"]["name"] = str(tmp_path / name)
        (where / "flags.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match=message):
            load_flagged(where)
    with pytest.raises(UserError, match=r"finetuning .*: it has an adapter of PEFT already; merge that first"):
        train_flags(trained.model, trained.flags, toy_examples(24), **SMALL)


def test_it_begins_as_the_model_itself(any_tiny: LanguageModel) -> None:
    """The same seed begins at the same adapter, and the random state of others is left alone."""
    ids = torch.tensor([any_tiny.encode_text("over the hills")])
    state = torch.get_rng_state()
    (one, _), (same, _), (other, _) = (add_adapter(any_tiny, FLAGS, LoraOptions(adapt="lora"), s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.hf(ids).logits, any_tiny.hf(ids).logits)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_every_layout_is_adapted_and_read_back(any_tiny: LanguageModel, tmp_path: Path) -> None:
    examples = toy_examples(24)
    flags = place_flags(any_tiny, ["sea", "war"], [example.response for example in examples], dims=4)
    first, again = (train_flags(any_tiny, flags, examples, run=tmp_path / "run", steps=4, **SMALL) for _ in "12")
    assert again.resumed
    assert again.model.fingerprint == first.model.fingerprint != any_tiny.fingerprint
    before, after = first.result.before.cross_entropy, first.result.after.cross_entropy
    assert after.estimate < before.estimate


def test_stopped_and_resumed_it_ends_with_the_same_bits(
    tiny_llama: LanguageModel, flags: FlagSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.flags.finetuning import FlagTrainer

    options = {**SMALL, "steps": 20, "checkpoint_every": 7, "snapshots": 3}
    real = FlagTrainer.take_step

    def stopping(self: FlagTrainer) -> None:
        if self.step == 17:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(FlagTrainer, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_flags(tiny_llama, flags, toy_examples(24), run=tmp_path / "stopped", **options)
    monkeypatch.setattr(FlagTrainer, "take_step", real)
    stopped, whole = (
        train_flags(tiny_llama, flags, toy_examples(24), run=tmp_path / name, **options)
        for name in ("stopped", "whole")
    )
    assert stopped.metrics == whole.metrics
    assert stopped.result == whole.result
    assert stopped.model.fingerprint == whole.model.fingerprint


WRITE = "flags from layer 1 on are written by o_proj and down_proj; add"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "queries and values, as is usual": (
        {"lora_modules": ("q_proj", "v_proj")},
        f"LoRA in q_proj, v_proj: {WRITE} o_proj and down_proj, or leave lora_modules out for all of down_proj,",
    ),
    "attention alone": ({"lora_modules": ("q_proj", "o_proj")}, f"LoRA in q_proj, o_proj: {WRITE} down_proj, or"),
    "a typo": (
        {"lora_modules": ("o_proj", "down_prj")},
        "module 'down_prj': the linear modules of tiny-llama's layers are down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj; did you mean down_proj?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_modules_by_which_flags_cannot_be_written_are_refused(tiny_llama: LanguageModel, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(UserError, match=re.escape(message)):
        train_flags(tiny_llama, FLAGS, toy_examples(24), **{**SMALL, **options})


def test_modules_pass_where_they_write_at_every_site(tiny_llama: LanguageModel) -> None:
    for chosen in (("o_proj",), ("down_proj",), ("o_proj", "q_proj"), ("o_proj", "down_proj"), ("q_proj", "v_proj")):
        try:
            check_lora(tiny_llama, FLAGS, LoraOptions(adapt="lora", lora_modules=chosen))
            passes = True
        except UserError:
            passes = False
        assert passes == ({"o_proj", "down_proj"} <= set(chosen)), chosen


def test_the_modules_that_write_are_enough(tiny_llama: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    options = LoraOptions(adapt="lora", lora_modules=("o_proj", "down_proj"))
    assert check_lora(tiny_llama, FLAGS, options) == ["o_proj", "down_proj"]
    assert check_lora(tiny_gpt2, FLAGS, LoraOptions(adapt="lora")) == ["c_attn", "c_fc", "c_proj"]
    with pytest.raises(
        UserError, match=re.escape("LoRA in attn.c_proj: flags from layer 1 on are written by c_proj; add")
    ):
        check_lora(tiny_gpt2, FLAGS, LoraOptions(adapt="lora", lora_modules=("attn.c_proj",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 4}, "lora_rank 4: all weights are trained; say adapt lora, too"),
        ({"lora_modules": ("o_proj",)}, r"lora_modules \('o_proj',\): all weights are trained; say adapt lora, too"),
        ({"adapt": "lora", "lora_rank": 0}, "lora_rank 0: it must be at least 1"),
        ({"adapt": "lora", "lora_alpha": -1.0}, r"lora_alpha -1\.0: it must be positive and finite"),
        ({"adapt": "half"}, "adapt 'half': it is one of full, lora; choose one"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraOptions(**options)


@pytest.mark.real
def test_an_adapter_of_the_default_model_is_small_and_plain(real_model: LanguageModel, tmp_path: Path) -> None:
    """At most 10 MB at the default rank, and read by plain PEFT on the files that `trimtab models pull` names."""
    examples = toy_examples(24)
    dims = {"sea": [3, 17], "war": [8, 30]}
    flags = place_flags(real_model, ["sea", "war"], [examples[0].response], dims=dims, ramp="paper")
    trained = train_flags(
        real_model, flags, examples, adapt="lora", steps=2, batch_size=2, max_tokens=24, holdout=0, warmup_share=0
    )
    where = trained.save(tmp_path / "adapter")
    assert trained.result.trained_weights == 8 * 305_280
    assert sum(file.stat().st_size for file in where.iterdir()) < 10_000_000
    base = AutoModelForCausalLM.from_pretrained(pull(real_model.name))
    model = peft.PeftModel.from_pretrained(base, where)
    assert load_flags(where, model) == flags
    ids = torch.tensor([real_model.encode_text("Over the hills")])
    ours, _ = load_flagged(where)
    with torch.no_grad(), switched(model, where, sea=True), switched(ours, sea=True):
        assert torch.equal(model(ids).logits, ours.hf(ids).logits)
