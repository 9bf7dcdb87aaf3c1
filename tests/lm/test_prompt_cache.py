"""Decoding from kept keys and values against decoding from nothing."""

from __future__ import annotations

import pytest
import torch

from trimtab.lm import (
    DecodeConfig,
    DecodeStart,
    Edit,
    EditRequest,
    LanguageModel,
    PositionRule,
    PromptCache,
    Site,
    decode,
)

PROMPTS = [[7, 20, 33, 9], [8, 21, 40, 52, 61, 13, 30], [7, 20, 33, 9, 11, 12]]


class _Push:
    """Adds one direction at every chosen position."""

    unit, operation, dictionary_hash = "absolute", "add", "test"

    def __init__(self, positions: str, width: int) -> None:
        self.sites: tuple[Site, ...] = (Site.parse("resid_post.1"),)
        self.positions = PositionRule.parse(positions)
        self.rows = torch.nn.functional.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(0)))

    def directions(self, site: Site) -> torch.Tensor:
        return self.rows

    def start(self, start: DecodeStart) -> None:
        pass

    def choose(self, request: EditRequest) -> Edit:
        rows = len(request.row)
        return Edit(torch.zeros(rows, 1, dtype=torch.long), torch.full((rows, 1), 5.0))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("steered", [False, True])
def test_kept_prompts_decode_as_fresh_ones(any_tiny: LanguageModel, repeats: int, steered: bool) -> None:
    cache = PromptCache(any_tiny)
    config = DecodeConfig(max_new_tokens=8, temperature=1.0, seed=3, stop_at_eos=False)
    source = _Push("generated", any_tiny.d_model) if steered else None
    fresh = decode(any_tiny, PROMPTS, config, source, repeats=repeats)
    for _ in range(2):
        kept = decode(any_tiny, PROMPTS, config, source, repeats=repeats, prompt_cache=cache)
        assert kept.token_ids == fresh.token_ids
        assert torch.allclose(torch.tensor(kept.token_logp), torch.tensor(fresh.token_logp), atol=1e-4)
        assert len(kept.edits) == len(fresh.edits)
    assert cache.computed == 3


def test_what_was_used_least_recently_is_forgotten_and_computed_anew(tiny_llama: LanguageModel) -> None:
    cache = PromptCache(tiny_llama, max_bytes=1)
    config = DecodeConfig(max_new_tokens=2)
    for prompt, computed in ((PROMPTS[0], 1), (PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[0], 3)):
        expected = decode(tiny_llama, [prompt], config).token_ids
        assert decode(tiny_llama, [prompt], config, prompt_cache=cache).token_ids == expected
        assert cache.computed == computed


def test_edits_inside_prompts_and_forced_tokens_bypass_the_cache(tiny_llama: LanguageModel) -> None:
    cache = PromptCache(tiny_llama)
    config = DecodeConfig(max_new_tokens=3)
    everywhere = _Push("all", tiny_llama.d_model)
    expected = decode(tiny_llama, PROMPTS, config, everywhere).token_logp
    assert decode(tiny_llama, PROMPTS, config, everywhere, prompt_cache=cache).token_logp == expected
    pushed = _Push("generated", tiny_llama.d_model)
    forced = [[5], [6, 7], [8]]
    expected = decode(tiny_llama, PROMPTS, config, pushed, forced=forced).token_logp
    assert decode(tiny_llama, PROMPTS, config, pushed, forced=forced, prompt_cache=cache).token_logp == expected
    assert cache.computed == 0
