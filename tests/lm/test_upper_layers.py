"""Running from a layer up, against plain forward passes of the whole model; each check can fail.

Copies of a prompt that part at the first edited layer are compared with rows of their own.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from trimtab.lm import (
    DecodeConfig,
    Decoded,
    DecodeStart,
    Edit,
    EditRequest,
    LanguageModel,
    PositionRule,
    PromptCache,
    RowDelta,
    Site,
    TokenBatch,
    capture,
    decode,
    edited,
    running,
    site_width,
    upper_layers,
)
from trimtab.lm import token_statistics as token_statistics_module
from trimtab.lm.cache import GrowingLayer
from trimtab.lm.editing import SourceRunner
from trimtab.lm.running import RunningRows
from trimtab.lm.token_statistics import CPU_BLOCK, kl_divergence, token_statistics
from trimtab.lm.upper_layers import can_run_from, first_edited_layer, input_site, starting_at

COPIES = 3
LENGTHS = (5, 18, 11, 2)
"""Mixed, so that caches are padded, and beyond tiny Gemma's window of 8."""
SITES = [
    ("resid_pre.0",), ("attn_z.0.1",), ("resid_post.0",), ("resid_mid.1",), ("attn_k.2",), ("mlp_out.2",),
    ("resid_post.2",), ("resid_post.last",), ("resid_post.2", "resid_pre.2", "attn_out.last"),
]  # fmt: skip


class Apart:
    """Adds another direction at every row, site and position, in proportion to the activation."""

    unit, operation, dictionary_hash = "relative", "add", "test"

    def __init__(self, model: LanguageModel, sites: Sequence[str], positions: str = "generated") -> None:
        last = str(model.n_layers - 1)
        self.sites: tuple[Site, ...] = tuple(model.site(site.replace("last", last)) for site in sites)
        self.positions = PositionRule.parse(positions)
        generator = torch.Generator().manual_seed(0)
        self.rows = {
            site: torch.nn.functional.normalize(torch.randn(29, site_width(model, site), generator=generator))
            for site in self.sites
        }

    def directions(self, site: Site) -> torch.Tensor:
        return self.rows[site]

    def start(self, start: DecodeStart) -> None:
        pass

    def choose(self, request: EditRequest) -> Edit:
        feature = (7 * request.row + request.position + request.token) % 29
        return Edit(feature[:, None], 0.8 * request.x.norm(dim=-1, keepdim=True))


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 100, (n,), generator=generator).tolist() for n in lengths]


def assert_same(found: Decoded, expected: Decoded) -> None:
    assert found.token_ids == expected.token_ids
    for name in ("token_logp", "entropy"):
        for mine, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), atol=1e-5, rtol=1e-5)
    for name in ("site", "row", "position", "feature"):
        assert torch.equal(found.edits.columns[name], expected.edits.columns[name])
    for name in ("coefficient", "x_norm", "delta_norm"):
        torch.testing.assert_close(found.edits.columns[name], expected.edits.columns[name], atol=1e-5, rtol=1e-5)


def check(
    model: LanguageModel,
    sites: Sequence[str] = ("resid_post.1",),
    *,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = 6,
    cache: PromptCache | None = None,
) -> None:
    """Copies are what rows of their own are."""
    config = DecodeConfig(max_new_tokens=new_tokens, temperature=1.0, seed=3, stop=tuple("aeiou13579"), batch_size=9)
    prompts = prompts_of(lengths)
    together = decode(model, prompts, config, Apart(model, sites), repeats=COPIES, prompt_cache=cache)
    each = [prompt for prompt in prompts for _ in range(COPIES)]
    alone = decode(
        model, each, config, Apart(model, sites), samples=together.sample, branches=together.branch
    )  # batches of 9 rows, whatever prompt they have
    assert_same(together, alone)
    assert len(set(map(tuple, alone.token_logp[:COPIES]))) == COPIES, "all copies are alike, so nothing is checked"
    if new_tokens > 1:
        assert len(set(map(len, alone.token_ids))) > 1, "no row ends before the others"


