"""A tiny model some of whose coordinates nothing writes and the head alone reads, and dictionaries at three sites.

Along coordinate UP the logit of Y rises and that of N falls. Only one feature of the three dictionaries has that
coordinate: feature UP_FEATURE at SITE (as −UP, so that it must be subtracted), and no other reads or writes it.
Coordinate HELD is the same everywhere and makes Y and N common, N more so: removing HELD_FEATURE at SITE, which fires
everywhere, favours Y.
Along PEAK the logit of Q rises, and that of Z more steeply from further down, so that Q is likeliest at one dose.
A gate that opens along one coordinate and passes on another makes the letter K likelier: features PAIR do it together
and neither by itself.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.finding.wishes import Contrast, Texts, Words
from trimtab.lm import LanguageModel, Site

SITES = tuple(Site("resid_post", layer) for layer in range(3))
SITE = SITES[1]
UP, HELD, PEAK, GATE, PASS, OUT = range(6)
PROTECTED = 6
N_FEATURES = 24
UP_FEATURE, HELD_FEATURE, PEAK_FEATURE = 7, 3, 11
PAIR = (15, 16)
LETTERS = [letter for letter in string.ascii_lowercase if letter not in "thein"]


class Ground(NamedTuple):
    """What is searched."""

    model: LanguageModel
    saes: Mapping[Site, Standard]


def token(model: LanguageModel, letter: str) -> int:
    (found,) = model.tokenizer.encode(letter, add_special_tokens=False)
    return found


def planted_ground(tiny: LanguageModel, *, double: bool = False) -> Ground:
    """The model and its dictionaries."""
    hf = copy.deepcopy(tiny.hf)
    model = LanguageModel.from_hf(hf, tiny.tokenizer, name="planted")
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        hf.model.norm.weight.fill_(1.0)
        embedding.weight[:, :PROTECTED] = 0
        embedding.weight[:, HELD] = 1.0
        head.weight[:, :PROTECTED] = 0
        for letter in "YNQZK":
            head.weight[token(model, letter)] = 0
        head.weight[token(model, "Y"), UP], head.weight[token(model, "N"), UP] = 4.0, -4.0
        head.weight[token(model, "Y"), HELD], head.weight[token(model, "N"), HELD] = 5.0, 8.0
        head.weight[token(model, "Q"), PEAK] = 4.0
        head.weight[token(model, "Z"), PEAK], head.weight[token(model, "Z"), HELD] = 10.0, -14.0
        head.weight[token(model, "K"), OUT] = 12.0
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[:PROTECTED] = 0
            layer.mlp.down_proj.weight[:PROTECTED] = 0
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[:, :PROTECTED] = 0
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[:, :PROTECTED] = 0
        mlp = hf.model.layers[3].mlp
        hf.model.layers[3].post_attention_layernorm.weight.fill_(1.0)
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[0] = 0
        mlp.gate_proj.weight[0, GATE], mlp.up_proj.weight[0, PASS] = 1.5, 1.5
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[OUT, 0] = 1.0
    if double:
        hf.double()
    return Ground(model, {site: _sae(model, site, i, double=double) for i, site in enumerate(SITES)})


def _sae(model: LanguageModel, site: Site, seed: int, *, double: bool) -> Standard:
    rows = torch.randn(N_FEATURES, model.d_model, generator=torch.Generator().manual_seed(seed))
    rows[:, :PROTECTED] = 0
    if site == SITE:
        for feature, coordinate, sign in (
            (UP_FEATURE, UP, -1.0), (HELD_FEATURE, HELD, 1.0), (PEAK_FEATURE, PEAK, 1.0), (PAIR[0], GATE, 1.0),
            (PAIR[1], PASS, 1.0),
        ):  # fmt: skip
            rows[feature] = 0
            rows[feature, coordinate] = sign
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", model=model.name, site=str(site))
    d = model.d_model
    sae = Standard(rows.T.contiguous(), torch.zeros(N_FEATURES), rows, torch.zeros(d), info=info)
    return sae.double() if double else sae


def random_words(n: int, length: int, seed: int, *, letters: str = "") -> list[str]:
    """Different strings of letters; with `letters`, every other one is one of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(among: list[str] | str) -> str:
        return among[int(torch.randint(len(among), (1,), generator=generator))]

    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(draw(letters if letters and i % 2 else LETTERS) for i in range(length))] = None
    return list(found)


def texts_wish(n: int = 40) -> Texts:
    """Strings with Y rather than N."""
    return Texts(wanted=tuple(random_words(n, 10, 1, letters="Y")), unwanted=tuple(random_words(n, 10, 2, letters="N")))


def contrast_wish(n: int = 40, answers: tuple[str, str] = ("Y", "N"), seed: int = 3) -> Contrast:
    """Y rather than N, behind anything."""
    rows = [{"prompt": f"{text}\n", "wanted": answers[0], "unwanted": answers[1]} for text in random_words(n, 6, seed)]
    return Contrast(rows=tuple(rows))


def words_wish(n: int = 40, more: tuple[str, ...] = ("Y",), less: tuple[str, ...] = ("N",)) -> Words:
    """Y more likely next and N less."""
    return Words(prompts=tuple(f"{text}\n" for text in random_words(n, 6, 4)), more=more, less=less)
