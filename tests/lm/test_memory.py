"""What is said where a device's memory does not hold what is decoded."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, decode
from trimtab.lm.memory import COPIES, LOGITS, row_bytes, too_many_rows

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 1]]


def full(monkeypatch: pytest.MonkeyPatch, *, above: int) -> None:
    """A device on which no more than so many rows fit."""
    real = LanguageModel.call

    def call(self: LanguageModel, **arguments: torch.Tensor) -> object:
        if len(arguments["input_ids"]) > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, **arguments)

    monkeypatch.setattr(LanguageModel, "call", call)


def test_rows_that_do_not_fit_are_counted(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, above=2)
    config = DecodeConfig(max_new_tokens=5, batch_size=3)
    what = "3 rows of up to 9 tokens side by side: cpu has no room for decoding them"
    with pytest.raises(UserError, match=rf"{what}; lower the batch size to 1 \(--batch-size 1\)"):
        decode(tiny_llama, PROMPTS, config)
    assert len(decode(tiny_llama, PROMPTS, DecodeConfig(max_new_tokens=5, batch_size=1))) == 4


def test_a_single_row_that_does_not_fit_has_another_hint(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, above=0)
    with pytest.raises(UserError, match=r"1 row of up to 8 tokens .*; use shorter texts, a lower precision"):
        decode(tiny_llama, PROMPTS[:1], DecodeConfig(max_new_tokens=5))


def test_bytes_of_a_row_are_those_of_its_cache_and_its_logits(any_tiny: LanguageModel) -> None:
    cache = any_tiny.new_cache()
    any_tiny.forward(TokenBatch.full(torch.arange(7)[None]), cache=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.growing)  # type: ignore[union-attr]
    logits = 4 * any_tiny.vocab_size
    assert row_bytes(any_tiny, 7) == COPIES * held + LOGITS * logits


def test_what_is_free_on_a_card_says_how_many_fit(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of which 20 rows' worth is free, and the allocator holds 10 more; 5 were held before."""
    row = row_bytes(tiny_llama, 100)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (20 * row, 80 * row))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 10 * row)
    said = too_many_rows(tiny_llama, 64, 100, held=5 * row)
    assert said.line == (
        "64 rows of up to 100 tokens side by side: cuda:0 has no room for decoding them; "
        "lower the batch size to 20 (--batch-size 20)"
    )
    few = too_many_rows(tiny_llama, 9, 100, held=5 * row)  # of which at most half is promised
    assert "batch size to 4 " in few.line
