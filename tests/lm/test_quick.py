"""The copy in bfloat16 against what it is a copy of, and what gets none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from trimtab.errors import UserError
from trimtab.lm import Capabilities, LanguageModel, TokenBatch, quick, self_check
from trimtab.lm.quick import quick_copy


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "fast_bfloat16", lambda _device: True)


def test_the_copy_is_the_model_rounded(any_tiny: LanguageModel) -> None:
    before = any_tiny.fingerprint
    copied = quick_copy(any_tiny)
    assert copied.dtype == torch.bfloat16
    assert any_tiny.dtype == torch.float32
    assert any_tiny.fingerprint == before
    mine, theirs = any_tiny.hf.state_dict(), copied.hf.state_dict()
    parameters = {name for name, _ in any_tiny.hf.named_parameters(remove_duplicate=False)}
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        expected = mine[name].bfloat16() if name in parameters else mine[name]
        assert torch.equal(value, expected)
        assert value.data_ptr() != mine[name].data_ptr()
    batch = TokenBatch.full(torch.tensor([[3, 9, 14, 20, 5]]))
    exact, rough = (model.forward(batch).float() for model in (any_tiny, copied))
    assert 0 < float((exact - rough).norm() / exact.norm()) < 0.05


def test_nothing_is_said_of_the_copy_in_the_models_name(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of some models rounding to bfloat16 moves the logits as much as the check looks for, which is noted."""
    unsure = Capabilities(unsure={"decode": "it differs, but so does rounding"})
    monkeypatch.setattr(self_check, "check_model", lambda _model: unsure)
    assert quick_copy(tiny_llama).dtype == torch.bfloat16
    assert capsys.readouterr().err == ""
    LanguageModel(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "said")
    assert "decode with said" in capsys.readouterr().err


def test_tied_weights_stay_tied(tiny_gpt2: LanguageModel) -> None:
    copied = quick_copy(tiny_gpt2).hf
    head, embedding = copied.get_output_embeddings(), copied.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    assert head.weight is embedding.weight


def test_what_gets_no_copy(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = quick_copy(tiny_llama)
    assert quick_copy(copied) is copied  # it is in bfloat16 already
    allowed = LanguageModel(tiny_llama.hf, tiny_llama.tokenizer, "allowed", ("decode",))
    assert quick_copy(allowed) is allowed
    monkeypatch.setattr(quick, "fast_bfloat16", lambda _device: False)
    assert quick_copy(tiny_llama) is tiny_llama


def no_room(_hf: object) -> None:
    raise MemoryError


def fails(_model: LanguageModel) -> Capabilities:
    raise UserError("model x", "a plain forward pass of a few tokens: mixed types", "use a causal LM")


@pytest.mark.parametrize(
    "check",
    [
        lambda _model: Capabilities(off={"decode": "it fails"}),
        lambda _model: Capabilities(unchecked="of a few random tokens its logits are NaN"),
        fails,
    ],
)
def test_a_copy_that_fails_its_check_is_not_used(
    tiny_llama: LanguageModel, check: Callable[[LanguageModel], Capabilities], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "check", staticmethod(check))
    assert quick_copy(tiny_llama) is tiny_llama


def test_nor_where_there_is_no_room_or_several_devices(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.hf, "hf_device_map", {"a": "cpu", "b": "meta"}, raising=False)
    assert quick_copy(tiny_llama) is tiny_llama
    monkeypatch.setattr(tiny_llama.hf, "hf_device_map", {"": "cpu"}, raising=False)
    assert quick_copy(tiny_llama) is not tiny_llama
    monkeypatch.setattr(quick, "_halved", no_room)
    assert quick_copy(tiny_llama) is tiny_llama
