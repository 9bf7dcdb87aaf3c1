"""The last-token scorer against a full forward pass per edit, without a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.lm.graph_stand_in import StandIn, stand_in_for_graphs
from tests.lm.nothing_asked import AsksError, NothingAsked, as_captured, take_a_cards_branches
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, RowDelta, Site, captured, edited, upper_layers
from trimtab.lm.cache import FrozenLayer
from trimtab.lm.captured import Captured
from trimtab.selection import EntropyChange, LastTokenScorer, prefix, score_features
from trimtab.selection.criterion import ScoringTarget

PREFIX = [7, 30, 12, 9, 41, 8, 77, 65, 14, 22, 31, 13, 90, 55, 18, 27, 33, 21, 80, 11]
"""20 tokens: more than twice the window of the Gemma-3 fixture."""


def deltas(count: int, d: int, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(count, d, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def full_forward(model: LanguageModel, layer: int, ids: list[int], delta: Tensor) -> Tensor:
    """Oracle: the whole prompt through the whole model, one edit at a time, by a plain PyTorch hook after a layer."""

    rows = iter(delta)

    def hook(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[0, -1] += next(rows)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    logits = []
    handle = model.layout.layers[layer].module.register_forward_hook(hook)
    try:
        for _ in range(len(delta)):
            logits.append(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1])
    finally:
        handle.remove()
    return torch.stack(logits)


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_a_full_forward_per_edit(any_tiny: LanguageModel, layer: int, length: int) -> None:
    delta = deltas(33, any_tiny.d_model)  # one more than a sequence holds: the last sequence is padded
    expected = full_forward(any_tiny, layer, PREFIX[:length], delta)
    scorer = LastTokenScorer(any_tiny, f"resid_post.{layer}", PREFIX[:length])
    torch.testing.assert_close(scorer.logits(delta), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.logits(delta[:3]), expected[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_every_residual_site_equals_a_full_forward(any_tiny: LanguageModel, kind: str) -> None:
    delta = deltas(5, any_tiny.d_model)
    scorer = LastTokenScorer(any_tiny, Site(kind, 2), PREFIX)
    expected = []
    for row in delta:
        place = RowDelta(torch.tensor([0]), torch.tensor([len(PREFIX) - 1]), row[None])
        with edited(any_tiny, {Site(kind, 2): lambda _x, place=place: place}), torch.no_grad():
            expected.append(any_tiny.hf(torch.tensor([PREFIX]), use_cache=False).logits[0, -1])
    torch.testing.assert_close(scorer.logits(delta), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attn_q", "attn_k", "attn_v", "attn_z"])
def test_one_attention_head_equals_a_full_forward(any_tiny: LanguageModel, kind: str) -> None:
    """By a plain hook on the projection: behind that of queries, keys and values, before that of outputs."""
    attention = any_tiny.layout.layers[2].attention
    assert attention is not None
    gpt2, width, ids = any_tiny.name == "tiny-gpt2", attention.head_dim, torch.tensor([PREFIX])
    delta = deltas(5, width)
    module: torch.nn.Module = any_tiny.hf.get_submodule(
        ("transformer.h.2.attn." if gpt2 else "model.layers.2.self_attn.")
        + (("c_proj" if gpt2 else "o_proj") if kind == "attn_z" else "c_attn" if gpt2 else f"{kind[-1]}_proj")
    )
    start = 32 * "qkv".index(kind[-1]) if gpt2 and kind != "attn_z" else 0  # head 0
    expected = []
    for row in delta:

        def change(x: Tensor, row: Tensor = row) -> Tensor:
            x = x.clone()
            x[0, -1, start : start + width] += row
            return x

        if kind == "attn_z":
            handle = module.register_forward_pre_hook(lambda _m, args, change=change: (change(args[0]),))
        else:
            handle = module.register_forward_hook(lambda _m, _a, out, change=change: change(out))
        with torch.no_grad():
            expected.append(any_tiny.hf(ids, use_cache=False).logits[0, -1])
        handle.remove()
    scorer = LastTokenScorer(any_tiny, Site(kind, 2, 0), PREFIX)
    torch.testing.assert_close(scorer.logits(delta), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_a_site_above_all_layers_needs_only_norm_and_head(any_tiny: LanguageModel) -> None:
    last = any_tiny.n_layers - 1
    delta = deltas(4, any_tiny.d_model)
    scorer = LastTokenScorer(any_tiny, f"resid_post.{last}", PREFIX[:4])
    expected = full_forward(any_tiny, last, PREFIX[:4], delta)
    torch.testing.assert_close(scorer.logits(delta), expected, rtol=1e-4, atol=1e-4)


def test_eager_attention_is_followed_too(any_tiny: LanguageModel) -> None:
    hf = copy.deepcopy(any_tiny.hf)
    hf.set_attn_implementation("eager")
    model = LanguageModel.from_hf(hf, any_tiny.tokenizer)
    delta = deltas(6, model.d_model)
    expected = full_forward(any_tiny, 1, PREFIX, delta)
    scorer = LastTokenScorer(model, "resid_post.1", PREFIX)
    torch.testing.assert_close(scorer.logits(delta), expected, rtol=1e-4, atol=1e-4)


def test_soft_capped_logits_are_followed(tiny_gemma3: LanguageModel) -> None:
    hf = copy.deepcopy(tiny_gemma3.hf)
    hf.config.final_logit_softcapping = 2.0
    model = LanguageModel.from_hf(hf, tiny_gemma3.tokenizer)
    delta = deltas(3, model.d_model)
    expected = full_forward(model, 1, PREFIX, delta)
    assert float(expected.abs().max()) < 2
    scorer = LastTokenScorer(model, "resid_post.1", PREFIX)
    torch.testing.assert_close(scorer.logits(delta), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_model_is_scored_in_its_own_precision(tiny_llama: LanguageModel) -> None:
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf).bfloat16(), tiny_llama.tokenizer)
    scorer = LastTokenScorer(model, "resid_post.1", PREFIX)
    delta = deltas(4, model.d_model)
    found = scorer.logits(delta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full_forward(model, 1, PREFIX, delta).float(), rtol=0.05, atol=0.15)


@pytest.mark.parametrize("batch_size", [7, 512])
@pytest.mark.parametrize("block_bytes", [5 * 160 * 4, None])
def test_batches_and_blocks_do_not_change_scores(
    any_tiny: LanguageModel, batch_size: int, block_bytes: int | None
) -> None:
    directions = torch.nn.functional.normalize(deltas(35, any_tiny.d_model), dim=-1)
    coefficients = torch.linspace(-20, 20, 35)
    reducers = {
        "top": lambda block: block.mean_top_log_prob(3),
        "kl": lambda block: block.kl(),
        "tokens": lambda block: block.top_tokens(2),
        "row": lambda block: block.rows,
    }
    one_by_one = LastTokenScorer(any_tiny, "resid_post.1", PREFIX, batch_size=1)
    expected = one_by_one.score(directions, coefficients, reducers)
    seen: list[int] = []
    scorer = LastTokenScorer(any_tiny, "resid_post.1", PREFIX, batch_size=batch_size, block_bytes=block_bytes)
    found = scorer.score(directions, coefficients, reducers, progress=seen.append)
    for name in ("top", "kl"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
    assert torch.equal(found["tokens"], expected["tokens"])
    assert found["row"].tolist() == list(range(35))
    assert sum(seen) == 35


@pytest.mark.parametrize("way", ["start", "copies"])
def test_a_model_that_cannot_be_run_from_a_layer_is_scored_all_the_same(
    any_tiny: LanguageModel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, or one edit in a sequence."""
    known = {(way, layer, "sdpa", "float32"): False for layer in range(any_tiny.n_layers + 1)}
    monkeypatch.setattr(upper_layers, "_works", {any_tiny.hf: known})
    delta = deltas(33, any_tiny.d_model)
    expected = full_forward(any_tiny, 1, PREFIX, delta)
    found = LastTokenScorer(any_tiny, "resid_post.1", PREFIX).logits(delta)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_earlier_tokens_may_be_edited(any_tiny: LanguageModel) -> None:
    delta, site = deltas(3, any_tiny.d_model), Site("resid_post", 1)
    past = RowDelta(torch.zeros(2, dtype=torch.long), torch.tensor([3, 11]), deltas(2, any_tiny.d_model, scale=2.0))
    scorer = LastTokenScorer(any_tiny, site, PREFIX, past={site: lambda _x: past})
    with edited(any_tiny, {site: lambda _x: past}):
        expected = full_forward(any_tiny, 1, PREFIX, delta)
    torch.testing.assert_close(scorer.logits(delta), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scorer.logits(delta), LastTokenScorer(any_tiny, site, PREFIX).logits(delta), atol=1e-2)


