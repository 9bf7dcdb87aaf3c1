"""Keyed draws and the choice of a token, against slow references in float64 and whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.lm.sampling import choose_token, inverse_cdf, nucleus, nucleus_floor, uniform

MASK = (1 << 64) - 1


def splitmix(z: int) -> int:
    """SplitMix64's output function on unsigned whole numbers, as published."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_uniform(*key: int) -> float:
    state = key[0] & MASK
    for part in key[1:]:
        state = splitmix((state + 0x9E3779B97F4A7C15) & MASK) ^ (part & MASK)
    return (splitmix((state + 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def test_the_mixing_function_is_splitmix64() -> None:
    """First outputs of SplitMix64 seeded with 1234567, as listed by its authors' reference implementation."""
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(splitmix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


word = st.integers(-(2**63), 2**63 - 1)


@given(seed=word, sample=word, branch=word, position=word, stream=word)
def test_draws_equal_unsigned_arithmetic(seed: int, sample: int, branch: int, position: int, stream: int) -> None:
    found = uniform(seed, torch.tensor([sample]), torch.tensor([branch]), torch.tensor([position]), stream)
    assert found.dtype == torch.float64
    assert float(found) == slow_uniform(seed, sample, branch, position, stream)
    assert 0 <= float(found) < 1


def test_draws_depend_on_every_part_of_the_key_and_nothing_else() -> None:
    sample = torch.arange(64)
    base = uniform(0, sample, 0, 5)
    torch.manual_seed(1)
    assert torch.equal(base, uniform(0, sample, 0, 5))
    assert torch.equal(base.flip(0), uniform(0, sample.flip(0), 0, 5))
    for seed, branch, position, stream in ((1, 0, 5, 0), (0, 1, 5, 0), (0, 0, 6, 0), (0, 0, 5, 1)):
        assert not torch.isclose(base, uniform(seed, sample, branch, position, stream)).any()


def test_draws_are_even() -> None:
    """40,000 draws over a grid of keys: the largest gap to the uniform CDF stays below the 99.9% Kolmogorov bound."""
    sample = torch.arange(200).repeat_interleave(200)
    position = torch.arange(200).repeat(200)
    u = uniform(0, sample, 0, position).sort().values
    n = len(u)
    gap = max(float((torch.arange(1, n + 1) / n - u).max()), float((u - torch.arange(n) / n).max()))
    assert gap < 1.95 / math.sqrt(n)


def slow_inverse_cdf(weights: list[float], u: float) -> int:
    total = math.fsum(weights)
    for i in range(len(weights)):
        if weights[i] > 0 and u * total < math.fsum(weights[: i + 1]):
            return i
    return max(i for i, w in enumerate(weights) if w > 0)


weights_lists = st.lists(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12).filter(any)


@given(weights=weights_lists, u=st.integers(0, 2**20 - 1))
def test_inverse_cdf_equals_a_slow_one(weights: list[float], u: int) -> None:
    """Weights and draws are exact in binary, so borders are hit exactly."""
    draw = u / 2**20
    found = int(inverse_cdf(torch.tensor([weights]), torch.tensor([draw], dtype=torch.float64)))
    assert found == slow_inverse_cdf(weights, draw)


def test_inverse_cdf_never_takes_a_weightless_index() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).expand(4, -1)
    u = torch.tensor([0.0, 0.5, 1 - 2**-53, 0.5 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(weights, u).tolist() == [1, 3, 3, 1]


def slow_choice(logits: list[float], temperature: float, top_p: float, u: float) -> tuple[int, float]:
    """The token by the definition, in Python floats, and how far the draw is from a border."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    total = math.fsum(weights)
    probs = [w / total for w in weights]
    kept: set[int] = set()
    mass = 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        kept.add(i)
        mass += probs[i]
        if mass >= top_p:
            break
    nucleus = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    borders = [math.fsum(nucleus[:i]) / math.fsum(nucleus) for i in range(len(probs) + 1)]
    sizes = sorted(probs, reverse=True)
    sums = [math.fsum(sizes[:i]) for i in range(1, len(sizes) + 1)]
    margins = [abs(u - border) for border in borders[1:-1]]
    if top_p < 1:
        margins += [abs(top_p - s) for s in sums]
    if len(kept) < len(sizes):  # tokens that tie with the last one kept are in, and float32 makes ties
        margins.append(sizes[len(kept) - 1] - sizes[len(kept)])
    return slow_inverse_cdf(nucleus, u), min(margins)


@settings(max_examples=300)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True),
    temperature=st.floats(0.3, 3),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    u=st.floats(0, 1, exclude_max=True),
)
def test_sampling_equals_a_slow_reference(logits: list[float], temperature: float, top_p: float, u: float) -> None:
    expected, margin = slow_choice(logits, temperature, top_p, u)
    found = int(choose_token(torch.tensor([logits]), temperature, top_p, torch.tensor([u], dtype=torch.float64)))
    assert found == expected or margin < 1e-5


@pytest.mark.parametrize("size", [100, 300, 5000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass(size: int, top_p: float) -> None:
    """Also where it is far wider than the tokens that are sorted first, as with nearly flat distributions."""
    generator = torch.Generator().manual_seed(size)
    for spread in (0.01, 1.0, 4.0):
        probs = torch.softmax(spread * torch.randn(3, size, generator=generator), dim=-1)
        tokens, weights = nucleus(probs, top_p, first=16)
        assert torch.equal(tokens, tokens.sort().values)
        for row, ids, kept in zip(probs, tokens, weights, strict=True):
            ids, kept = ids[kept > 0], kept[kept > 0]
            assert torch.equal(kept, row[ids])
            assert torch.equal(kept.sort().values, row.sort().values[-len(kept) :])
            assert float(kept.double().sum()) >= top_p - 1e-6
            assert float(kept.double().sum() - kept.min()) < top_p + 1e-6


def test_rows_beside_one_with_a_larger_nucleus_keep_theirs() -> None:
    """Mutation: of more tokens only those that the row with the larger nucleus needs are kept."""
    flat, peaked = torch.full((100,), 0.01), torch.zeros(100).index_fill_(0, torch.tensor([4]), 1.0)
    steep = torch.arange(100.0).flip(0)
    probs = torch.stack([peaked, flat, peaked, steep / steep.sum(), peaked])
    tokens, weights = nucleus(probs, 0.9, first=4)
    found = torch.zeros_like(probs).scatter_(1, tokens, weights)
    for row, alone in zip(found, probs, strict=True):
        ids, kept = nucleus(alone[None], 0.9, first=100)
        assert torch.equal(row[ids[0]], kept[0])
        assert int((row > 0).sum()) == int((kept > 0).sum())


def test_tokens_that_tie_with_the_last_of_the_nucleus_are_in() -> None:
    """Also where they tie with the last of the few that are tried first."""
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    for first in (2, 3, 4):
        assert nucleus(probs, 0.5, first)[1].tolist() == probs.tolist()


@given(
    weights=st.lists(st.sampled_from([0, 0, 1, 2, 3, 3, 8, 40]), min_size=1, max_size=12).filter(any),
    top_p=st.integers(1, 64).map(lambda p: p / 64),
)
def test_the_floor_of_a_nucleus_is_that_of_its_definition(weights: list[int], top_p: float) -> None:
    """In fractions, and where sums are hit exactly: probabilities are whole 512ths that need not add up to 1.

    Mutations: a sum must be more than `top_p`; the lowest bit is left out.
    """
    probs = [Fraction(weight, 512) for weight in weights]
    reached = [p for p in probs if sum(q for q in probs if q >= p) >= Fraction(top_p)]
    assert nucleus_floor(torch.tensor([[float(p) for p in probs]]), top_p).tolist() == [[max(reached, default=0)]]


@pytest.mark.parametrize("size", [7, 50, 1000, 9000])
def test_a_nucleus_by_its_floor_is_the_sorted_one_and_gives_the_same_tokens(size: int) -> None:
    """Nearly flat, steep and one-hot rows, with ties and zeros, up to sums that no row reaches.

    Mutations: sums in float32; tokens at the floor are left out; the floor is one bit off.
    """
    generator = torch.Generator().manual_seed(size)
    rows = 200 if size <= 1000 else 30
    u = torch.rand(rows, dtype=torch.float64, generator=generator)
    for spread in (0.01, 1.0, 4.0, 12.0):
        logits = spread * torch.randn(rows, size, generator=generator)
        logits[::3] = logits[::3].round()
        logits[::5, ::2] = -torch.inf
        logits[::7, 3] = 300.0
        probs = torch.softmax(logits, dim=-1)
        for top_p in (1e-9, 0.05, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-12):
            tokens, weights = nucleus(probs, top_p, size)
            kept = torch.where(probs >= nucleus_floor(probs, top_p), probs, 0.0)
            assert torch.equal(kept.gather(1, tokens), weights)
            assert torch.equal(choose_token(logits, 1.0, top_p, u, None), choose_token(logits, 1.0, top_p, u, size))


def test_greedy_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0]])
    assert choose_token(logits, 0.0, 1.0, None).tolist() == [1, 0]


def test_a_cold_temperature_is_nearly_greedy_and_top_p_zero_nearly_too() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0.01, 0.99, 5, dtype=torch.float64)
    assert choose_token(logits, 1e-6, 1.0, u).tolist() == logits.argmax(-1).tolist()
    assert choose_token(logits, 1.0, 1e-9, u).tolist() == logits.argmax(-1).tolist()
