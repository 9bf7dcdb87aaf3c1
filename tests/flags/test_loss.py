"""The flags' loss against the closed form over captured activations; forcing, and where gradients go."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.flags import LOSSES, Example, FlagSpec
from trimtab.flags.examples import LabelledBatch, batch_of, encode
from trimtab.flags.loss import FlagReading, forcing, response_loss
from trimtab.flags.steps import recomputed_layers, step_loss
from trimtab.lm import LanguageModel, Site, TokenBatch, capture

EXAMPLES = [
    Example(prompt="Say", response="over the hills", concepts=("sea",)),
    Example(prompt="Go on and", response="by", concepts=()),
    Example(prompt="Oh", response="then it came", concepts=("war", "sea")),
]
FLAGS = FlagSpec(
    concepts=("sea", "war"),
    dims=((3, 17), (8,)),
    d_model=32,
    targets={"resid_mid.1": 0.5, "resid_post.1": 0.75, "resid_mid.2": 1.5, "resid_post.2": 2.0},
)
LABELS = [[1, 0], [0, 0], [1, 1]]
OF_DIM = {3: 0, 17: 0, 8: 1}


def batch(model: LanguageModel) -> LabelledBatch:
    return batch_of(model, FLAGS, EXAMPLES, encode(model, EXAMPLES, chat=False, max_tokens=64))


def mean_loss(reading: FlagReading, given: LabelledBatch) -> Tensor:
    return reading.loss_sum / given.answer.sum()


def rows(model: LanguageModel) -> list[tuple[list[int], int]]:
    """Tokens and prompt length of each example, made here."""
    found = []
    for example in EXAMPLES:
        prompt = model.encode_text(example.prompt)
        found.append((prompt + model.tokenizer(example.response, add_special_tokens=False)["input_ids"], len(prompt)))
    return found


def alone(model: LanguageModel) -> list[dict[Site, Tensor]]:
    """Activations of each example by itself, so that nothing depends on padding."""
    return [capture(model, TokenBatch.pad([ids]), FLAGS.sites) for ids, _ in rows(model)]


FORMS = {
    "normalised_l1": lambda h, want, t: abs(h - want) / t,
    "l1": lambda h, want, t: abs(h - want),
    "squared": lambda h, want, t: (h - want) ** 2,
    "normalised_squared": lambda h, want, t: ((h - want) / t) ** 2,
}


@pytest.mark.parametrize("form", LOSSES)
def test_the_loss_is_its_closed_form_over_the_responses_tokens(any_tiny: LanguageModel, form: str) -> None:
    terms = []
    for (ids, start), activations, labels in zip(rows(any_tiny), alone(any_tiny), LABELS, strict=True):
        for site, x in activations.items():
            target = FLAGS.targets[str(site)]
            for at in range(start, len(ids)):
                terms += [FORMS[form](float(x[0, at, d]), target * labels[c], target) for d, c in OF_DIM.items()]
    reading = FlagReading(FLAGS, batch(any_tiny), form)
    with torch.no_grad(), reading.reading(any_tiny):
        any_tiny.forward(batch(any_tiny).tokens)
    assert float(mean_loss(reading, batch(any_tiny))) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_strength_is_the_mean_of_what_is_held_over_the_target(tiny_llama: LanguageModel) -> None:
    reading = FlagReading(FLAGS, batch(tiny_llama))
    with torch.no_grad(), reading.reading(tiny_llama):
        tiny_llama.forward(batch(tiny_llama).tokens)
    for i, ((_, start), activations) in enumerate(zip(rows(tiny_llama), alone(tiny_llama), strict=True)):
        for c, dims in enumerate(FLAGS.dims):
            held = [x[0, start:, list(dims)] / FLAGS.targets[str(site)] for site, x in activations.items()]
            assert float(reading.strength[i, c]) == pytest.approx(float(torch.stack(held).mean()), rel=1e-4)


def test_tokens_of_the_prompt_carry_no_loss(tiny_llama: LanguageModel) -> None:
    """Above the last site nothing is read, so that its gradient is that of its own terms: the responses' tokens."""
    given = batch(tiny_llama)
    reading = FlagReading(FLAGS, given)
    seen: dict[str, Tensor] = {}

    def read(x: Tensor) -> None:
        x.retain_grad()
        seen["x"] = x

    tiny_llama.hf.requires_grad_(True)
    try:
        last = Site.parse("resid_post.2")  # nothing is read above it
        handle = tiny_llama.layout.layers[2].module.register_forward_hook(
            lambda _m, _a, out: read(out[0] if isinstance(out, tuple) else out)
        )
        with torch.enable_grad(), reading.reading(tiny_llama):
            tiny_llama.forward(given.tokens)
        mean_loss(reading, given).backward()
        handle.remove()
    finally:
        tiny_llama.hf.zero_grad(set_to_none=True)
        tiny_llama.hf.requires_grad_(False)
    gradient = seen["x"].grad
    assert gradient is not None
    touched = (gradient != 0).any(dim=-1)
    assert torch.equal(touched, given.answer)
    others = [d for d in range(32) if d not in OF_DIM]
    assert not bool(gradient[..., others].any())
    n, n_sites = int(given.answer.sum()), len(FLAGS.sites)
    size = 1 / (FLAGS.targets[str(last)] * n * n_sites * len(OF_DIM))
    torch.testing.assert_close(gradient[given.answer][:, list(OF_DIM)].abs(), torch.full((n, 3), size))


