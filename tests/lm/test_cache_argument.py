"""The name under which a model's forward takes its cache: the current one, the older one, and models without any."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, capture, decode
from trimtab.selection.scorer import LastTokenScorer

PROMPTS = [[7, 20, 33, 9], [8, 21, 40, 52, 61, 13, 30]]
CONFIG = DecodeConfig(max_new_tokens=5, stop_at_eos=False)


def test_no_command_warns(any_tiny: LanguageModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(any_tiny, PROMPTS, CONFIG, repeats=2)
        cache = any_tiny.new_cache()
        capture(any_tiny, TokenBatch.pad(PROMPTS), ["resid_post.1"], cache=cache)
        scorer = LastTokenScorer(any_tiny, "resid_post.1", PROMPTS[0])
        scorer.logits(torch.zeros(2, any_tiny.d_model))


def test_the_older_name_gives_the_same_tokens(tiny_llama: LanguageModel) -> None:
    own = tiny_llama.cache_argument

    class Older(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **rest):  # type: ignore[no-untyped-def, override]
            assert "cache" not in rest
            return super().forward(input_ids, **{own: past_key_values}, **rest)

    hf = copy.deepcopy(tiny_llama.hf)
    hf.__class__ = Older
    older = LanguageModel(hf, tiny_llama.tokenizer, "older")
    assert older.cache_argument == "past_key_values"
    found, expected = decode(older, PROMPTS, CONFIG), decode(tiny_llama, PROMPTS, CONFIG)
    assert found.token_ids == expected.token_ids
    for row, own in zip(found.token_logp, expected.token_logp, strict=True):
        assert row == pytest.approx(own, abs=1e-5)  # its head sees all places: it does not name `logits_to_keep`


def test_models_that_keep_another_state_are_refused(
    tiny_llama: LanguageModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    class WithoutCache(LlamaForCausalLM):
        def forward(self, input_ids=None, **rest):  # type: ignore[no-untyped-def, override]
            return super().forward(input_ids, **rest)

    hf = copy.deepcopy(tiny_llama.hf)
    hf.__class__ = WithoutCache
    mamba = MambaForCausalLM(MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2))
    for model in (hf, mamba):
        with pytest.raises(UserError, match="layers with a state other than keys and values; use another model"):
            decode(LanguageModel(model, tiny_tokenizer, "other"), PROMPTS, CONFIG)