def grow_the_prefix(patch: pytest.MonkeyPatch) -> None:
    """A pass leaves what it fed in the cache."""
    original = FrozenLayer.update

    def update(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        keys, values = original(self, *args, **kwargs)
        self.keys, self.values, self.length = keys[:1], values[:1], keys.shape[2]
        return keys, values

    patch.setattr(FrozenLayer, "update", update)


def feed_the_last_token_one_place_on(patch: pytest.MonkeyPatch) -> None:
    original = LanguageModel.forward_arguments

    def forward_arguments(self, batch, **kwargs):  # type: ignore[no-untyped-def]
        found = original(self, batch, **kwargs)
        return {**found, "position_ids": found["position_ids"] + (batch.ids.shape[1] == 1)}

    patch.setattr(LanguageModel, "forward_arguments", forward_arguments)


def let_edits_see_each_other(patch: pytest.MonkeyPatch) -> None:
    original = upper_layers._CopyMasks.of_copies

    def of_copies(self, mask):  # type: ignore[no-untyped-def]
        self.visible = torch.ones_like(self.visible)
        return original(self, mask)

    patch.setattr(upper_layers._CopyMasks, "of_copies", of_copies)


def score_one_edit_for_all(patch: pytest.MonkeyPatch) -> None:
    original = prefix.RowDelta
    patch.setattr(prefix, "RowDelta", lambda batch, time, delta: original(batch, time * 0, delta))


@pytest.mark.parametrize(
    "mistake",
    [grow_the_prefix, feed_the_last_token_one_place_on, let_edits_see_each_other, score_one_edit_for_all],
    ids=lambda mistake: mistake.__name__,
)
def test_the_check_fails(
    mistake: Callable[[pytest.MonkeyPatch], None], any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_equals_a_full_forward_per_edit(any_tiny, 2, 20)  # has tried the model
    mistake(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, UserError)):
        test_equals_a_full_forward_per_edit(any_tiny, 2, 20)


def hooks(model: LanguageModel) -> list[int]:
    """All hooks on a model; transformers leaves some of its own once hidden states have been asked for."""
    return [
        key
        for m in model.hf.modules()
        for kind in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        for key in kind
    ]


def test_scoring_leaves_the_model_and_the_prefix_as_they_were(any_tiny: LanguageModel) -> None:
    hf = any_tiny.hf
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    config, hooked = hf.config.to_dict(), hooks(any_tiny)
    with torch.no_grad():
        logits = hf(torch.tensor([PREFIX])).logits
    scorer = LastTokenScorer(any_tiny, "resid_mid.1", PREFIX)
    directions, coefficients = deltas(40, any_tiny.d_model), torch.ones(40)
    reducers = {"top": lambda block: block.mean_top_log_prob(1)}
    first = scorer.score(directions, coefficients, reducers)["top"]
    second = scorer.score(directions, coefficients, reducers)["top"]
    assert torch.equal(first, second)
    after = hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert hooks(any_tiny) == hooked
    assert hf.config.to_dict() == config
    assert hf.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in hf.parameters())
    with torch.no_grad():
        assert torch.equal(hf(torch.tensor([PREFIX])).logits, logits)