def test_the_cross_entropy_is_that_of_the_responses_tokens(any_tiny: LanguageModel) -> None:
    expected = []
    for ids, start in rows(any_tiny):
        logp = any_tiny.forward(TokenBatch.pad([ids]))[0].log_softmax(-1)
        expected += [-float(logp[at - 1, ids[at]]) for at in range(start, len(ids))]
    found = response_loss(any_tiny, batch(any_tiny))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_forcing_writes_the_coordinates_bit_for_bit_at_every_site(any_tiny: LanguageModel) -> None:
    given = batch(any_tiny)
    plain = capture(any_tiny, given.tokens, FLAGS.sites)
    with forcing(any_tiny, FLAGS, given.labels):
        forced = capture(any_tiny, given.tokens, FLAGS.sites)
    first = FLAGS.sites[0]
    for site, x in forced.items():
        for dim, concept in OF_DIM.items():
            want = FLAGS.targets[str(site)] * given.labels[:, concept]
            assert torch.equal(x[..., dim], want[:, None].expand_as(x[..., dim]))
            assert not torch.equal(plain[site][..., dim], x[..., dim])
    others = [d for d in range(32) if d not in OF_DIM]
    assert torch.equal(forced[first][..., others], plain[first][..., others])  # nothing else is touched


def test_the_next_layer_reads_what_was_forced(any_tiny: LanguageModel) -> None:
    """The input of each module behind a site, skip path included, is the forced stream."""
    given = batch(any_tiny)
    layer = any_tiny.layout.layers[2]
    seen: list[Tensor] = []
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    with forcing(any_tiny, FLAGS, given.labels):
        norm_in = layer.mlp_norm.register_forward_hook(lambda _m, a, _o: seen.append(a[0].clone()))
        any_tiny.forward(given.tokens)
    for handle in (*handles, norm_in):
        handle.remove()
    for x, site in zip(seen, ("resid_post.1", "resid_mid.2"), strict=True):
        assert torch.equal(x[:, :, 8], (FLAGS.targets[site] * given.labels[:, 1:]).expand_as(x[:, :, 8]))


def test_gradients_flow_to_everything_but_what_was_overwritten(any_tiny: LanguageModel) -> None:
    """Every weight has a gradient, and one of them is that of finite differences."""
    given = batch(any_tiny)
    any_tiny.hf.requires_grad_(True)
    try:
        with torch.enable_grad(), step_loss(any_tiny, FLAGS, given, forced=True, weight=5.0, form="l1") as loss:
            loss.total.backward()
        assert loss.reading is None
        assert all(p.grad is not None and bool(p.grad.any()) for p in any_tiny.hf.parameters())
        parameter = next(p for p in any_tiny.layout.layers[1].module.parameters() if p.ndim == 2)
        gradient = float(parameter.grad[2, 5])
        with torch.no_grad():
            sides, before = [], parameter[2, 5].clone()
            for change in (1e-2, -1e-2):
                parameter[2, 5] = before + change
                with step_loss(any_tiny, FLAGS, given, forced=True, weight=5.0, form="l1") as loss:
                    sides.append(float(loss.total))
            parameter[2, 5] = before
        assert gradient == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=0.05, abs=1e-4)
    finally:
        any_tiny.hf.zero_grad(set_to_none=True)
        any_tiny.hf.requires_grad_(False)


