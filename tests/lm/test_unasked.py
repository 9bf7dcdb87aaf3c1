"""Passes of whole texts ask nothing where a device would be waited for, and have the bits that they have anyway."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lm.nothing_asked import AsksError, NothingAsked
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from trimtab.activations import HarvestOptions
from trimtab.activations.forwards import Forwards
from trimtab.activations.packing import tokenise
from trimtab.activations.sequences import pack_splits
from trimtab.activations.text import Document
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site, TokenBatch, capture
from trimtab.lm import model as model_module
from trimtab.lm.applying import applied
from trimtab.lm.cache import GrowingCache
from trimtab.steering import VectorSource

IDS = torch.randint(6, 100, (3, 20), generator=torch.Generator().manual_seed(1))
"""More tokens than a window of 8 holds."""


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[LanguageModel], LanguageModel]:
    """The same model, loaded where it would be waited for."""

    def loaded(model: LanguageModel) -> LanguageModel:
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "is_waited_for", lambda _device: True)
            return LanguageModel(copy.deepcopy(model.hf), model.tokenizer, model.name)

    return loaded


@pytest.fixture(params=["tiny_llama", "tiny_gemma3", "mistral"])
def model(request: pytest.FixtureRequest, tiny_llama: LanguageModel) -> LanguageModel:
    """No window, a window in some layers, a window in all of them."""
    if request.param != "mistral":
        return request.getfixturevalue(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=160, num_key_value_heads=2, sliding_window=8, **sizes)
    return LanguageModel(MistralForCausalLM(config), tiny_llama.tokenizer, "mistral")


def check_whole_texts(model: LanguageModel) -> None:
    """Passes, twice, since what one leaves behind would be seen by the next one."""
    batch = TokenBatch.full(IDS)
    expected = model.hf(input_ids=IDS, position_ids=batch.position_ids, use_cache=False).logits
    for _ in range(2):
        with torch.no_grad(), NothingAsked():
            found = model.forward(batch)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_whole_texts_ask_nothing(model: LanguageModel, as_on_a_card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: no cache is given; one that keeps what it is given."""
    card = as_on_a_card(model)
    check_whole_texts(card)
    monkeypatch.setattr(card, "_keeps_nothing", GrowingCache(card.n_layers))
    with pytest.raises((AssertionError, RuntimeError, AsksError)):
        check_whole_texts(card)
    monkeypatch.setattr(card, "_keeps_nothing", None)
    with pytest.raises(AsksError):
        check_whole_texts(card)


@torch.no_grad()
def test_a_harvests_passes_ask_nothing(model: LanguageModel, as_on_a_card: Any) -> None:
    """Rows packed with several documents have the bits that they have on a CPU."""
    documents = [Document(f"doc-{i}", "the tide and the boat " * (3 + i), "test") for i in range(12)]
    site, options = Site("resid_post", 1), HarvestOptions(context=24, batch_size=3, holdout=0.0)
    rows: list[Tensor] = []
    for each in (model, as_on_a_card(model)):
        forwards = Forwards(each, [site], pack_splits(tokenise(documents, each.tokenizer), options), options)
        batch = forwards._sequences("train", 0)
        ids = torch.from_numpy(batch.tokens).long()
        if each is not model:
            with NothingAsked():
                capture(each, TokenBatch.full(ids), [site])
        rows.append(forwards._run(batch).rows[str(site)].clone())
    assert torch.equal(*rows)


@torch.no_grad()
def test_a_model_with_other_bits_beside_a_cache_is_not_given_one(tiny_llama: LanguageModel, as_on_a_card: Any) -> None:
    """Mutation: no trial."""
    kind = type(tiny_llama.hf)

    class Unlike(kind):  # type: ignore[valid-type, misc]
        def forward(self, input_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
            found = super().forward(input_ids, cache=cache, **rest)
            found.logits = found.logits * (1 if cache is None or cache.get_seq_length() else 1.0001)
            return found

    hf = copy.deepcopy(tiny_llama.hf)
    hf.__class__ = Unlike
    other = as_on_a_card(LanguageModel(hf, tiny_llama.tokenizer, "unlike"))
    batch = TokenBatch.full(IDS)
    assert torch.equal(other.forward(batch), tiny_llama.forward(batch))
    other._keeps_nothing = GrowingCache(other.n_layers).frozen()
    assert not torch.equal(other.forward(batch), tiny_llama.forward(batch))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_a_block_of_edits_sees_a_pass_without_a_cache(
    positions: str, tiny_llama: LanguageModel, as_on_a_card: Any
) -> None:
    """Mutation: the cache that keeps nothing counts as one."""
    card = as_on_a_card(tiny_llama)
    source = VectorSource(torch.ones(card.d_model), "resid_post.1", 0.5, positions=positions)

    def check() -> None:
        found = list[Tensor]()
        for model in (tiny_llama, card):
            with applied(model, source):
                found.append(model.forward(TokenBatch.full(IDS)))
        assert torch.equal(*found)
        assert not torch.equal(found[0], tiny_llama.forward(TokenBatch.full(IDS)))
        if positions == "generated":
            with applied(card, source):
                card.forward(TokenBatch.full(IDS[:, :11]))
                with pytest.raises(UserError, match="generation without a cache"):
                    card.forward(TokenBatch.full(IDS[:, :12]))

    check()
    assert card._keeps_nothing is not None
    card._keeps_nothing.keeps_nothing = False
    if positions == "generated":
        with pytest.raises(pytest.fail.Exception):
            check()


def test_where_gradients_are_wanted_nothing_is_given(tiny_llama: LanguageModel, as_on_a_card: Any) -> None:
    """Recomputed layers take no cache, and `transformers` says so each time."""
    card = as_on_a_card(tiny_llama)
    with torch.enable_grad():
        assert card.cache_argument not in card.forward_arguments(TokenBatch.full(IDS))
    with torch.no_grad():
        assert card.cache_argument in card.forward_arguments(TokenBatch.full(IDS))


def test_on_a_cpu_nothing_is_given(tiny_llama: LanguageModel) -> None:
    assert tiny_llama._keeps_nothing is None
    assert tiny_llama.cache_argument not in tiny_llama.forward_arguments(TokenBatch.full(IDS))
