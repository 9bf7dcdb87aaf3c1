"""A tiny model with some text; tests and the scripts that they run import modules of this directory and of the
dictionaries' one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trimtab.lm import LanguageModel

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "dictionaries")]


@pytest.fixture(scope="session")
def data(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny model and some text."""
    root = tmp_path_factory.mktemp("data")
    tiny_llama.hf.save_pretrained(root / "model")
    tiny_llama.tokenizer.save_pretrained(root / "model")
    words = "the cat and the hen ran in and over then under the inn and there they sat"
    lines = [json.dumps({"id": str(i), "text": f"{words[i % 30 :]} {i} " * 4}) for i in range(60)]
    (root / "text.jsonl").write_text("\n".join(lines))
    return ["--model", str(root / "model"), "--text", str(root / "text.jsonl")]