@contextmanager
def fed(model: LanguageModel, layer: int) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every call of a layer's MLP."""
    seen: list[tuple[int, int]] = []
    mlp = model.layout.layers[layer].mlp_branch
    assert mlp is not None
    handle = mlp.register_forward_hook(lambda _m, _a, output: seen.append(tuple(output.shape[:2])))  # type: ignore[func-returns-value]
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("sites", SITES, ids="+".join)
def test_copies_are_rows_of_their_own(any_tiny: LanguageModel, sites: tuple[str, ...]) -> None:
    assert can_run_from(any_tiny, first_edited_layer(Apart(any_tiny, sites).sites), "copies")
    check(any_tiny, sites)


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9)], ids=["padded", "one length"])
def test_attention_without_a_kernel(any_tiny: LanguageModel, lengths: tuple[int, ...]) -> None:
    """Its masks are added to scores, and none is made where everything is seen."""
    before = any_tiny.hf.config._attn_implementation
    any_tiny.hf.set_attn_implementation("eager")
    try:
        assert can_run_from(any_tiny, 2, "copies")
        check(any_tiny, lengths=lengths, cache=PromptCache(any_tiny))
    finally:
        any_tiny.hf.set_attn_implementation(before)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9), (1, 1)], ids=["padded", "one length", "one token"])
def test_answers_of_one_token(any_tiny: LanguageModel, lengths: tuple[int, ...], cached: bool) -> None:
    check(any_tiny, lengths=lengths, new_tokens=1, cache=PromptCache(any_tiny) if cached else None)


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9)], ids=["padded", "one length"])
def test_longer_answers_from_kept_prompts(any_tiny: LanguageModel, lengths: tuple[int, ...]) -> None:
    check(any_tiny, lengths=lengths, cache=PromptCache(any_tiny))


@pytest.mark.parametrize("positions", ["all", "prompt", "2:9"])
def test_prompts_that_are_edited_too(any_tiny: LanguageModel, positions: str) -> None:
    """The first copy's edits shape the prefill of all, which the unshared path must be made to do."""
    config = DecodeConfig(max_new_tokens=4, temperature=1.0, stop_at_eos=False)
    prompts, sites = prompts_of(LENGTHS), ("resid_mid.1",)
    shared = decode(any_tiny, prompts, config, Apart(any_tiny, sites, positions), repeats=COPIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "MOST_COPIES", 1)
        assert_same(shared, decode(any_tiny, prompts, config, Apart(any_tiny, sites, positions), repeats=COPIES))


def test_what_lies_below_the_edits_is_fed_once_per_prompt(any_tiny: LanguageModel) -> None:
    config, prompts = DecodeConfig(max_new_tokens=1), prompts_of((9, 9))
    cache, source = PromptCache(any_tiny), Apart(any_tiny, ("resid_post.1",))
    decode(any_tiny, prompts, config, source, repeats=COPIES, prompt_cache=cache)
    with fed(any_tiny, 1) as below, fed(any_tiny, 2) as above:
        decode(any_tiny, prompts, config, source, repeats=COPIES, prompt_cache=cache)
    assert below == [(2, 1)]
    assert above == [(2, COPIES)]
    with fed(any_tiny, any_tiny.n_layers - 1) as last:
        decode(any_tiny, prompts, config, repeats=COPIES, prompt_cache=cache)
    assert last == [(2, 1)]


