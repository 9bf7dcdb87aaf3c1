"""Choosing among allowed tokens, against the bare model's distribution masked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, decode
from trimtab.lm.sampling import inverse_cdf, uniform

PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25], [40]]
ALLOWED = [[90, 30, 60], [31], [77, 50, 110, 6]]
GREEDY = DecodeConfig(max_new_tokens=3, stop_at_eos=False)


def log_softmax(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Next-token log-probabilities [V] in one pass of the bare transformers model."""
    with torch.no_grad():
        return torch.log_softmax(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double(), dim=-1)


def test_greedy_takes_the_best_allowed_token(any_tiny: LanguageModel) -> None:
    decoded = decode(any_tiny, PROMPTS, GREEDY, allowed=ALLOWED)
    for row, prompt in enumerate(PROMPTS):
        for step, token in enumerate(decoded.token_ids[row]):
            logp = log_softmax(any_tiny, prompt + decoded.token_ids[row][:step])
            best = max(ALLOWED[row], key=lambda t: float(logp[t]))
            assert token == best
            assert decoded.decided_ids[row][step] == best
            assert decoded.allowed_logp[row][step] == pytest.approx([float(logp[t]) for t in ALLOWED[row]], abs=1e-4)


def test_log_probabilities_are_of_the_whole_vocabulary(any_tiny: LanguageModel) -> None:
    decoded = decode(any_tiny, PROMPTS, GREEDY, allowed=ALLOWED)
    for row, prompt in enumerate(PROMPTS):
        logp = log_softmax(any_tiny, prompt)
        assert decoded.token_logp[row][0] == pytest.approx(float(logp[decoded.token_ids[row][0]]), abs=1e-4)
        assert decoded.entropy[row][0] == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_is_from_the_renormalised_distribution(tiny_llama: LanguageModel, top_p: float) -> None:
    config = replace(GREEDY, temperature=2.0, top_p=top_p, max_new_tokens=1, seed=5)
    decoded = decode(tiny_llama, PROMPTS, config, allowed=ALLOWED)
    u = uniform(5, torch.arange(3), 0, torch.tensor([len(p) - 1 for p in PROMPTS]))
    for row, prompt in enumerate(PROMPTS):
        ids = sorted(ALLOWED[row])
        probs = torch.softmax(log_softmax(tiny_llama, prompt)[ids] / 2.0, dim=0)
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        kept = torch.zeros_like(probs).index_copy(0, order, torch.where(before < top_p, probs[order], 0.0))
        assert decoded.token_ids[row] == [ids[int(inverse_cdf(kept[None], u[row : row + 1]))]]


def test_all_tokens_allowed_is_no_restriction(any_tiny: LanguageModel) -> None:
    config = replace(GREEDY, temperature=0.9, top_p=0.9, max_new_tokens=6)
    free = decode(any_tiny, PROMPTS, config)
    everything = decode(any_tiny, PROMPTS, config, allowed=[range(any_tiny.vocab_size)] * 3)
    assert everything.token_ids == free.token_ids
    assert everything.token_logp == free.token_logp
    assert everything.entropy == free.entropy
    assert free.allowed_logp == []


def test_rows_keep_their_own_tokens_when_others_end_and_prompts_repeat(tiny_llama: LanguageModel) -> None:
    eos = min(tiny_llama.eos_ids)
    allowed = [[eos], [33, 34], [70, 71]]
    decoded = decode(
        tiny_llama, [[5, 6], [7, 8, 9], [9, 8]], DecodeConfig(max_new_tokens=3), allowed=allowed, repeats=2
    )
    assert decoded.finish == ["eos", "eos", "length", "length", "length", "length"]
    for row, tokens in enumerate(decoded.token_ids):
        assert set(tokens) <= set(allowed[row // 2])


def test_a_teacher_is_fed_whatever_is_allowed(tiny_llama: LanguageModel) -> None:
    decoded = decode(tiny_llama, PROMPTS, GREEDY, teacher=[[8, 9, 10]] * 3, allowed=ALLOWED)
    assert decoded.token_ids == [[8, 9, 10]] * 3
    assert all(set(chosen) <= set(ALLOWED[row]) for row, chosen in enumerate(decoded.decided_ids))
    logp = log_softmax(tiny_llama, PROMPTS[0])
    assert decoded.token_logp[0][0] == pytest.approx(float(logp[8]), abs=1e-4)
    assert decoded.decided_logp[0][0] == pytest.approx(max(float(logp[t]) for t in ALLOWED[0]), abs=1e-4)
    assert decoded.allowed_logp[0][0] == pytest.approx([float(logp[t]) for t in ALLOWED[0]], abs=1e-4)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ([[1], [], [2]], "the list of allowed tokens of row 1: it is empty"),
        ([[1], [2], [160]], "the list of allowed tokens of row 2: tiny-llama has tokens 0 to 159"),
        ([[-1], [2], [3]], "the list of allowed tokens of row 0: tiny-llama has tokens 0 to 159"),
    ],
)
def test_bad_allowed_tokens_are_refused(tiny_llama: LanguageModel, allowed: list[list[int]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(tiny_llama, PROMPTS, GREEDY, allowed=allowed)
    assert message in caught.value.line
