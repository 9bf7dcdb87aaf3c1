"""Flags placed in the tiny Llama, and its finetunings on the toy corpus under each curriculum."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from toy_corpus import toy_examples

from trimtab.flags import FlagSpec, TrainedFlags, place_flags, train_flags
from trimtab.lm import LanguageModel


@pytest.fixture(scope="session")
def flags(tiny_llama: LanguageModel) -> FlagSpec:
    """Two concepts of two dimensions each, at all eight sites."""
    texts = [example.response for example in toy_examples()]
    return place_flags(tiny_llama, ["sea", "war"], texts, dims=4, from_layer=0, ramp_scale=3.0)


@pytest.fixture(scope="session")
def finetuned(tiny_llama: LanguageModel, flags: FlagSpec) -> dict[str, TrainedFlags]:
    """One model per curriculum, from the same weights on the same batches."""
    return {
        name: train_flags(
            tiny_llama, flags, toy_examples(), curriculum=name, steps=100, lr=3e-3, batch_size=12, log_every=10
        )
        for name in ("plain", "auxiliary", "forced")
    }