def test_a_model_whose_copies_cannot_part_is_fed_them_one_by_one(
    any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KeyError("attention_mask")

    monkeypatch.setattr(upper_layers._CopyMasks, "replace", refuse)
    monkeypatch.setattr(upper_layers, "_works", {})
    check(any_tiny)
    assert upper_layers._works[any_tiny.hf] == {("copies", 2, "sdpa", "float32"): False}


def test_too_little_memory_says_nothing_of_a_model(any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(upper_layers, "_works", {})
    with monkeypatch.context() as patch:
        patch.setattr(upper_layers._CopyMasks, "replace", full)
        with pytest.raises(torch.OutOfMemoryError):
            can_run_from(any_tiny, 2, "copies")
    assert can_run_from(any_tiny, 2, "copies")


@torch.no_grad()
def check_starting(model: LanguageModel, layer: int, lengths: Sequence[int], cached: bool) -> None:
    """Logits of a pass that starts at a layer are those of a whole one, with the same plain hook in both."""
    rows, batch = prompts_of(lengths), TokenBatch.pad(prompts_of(lengths))
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))

    def add(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -2:] += 4 * vector
        return output

    arguments: dict[str, Any] = {}
    if cached:
        cache = model.new_cache()
        model.forward(TokenBatch.pad([row[:-2] for row in rows]), cache=cache)
        batch = TokenBatch.full(torch.tensor([row[-2:] for row in rows]))
        arguments = {"cache": cache.frozen(), "past_lengths": torch.tensor([len(row) - 2 for row in rows])}
    below = capture(model, batch, [input_site(layer)], **arguments)[input_site(layer)]
    handle = model.layout.layers[layer - 1].module.register_forward_hook(add)
    try:
        expected = [model.hf(torch.tensor([row])).logits[0, -2:] for row in rows]
    finally:
        handle.remove()
    with fed(model, layer - 1) as run, starting_at(model, layer, below):
        handle = model.layout.layers[layer - 1].module.register_forward_hook(add)
        try:
            found = model.forward(batch, last=2, **arguments)
        finally:
            handle.remove()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert run == [], "the layers below ran"


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("layer", [1, 2, -1])
def test_a_pass_that_starts_at_a_layer(any_tiny: LanguageModel, layer: int, cached: bool) -> None:
    at = any_tiny.n_layers + 1 + layer if layer < 0 else layer
    assert can_run_from(any_tiny, at, "start")
    check_starting(any_tiny, at, (5, 18, 11, 3), cached)


