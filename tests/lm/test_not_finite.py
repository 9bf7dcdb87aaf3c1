"""Numbers that are no numbers end what reads them, and the message names the first place: a site and a token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.activations import LiveSource, harvest, tokenise
from trimtab.activations.sequences import HarvestOptions
from trimtab.activations.text import Document
from trimtab.dictionaries import ARCHITECTURES, DictionaryInfo
from trimtab.errors import UserError
from trimtab.evaluation import evaluate
from trimtab.lm import DecodeConfig, Decoded, DecodeStream, LanguageModel, Row, decode
from trimtab.lm.token_statistics import token_statistics
from trimtab.selection.scorer import LastTokenScorer
from trimtab.steering import VectorSource

PROMPT = "some words"
BAD = "w"
"""The token after which a planted layer's numbers are no numbers: position 5 of the prompt."""


@contextmanager
def planted(model: LanguageModel, value: float, layer: int = 1, token: str = BAD) -> Iterator[None]:
    """The MLP of a layer gives a value wherever a token is read."""
    (bad,) = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    seen: list[Tensor] = []
    mlp = model.layout.layers[layer].module.mlp
    handles = [
        model.hf.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True),
        mlp.register_forward_hook(lambda m, args, out: out.masked_fill((seen[-1] == bad)[..., None], value)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.hint
    return caught.value.line


def ids_of(model: LanguageModel, text: str = PROMPT) -> list[int]:
    return model.encode_text(text)


def place(model: LanguageModel, kind: str) -> str:
    position = ids_of(model).index(*model.tokenizer(BAD, add_special_tokens=False)["input_ids"])
    return f"activations at mlp_out.1 of token {position} ('w'): the first that are not finite in {model.name} ({kind})"


DECODINGS: dict[str, Callable[[LanguageModel], object]] = {
    "greedy": lambda m: decode(m, [ids_of(m)], DecodeConfig(max_new_tokens=3)),
    "sampled": lambda m: decode(m, [ids_of(m)], DecodeConfig(max_new_tokens=3, temperature=1.0)),
    "nucleus": lambda m: decode(m, [ids_of(m)], DecodeConfig(max_new_tokens=3, temperature=1.0, top_p=0.9)),
    "restricted": lambda m: decode(m, [ids_of(m)], DecodeConfig(temperature=1.0), allowed=[[7, 9]]),
    "teacher": lambda m: decode(m, [ids_of(m)[:2]], DecodeConfig(max_new_tokens=9), teacher=[[*ids_of(m)[2:], 7]]),
    "batched": lambda m: decode(m, [ids_of(m, "a"), ids_of(m)], DecodeConfig(max_new_tokens=3), repeats=2),
    "scored": lambda m: LastTokenScorer(m, "resid_post.0", ids_of(m)),
}


@pytest.mark.parametrize("name", DECODINGS)
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_decoding_and_ranking_name_the_first_place(
    tiny_llama: LanguageModel, name: str, value: float, kind: str
) -> None:
    with planted(tiny_llama, value):
        assert place(tiny_llama, kind) in message(lambda: DECODINGS[name](tiny_llama))
    DECODINGS[name](tiny_llama)


def test_a_stream_names_it_too(tiny_gemma3: LanguageModel) -> None:
    stream = DecodeStream(tiny_gemma3)
    stream.add(Row(ids_of(tiny_gemma3), DecodeConfig(max_new_tokens=3, temperature=0.7)))
    with planted(tiny_gemma3, float("nan")):
        assert "(NaN)" in message(lambda: list(stream))


def test_mutation_a_step_that_does_not_look(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeStream, "_check_finite", lambda self, rows, logp: None)
    with planted(tiny_llama, float("nan")):
        found = decode(tiny_llama, [ids_of(tiny_llama)], DecodeConfig(max_new_tokens=2, temperature=1.0))
    assert all(value != value for value in found.token_logp[0])


def test_a_weight_that_is_no_number_is_named(tiny_gpt2: LanguageModel) -> None:
    weight = tiny_gpt2.hf.transformer.h[1].mlp.c_fc.weight
    before = weight.data.clone()
    try:
        weight.data[3, 4] = float("nan")
        said = message(lambda: decode(tiny_gpt2, [ids_of(tiny_gpt2)]))
    finally:
        weight.data.copy_(before)
    assert "mlp_out.1 of token 0" in said
    assert "whose weight transformer.h.1.mlp.c_fc.weight is not finite; get the model again" in said


def test_half_precision_that_overflows_works_in_float32_as_the_hint_says(tiny_llama: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_llama.hf)
    hf.model.layers[1].mlp.down_proj.weight.data.mul_(1e7)
    half = LanguageModel.from_hf(copy.deepcopy(hf).half(), tiny_llama.tokenizer, "half")
    said = message(lambda: decode(half, [ids_of(half)], DecodeConfig(max_new_tokens=2)))
    assert "mlp_out.1" in said or "weight" in said
    for parameter in half.hf.parameters():  # the weights themselves fit
        parameter.data.clamp_(-60_000, 60_000)
    said = message(lambda: decode(half, [ids_of(half)], DecodeConfig(max_new_tokens=2)))
    assert "in float16; load it in float32 (--dtype float32)" in said
    decode(
        LanguageModel.from_hf(hf, tiny_llama.tokenizer, "whole"), [ids_of(tiny_llama)], DecodeConfig(max_new_tokens=2)
    )


def test_an_edit_that_overflows_asks_for_a_smaller_dose(tiny_llama: LanguageModel) -> None:
    half = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf).half(), tiny_llama.tokenizer, "half")

    def steered(dose: float) -> Decoded:
        source = VectorSource(torch.ones(32), "resid_post.1", dose, unit="absolute")
        return decode(half, [ids_of(half)], DecodeConfig(max_new_tokens=3), source)

    assert "not finite with the edits that were made; use a smaller dose" in message(lambda: steered(1e6))
    steered(10.0)


