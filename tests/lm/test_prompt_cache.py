"""Decoding from kept keys and values against decoding from nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.lm import (
    DecodeConfig,
    DecodeStart,
    Edit,
    EditRequest,
    GrowingCache,
    LanguageModel,
    PositionRule,
    PromptCache,
    Site,
    TokenBatch,
    decode,
)
from trimtab.lm.prompt_cache import _Tokens

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


def keys_of(cache: GrowingCache) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.growing if layer.keys is not None]


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
        head = prompts[number][:-1]
        mine, theirs = (keys_of(one.load([head], 30)) for one in (alone, cache))
        assert all(map(torch.equal, mine, theirs))


def test_what_was_used_least_recently_is_forgotten_and_computed_anew(tiny_llama: LanguageModel) -> None:
    cache = PromptCache(tiny_llama, max_bytes=1)
    config = DecodeConfig(max_new_tokens=2)
    for prompt, computed in ((PROMPTS[0], 1), (PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[0], 3)):
        expected = decode(tiny_llama, [prompt], config).token_ids
        assert decode(tiny_llama, [prompt], config, prompt_cache=cache).token_ids == expected
        assert cache.computed == computed


def loads_as_fresh(model: LanguageModel, max_tokens: int) -> PromptCache:
    """Whether heads come out as they are fed by themselves, while many are forgotten and the others moved."""
    token_bytes = sum(2 * keys[0, :, :1].nbytes for keys in keys_of(PromptCache(model).load([[1]], 1)))
    cache, generator = PromptCache(model, max_bytes=max_tokens * token_bytes), torch.Generator().manual_seed(0)
    known = [torch.randint(100, (int(n),), generator=generator).tolist() for n in range(1, 9)]
    for _ in range(40):
        heads = [known[i] for i in torch.randint(len(known), (3,), generator=generator).tolist()]
        loaded = cache.load(heads, 12)
        for row, head in enumerate(heads):
            alone = keys_of(PromptCache(model).load([head], 12))
            for mine, theirs in zip(keys_of(loaded), alone, strict=True):
                assert torch.equal(mine[row, :, -len(head) :], theirs[0])
                assert not mine[row, :, : -len(head)].any()
        assert (
            sum(kept.keys.nbytes + kept.values.nbytes for kept in cache._kept.values())
            <= (max_tokens + 3 * 8) * token_bytes
        )
    return cache


def test_heads_stay_what_they_are_while_others_are_forgotten(tiny_llama: LanguageModel) -> None:
    assert loads_as_fresh(tiny_llama, 44).computed > 8  # all eight have 36 tokens, and three quarters may be held


def test_heads_that_are_moved_unsaid_show(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: tokens are moved in another order than that of the heads."""
    real = _Tokens.move
    monkeypatch.setattr(_Tokens, "move", lambda self, order, capacity: real(self, order.flip(0), capacity))
    with pytest.raises(AssertionError):
        loads_as_fresh(tiny_llama, 44)


class _Copies(TorchDispatchMode):
    """Counts what fills memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("copy_", "fill_", "index", "index_select", "clone", "index_put_")
        return func(*args, **(kwargs or {}))


def test_any_number_of_rows_is_loaded_by_as_many_copies(tiny_llama: LanguageModel) -> None:
    cache, counts = PromptCache(tiny_llama), []
    heads = [prompt[:-1] for prompt in PROMPTS]
    cache.load(heads, 10)
    for copies in (1, 20):
        with _Copies() as copied:
            cache.load(heads * copies, 10)
        counts.append(copied.count)
    assert counts[0] == counts[1] <= 6 * tiny_llama.n_layers


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
