"""Logits of last positions: those of all positions, from rows that the output embedding reads side by side."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from trimtab.lm import LanguageModel, TokenBatch
from trimtab.lm import model as lm_model

ROWS = [[7, 20, 33, 9, 11], [8, 21, 40, 52, 61]]


def check_rows_lie_side_by_side(model: LanguageModel) -> None:
    head, seen = model.hf.get_output_embeddings(), []
    assert head is not None
    with head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0])), torch.no_grad():
        last = model.forward(TokenBatch.pad(ROWS), last=2)
        whole = model.forward(TokenBatch.pad(ROWS))
    assert [tuple(x.shape[:2]) for x in seen] == [(2, 2), (2, 5)]
    assert all(x.is_contiguous() for x in seen)
    torch.testing.assert_close(last, whole[:, -2:], rtol=0, atol=1e-6)
    assert not head._forward_pre_hooks


def test_rows_lie_side_by_side(any_tiny: LanguageModel) -> None:
    check_rows_lie_side_by_side(any_tiny)


def test_mutation_rows_are_read_where_they_lie(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_model, "contiguous_rows", lambda head: nullcontext())
    with pytest.raises(AssertionError):
        check_rows_lie_side_by_side(tiny_llama)
