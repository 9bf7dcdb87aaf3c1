"""Parts of an evaluation on models of which everything is known, and against slow references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_model import COPIES, FLAGS, OTHERS, loss_of_a_letter, planted_model
from toy_corpus import toy_examples

from trimtab.activations import as_documents, tokenise
from trimtab.errors import UserError
from trimtab.evaluation.documents import pack
from trimtab.flags import Example, FlagSpec
from trimtab.flags.evaluation import harvest, reliance
from trimtab.flags.evaluation.effects import concept_directions, effect_values, effects_result
from trimtab.flags.evaluation.erosion import ONLY, RANDOM, WHOLE, WITHOUT, erosion_result, probe_values
from trimtab.flags.evaluation.harvest import Harvest
from trimtab.flags.evaluation.measured import Moment, Part, Series, read_part, write_part
from trimtab.flags.evaluation.price import GeneralText, price_result, price_values
from trimtab.flags.evaluation.reading import reading_result, reading_values
from trimtab.flags.evaluation.reliance import ELSEWHERE, PAPER_TOKENS, THEMSELVES, reliance_result, reliance_values
from trimtab.flags.evaluation.reliance import FLAGS as CHANGED
from trimtab.flags.evaluation.texts import EvaluationTexts, LabelledTexts, evaluation_texts
from trimtab.flags.evaluation.unassigned import unassigned_dims
from trimtab.flags.examples import batch_of
from trimtab.flags.loss import FlagReading
from trimtab.lm import LanguageModel, capture
from trimtab.stats import Resamples

LAYERS = (0, 3)


def divided(model: LanguageModel, flags: FlagSpec = FLAGS, n: int = 60) -> EvaluationTexts:
    return evaluation_texts(model, flags, toy_examples(n), fit_items=40, items=30, chat=False, max_tokens=64)


def harvested(
    model: LanguageModel, texts: LabelledTexts, flags: FlagSpec = FLAGS, others: FlagSpec = OTHERS
) -> Harvest:
    return harvest.harvest(model, flags, others, texts, LAYERS, batch_size=7)


def moments(*steps: int, run: str = "forced", curriculum: str = "forced", tokens: int = 1000) -> list[Moment]:
    return [Moment(run=run, curriculum=curriculum, seed=0, step=s, tokens=s * tokens) for s in steps]


def resamples(texts: LabelledTexts) -> Resamples:
    return Resamples(texts.unit, n_resamples=200)


def test_activations_are_those_of_single_forward_passes(any_tiny: LanguageModel) -> None:
    """The last prompt token's, and the mean over the response's tokens, of padded batches."""
    flags = FlagSpec(
        concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_mid.1": 1, "resid_post.3": 1}
    )
    others = unassigned_dims(flags)
    examples = [
        *toy_examples(6),
        Example(prompt="A longer prompt than these", response="abcabcabcabc", concepts=["sea"]),
    ]
    texts = evaluation_texts(
        any_tiny, flags, [*examples, *toy_examples(60, seed=1)], fit_items=9, items=9, chat=False, max_tokens=64
    )
    for part in (texts.fitted, texts.reported):
        found = harvested(any_tiny, part, flags, others)
        for i, (ids, start) in enumerate(part.tokens):
            batch = batch_of(any_tiny, flags, part.examples[i : i + 1], part.tokens[i : i + 1])
            alone = capture(any_tiny, batch.tokens, ["resid_mid.1", "resid_post.0", "resid_post.3"])
            mid, low, top = (alone[any_tiny.site(name)][0] for name in ("resid_mid.1", "resid_post.0", "resid_post.3"))
            assert len(ids) == len(top)
            for layer, x in ((0, low), (3, top)):
                torch.testing.assert_close(found.residual[layer][0, i], x[start - 1], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found.residual[layer][1, i], x[start:].mean(0), rtol=1e-4, atol=1e-4)
            for values, spec in ((found.held, flags), (found.unassigned, others)):
                expected = torch.stack([mid[start - 1, spec.flat_dims], top[start - 1, spec.flat_dims]])
                torch.testing.assert_close(values[0, i], expected, rtol=1e-4, atol=1e-4)


def test_the_last_prompt_token_sees_nothing_of_the_response(any_tiny: LanguageModel) -> None:
    flags = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_post.3": 1})
    others = unassigned_dims(flags)
    texts = divided(any_tiny, flags).reported
    answered = [example for example in toy_examples(len(texts), seed=9)]
    other = tuple(
        Example(prompt=own.prompt, response=new.response, concepts=own.concepts)
        for own, new in zip(texts.examples, answered, strict=True)
    )
    tokens = tuple(
        own._replace(ids=[*own.ids[: own.prompt_length], *any_tiny.encode_text(new.response)])
        for own, new in zip(texts.tokens, other, strict=True)
    )
    before, after = (
        harvested(any_tiny, each, flags, others) for each in (texts, replace(texts, examples=other, tokens=tokens))
    )
    torch.testing.assert_close(before.held[0], after.held[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before.residual[3][0], after.residual[3][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.held[1], after.held[1], rtol=1e-2)


def test_reading_at_a_site_is_that_of_the_loss(tiny_llama: LanguageModel, flags: FlagSpec) -> None:
    texts, others = divided(tiny_llama, flags).reported, unassigned_dims(flags)
    values = reading_values(flags, others, harvested(tiny_llama, texts, flags, others))
    found = Part(values, 0.0).of(site="all", place="response", dims="flags").reshape(texts.labels.shape)
    batch = batch_of(tiny_llama, flags, texts.examples, texts.tokens)
    reading = FlagReading(flags, batch)
    with reading.reading(tiny_llama), torch.no_grad():
        tiny_llama.forward(batch.tokens, last=1)
    np.testing.assert_allclose(found, reading.strength.numpy(), rtol=1e-3, atol=1e-4)


def test_planted_flags_read_whole_in_responses_and_not_before(tiny_tokenizer) -> None:
    model = planted_model(tiny_tokenizer)
    texts = divided(model).reported
    part = Part(reading_values(FLAGS, OTHERS, harvested(model, texts)), 0.0)
    result = reading_result([Series(moments(1), [part])], texts, {"forced": FLAGS}, resamples(texts), seed=0)
    assert {row.site for row in result.sites} == {"all", *FLAGS.targets}
    for row in result.sites:
        expected = (1, 1) if row.place == "response" else (0.5, 0.5)
        assert (row.accuracy.estimate, row.auc.estimate) == expected, row
        assert row.unassigned.estimate == 0.5
        assert 0.2 < row.shuffled.estimate < 0.8
    assert [(row.concept, row.place, row.auc.estimate) for row in result.concepts] == [
        ("sea", "prompt", 0.5), ("war", "prompt", 0.5), ("sea", "response", 1), ("war", "response", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("copies", [False, True])
def test_probes_find_a_concept_exactly_where_it_is_planted(tiny_tokenizer, copies: bool) -> None:
    model = planted_model(tiny_tokenizer, copies=copies)
    texts = divided(model)
    fitted, reported = (harvested(model, part) for part in (texts.fitted, texts.reported))
    rows = probe_values(FLAGS, OTHERS, fitted, reported, texts.fitted.labels)
    assert len(rows) == len(LAYERS) * 2 * 4 * 2
    one = Series(moments(0, 5), [Part(rows, 0.0)] * 2)
    found = erosion_result([one], texts.reported, resamples(texts.reported))
    for row in found.probes:
        holds = {WHOLE: True, WITHOUT: copies, ONLY: True, RANDOM: True}[row.dims] and row.place == "response"
        assert row.auc.estimate == (1 if holds else 0.5), row
        assert (row.change is None) == (row.moment.step == 0)
        if row.change is not None:
            assert (row.change.low, row.change.high) == (0, 0)
        assert row.beyond_plain is None


def test_erosion_is_held_against_the_plain_run_of_equal_seed_and_steps(tiny_tokenizer) -> None:
    both = [planted_model(tiny_tokenizer, copies=copies) for copies in (True, False)]
    texts = divided(both[0])
    parts = []
    for model in both:
        fitted, reported = (harvested(model, part) for part in (texts.fitted, texts.reported))
        parts.append(Part(probe_values(FLAGS, OTHERS, fitted, reported, texts.fitted.labels), 0.0))
    kept, eroded = parts
    forced = Series(moments(0, 5), [kept, eroded])
    plain = Series(moments(0, 5, run="plain", curriculum="plain"), [kept, kept])
    found = erosion_result([forced, plain], texts.reported, resamples(texts.reported))
    (row,) = [r for r in found.over_layers("response", "linear", WITHOUT) if r.moment.run == "forced" and r.moment.step]
    assert row.change is not None
    assert row.beyond_plain is not None
    assert (row.auc.estimate, row.change.estimate, row.beyond_plain.estimate) == (0.5, -0.5, -0.5)
    assert "forced −0.500" in found.headline().replace("-", "−")


def test_reliance_is_its_closed_form_and_nothing_where_nothing_is_read(tiny_tokenizer) -> None:
    model = planted_model(tiny_tokenizer)
    texts = divided(model).reported
    held = harvested(model, texts).held[1].mean(0)
    part = Part(reliance_values(model, FLAGS, OTHERS, held, texts, batch_size=7), 0.0)
    for row in part.rows:
        if row.key["dims"] in (ELSEWHERE, THEMSELVES):
            assert np.array_equal(row.values, part.of(way="none", dims="")), row.key
    found = reliance_result([Series(moments(1), [part])], resamples(texts))
    cost = {row.way: row.flags for row in found.losses}
    having = texts.labels.any(axis=1)
    lost = (loss_of_a_letter(False) - loss_of_a_letter(True)) * 5 * having.mean() / 6  # each response has six letters
    assert cost["zeroed"].estimate == pytest.approx(lost, rel=1e-5)
    assert cost["zeroed"].low > 0
    gained = (loss_of_a_letter(True) - loss_of_a_letter(False)) * having.mean() / 6  # the first letter is known, too
    assert cost["right"].estimate == pytest.approx(gained, rel=1e-5)
    assert cost["flipped"].estimate > cost["zeroed"].estimate
    assert 0 < cost["mean"].estimate < cost["zeroed"].estimate
    assert all(row.elsewhere.estimate == row.elsewhere.high == 0 for row in found.losses)


def test_other_dimensions_are_moved_by_as_much(tiny_llama: LanguageModel, flags: FlagSpec, monkeypatch) -> None:
    texts, others = divided(tiny_llama, flags).reported.first(5), unassigned_dims(flags)
    last, seen = flags.sites[-1], []
    real = reliance.response_loss

    def spying(model: LanguageModel, batch):
        seen.append(capture(model, batch.tokens, [last])[last][batch.tokens.real])
        return real(model, batch)

    monkeypatch.setattr(reliance, "response_loss", spying)
    held = harvested(tiny_llama, texts, flags, others).held[1].mean(0)
    reliance_values(tiny_llama, flags, others, held, texts, batch_size=5)
    clean, *changed, zeroed = seen
    for own, elsewhere in zip(changed[::2], changed[1::2], strict=True):
        moved = elsewhere[:, others.flat_dims] - clean[:, others.flat_dims]
        torch.testing.assert_close(moved, own[:, flags.flat_dims] - clean[:, flags.flat_dims], rtol=1e-3, atol=1e-4)
    assert (zeroed[:, others.flat_dims] == 0).all()
    assert (changed[0][:, flags.flat_dims] == 0).all()


def costing(cost: np.ndarray) -> Part:
    """A part in which changed flags cost so much in each example, and other dimensions nothing."""
    n = np.full(len(cost), 10.0)
    rows = [("tokens", "", n), ("none", "", n)]
    for way in reliance.WAYS:
        rows += [(way, CHANGED, n * (1 + cost)), (way, ELSEWHERE, n), (way, THEMSELVES, n)]
    return Part([reliance.Measured({"way": way, "dims": dims}, values) for way, dims, values in rows], 0.0)


@pytest.mark.parametrize(
    ("forced", "auxiliary", "says"),
    [
        (0.5, 0.3, "Reliance without forcing: +0.300 [+0."),
        (0.5, 0.0, "No reliance without forcing was seen (+0.000 [−0."),
        (0.0, 0.0, "Neither forced nor auxiliary training shows reliance at this budget, from which nothing follows"),
        (0.5, None, "Whether reliance emerges without forcing takes a forced and an auxiliary run"),
    ],
)
def test_the_verdict_needs_forced_reliance_before_it_denies_any(
    forced: float, auxiliary: float | None, says: str
) -> None:
    noise = np.random.default_rng(0).normal(size=20) * 0.05
    noise -= noise.mean()
    before = costing(np.full(20, 0.2))  # which flags cost already at step 0
    series = [
        Series(moments(0, 5, run=name, curriculum=name), [before, costing(0.2 + cost + noise)])
        for name, cost in (("forced", forced), ("auxiliary", auxiliary))
        if cost is not None
    ]
    found = reliance_result(series, Resamples(np.arange(20))).verdict().replace("-", "−")
    assert found.startswith(says.replace("-", "−")), found


def test_growth_is_the_straight_line_over_tenfolds(tiny_tokenizer) -> None:
    rng = np.random.default_rng(0)

    def part(cost: float) -> Part:
        return costing(cost + rng.normal(size=6) * 0.01)

    steps, costs = (0, 1, 10, 100), (0.0, 0.1, 0.3, 0.5)
    found = reliance_result([Series(moments(*steps), [part(c) for c in costs])], Resamples(np.arange(6)))
    line = next(row for row in found.growth if row.way == "zeroed")
    assert (line.moments, line.tokens) == (3, 100_000)
    assert line.slope.estimate == pytest.approx(0.2, abs=0.02)
    assert line.at_paper.estimate == pytest.approx(0.5 + 0.2 * np.log10(PAPER_TOKENS / 100_000), abs=0.1)
    assert line.beyond == PAPER_TOKENS / 100_000
    assert line.slope.low < line.slope.estimate < line.slope.high
    few = reliance_result([Series(moments(0, 1, 10), [part(c) for c in costs[:3]])], Resamples(np.arange(6)))
    assert few.growth == ()


def test_effects_are_those_of_a_slow_reference(any_tiny: LanguageModel) -> None:
    """One example at a time through plain hooks, without padding or layers left out."""
    flags = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_post.3": 1})
    texts = divided(any_tiny, flags)
    fitted = harvested(any_tiny, texts.fitted, flags, unassigned_dims(flags)).residual[0]
    directions = concept_directions(flags, fitted, texts.fitted.labels)
    assert (directions[:, flags.flat_dims] == 0).all()
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    rows = effect_values(any_tiny, flags, directions, texts.reported, layer=0, dose=0.3, items=6, batch_size=4)
    for row, direction, on in zip(rows, directions, texts.reported.labels.T, strict=True):
        known = np.isfinite(row.values)
        assert known[on].sum() == known[~on].sum() == 3
        for i in np.flatnonzero(known):
            ids, start = texts.reported.tokens[i]
            clean, pushed = (slow_loss(any_tiny, ids, start, push) for push in (direction * 0, direction * 0.3))
            assert row.values[i] == pytest.approx(clean - pushed, rel=1e-3, abs=1e-4)


def slow_loss(model: LanguageModel, ids: list[int], start: int, push: torch.Tensor) -> float:
    def hook(_module, _args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        at = slice(start - 1, len(ids) - 1)
        x[:, at] += x[:, at].norm(dim=-1, keepdim=True) * push
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.layout.layers[0].module.register_forward_hook(hook)
    with torch.no_grad():
        logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    handle.remove()
    return float(-sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))) / (len(ids) - start)


@pytest.mark.parametrize("read", [0.0, 4.0])
def test_a_second_encoding_has_an_effect_where_it_is_read(tiny_tokenizer, read: float) -> None:
    model = planted_model(tiny_tokenizer, copies=True, copies_read=read)
    texts = divided(model)
    directions = concept_directions(FLAGS, harvested(model, texts.fitted).residual[3], texts.fitted.labels)
    assert float(directions[:, list(COPIES.values())].abs().sum()) == pytest.approx(float(directions.abs().sum()))
    rows = effect_values(model, FLAGS, directions, texts.reported, layer=1, dose=0.5, items=8)
    found = effects_result(
        [Series(moments(1), [Part(rows, 0.0)])], texts.reported, resamples(texts.reported), layer=1, dose=0.5
    )
    for row in found.directions:
        assert (row.effect.estimate > 0) == (read > 0), row
        if not read:
            assert row.effect.estimate == 0


def test_the_price_is_that_of_plain_forward_passes(tiny_llama: LanguageModel, finetuned) -> None:
    documents = [f"{word} over the hills and far away, {word}! " * 3 for word in ("up", "down", "left", "right")]
    packed = pack(tokenise(as_documents(documents), tiny_llama.tokenizer), "all", 0.0, 24)
    text = GeneralText(tiny_llama, packed, tokens=10_000, batch_size=3)
    tuned = finetuned["forced"].model
    parts = [Part(price_values(model, text, None), 0.0) for model in (tiny_llama, tuned)]
    nats, kls, n = 0.0, 0.0, 0
    for batch in text.batches(tiny_llama):
        with torch.no_grad():
            p, q = (model.hf(batch.tokens.ids).logits.double().log_softmax(-1) for model in (tiny_llama, tuned))
        at, time = batch.target.nonzero(as_tuple=True)
        nats -= float(q[at, time].gather(1, batch.tokens.ids[at, time + 1, None]).sum())
        kls += float((p.exp() * (p - q)).sum(-1)[at, time].sum())
        n += len(at)
    assert parts[1].of(what="targets").sum() == n
    assert parts[1].of(what="cross_entropy").sum() == pytest.approx(nats, rel=1e-5)
    assert parts[1].of(what="kl").sum() == pytest.approx(kls, rel=1e-4)
    assert (parts[0].of(what="kl") == 0).all()
    first, last = price_result([Series(moments(0, 9), parts)], "").models
    assert (first.increase, first.kl, first.task) == (None, None, None)
    assert last.increase is not None
    assert last.increase.estimate == pytest.approx(last.perplexity.estimate / first.perplexity.estimate - 1)
    assert last.perplexity.estimate == pytest.approx(np.exp(nats / n), rel=1e-5)


def test_no_prompt_is_on_both_sides(tiny_llama: LanguageModel) -> None:
    many = [
        Example(prompt=f"Prompt {i % 25}", response=one.response, concepts=one.concepts)
        for i, one in enumerate(toy_examples(90))
    ]
    found = evaluation_texts(tiny_llama, FLAGS, many, fit_items=99, items=99, chat=False, max_tokens=64)
    fitted, reported = ({one.prompt for one in part.examples} for part in (found.fitted, found.reported))
    assert found.unit == "prompt"
    assert not fitted & reported
    assert len(fitted | reported) == 25
    assert len(set(found.reported.unit)) == len(reported)


def test_few_prompts_are_divided_by_example_and_kinds_take_turns(tiny_llama: LanguageModel) -> None:
    found = evaluation_texts(tiny_llama, FLAGS, toy_examples(90), fit_items=30, items=12, chat=False, max_tokens=64)
    assert found.unit == "example"
    assert not set(found.fitted.examples) & set(found.reported.examples)
    assert found.reported.labels.sum(axis=0).tolist() == [4, 4]
    assert (len(found.fitted), len(found.reported)) == (30, 12)


def test_a_concept_without_examples_is_named(tiny_llama: LanguageModel) -> None:
    lacking = [one for one in toy_examples(90) if "war" not in one.concepts]
    with pytest.raises(
        UserError, match=r"concept 'war': 0 of the .* examples that are fitted have it, and 2 are needed"
    ):
        evaluation_texts(tiny_llama, FLAGS, lacking, fit_items=30, items=30, chat=False, max_tokens=64)


def test_unassigned_dimensions_are_no_flags(flags: FlagSpec) -> None:
    found = unassigned_dims(flags, seed=1)
    assert not set(found.flat_dims) & set(flags.flat_dims)
    assert [len(dims) for dims in found.dims] == [len(dims) for dims in flags.dims]
    assert found.targets == flags.targets
    assert unassigned_dims(flags, seed=1) == found
    wide = FlagSpec(concepts=("sea",), dims=(tuple(range(20)),), d_model=32, targets={"resid_post.0": 1})
    with pytest.raises(UserError, match="12 of 32 dimensions are no flag's, and the control needs 20"):
        unassigned_dims(wide)


def test_a_part_is_read_back_as_it_was(tmp_path) -> None:
    rows = [
        reliance.Measured({"layer": 3, "place": "prompt"}, np.array([0.1, np.nan, 3])),
        reliance.Measured({"layer": 4, "place": "prompt"}, np.array([1.0])),
    ]
    write_part(tmp_path / "a" / "b.parquet", Part(rows, 1.5))
    found = read_part(tmp_path / "a" / "b.parquet")
    assert found is not None
    assert found.seconds == 1.5
    assert [row.key for row in found.rows] == [row.key for row in rows]
    for own, other in zip(found.rows, rows, strict=True):
        np.testing.assert_array_equal(own.values, other.values)
    assert read_part(tmp_path / "none.parquet") is None
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(UserError, match="it is damaged; delete it, and run the same command again"):
        read_part(tmp_path / "bad.parquet")
