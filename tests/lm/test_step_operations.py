"""How many operations a decoding step adds to the model's forward pass: on a GPU each is a launch.

The most that there may be is what there is, by `python benchmarks/gpu.py --small --device cpu --dtype float32 --only
launches`, here of a smaller model: whoever adds one says so.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.lm import DecodeConfig, LanguageModel, decode, editing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROMPTS = [[7, 20, 31, 44], [9, 12, 33]]
MOST = {"none": 27, "static": 46}
"""One or two more than there are (25.25 and 43), as versions of torch differ."""


def counted(model: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    operations: Any = importlib.import_module("accelerator.operations")
    one_direction: Any = importlib.import_module("decode").OneDirection
    source = one_direction(model.site("resid_post.1"), model.d_model, torch.device("cpu")) if name == "static" else None

    def run(tokens: int) -> None:
        decode(model, PROMPTS, DecodeConfig(max_new_tokens=tokens, stop_at_eos=False), source, ahead=4)

    return operations.of_a_step(run, 12)


def check_count(model: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(model, name, monkeypatch)
    assert counts.pop("model") > 100
    assert sum(counts.values()) <= MOST[name], counts


@pytest.mark.parametrize("name", MOST)
def test_a_step_adds_few_operations(tiny_llama: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_count(tiny_llama, name, monkeypatch)


def test_numbers_that_are_made_at_each_step_are_noticed(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: a log's common numbers are filled in at each step."""
    monkeypatch.setattr(
        editing.SourceRunner,
        "_all",
        lambda _, value, like, *shape, dtype=None: like.new_full(shape, value, dtype=dtype or like.dtype),
    )
    with pytest.raises(AssertionError):
        check_count(tiny_llama, "static", monkeypatch)
