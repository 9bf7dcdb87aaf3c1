"""Switches: plain transformers, the source of interventions, traces and replays say the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_corpus import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from trimtab.errors import UserError
from trimtab.flags import FlagSource, FlagSpec, TrainedFlags, load_flags, save_flags, switched
from trimtab.lm import DecodeConfig, LanguageModel, applied, decode
from trimtab.lm.layouts import find_layout
from trimtab.steering import DirectionTable, replay_trace

FLAGS = FlagSpec(
    concepts=("sea", "war", "old town"),
    dims=((3, 17), (8,), (30,)),
    d_model=32,
    targets={"resid_mid.1": 0.5, "resid_post.1": 0.75, "resid_mid.2": 1.5, "resid_post.2": 2.0},
)
SWITCHES = [
    {"sea": True},
    {"sea": False, "war": True},
    {"sea": None, "war": np.float32(0.3), "old town": False},
]


def seen_at_sites(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """What the next module is given behind each site, by hooks of our own that come last."""
    found: dict[str, Tensor] = {}
    handles = []
    for site in FLAGS.sites:
        layer = model.layout.layers[site.layer]
        if site.kind == "resid_mid":
            assert layer.mlp_norm is not None
            put = lambda _m, a, _o, name=str(site): found.update({name: a[0].clone()})  # noqa: E731
            handles.append(layer.mlp_norm.register_forward_hook(put))
        else:
            put = lambda _m, a, k, name=str(site): found.update({name: a[0] if a else k["hidden_states"]})  # noqa: E731
            after = model.layout.layers[site.layer + 1].module
            handles.append(after.register_forward_pre_hook(put, with_kwargs=True))
    with torch.no_grad():
        model.hf(ids)
    for handle in handles:
        handle.remove()
    return found


def test_values_are_there_bit_for_bit_at_every_site_and_position(any_tiny: LanguageModel) -> None:
    ids = torch.tensor([any_tiny.encode_text("over the hills")])
    with switched(any_tiny, FLAGS, sea=True, war=0.3):
        found = seen_at_sites(any_tiny, ids)
    assert list(found) == [str(site) for site in FLAGS.sites]
    for site, x in found.items():
        target = torch.tensor(FLAGS.targets[site])
        for dim, strength in ((3, 1.0), (17, 1.0), (8, 0.3)):
            assert torch.equal(x[0, :, dim], (target * strength).expand(x.shape[1])), (site, dim)


@pytest.mark.parametrize("switches", SWITCHES)
def test_switched_equals_the_source(any_tiny: LanguageModel, switches: dict) -> None:
    """Logits of a prompt to the bit; tokens of `generate` and of the decode loop."""
    source = FlagSource(FLAGS, switches)
    ids = torch.tensor([any_tiny.encode_text("over the hills")])
    with torch.no_grad():
        plain = any_tiny.hf(ids).logits
        with switched(any_tiny.hf, FLAGS, **switches):
            ours = any_tiny.hf(ids).logits
            tokens = any_tiny.hf.generate(ids, max_new_tokens=8, do_sample=False)
        with applied(any_tiny, source):
            theirs = any_tiny.hf(ids).logits
        assert torch.equal(any_tiny.hf(ids).logits, plain)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, plain, atol=1e-3)
    decoded = decode(any_tiny, ids.tolist(), DecodeConfig(max_new_tokens=8), source=FlagSource(FLAGS, switches))
    assert decoded.token_ids[0] == tokens[0, ids.shape[1] :].tolist()


def test_a_source_is_logged_and_replayed(tiny_llama: LanguageModel) -> None:
    source = FlagSource(FLAGS, {"sea": True, "war": 0.5})
    steered = trimtab.steer(tiny_llama, source, ["over the hills", "Go"], max_new_tokens=5)
    edits = steered.trace.to_frame("edits")
    assert set(edits["operation"]) == {"overwrite"}
    assert set(edits["site"]) == {str(site) for site in FLAGS.sites}
    for site, rows in edits.groupby("site"):
        assert set(rows["target"]) == {FLAGS.targets[site], FLAGS.targets[site] / 2}
    report = replay_trace(tiny_llama, steered.trace, FlagSource(FLAGS, {"sea": True, "war": 0.5}))
    assert report.exact
    table = DirectionTable.axes(32, [3, 17, 8])
    assert set(edits["dictionary_hash"]) == {table.hash}


def test_a_source_at_the_positions_that_choose_tokens(tiny_llama: LanguageModel) -> None:
    prompt = tiny_llama.encode_text("over the hills")
    out = decode(tiny_llama, [prompt], source=FlagSource(FLAGS, {"sea": True}, positions="generated"))
    assert int(out.edits.position.min()) == len(prompt) - 1
    out = decode(tiny_llama, [prompt], source=FlagSource(FLAGS, {"sea": True}))
    assert int(out.edits.position.min()) == 0


def test_generate_may_do_what_it_likes(tiny_llama: LanguageModel) -> None:
    """Beams, no cache, padding: every position is edited whatever comes."""
    tokenizer = tiny_llama.tokenizer
    one = tokenizer("over the hills", return_tensors="pt")
    with switched(tiny_llama.hf, FLAGS, sea=True):
        cached, bare = (
            tiny_llama.hf.generate(**one, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(cached, bare)
        tiny_llama.hf.generate(**one, max_new_tokens=6, num_beams=3)
        both = tokenizer(["Go", "over the hills"], return_tensors="pt", padding=True, padding_side="left")
        padded = tiny_llama.hf.generate(**both, max_new_tokens=6, do_sample=False)
    assert torch.equal(padded[1, -6:], cached[0, -6:])


def test_it_is_loaded_by_plain_transformers(finetuned: dict[str, TrainedFlags], tmp_path: Path) -> None:
    trained = finetuned["forced"]
    where = trained.save(tmp_path / "model")
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    batch = tokenizer(list(PROMPTS), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(hf(**batch).logits, trained.model.hf(**batch).logits)
        with switched(hf, sea=True):
            ours = hf.generate(**batch, max_new_tokens=5, do_sample=False)
        with switched(trained.model, trained.flags, sea=True):
            assert torch.equal(ours, trained.model.hf.generate(**batch, max_new_tokens=5, do_sample=False))
    assert hf.training is False
    assert all(parameter.requires_grad for parameter in hf.parameters())  # left as it was
    again = trimtab.load_model(str(where))
    assert load_flags(where, again) == trained.flags
    assert json.loads((where / "flags.json").read_text())["about"]["curriculum"] == "forced"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flags_are_known_in_other_precisions(any_tiny: LanguageModel, tmp_path: Path, dtype: torch.dtype) -> None:
    where = save_flags(any_tiny, FLAGS, tmp_path / "model")
    hf = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    assert load_flags(where / "flags.json", hf) == FLAGS
    ids = torch.tensor([any_tiny.encode_text("over the hills")])
    seen: list[Tensor] = []
    layer = find_layout(hf).layers[3].module
    with switched(hf, **{"old town": True}), torch.no_grad():
        layer.register_forward_pre_hook(
            lambda _m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        hf(ids)
    assert seen[0].dtype == dtype
    assert torch.equal(seen[0][0, :, 30], torch.full((ids.shape[1],), 2.0, dtype=dtype))


def test_flags_of_another_model_are_refused(any_tiny: LanguageModel, tmp_path: Path) -> None:
    where = save_flags(any_tiny, FLAGS, tmp_path / "model")
    hf = copy.deepcopy(any_tiny.hf)
    with torch.no_grad():
        next(p for p in hf.parameters() if p.ndim == 2)[0, 0] += 0.1
    other = LanguageModel.from_hf(hf, any_tiny.tokenizer, "other")
    with pytest.raises(UserError, match=r"flags\.json: it is another model's: other has other weights than those"):
        load_flags(where, other)
    with pytest.raises(UserError, match="it is another model's"), switched(other, where, sea=True):
        pass


def test_flags_of_another_shape_are_refused(tiny_llama: LanguageModel) -> None:
    wide = FlagSpec(concepts=("sea",), dims=((3,),), d_model=64, targets={"resid_mid.1": 0.5})
    with (
        pytest.raises(UserError, match="flags in a stream of 64 dimensions: tiny-llama has 32"),
        switched(tiny_llama, wide, sea=1),
    ):
        pass
    with pytest.raises(UserError, match="directions of width 64"):
        decode(tiny_llama, [[5, 6]], source=FlagSource(wide, {"sea": True}))


def test_a_file_that_is_not_right(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean smollm2-135m-instruct/topics"):
        load_flags("smollm2-135m-instruct/topic")
    with pytest.raises(UserError, match=r"flags\.json: there is no such file; give a directory with a flags\.json"):
        load_flags(tmp_path)
    where = save_flags(tiny_llama, FLAGS, tmp_path / "model")
    with pytest.raises(UserError, match="model: it is there already; choose another one"):
        save_flags(tiny_llama, FLAGS, where)
    file = where / "flags.json"
    good = json.loads(file.read_text())
    for changed, message in (
        ({"format": 2}, "its format is 2, not 1; write it again"),
        ({"flags": {**good["flags"], "d_model": "32"}}, r"d_model: it must be a whole number, not '32'"),
        ({"flags": {**good["flags"], "dims": [[3, 3], [8], [30]]}}, "dimension 3 of 'sea': it is named twice"),
    ):
        file.write_text(json.dumps({**good, **changed}))
        with pytest.raises(UserError, match=message):
            load_flags(where)
    file.write_text("{")
    with pytest.raises(UserError, match="it is not JSON"):
        load_flags(where)


WRONG = {
    "unknown": ({"see": True}, r"concept 'see': the flags are sea, war, old town; did you mean sea\?"),
    "no strength": ({"sea": "on"}, "switch sea='on': it is on, off or a strength; give True, False or 0.5"),
    "beyond on": ({"sea": 50}, "strength 50: 0 is off and 1 is on; give one between"),
    "below off": ({"sea": -0.5}, "strength -0.5: 0 is off and 1 is on"),
    "not finite": ({"sea": float("nan")}, "strength nan of 'sea': 0 is off and 1 is on; give one between"),
    "all free": ({"sea": None}, "the switches: all flags are free; set one, such as sea=True"),
    "none": ({}, "the switches: all flags are free; set one, such as sea=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_switches_that_are_refused(tiny_llama: LanguageModel, case: str) -> None:
    switches, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        FlagSource(FLAGS, switches)
    with pytest.raises(UserError, match=message), switched(tiny_llama, FLAGS, **switches):
        pass


def test_what_has_no_flags(tiny_llama: LanguageModel) -> None:
    with pytest.raises(
        UserError, match=r"switches of tiny-llama: there is no flags\.json beside its files; give the f"
    ):
        switched(tiny_llama, sea=True).__enter__()
    with pytest.raises(
        UserError, match="the Linear whose flags are to be switched: it is no language model; give one of"
    ):
        switched(torch.nn.Linear(2, 2), sea=True).__enter__()  # type: ignore[arg-type]
