"""Puts this folder's modules, and those of the tasks' tests, on the path; a model whose circuit was built by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

import torch
from circuit_prompts import few_names, saved_words
from transformers import GPT2Config, GPT2LMHeadModel

from trimtab.lm import LanguageModel
from trimtab.tasks.ioi_prompts import IOIDistribution

INHIBITION, MOVER = (0, 1), (1, 2)
D, HEADS, WIDTH = 64, 4, 16
NAME, END, PLACE = 10, 11, 12  # coordinates behind the ten names: is a name, is " to", how late
INHIBITED, ANSWER = slice(20, 30), slice(30, 40)


@pytest.fixture(scope="session")
def ioi() -> IOIDistribution:
    return few_names(tokenizer=saved_words())


@pytest.fixture(scope="session")
def built(ioi: IOIDistribution) -> LanguageModel:
    """Layer 0, head 1 tells the last token which name came last; layer 1, head 2 copies a name that is not that one."""
    config = GPT2Config(vocab_size=160, n_embd=D, n_layer=2, n_head=HEADS, n_positions=64, tie_word_embeddings=False)
    hf = GPT2LMHeadModel(config)
    to = ioi.tokenise(ioi.prompts(1)[0]).ids[-1]
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        hf.transformer.wte.weight[:, 40:] = torch.linspace(-1, 1, 24)  # all tokens have a norm without a meaning
        for number, token in enumerate(ioi.name_token.values()):
            hf.transformer.wte.weight[token, number] = hf.transformer.wte.weight[token, NAME] = 2
            hf.lm_head.weight[token, ANSWER.start + number] = 1
        hf.transformer.wte.weight[to, END] = 2
        hf.transformer.wpe.weight[:, PLACE] = torch.arange(64) / 64

        def connect(place: tuple[int, int], part: str, coordinate: int, column: int, strength: float) -> None:
            block, start = hf.transformer.h[place[0]].attn, place[1] * WIDTH
            if part == "out":
                block.c_proj.weight[start + column, coordinate] = strength
            else:
                block.c_attn.weight[coordinate, "qkv".index(part) * D + start + column] = strength

        connect(INHIBITION, "q", END, 0, 10)
        connect(INHIBITION, "k", NAME, 0, 10)
        connect(INHIBITION, "k", PLACE, 0, 20)
        connect(MOVER, "q", END, NAME, 10)
        connect(MOVER, "k", NAME, NAME, 10)
        for number in range(10):
            connect(INHIBITION, "v", number, number, 1)
            connect(INHIBITION, "out", INHIBITED.start + number, number, 2)
            connect(MOVER, "q", INHIBITED.start + number, number, -10)
            connect(MOVER, "k", number, number, 10)
            connect(MOVER, "v", number, number, 1)
            connect(MOVER, "out", ANSWER.start + number, number, 4)
    return LanguageModel.from_hf(hf.eval().requires_grad_(False), ioi.tokenizer, name="built")  # type: ignore[arg-type]