def test_where_layers_cannot_be_left_out_the_whole_model_runs(
    any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = upper_layers.given_below
    monkeypatch.setattr(upper_layers, "given_below", lambda model, layer, x: given(model, layer, x.flip(-1)))
    monkeypatch.setattr(upper_layers, "_works", {})
    with pytest.raises(AssertionError, match="the layers below ran"):  # and no other complaint before it
        check_starting(any_tiny, 2, (5, 18, 11, 3), cached=True)
    assert upper_layers._works[any_tiny.hf] == {("start", 2, "sdpa", "float32"): False}
    monkeypatch.setattr(upper_layers, "can_run_from", lambda *_: True)  # a probe that is always content
    with pytest.raises(AssertionError, match="not close"):
        check_starting(any_tiny, 2, (5, 18, 11, 3), cached=True)


def test_a_model_is_tried_once_and_forgotten_with_it(any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.from_hf(copy.deepcopy(any_tiny.hf), any_tiny.tokenizer)
    before, calls = len(upper_layers._works), 0
    original = upper_layers._pushed

    def pushed(*arguments):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(upper_layers, "_pushed", pushed)
    for _ in range(2):
        assert can_run_from(model, 1, "start")
        assert can_run_from(model, 1, "copies")
    assert calls == 4
    model.hf.set_attn_implementation("eager")
    assert can_run_from(model, 1, "copies")
    assert calls == 6
    del model
    gc.collect()
    assert len(upper_layers._works) == before


def test_a_model_that_is_edited_at_the_moment_is_not_judged(
    any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upper_layers, "_works", {})
    far = RowDelta(torch.tensor([7]), torch.tensor([90]), torch.ones(1, any_tiny.d_model))
    with edited(any_tiny, {any_tiny.site("resid_post.1"): lambda _x: far}):
        assert not can_run_from(any_tiny, 2, "copies")
    assert can_run_from(any_tiny, 2, "copies")


def test_the_model_is_left_as_it_was(any_tiny: LanguageModel) -> None:
    def hooks() -> list[tuple[list[int], list[int]]]:
        return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in any_tiny.hf.modules()]

    before = hooks()
    check(any_tiny, ("resid_pre.0",))
    assert hooks() == before


def copies_see_each_other(patch: pytest.MonkeyPatch) -> None:
    original = upper_layers._CopyMasks.of_copies

    def of_copies(self, mask):  # type: ignore[no-untyped-def]
        self.visible = torch.ones_like(self.visible)
        return original(self, mask)

    patch.setattr(upper_layers._CopyMasks, "of_copies", of_copies)


def copies_see_their_own_token_only(patch: pytest.MonkeyPatch) -> None:
    original = upper_layers._CopyMasks.of_copies

    def of_copies(self, mask):  # type: ignore[no-untyped-def]
        made = original(self, mask).clone()
        made[..., : self.past] = False if made.dtype == torch.bool else torch.finfo(made.dtype).min
        return made

    patch.setattr(upper_layers._CopyMasks, "of_copies", of_copies)


def make_no_mask(patch: pytest.MonkeyPatch) -> None:
    """Padding is seen, and so are the copies."""
    patch.setattr(upper_layers._CopyMasks, "of_copies", lambda *_: None)


def keep_one_copy_for_all(patch: pytest.MonkeyPatch) -> None:
    original = GrowingLayer._unfolded

    def unfolded(self, storage, times, shared, own):  # type: ignore[no-untyped-def]
        if own:
            storage[:, :, shared : shared + times] = storage[:, :, shared : shared + 1].clone()
        return original(self, storage, times, shared, own)

    patch.setattr(GrowingLayer, "_unfolded", unfolded)


def interleave_copies(patch: pytest.MonkeyPatch) -> None:
    original = GrowingLayer._unfolded

    def unfolded(self, storage, times, shared, own):  # type: ignore[no-untyped-def]
        found = original(self, storage, times, shared, own)
        return found.unflatten(0, (-1, times)).transpose(0, 1).flatten(0, 1)

    patch.setattr(GrowingLayer, "_unfolded", unfolded)


def lose_what_lies_below(patch: pytest.MonkeyPatch) -> None:
    """The last prompt token is missing in the layers that were shared."""
    original = GrowingLayer.unfold

    def unfold(self, times, own, reserve):  # type: ignore[no-untyped-def]
        if not own:
            self.values[:, :, -1] = 0
        original(self, times, own, reserve)

    patch.setattr(GrowingLayer, "unfold", unfold)


def part_above_the_edits(patch: pytest.MonkeyPatch) -> None:
    original = first_edited_layer
    patch.setattr(running, "first_edited_layer", lambda sites: original(sites) + 1)


def edit_the_first_copy_only(patch: pytest.MonkeyPatch) -> None:
    original = SourceRunner.aim

    def aim(self, ids, *args, real=None, **kwargs):  # type: ignore[no-untyped-def]
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        original(self, ids, *args, real=first if real is None else real, **kwargs)

    patch.setattr(SourceRunner, "aim", aim)


def count_padding_as_held(patch: pytest.MonkeyPatch) -> None:
    original = RunningRows._forward
    patch.setattr(RunningRows, "_forward", lambda self, batch, held=None, last=1: original(self, batch, None, last))


class Mutation(NamedTuple):
    apply: Callable[[pytest.MonkeyPatch], None]
    noticed: bool
    """Whether trying the model notices it as well."""
    error: type[Exception] = AssertionError


MUTATIONS = [
    Mutation(copies_see_each_other, True),
    Mutation(copies_see_their_own_token_only, True),
    Mutation(make_no_mask, True, Exception),
    Mutation(keep_one_copy_for_all, False),
    Mutation(interleave_copies, False),
    Mutation(lose_what_lies_below, False),
    Mutation(part_above_the_edits, False, IndexError),
    Mutation(edit_the_first_copy_only, False, RuntimeError),
    Mutation(count_padding_as_held, False),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.apply.__name__)
def test_the_check_fails(mutation: Mutation, any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper_layers, "_works", {})
    with monkeypatch.context() as patch:
        mutation.apply(patch)
        assert can_run_from(any_tiny, 2, "copies") is not mutation.noticed
        patch.setattr(running, "can_run_from", lambda *_: True)
        with pytest.raises(mutation.error):
            check(any_tiny)


def test_token_statistics_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = CPU_BLOCK // 3  # several rows a block, and a block that is not full
    logits = torch.randn(8, vocabulary, generator=generator) * torch.logspace(-2, 2, 8)[:, None] + 30
    ids = torch.randint(vocabulary, (8,), generator=generator)
    logp = logits.double().log_softmax(-1)
    found, entropy = token_statistics(logits, ids)
    torch.testing.assert_close(found.double(), logp.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-6)
    assert [len(x) for x in token_statistics(logits[:0], ids[:0])] == [0, 0]


def test_divergences_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = 4 * torch.randn(3, 90_000, generator=generator) + 20
    which = torch.tensor([0, 0, 2, 1, 2, 2, 0])
    steered = plain[which] + torch.randn(7, 90_000, generator=generator) * torch.logspace(-3, 1, 7)[:, None]
    steered[4] = plain[2] - 300.0 * torch.arange(90_000).div(90_000)  # differences that overflow if exponentiated
    p, q = steered.double().log_softmax(-1), plain.double().log_softmax(-1)[which]
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.max() > 5
    torch.testing.assert_close(kl_divergence(steered, plain, which).double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(kl_divergence(steered, plain[which]).double(), expected, atol=2e-6, rtol=1e-6)
    one = kl_divergence(steered[:2], plain[:1])
    torch.testing.assert_close(one.double(), expected[:2], atol=2e-6, rtol=1e-6)


def check_closed_form(kl: Callable[..., torch.Tensor]) -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.125, 0.125]]), torch.full((1, 4), 0.25)
    found = kl(p.log() + 7, q.log() - 3)  # logits are known up to a constant
    assert float(found) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    q = torch.tensor([[0.125, 0.125, 0.5, 0.25]])
    assert float(kl(p.log(), q.log())) == pytest.approx((1 + 0.25 - 0.25 - 0.125) * math.log(2), abs=1e-6)
    assert float(kl(p.log(), p.log() + 1)) == pytest.approx(0, abs=1e-6)
    coin = torch.tensor([[0.25, 0.75]]).log()  # against a fair one: log 2 − H
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(kl(coin, torch.zeros(1, 2))) == pytest.approx(math.log(2) - entropy, abs=1e-6)