def test_base_is_the_models_own_answer(any_tiny: LanguageModel) -> None:
    scorer = LastTokenScorer(any_tiny, "resid_post.1", PREFIX)
    with torch.no_grad():
        expected = any_tiny.hf(torch.tensor([PREFIX]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(scorer.base.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.base.probs.sum(), torch.tensor(1.0))


def test_a_model_that_does_more_than_norm_and_head_is_refused(tiny_llama: LanguageModel) -> None:
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "scaled")

    def scale(_module: object, _args: object, output: dict[str, Tensor]) -> object:
        output["logits"] = output["logits"] * 3
        return output

    model.hf.register_forward_hook(scale)
    with pytest.raises(UserError, match=r"model scaled: its logits are not final norm and head of its residual"):
        LastTokenScorer(model, "resid_post.1", PREFIX)


def test_hooks_are_gone_after_an_error(tiny_llama: LanguageModel) -> None:
    hooked = hooks(tiny_llama)
    with pytest.raises(IndexError):
        LastTokenScorer(tiny_llama, "resid_post.1", [10**6])
    assert hooks(tiny_llama) == hooked


@pytest.mark.parametrize(
    ("site", "ids", "batch_size", "message"),
    [
        ("resid_post.4", PREFIX, 8, r"site resid_post\.4: tiny-llama has layers 0 to 3"),
        ("attn_z.1", PREFIX, 8, r"site attn_z\.1: features of all heads at once .*; name a head, like attn_z\.1\.0"),
        ("resid_post.1", [], 8, r"the prefix: it is empty"),
        ("resid_post.1", [5] * 257, 8, r"the prefix: it has 257 tokens, tiny-llama takes 256"),
        ("resid_post.1", PREFIX, 0, r"batch size 0: it must be at least 1"),
    ],
)
def test_bad_input(tiny_llama: LanguageModel, site: str, ids: list[int], batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LastTokenScorer(tiny_llama, site, ids, batch_size=batch_size)


def test_directions_of_another_width(tiny_llama: LanguageModel) -> None:
    scorer = LastTokenScorer(tiny_llama, "resid_post.1", PREFIX)
    with pytest.raises(UserError, match=r"directions of width 31: site resid_post\.1 of tiny-llama has width 32"):
        scorer.score(torch.ones(2, 31), torch.ones(2), {})


@pytest.mark.real
def test_real_model_equals_a_full_forward(real_model: LanguageModel) -> None:
    ids = real_model.encode_text("From my experience,")
    delta = deltas(9, real_model.d_model, scale=20.0)
    scorer = LastTokenScorer(real_model, "resid_post.15", ids)
    expected = full_forward(real_model, 15, ids, delta).log_softmax(-1)
    torch.testing.assert_close(scorer.logits(delta).log_softmax(-1), expected, rtol=1e-4, atol=2e-4)
    unit = torch.nn.functional.normalize(delta, dim=-1)
    top = {"top": lambda block: block.mean_top_log_prob(1)}
    batched = scorer.score(unit, delta.norm(dim=-1), top)["top"]
    torch.testing.assert_close(batched, expected.amax(-1), rtol=0, atol=1e-4)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return stand_in_for_graphs(monkeypatch)


def check_batches_at_the_same_addresses(model: LanguageModel, site: str) -> None:
    """Six batches of one size and a smaller one, whose results are looked at when all are there."""
    delta = deltas(6 * 40 + 7, model.d_model)
    scorer = LastTokenScorer(model, site, PREFIX)
    found = [scorer.continuation.last_hidden(part) for part in delta.split(40)]
    fresh = [LastTokenScorer(model, site, PREFIX).continuation.last_hidden(part) for part in delta.split(40)]
    for mine, other in zip(found, fresh, strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)


@pytest.mark.parametrize("site", ["resid_pre.0", "resid_mid.1", "resid_post.2", "resid_post.3"])
def test_batches_of_one_size_are_one_graph(any_tiny: LanguageModel, site: str, graphs: list[StandIn]) -> None:
    check_batches_at_the_same_addresses(any_tiny, site)
    assert [graph.replays for graph in graphs] == [1 + 4]  # once to be tried beside a call


def put_each_batch_elsewhere(patch: pytest.MonkeyPatch) -> None:
    original = prefix.PrefixContinuation.last_hidden

    def last_hidden(self, delta, *more):  # type: ignore[no-untyped-def]
        if self._stack is not None:
            self._stack.delta = self._stack.delta.clone()
        return original(self, delta, *more)

    patch.setattr(prefix.PrefixContinuation, "last_hidden", last_hidden)


def hand_out_the_graphs_own_place(patch: pytest.MonkeyPatch) -> None:
    original = Captured.__call__

    def call(self, function, **how):  # type: ignore[no-untyped-def]
        found = original(self, function, **how)
        return self._found if self._graph is not None else found

    patch.setattr(Captured, "__call__", call)


@pytest.mark.parametrize("mistake", [put_each_batch_elsewhere, hand_out_the_graphs_own_place], ids=lambda f: f.__name__)
def test_batches_at_other_addresses_are_noticed(
    tiny_llama: LanguageModel,
    mistake: Callable[[pytest.MonkeyPatch], None],
    graphs: list[StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_batches_at_the_same_addresses(tiny_llama, "resid_post.1")


def test_a_hook_of_somebodys_sees_every_batch(tiny_llama: LanguageModel, graphs: list[StandIn]) -> None:
    model, seen = tiny_llama, list[int]()
    scorer, delta = LastTokenScorer(model, "resid_post.1", PREFIX), deltas(40, model.d_model)
    scorer.continuation.last_hidden(delta)  # has tried the model
    handle = model.layout.layers[2].module.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(6):
        scorer.continuation.last_hidden(delta)
    assert (len(seen), graphs) == (6, [])
    handle.remove()
    scorer.continuation.last_hidden(delta)
    assert len(graphs) == 1


def check_nothing_is_asked(model: LanguageModel) -> None:
    scorer, delta = LastTokenScorer(model, "resid_post.1", PREFIX), deltas(70, model.d_model)
    continuation = scorer.continuation
    continuation.last_hidden(delta)
    stack = continuation._stack
    assert stack is not None
    with torch.no_grad(), as_captured(), NothingAsked():
        continuation._hidden(stack, stack.delta)


def test_layers_above_ask_the_device_nothing(
    tiny_llama: LanguageModel, tiny_gemma3: LanguageModel, tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they can be captured. GPT-2 in `transformers` asks whether there is padding, but not in a capture.
    Mutation: ask for a size."""
    for model in (tiny_llama, tiny_gemma3, tiny_gpt2):
        check_nothing_is_asked(model)
    original = upper_layers._CopyMasks.of_copies

    def of_copies(self, mask):  # type: ignore[no-untyped-def]
        assert int(self.place.max()) == 0
        return original(self, mask)

    monkeypatch.setattr(upper_layers._CopyMasks, "of_copies", of_copies)
    with pytest.raises(AsksError):
        check_nothing_is_asked(tiny_llama)


@pytest.mark.gpu
@pytest.mark.parametrize("site", ["resid_pre.0", "resid_mid.1", "resid_post.2"])
def test_captured_layers_are_the_layers(any_tiny: LanguageModel, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    hf = copy.deepcopy(any_tiny.hf).cuda()
    model, graphs = LanguageModel(hf, any_tiny.tokenizer, "on the card"), list[object]()
    real = Captured._capture

    def capture(self: Captured, function: Callable[[], Tensor]) -> None:
        real(self, function)
        graphs.append(self._graph)

    monkeypatch.setattr(Captured, "_capture", capture)
    delta = deltas(6 * 40, model.d_model).cuda()
    scorer, plain = LastTokenScorer(model, site, PREFIX), LastTokenScorer(model, site, PREFIX)
    found = [scorer.continuation.last_hidden(part) for part in delta.split(40)]
    assert graphs
    assert None not in graphs
    monkeypatch.setattr(captured, "WARM", 10**9)
    for mine, part in zip(found, delta.split(40), strict=True):
        torch.testing.assert_close(mine, plain.continuation.last_hidden(part), atol=0, rtol=0)


REDUCERS: dict[str, Callable[..., Tensor]] = {
    "top": lambda block: block.mean_top_log_prob(1),
    "kl": lambda block: block.kl(),
    "entropy": lambda block: block.entropy - block.base.entropy,
    "rank": lambda block: block.rank(block.rows % 160),
    "row": lambda block: block.rows,
}


def check_a_batch_asks_nothing(model: LanguageModel, reducers: dict[str, Callable[..., Tensor]]) -> None:
    scorer = LastTokenScorer(model, "resid_post.1", PREFIX)
    directions = torch.nn.functional.normalize(deltas(70, model.d_model), dim=-1)
    scorer.score(directions, torch.ones(70), reducers)
    with torch.no_grad(), NothingAsked():
        scorer._reduced(0, directions, torch.ones(70), reducers, 0)


def test_a_batch_asks_the_device_nothing(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sums as they are made on a GPU. Mutation: fetch a score with each block."""
    take_a_cards_branches(monkeypatch)
    check_a_batch_asks_nothing(tiny_llama, REDUCERS)
    with pytest.raises(AsksError):
        check_a_batch_asks_nothing(
            tiny_llama, {"fetched": lambda block: block.normaliser / float(block.normaliser.max())}
        )


@contextmanager
def room_for(most: int, patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Memory for so many edits at once; how many were tried."""
    tried, original = list[int](), prefix.PrefixContinuation.last_hidden

    def last_hidden(self, delta, *more):  # type: ignore[no-untyped-def]
        tried.append(len(delta))
        if len(delta) > most:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, delta, *more)

    with patch.context() as context:
        context.setattr(prefix.PrefixContinuation, "last_hidden", last_hidden)
        yield tried


def test_batches_that_do_not_fit_are_halved(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directions = torch.nn.functional.normalize(deltas(35, tiny_llama.d_model), dim=-1)
    expected = LastTokenScorer(tiny_llama, "resid_post.1", PREFIX).score(directions, torch.ones(35), REDUCERS)
    scorer, done = LastTokenScorer(tiny_llama, "resid_post.1", PREFIX, batch_size=20), list[int]()
    with room_for(7, monkeypatch) as tried:
        found = scorer.score(directions, torch.ones(35), REDUCERS, progress=done.append)
        assert tried == [20, 10, *[5] * 7]
        assert done == [5] * 7
    said = capsys.readouterr().err
    assert said == "trimtab: note: 20 edits at once do not fit in the memory of cpu; going on with 5\n"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    with room_for(5, monkeypatch):
        scorer.score(directions, torch.ones(35), REDUCERS)
    assert capsys.readouterr().err == ""  # it is known now


def test_no_room_for_one_edit(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = LastTokenScorer(tiny_llama, "resid_post.1", PREFIX, batch_size=8)
    message = r"scoring at resid_post\.1 of tiny-llama: one edit does not fit in the memory of cpu; free memory there, "
    with room_for(0, monkeypatch) as tried, pytest.raises(UserError, match=message):
        scorer.score(deltas(9, tiny_llama.d_model), torch.ones(9), REDUCERS)
    assert tried == [8, 4, 2, 1]


def test_what_fits_is_remembered_by_the_next_prefix(
    tiny_llama: LanguageModel,
    make_rows: Callable[..., Dictionary],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Mutation: begin each prefix with the size that did not fit."""
    target = ScoringTarget(tiny_llama, make_rows(20), torch.arange(20))
    criteria = [EntropyChange(prefixes=("the tide", "and then"), dose=2.0, unit="absolute")]
    expected = score_features(target, "resid_post.1", criteria)
    with room_for(6, monkeypatch) as tried:
        found = score_features(target, "resid_post.1", criteria, batch_size=16)
    assert tried == [16, 8, *[4] * 10]
    assert capsys.readouterr().err.count("do not fit") == 1
    torch.testing.assert_close(found[0].score, expected[0].score, atol=1e-5, rtol=1e-5)