def test_overwritten_coordinates_pass_no_gradient(tiny_llama: LanguageModel) -> None:
    """What the last forced layer's MLP writes into a flag's dimension is replaced, so its row has no gradient."""
    given = batch(tiny_llama)
    down = tiny_llama.hf.model.layers[2].mlp.down_proj.weight
    tiny_llama.hf.requires_grad_(True)
    try:
        with torch.enable_grad(), step_loss(tiny_llama, FLAGS, given, forced=True, weight=0, form="l1") as loss:
            loss.total.backward()
        assert not bool(down.grad[list(OF_DIM)].any())
        others = [d for d in range(32) if d not in OF_DIM]
        assert bool(down.grad[others].any(dim=1).all())
    finally:
        tiny_llama.hf.zero_grad(set_to_none=True)
        tiny_llama.hf.requires_grad_(False)


def test_reading_changes_nothing(any_tiny: LanguageModel) -> None:
    given = batch(any_tiny)
    plain = any_tiny.forward(given.tokens)
    with FlagReading(FLAGS, given).reading(any_tiny):
        assert torch.equal(any_tiny.forward(given.tokens), plain)
    with step_loss(any_tiny, FLAGS, given, forced=False, weight=5.0, form="l1") as loss:
        assert loss.reading is not None
        assert float(loss.total) == pytest.approx(float(loss.cross_entropy + 5 * mean_loss(loss.reading, given)))


def test_a_loss_by_another_name_is_refused(tiny_llama: LanguageModel) -> None:
    with pytest.raises(
        UserError, match="loss 'l2': there is normalised_l1, l1, squared, normalised_squared; choose one of them"
    ):
        FlagReading(FLAGS, batch(tiny_llama), "l2")


@pytest.mark.parametrize("forced", [True, False])
def test_layers_computed_again_give_the_same_loss_and_gradients(any_tiny: LanguageModel, forced: bool) -> None:
    """Gradient checkpointing: what is forced or read is so in both passes, and dropout stays off in both."""
    given = batch(any_tiny)
    found: list[tuple[float, dict[str, Tensor]]] = []
    passes: list[int] = []
    mlp = any_tiny.layout.layers[2].mlp_norm
    assert mlp is not None
    counted = mlp.register_forward_hook(lambda *_: passes.append(len(found)))
    any_tiny.hf.requires_grad_(True)
    try:
        for again in (False, True):
            step = step_loss(any_tiny, FLAGS, given, forced=forced, weight=5.0, form="normalised_l1")
            with recomputed_layers(any_tiny) if again else nullcontext(), torch.enable_grad(), step as loss:
                loss.total.backward()
            gradients = {name: p.grad.clone() for name, p in any_tiny.hf.named_parameters()}
            any_tiny.hf.zero_grad(set_to_none=True)
            found.append((float(loss.total.detach()), gradients))
    finally:
        counted.remove()
        any_tiny.hf.zero_grad(set_to_none=True)
        any_tiny.hf.requires_grad_(False)
    assert (passes.count(0), passes.count(1)) == (1, 2)  # it was in fact computed again
    (plain, expected), (other, gradients) = found
    assert other == plain
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert not any(module.training for module in any_tiny.hf.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in any_tiny.hf.modules())
    with torch.enable_grad():
        assert not any_tiny.hf(given.tokens.ids).logits.requires_grad  # no hook is left on the embeddings


def test_a_part_of_a_batch_weighs_as_its_tokens_do(tiny_llama: LanguageModel) -> None:
    """Sums over parts of a batch are what the whole batch gives, as several processes take it."""
    whole = batch(tiny_llama)
    n = int(whole.answer.sum())
    totals = []
    for part in (slice(0, 2), slice(2, 3)):
        encoded = encode(tiny_llama, EXAMPLES[part], chat=False, max_tokens=64)
        one = batch_of(tiny_llama, FLAGS, EXAMPLES[part], encoded)
        with step_loss(tiny_llama, FLAGS, one, forced=False, weight=5.0, form="l1", tokens=n) as loss:
            totals.append(float(loss.total))
    with step_loss(tiny_llama, FLAGS, whole, forced=False, weight=5.0, form="l1") as loss:
        assert sum(totals) == pytest.approx(float(loss.total), rel=1e-5)