def test_divergences_in_closed_form() -> None:
    check_closed_form(kl_divergence)


def test_divergences_with_tokens_that_are_impossible() -> None:
    certain, fair = torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)
    assert float(kl_divergence(certain, fair)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(kl_divergence(certain, certain)) == 0
    assert float(kl_divergence(fair, certain)) == math.inf


def statistics_on(device: str) -> None:
    logits = torch.zeros(4, 50, device=device)
    token_statistics(logits, torch.zeros(4, dtype=torch.long, device=device))
    kl_divergence(logits, logits[:1])


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device `meta` have no values: whoever asks for one fails."""
    statistics_on("meta")
    asking: Callable[..., torch.Tensor] = lambda w, d: w.sum(-1) if d.isnan().any() else d.sum(-1)  # noqa: E731
    monkeypatch.setattr(token_statistics_module, "_weighted_sums", asking)  # mutation
    with pytest.raises((RuntimeError, NotImplementedError)):
        statistics_on("meta")


def test_sums_with_impossible_tokens_are_the_same_on_every_device() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logits[1:4, ::3] = -torch.inf
    weights, distance = logits.softmax(-1), logits - logits.amax(-1, keepdim=True)
    expected = torch.where(weights > 0, weights.double() * distance.double(), 0).sum(-1)
    for device in ("cpu", "another"):
        w = weights.clone().as_subclass(_Elsewhere if device == "another" else torch.Tensor)
        found = token_statistics_module._weighted_sums(w, distance.clone()).as_subclass(torch.Tensor)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


class _Elsewhere(torch.Tensor):
    """A tensor that says it is not on the CPU."""

    device = torch.device("meta")  # type: ignore[assignment]


def test_divergences_of_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(AssertionError, match="6 rows cannot be compared with 3"):
        kl_divergence(torch.zeros(6, 4), torch.zeros(3, 4))


def forget_the_normaliser(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    logp = p.log_softmax(-1)
    return (logp.exp() * (logp - q)).sum(-1)


def swap_the_sides(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return kl_divergence(q, p)


@pytest.mark.parametrize("mistake", [forget_the_normaliser, swap_the_sides], ids=lambda f: f.__name__)
def test_the_closed_form_can_fail(mistake: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_closed_form(mistake)