def test_a_model_that_overflows_behind_its_layers_is_not_blamed_on_the_edits(tiny_llama: LanguageModel) -> None:
    """Mutation: take edits for the reason wherever there are some."""
    hf = copy.deepcopy(tiny_llama.hf)
    hf.model.norm.weight.data.mul_(1e6)
    half = LanguageModel.from_hf(copy.deepcopy(hf).half(), tiny_llama.tokenizer, "half")
    whole = LanguageModel.from_hf(hf, tiny_llama.tokenizer, "whole")

    def steered(model: LanguageModel) -> Decoded:
        source = VectorSource(torch.ones(32), "resid_post.1", 0.1, unit="absolute")
        return decode(model, [ids_of(model)], DecodeConfig(max_new_tokens=3), source)

    assert "while half's layers are; load it in float32 (--dtype float32)" in message(lambda: steered(half))
    steered(whole)


def test_logits_of_minus_infinity_are_no_fault(tiny_llama: LanguageModel) -> None:
    handle = tiny_llama.hf.lm_head.register_forward_hook(
        lambda m, args, out: out.index_fill(-1, torch.tensor([3, 8]), -torch.inf)
    )
    try:
        found = decode(tiny_llama, [ids_of(tiny_llama)], DecodeConfig(max_new_tokens=4, temperature=1.0))
    finally:
        handle.remove()
    assert not {3, 8} & set(found.token_ids[0])
    assert all(0 < value < 10 for value in found.entropy[0])
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    p = torch.softmax(torch.tensor([1.0, 2.0]), 0)
    _, entropy = token_statistics(logits, torch.tensor([0]))
    torch.testing.assert_close(entropy[0], -(p * p.log()).sum())


DOCUMENTS = [Document(f"d{i}", "line after line of text. " * 6, "x") for i in range(8)]
WITH_BAD = [*DOCUMENTS, Document("d8", "line after line of words. " * 6, "x")]
OPTIONS = HarvestOptions(context=16, holdout=0.0, batch_size=4)


def read_all(source: LiveSource) -> None:
    batches = source.batches(32)
    for _ in range(40):
        next(batches)


READINGS: dict[str, Callable[[LanguageModel, list[Document], Path], object]] = {
    "harvest": lambda m, docs, path: harvest(m, ["resid_post.1"], tokenise(docs, m.tokenizer), path / "h", OPTIONS),
    "live": lambda m, docs, path: read_all(LiveSource(m, "resid_post.1", tokenise(docs, m.tokenizer), options=OPTIONS)),
}


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reading_text_names_the_first_place(tiny_llama: LanguageModel, tmp_path: Path, name: str, value: float) -> None:
    with planted(tiny_llama, value):
        said = message(lambda: READINGS[name](tiny_llama, WITH_BAD, tmp_path))
        assert "activations at mlp_out.1 of token" in said
        assert "('w')" in said
        assert list(tmp_path.iterdir()) == []
        READINGS[name](tiny_llama, DOCUMENTS, tmp_path)


@pytest.mark.parametrize("site", ["resid_post.1", "resid_pre.1"])  # where it is seen, and below
def test_evaluation_names_the_first_place(tiny_llama: LanguageModel, site: str) -> None:
    weights = torch.randn(32, 48), torch.zeros(48), torch.randn(48, 32), torch.zeros(32)
    sae = ARCHITECTURES["standard"](*weights, info=DictionaryInfo(architecture="standard", site=site))
    with planted(tiny_llama, float("inf")):
        said = message(lambda: evaluate(tiny_llama, sae, [doc.text for doc in WITH_BAD], context=16))
    assert "activations at mlp_out.1 of token" in said
