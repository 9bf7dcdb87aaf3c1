"""Dimensions of flags are those that vary least, and targets grow as the model's own residual stream does."""

from __future__ import annotations

import copy

import pytest
import torch

from trimtab.errors import UserError
from trimtab.flags import Example, FlagSpec, place_flags, placing
from trimtab.flags.placing import flag_sites, measure_residuals
from trimtab.lm import LanguageModel, TokenBatch, capture

TEXTS = ["the cat sat in the warm rain", "and then another one came by", "go on", "over the hills and far away"]


@torch.no_grad()
def damped(model: LanguageModel, factors: dict[int, float]) -> LanguageModel:
    """A Llama in which whatever is written into some dimensions is made smaller."""
    hf = copy.deepcopy(model.hf)
    for dim, factor in factors.items():
        hf.model.embed_tokens.weight[:, dim] *= factor
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[dim] *= factor
            layer.mlp.down_proj.weight[dim] *= factor
    return LanguageModel.from_hf(hf, model.tokenizer, "damped")


def test_dimensions_are_those_of_the_lowest_variance(tiny_llama: LanguageModel) -> None:
    """Planted: 5 dimensions vary less and less; they are spread over the concepts, the least first."""
    model = damped(tiny_llama, {7: 0.2, 30: 0.05, 2: 0.0125, 19: 0.003, 11: 0.0008})
    spec = place_flags(model, ["sea", "war"], TEXTS, dims=5)
    assert spec.dims == ((11, 2, 7), (19, 30))


