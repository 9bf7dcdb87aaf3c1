"""Decoding from kept keys and values against decoding from nothing."""

from __future__ import annotations

from typing import Any

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
    TokenBatch,
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


BEGIN = [5, 17, 29, 44, 8, 31, 60, 12, 3]


def fed_tokens(patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward pass is fed, as they come."""
    found: list[int] = []
    real = LanguageModel.forward

    def forward(self: LanguageModel, batch: TokenBatch, **more: Any) -> torch.Tensor:
        found.append(batch.ids.numel())
        return real(self, batch, **more)

    patch.setattr(LanguageModel, "forward", forward)
    return found


def is_as_fresh(model: LanguageModel, prompts: list[list[int]]) -> bool:
    config = DecodeConfig(max_new_tokens=4, temperature=1.0, seed=3, stop_at_eos=False)
    fresh = decode(model, prompts, config)
    kept = decode(model, prompts, config, prompt_cache=PromptCache(model, together=True))
    near = torch.allclose(torch.tensor(kept.token_logp), torch.tensor(fresh.token_logp), atol=1e-4)
    return near and kept.token_ids == fresh.token_ids


def test_what_prompts_begin_with_is_fed_once(any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[*BEGIN, *prompt] for prompt in (*PROMPTS, [4, 6])]
    assert is_as_fresh(any_tiny, prompts)
    fed = fed_tokens(monkeypatch)
    decode(any_tiny, prompts, DecodeConfig(max_new_tokens=1), prompt_cache=PromptCache(any_tiny, together=True))
    assert fed == [len(BEGIN), 4 * 6, 4]


@pytest.mark.parametrize("prompts", [[[*BEGIN, 7, 8]], [[*BEGIN[:6], 7, 8], [*BEGIN[:6], 9, 10, 11]]])
def test_what_is_short_or_begins_one_prompt_is_not_fed_apart(
    tiny_llama: LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = fed_tokens(monkeypatch)
    cache = PromptCache(tiny_llama, together=True)
    decode(tiny_llama, prompts, DecodeConfig(max_new_tokens=1), prompt_cache=cache)
    assert fed == [len(prompts) * (max(map(len, prompts)) - 1), len(prompts)]


def test_a_prompt_may_be_all_that_others_begin_with(tiny_llama: LanguageModel) -> None:
    assert is_as_fresh(tiny_llama, [[*BEGIN, 1], [*BEGIN, 7, 2], [*BEGIN, 7, 9, 11]])


def test_a_begin_that_is_not_theirs_shows(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: what is put before the heads is not what they begin with."""
    real, prompts = PromptCache._begin, [[*BEGIN, *prompt] for prompt in PROMPTS]
    assert is_as_fresh(tiny_llama, prompts)

    def other(self: PromptCache, heads: list[tuple[int, ...]]) -> Any:
        return real(self, [(9,) * (len(BEGIN) + 1)] * 2)

    monkeypatch.setattr(PromptCache, "_begin", other)
    assert not is_as_fresh(tiny_llama, prompts)


def test_much_longer_prompts_are_fed_apart(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1] * 5, [2] * 9, [3] * 10]  # heads of 4, 8 and 9
    fed = fed_tokens(monkeypatch)
    decode(tiny_llama, prompts, DecodeConfig(max_new_tokens=1), prompt_cache=PromptCache(tiny_llama, together=True))
    assert fed == [2 * 8, 9, 3]


@pytest.mark.parametrize("turning", [False, True])
def test_by_default_and_where_positions_turn_heads_of_one_length_are_fed(
    tiny_llama: LanguageModel, turning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its begin, or beside longer ones, a head would have other bits, or other positions."""
    if turning:
        monkeypatch.setitem(tiny_llama.__dict__, "turning_length", len(BEGIN) + 4)
    prompts = [[*BEGIN, *prompt] for prompt in (*PROMPTS, [1, 2, 3, 4])]
    fed, alone = fed_tokens(monkeypatch), PromptCache(tiny_llama, together=turning)
    cache = PromptCache(tiny_llama, together=turning)
    cache.load([prompt[:-1] for prompt in prompts], 30)
    n = len(BEGIN)
    assert fed == [2 * (n + 3), n + 5, n + 6]
    for number in (1, 2):  # each the only one of its length
        head = tuple(prompts[number][:-1])
        alone.load([head], 30)
        for mine, theirs in zip(alone._held[head].keys, cache._held[head].keys, strict=True):
            assert torch.equal(mine, theirs)


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
