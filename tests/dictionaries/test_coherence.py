"""Coherence against the whole matrix of cosines, and against dictionaries whose coherence is known."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.dictionaries import coherence
from trimtab.dictionaries.coherence import decoder_coherence


def test_orthogonal_rows_have_none():
    found = decoder_coherence(torch.eye(5))
    assert (found.mean, found.max) == (0, 0)


def test_a_known_angle():
    angle = math.radians(60)
    rows = torch.tensor([[1.0, 0, 0], [math.cos(angle), math.sin(angle), 0], [0, 0, -1]])
    found = decoder_coherence(rows)
    assert found.max == pytest.approx(0.5, abs=1e-6)
    assert found.mean == pytest.approx(1 / 3, abs=1e-6)
    assert sorted(found.pair) == [0, 1]


def test_opposite_rows_are_as_near_as_can_be():
    assert decoder_coherence(torch.tensor([[0.6, 0.8], [-0.6, -0.8]])).max == pytest.approx(1)


@pytest.mark.parametrize("block_bytes", [1, 4 * 37 * 5, 1 << 20])
def test_blocks_give_what_the_whole_matrix_gives(block_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coherence, "_BLOCK_BYTES", block_bytes)
    rows = torch.nn.functional.normalize(torch.randn(37, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosine = (rows.double() @ rows.double().T).abs().fill_diagonal_(0)
    found = decoder_coherence(rows)
    assert found.mean == pytest.approx(float(cosine.amax(1).mean()), rel=1e-6)
    assert found.max == pytest.approx(float(cosine.max()), rel=1e-6)
    assert cosine[found.pair] == cosine.max()


def test_one_feature_has_no_neighbour():
    with pytest.raises(ValueError, match="two features"):
        decoder_coherence(torch.ones(1, 4))