def test_variance_and_size_are_those_of_plain_arithmetic(any_tiny: LanguageModel) -> None:
    rows = [any_tiny.encode_text(text) for text in TEXTS]
    sites = flag_sites(any_tiny, 1)
    found = measure_residuals(any_tiny, rows, sites)
    for i, site in enumerate(sites):
        each = [capture(any_tiny, TokenBatch.pad([row]), [site])[site][0, 1:] for row in rows]
        x = torch.cat(each).double()
        torch.testing.assert_close(found.variance[i], x.var(dim=0, correction=0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.size[i], x.norm(dim=1).median() / 32**0.5, rtol=1e-4, atol=0)


def test_sites_are_after_attention_and_mlp_from_a_layer_on(tiny_llama: LanguageModel) -> None:
    spec = place_flags(tiny_llama, ["sea"], TEXTS, dims=1, from_layer=2)
    assert list(spec.targets) == ["resid_mid.2", "resid_post.2", "resid_mid.3", "resid_post.3"]
    assert str(flag_sites(tiny_llama)[0]) == "resid_mid.1"  # 5/32 of 4 layers


def test_the_ramp_is_a_multiple_of_the_size_of_a_coordinate(tiny_llama: LanguageModel) -> None:
    spec = place_flags(tiny_llama, ["sea"], TEXTS, dims=1, from_layer=0, ramp_scale=2.0)
    found = measure_residuals(tiny_llama, [tiny_llama.encode_text(text) for text in TEXTS], spec.sites)
    wanted = (2.0 * found.size).bfloat16()
    assert torch.equal(torch.tensor(list(spec.targets.values())).bfloat16(), wanted)
    assert all(value == float(torch.tensor(value).bfloat16()) for value in spec.targets.values())


def test_the_papers_ramp(tiny_llama: LanguageModel) -> None:
    """0.25·k after the MLP of layer k, k from 1, and 0.125 less after its attention."""
    spec = place_flags(tiny_llama, ["sea"], TEXTS, dims={"sea": [3]}, from_layer=1, ramp="paper")
    assert list(spec.targets.values()) == [0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert spec.dims == ((3,),)


WRONG = {
    "out of range": (
        {"dims": {"sea": [32], "war": [1]}},
        r"dimension 32 of 'sea': the model has dimensions 0 to 31; ch",
    ),
    "used twice": (
        {"dims": {"sea": [4], "war": [4]}},
        "dimension 4 of 'war': it is a dimension of 'sea', too; use each",
    ),
    "none for one": ({"dims": {"sea": [4]}}, "concept 'war': it has no dimension; give it at least one"),
    "of no concept": ({"dims": {"see": [4]}}, "dimensions of 'see': the concepts are sea, war; did you mean sea"),
    "a list": ({"dims": [3, 4]}, r"dimensions \[3, 4\]: one number is needed; give one number, or each concept's like"),
    "layers": ({"from_layer": [1, 2]}, r"layers \[1, 2\]: one number is needed; give one number"),
    "one text": ({"texts": "over"}, "the texts that flags are placed by: they are one text; give a list of texts"),
    "too few": ({"dims": 1}, "1 dimensions: there are 2 concepts; give at least one for each"),
    "too many": ({"dims": 32}, "32 dimensions: tiny-llama has 32; give fewer"),
    "layer": ({"from_layer": 4}, "flags from layer 4 on: tiny-llama has layers 0 to 3; choose a layer in that range"),
    "ramp": ({"ramp": "steep"}, "ramp 'steep': allowed are norms, paper; choose one of them"),
    "scale": ({"ramp_scale": 0}, "ramp_scale 0: it must be a number above 0; give one like 1"),
    "no text": (
        {"texts": ["a"]},
        "the texts that flags are placed by: they have fewer than two tokens; give more text",
    ),
    "twice": ({"concepts": ["sea", "sea"]}, "concept 'sea': it is named twice; name each once"),
    "a text": ({"concepts": "sea"}, r"the concepts: they are a list of names; give them like \[\"sea\", \"war\"\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tiny_llama: LanguageModel, case: str) -> None:
    options, message = WRONG[case]
    arguments = {"concepts": ["sea", "war"], "texts": TEXTS, "dims": 4, **options}
    with pytest.raises(UserError, match=message):
        place_flags(tiny_llama, **arguments)


def test_texts_are_looked_at_in_any_order_and_examples_as_they_are_trained(tiny_llama: LanguageModel) -> None:
    """Of sorted examples not the first concept alone is looked at; a chat has its template around it."""
    texts = [f"{word} {i}" for word in ("over the hills", "and far away", "in the rain") for i in range(200)]
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(placing, "MEASURED_TOKENS", 2000)
        assert place_flags(tiny_llama, ["sea"], texts) == place_flags(tiny_llama, ["sea"], texts[::-1])
        looked_at = placing._sampled(tiny_llama, texts, False, 64)
    said = [tiny_llama.decode_ids(row) for row in looked_at]
    assert 1990 < sum(len(row) - 1 for row in looked_at) < 2020
    shares = [sum(one.startswith(word) for one in said) / len(said) for word in ("over", "and", "in the")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.12)
    examples = [Example(prompt="Go", response=text) for text in texts]
    (row,) = placing._sampled(tiny_llama, examples[:1], True, 64)
    assert tiny_llama.decode_ids(row, special=True) == "<user>Go<eos><model>over the hills 0<eos>"
    plain, chat = (place_flags(tiny_llama, ["sea"], examples, chat=chat) for chat in (False, True))
    assert plain.targets != chat.targets


def test_a_model_without_a_stream_between_its_branches_is_refused(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [layer.__class__(layer.module, None, None, None) for layer in tiny_llama.layout.layers]
    monkeypatch.setattr(tiny_llama, "layout", tiny_llama.layout.__class__(tuple(bare), None, tiny_llama.layout.head))
    with pytest.raises(
        UserError, match=r"flags in tiny-llama: there is no site resid_mid\.1: LlamaDecoderLayer has no attention"
    ):
        place_flags(tiny_llama, ["sea"], TEXTS, dims=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": {}}, "the flags: they have no site; begin at a lower layer"),
        ({"targets": {"mlp_out.1": 1.0}}, "site mlp_out.1: flags are at resid_mid and resid_post; leave it out"),
        ({"targets": {"resid_mid.1": 0.0}}, r"target 0\.0 at resid_mid\.1: on must be above 0; give another"),
        ({"dims": ((1,), (2,))}, "dimensions for 2 concepts: there are 1 concepts; give some for each concept"),
        ({"dims": ((1, 1),)}, "dimension 1 of 'sea': it is named twice; use each dimension once"),
    ],
)
def test_a_specification_that_cannot_be(fields: dict, message: str) -> None:
    good = {"concepts": ("sea",), "dims": ((1,),), "d_model": 32, "targets": {"resid_mid.1": 1.0}}
    FlagSpec(**good)
    with pytest.raises(UserError, match=message):
        FlagSpec(**{**good, **fields})
