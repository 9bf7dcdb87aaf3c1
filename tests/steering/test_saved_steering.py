"""A steering that is saved and loaded does what it was made from, in trimtab and in plain `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dictionary import make_dictionary
from transformers import AutoModelForCausalLM

import trimtab
from trimtab.dictionaries.architectures.topk import TopK
from trimtab.dictionaries.meanings import describe_features
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, PositionRule, decode
from trimtab.runs import read_typed
from trimtab.stats import Interval
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    Evidence,
    RandomFeatureSource,
    StaticSource,
    Steering,
    VectorSource,
    load,
    saved_steering,
    steer,
)
from trimtab.steering.steering_facts import SteeringFacts

PROMPTS = ["the sea and the ship", "an inn", "in the end, the trim tab turned the rudder"]
CONFIG = DecodeConfig(max_new_tokens=8, stop_at_eos=False)
EVIDENCE = (
    Evidence(name="effect", value=Interval(estimate=1.2, low=0.9, high=1.5, n=24), unit="nats", note="log-odds"),
    Evidence(name="KL to unsteered", value=0.3, unit="nats per token"),
)


def vectors(model: LanguageModel, seed: int = 3) -> torch.Tensor:
    return torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(seed))


def feature(model: LanguageModel) -> StaticSource:
    return StaticSource(make_dictionary(model), 3, 0.9)


def clamped(model: LanguageModel) -> StaticSource:
    return StaticSource(make_dictionary(model), [3, 5], [4.0, -2.0], unit="absolute", operation="clamp")


def by_largest(model: LanguageModel) -> StaticSource:
    return StaticSource(make_dictionary(model), [3, 5], 2.5, unit="max_activation", combine="total", positions="all")


def two_sites(model: LanguageModel) -> StaticSource:
    v = vectors(model)
    return VectorSource({"resid_post.1": v, "mlp_out.2": v[0]}, doses={"resid_post.1": [0.5, -0.4], "mlp_out.2": 0.9})


def of_one_length(model: LanguageModel) -> StaticSource:
    return VectorSource(3 * vectors(model), "resid_post.1", [1.0, 0.5], keep_length=True, positions=[0, -1, 9])


def coordinates(model: LanguageModel) -> StaticSource:
    axes = DirectionTable.axes(model.d_model, [3, 8])
    return StaticSource(
        axes, [0, 1], [4.0, -6.0], "resid_mid.2", operation="overwrite", unit="absolute", positions="all"
    )


SOURCES: list[Callable[[LanguageModel], StaticSource]] = [
    feature, clamped, by_largest, two_sites, of_one_length, coordinates,
]  # fmt: skip


def saved(model: LanguageModel, source: StaticSource, path: Path, **about: Any) -> Steering:
    Steering.of(model, source, about="the sea", made_by="a test", evidence=EVIDENCE, **about).save(path)
    return load(path)


def padded(model: LanguageModel) -> dict[str, torch.Tensor]:
    ids = [model.encode_text(text) for text in PROMPTS]
    longest = max(map(len, ids))
    rows = [[*[model.pad_id] * (longest - len(row)), *row] for row in ids]
    masks = [[*[0] * (longest - len(row)), *[1] * len(row)] for row in ids]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generated(hf: Any, model: LanguageModel, steering: Steering) -> list[list[int]]:
    """What plain `transformers` writes inside the block."""
    given = padded(model)
    with steering.applied(hf):
        found = hf.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return found[:, given["input_ids"].shape[1] :].tolist()


def check_plain_transformers(model: LanguageModel, make: Callable[[LanguageModel], StaticSource], path: Path) -> None:
    """The model as `transformers` loads it, against trimtab's decode with the source that was saved."""
    ids = [model.encode_text(text) for text in PROMPTS]
    expected, plain = decode(model, ids, CONFIG, make(model)), decode(model, ids, CONFIG)
    assert expected.token_ids != plain.token_ids
    steering = saved(model, make(model), path / "steering")
    model.hf.save_pretrained(path / "model")
    hf = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32).train()
    assert generated(hf.eval(), model, steering) == expected.token_ids
    assert all(parameter.requires_grad for parameter in hf.parameters())  # it is left as it was
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    decoded = decode(model, ids, CONFIG, steering.source(model))
    assert decoded.token_ids == expected.token_ids
    assert torch.allclose(decoded.edits.delta_norm, expected.edits.delta_norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_plain_transformers_gives_the_tokens_of_decode(
    any_tiny: LanguageModel, make: Callable[[LanguageModel], StaticSource], tmp_path: Path
) -> None:
    check_plain_transformers(any_tiny, make, tmp_path)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_files_hold_everything(
    tiny_llama: LanguageModel, make: Callable[[LanguageModel], StaticSource], tmp_path: Path
) -> None:
    before = Steering.of(tiny_llama, make(tiny_llama), about="the sea", evidence=EVIDENCE, norms={"resid_post.1": 5.5})
    after = load(before.save(tmp_path / "steering"))
    assert after.facts == before.facts
    assert after.fingerprint == before.fingerprint
    assert all(torch.equal(after.directions[site], rows) for site, rows in before.directions.items())
    assert after.evidence == EVIDENCE
    assert read_typed(SteeringFacts, {k: v for k, v in after.facts.items() if k != "format"}).parts == after.parts
    assert after.parts[0].norm == (5.5 if after.parts[0].site == "resid_post.1" else None)
    assert f"{after.operation} at {after.parts[0].site}" in repr(after)
    assert list(after.tables()) == ["directions", "evidence"]
    assert json.dumps(after.to_json())


def test_where_features_come_from_is_kept(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    sae = make_dictionary(tiny_llama)
    sae.name = "mine"
    (part,) = saved(tiny_llama, StaticSource(sae, [3, 5], 0.4), tmp_path / "s").parts
    assert (part.feature, part.sae, part.sae_hash) == ((3, 5), "mine", sae.fingerprint)
    assert part.dose == pytest.approx((0.4, 0.4))
    words = [str(one) for one in describe_features(tiny_llama, sae, [3, 5])]
    assert list(part.words) == words
    steering = load(tmp_path / "s")
    assert steering.to_frame("directions")["words"].tolist() == words
    result = steer(tiny_llama, steering, "an inn", max_new_tokens=2, kl=False)
    assert result.words == [f"{SITE}:{i}: {line}" for i, line in zip((3, 5), words, strict=True)]
    assert steer(tiny_llama, sae, "an inn", 3, max_new_tokens=2, kl=False).words == [f"3: {words[0]}"]
    assert "words" not in steer(tiny_llama, vectors(tiny_llama)[0], "an inn", site=SITE, max_new_tokens=2).to_json()


def test_a_hook_of_ones_own_does_the_same(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    """An independent reference: the vector added by a hook of PyTorch's at every position."""
    v = vectors(tiny_gpt2)[0]
    steering = saved(tiny_gpt2, VectorSource(v, "resid_post.1", keep_length=True, positions="all"), tmp_path / "s")
    handle = tiny_gpt2.hf.transformer.h[1].register_forward_hook(lambda module, args, output: output + v)
    given = padded(tiny_gpt2)
    expected = tiny_gpt2.hf(**given).logits
    handle.remove()
    with steering.applied(tiny_gpt2.hf):
        found = tiny_gpt2.hf(**given).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


def test_steer_takes_saved_steerings_and_multiples_of_them(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    one = saved(tiny_llama, feature(tiny_llama), tmp_path / "one")
    two = saved(tiny_llama, VectorSource(vectors(tiny_llama)[0], "resid_post.2", 0.5), tmp_path / "two")
    ids = [tiny_llama.encode_text(text) for text in PROMPTS]
    alone = decode(tiny_llama, ids, CONFIG, feature(tiny_llama))
    result = steer(tiny_llama, one, PROMPTS, decoding=CONFIG)
    assert [c.text for c in result.steered[0].continuations] == alone.texts
    assert result.steered_with == "the sea"
    swept = steer(tiny_llama, one, PROMPTS, sweep=(0.5, 1, -1), decoding=CONFIG, kl=False)
    assert [arm.name for arm in swept.arms] == ["unsteered", "0.5 × its dose", "1 × its dose", "-1 × its dose"]
    assert [arm.realised.relative for arm in swept.arms] == pytest.approx([0, 0.45, 0.9, 0.9], abs=1e-4)
    both = steer(tiny_llama, [one, two], PROMPTS, decoding=CONFIG, kl=False)
    expected = decode(tiny_llama, ids, CONFIG, CombinedSource([one.source(), two.source()]))
    assert [c.text for c in both.steered[0].continuations] == expected.texts
    assert both.site == "resid_post.1, resid_post.2"


def test_another_model_is_refused(
    tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, tiny_gemma3: LanguageModel, tmp_path: Path
) -> None:
    steering = saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    with pytest.raises(UserError) as caught:
        steer(tiny_gpt2, steering, PROMPTS)
    assert caught.value.line == (
        "steering the sea: tiny-gpt2 has other weights than tiny-llama that it is for; steer that one, or allow any "
        "model (--any-model, any_model=True) if activations agree"
    )
    with pytest.raises(UserError, match="other weights"), steering.applied(tiny_gpt2.hf):
        pass
    assert steer(tiny_gpt2, steering, PROMPTS, any_model=True).steered[0].realised.n_edits
    with steering.applied(tiny_gpt2.hf, any_model=True) as calls:
        tiny_gpt2.hf(torch.tensor([[7, 8, 9]]))
    assert len(calls.edits) == 1
    head = VectorSource(torch.ones(8), "attn_z.1.0", 0.5)
    with pytest.raises(UserError, match=r"directions of width 8 at attn_z\.1\.0: tiny-gemma3 has width 16 there"):
        saved(tiny_llama, head, tmp_path / "head").source(tiny_gemma3, any_model=True)
    deep = saved(tiny_gemma3, VectorSource(torch.ones(32), "resid_post.5", 0.5), tmp_path / "deep")
    with pytest.raises(UserError, match=r"site resid_post\.5: tiny-llama has layers 0 to 3"):
        deep.source(tiny_llama, any_model=True)


def test_the_model_in_another_precision_is_the_same(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    steering = saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with steering.applied(hf) as calls:
        hf.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert calls.edits.relative_dose.tolist() == pytest.approx([0.9] * 3, rel=0.02)
    with torch.no_grad():
        hf.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match="other weights"), steering.applied(hf):
        pass


def test_what_cannot_be_saved_is_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    sae = make_dictionary(tiny_llama)
    with pytest.raises(UserError, match="the RandomFeatureSource that is to be saved: it decides anew at each token"):
        Steering.of(tiny_llama, RandomFeatureSource(sae, 0.4))  # type: ignore[arg-type]
    topk = TopK(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k=4, info=sae.info)
    with pytest.raises(
        UserError, match="features 3 alone: in an SAE of the architecture topk a feature's code depends"
    ):
        Steering.of(tiny_llama, StaticSource(topk, 3, operation="ablate"))
    assert Steering.of(tiny_llama, StaticSource(topk, 3, 0.4)).parts[0].feature == (3,)
    saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    with pytest.raises(UserError, match="s: it is there already; choose another directory"):
        saved(tiny_llama, feature(tiny_llama), tmp_path / "s")


def check_a_save_that_dies(model: LanguageModel, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Whichever of its files it died at: no steering, nothing in its place, and the next save is whole."""
    one = Steering.of(model, clamped(model))
    for writer in ("save_file", "save_dictionary", "write_json"):
        with patch.context() as dying:
            dying.setattr(saved_steering, writer, dies)
            with pytest.raises(KeyboardInterrupt):
                one.save(path / writer)
        (path / f"{writer}.saving").mkdir()  # what a kill leaves
        (path / f"{writer}.saving" / "steering.json").write_text("{")
        assert not (path / writer).exists()
        assert load(one.save(path / writer)).fingerprint == one.fingerprint
        assert not (path / f"{writer}.saving").exists()


def dies(*given: Any, **more: Any) -> None:
    raise KeyboardInterrupt


def test_a_save_that_dies_leaves_no_steering(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_save_that_dies(tiny_llama, tmp_path, monkeypatch)
    (tmp_path / "other").mkdir()
    one = Steering.of(tiny_llama, feature(tiny_llama))
    assert load(one.save(tmp_path / "other")).fingerprint == one.fingerprint  # an empty directory will do
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    with pytest.raises(UserError, match="notes: it is there already; choose another directory"):
        one.save(tmp_path / "notes")


def test_files_put_straight_in_place_are_noticed(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def straight(path: Path) -> Iterator[Path]:
        path.mkdir()
        yield path

    monkeypatch.setattr(saved_steering, "atomic_directory", straight)
    with pytest.raises(AssertionError):
        check_a_save_that_dies(tiny_llama, tmp_path, monkeypatch)


def change(path: Path, **fields: Any) -> None:
    file = path / "steering.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def tensors(path: Path, **changed: torch.Tensor) -> None:
    file = path / "directions.safetensors"
    save_file({**load_file(file), **changed}, file)


def cut(path: Path) -> None:
    file = path / "directions.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


SITE = "resid_post.1"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: (p / "steering.json").unlink(), "there is no steering.json; give a directory"),
    "no JSON": (lambda p: (p / "steering.json").write_text("{"), "steering.json"),
    "another version": (
        lambda p: change(p, format=2),
        "its format is not 1, which this version reads; use the version",
    ),
    "an unknown key": (lambda p: change(p, posotions="all"), "there is no posotions; did you mean positions?"),
    "a missing key": (lambda p: change(p, parts=None), "parts"),
    "an unknown operation": (lambda p: change(p, operation="remove"), "operation 'remove': allowed are add"),
    "unknown positions": (lambda p: change(p, positions="some"), "positions 'some': allowed are generated"),
    "an unknown unit": (lambda p: change(p, unit="percent"), "unit 'percent'"),
    "a malformed site": (lambda p: change(p, parts=[{"site": "resid", "dose": [1.0]}]), "resid"),
    "a dose too many": (
        lambda p: change(p, parts=[{"site": SITE, "dose": [1.0, 2.0]}]),
        "there are 2 doses; give [n, d]",
    ),
    "a site twice": (lambda p: change(p, parts=[{"site": SITE, "dose": [1.0]}] * 2), "it names no site, or one twice"),
    "another site": (
        lambda p: change(p, parts=[{"site": "resid_post.2", "dose": [1.0]}]),
        "has no tensor of that name",
    ),
    "no tensors": (
        lambda p: (p / "directions.safetensors").unlink(),
        "it has no directions.safetensors; get the steering",
    ),
    "cut short": (cut, "directions.safetensors: damaged or no safetensors file"),
    "NaN": (lambda p: tensors(p, **{SITE: torch.full((1, 32), torch.nan)}), f"directions at {SITE} of"),
    "zero": (lambda p: tensors(p, **{SITE: torch.zeros(1, 32)}), "one is zero, so it points nowhere"),
    "one vector without rows": (lambda p: tensors(p, **{SITE: torch.ones(32)}), "of shape (32,): there are 1 doses"),
    "a tensor too many": (lambda p: tensors(p, **{"resid_post.11": torch.ones(1, 32)}), "did you mean resid_post.1?"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(name: str, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    damage, message = BAD[name]
    saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "s")
    assert message in caught.value.line


def test_a_wrong_width_is_refused_by_the_model(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    tensors(tmp_path / "s", **{SITE: torch.ones(1, 31)})
    with pytest.raises(UserError, match=r"directions of width 31 at resid_post\.1: tiny-llama has width 32 there"):
        steer(tiny_llama, load(tmp_path / "s"), "in")


BESIDE: list[tuple[dict[str, Any], str]] = [
    ({"features": 3}, "feature beside steering the sea: it says that itself; leave it out"),
    ({"positions": "all"}, "positions beside steering the sea"),
    ({"unit": "absolute"}, "unit beside steering the sea"),
    ({"dose": [1, 2]}, "2 doses: a saved steering's doses are multiplied by one number"),
    ({"dose": 1, "sweep": [1]}, "the sweep says the doses"),
]


@pytest.mark.parametrize(("options", "message"), BESIDE)
def test_options_that_a_steering_says_itself(
    tiny_llama: LanguageModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    steering = saved(tiny_llama, feature(tiny_llama), tmp_path / "s")
    with pytest.raises(UserError) as caught:
        steer(tiny_llama, steering, "in", **options)
    assert message in caught.value.line


def test_a_run_that_holds_one_will_do(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    saved(tiny_llama, feature(tiny_llama), tmp_path / "run" / "steering")
    assert trimtab.steering.load(tmp_path / "run").parts[0].site == SITE


def dose_ignored(patch: pytest.MonkeyPatch) -> None:
    real = Steering.source
    patch.setattr(Steering, "source", lambda self, *a, **k: real(self, *a, **{**k, "times": (0.5,)}))


def sign_lost(patch: pytest.MonkeyPatch) -> None:
    real = Steering.source
    patch.setattr(Steering, "source", lambda self, *a, **k: real(self, *a, **{**k, "times": (-1.0,)}))


def positions_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = Steering.source

    def source(self: Steering, *given: Any, **more: Any) -> StaticSource:
        found = real(self, *given, **more)
        found.positions = found.where = PositionRule("prompt")
        return found

    patch.setattr(Steering, "source", source)


def codes_left_out(patch: pytest.MonkeyPatch) -> None:
    """A clamp of what the SAE reads becomes one of a projection."""
    patch.setattr("trimtab.steering.saved_steering.OF_DIRECTIONS", ("add", "overwrite", "clamp"))


def largest_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Steering, "direction_tables", lambda self, real=Steering.direction_tables: ones(real(self)))


def ones(tables: dict[str, DirectionTable]) -> dict[str, DirectionTable]:
    for table in tables.values():
        table.max_activation = torch.ones(table.n)
    return tables


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[LanguageModel], StaticSource]]] = {
    "half the dose": (dose_ignored, feature),
    "the sign lost": (sign_lost, two_sites),
    "positions forgotten": (positions_forgotten, feature),
    "codes left out": (codes_left_out, clamped),
    "largest activations forgotten": (largest_forgotten, by_largest),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(
    name: str, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, make = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_plain_transformers(tiny_llama, make, tmp_path)


@pytest.mark.real
def test_plain_transformers_on_the_real_model(real_model: LanguageModel, tmp_path: Path) -> None:
    """The shipped SAE's feature, in the model as `transformers` loads it from the cache's files."""
    sae = trimtab.load_sae("default", model=real_model)
    source = StaticSource(sae, 2112, 0.4)
    ids = [real_model.encode_text(text) for text in ("Yesterday I went to the", "The weather today is")]
    config = DecodeConfig(max_new_tokens=24, stop_at_eos=False)
    expected = decode(real_model, ids, config, source)
    steering = saved(real_model, source, tmp_path / "sea")
    real_model.hf.save_pretrained(tmp_path / "model")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for row, prompt in enumerate(ids):
        with steering.applied(hf):
            found = hf.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert found[0, len(prompt) :].tolist() == expected.token_ids[row]
