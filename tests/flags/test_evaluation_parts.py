"""Parts of an evaluation on models of which everything is known, and against slow references."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_model import COPIES, FLAGS, LETTER, OTHERS, loss_of_a_letter, planted_model
from toy_corpus import toy_examples

from trimtab.activations import as_documents, tokenise
from trimtab.errors import UserError
from trimtab.evaluation.documents import pack
from trimtab.flags import Example, FlagSpec
from trimtab.flags.evaluation import harvest, reliance
from trimtab.flags.evaluation.effects import FREE, HELD, concept_directions, effect_values, effects_result
from trimtab.flags.evaluation.erosion import (
    ONLY,
    RANDOM,
    SHUFFLED,
    WHOLE,
    WITHOUT,
    Erosion,
    erosion_result,
    probe_values,
    probed,
    probed_layers,
)
from trimtab.flags.evaluation.harvest import Harvest
from trimtab.flags.evaluation.measured import Measured, Moment, Part, Series, read_part, write_part
from trimtab.flags.evaluation.price import GeneralText, price_result, price_values
from trimtab.flags.evaluation.reading import ASKING, NEUTRAL, RESPONSE, reading_result, reading_values
from trimtab.flags.evaluation.reliance import ELSEWHERE, PAPER_TOKENS, Reliance, reliance_result, reliance_values
from trimtab.flags.evaluation.reliance import FLAGS as CHANGED
from trimtab.flags.evaluation.texts import EvaluationTexts, LabelledTexts, evaluation_texts
from trimtab.flags.evaluation.unassigned import matched_dims, unassigned_draws
from trimtab.flags.examples import batch_of
from trimtab.flags.loss import FlagReading
from trimtab.lm import LanguageModel, Site, capture
from trimtab.stats import Resamples

LAYERS = (0, 3)
ALIKE = np.ones(32)
"""Dimensions whose variances do not differ."""


def divided(model: LanguageModel, flags: FlagSpec = FLAGS, n: int = 60) -> EvaluationTexts:
    return evaluation_texts(model, flags, toy_examples(n), fit_items=40, items=30, chat=False, max_tokens=64)


def harvested(
    model: LanguageModel, texts: LabelledTexts, flags: FlagSpec = FLAGS, others: FlagSpec = OTHERS
) -> Harvest:
    return harvest.harvest(model, flags, others.flat_dims, texts, LAYERS, inputs=range(5), batch_size=7)


def moments(*steps: int, run: str = "forced", tokens: int = 1000, seed: int = 0) -> list[Moment]:
    curriculum = run.split(",")[0]
    return [Moment(run=run, curriculum=curriculum, seed=seed, step=s, tokens=s * tokens) for s in steps]


def series_of(run: str, steps: Mapping[int, Part], plain: Mapping[int, Part] | None = None, seed: int = 0) -> Series:
    return Series(moments(*steps, run=run, seed=seed), list(steps.values()), plain or {})


def resamples(texts: LabelledTexts) -> Resamples:
    return Resamples(texts.unit, n_resamples=200)


def test_forward_passes_are_those_of_single_examples(any_tiny: LanguageModel) -> None:
    """At the last prompt token, as the mean over the response's tokens, and token by token, of padded batches."""
    flags = FlagSpec(
        concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_mid.1": 1, "resid_post.3": 1}
    )
    others = unassigned_draws(flags, ALIKE)[0]
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
                torch.testing.assert_close(found.residual[layer][:, i], at_places(x, start), rtol=1e-4, atol=1e-4)
            for spec in (flags, others):
                at_sites = torch.stack([mid[:, spec.flat_dims], top[:, spec.flat_dims]], dim=1)
                expected = at_places(at_sites, start)
                torch.testing.assert_close(found.of(spec)[:, i], expected, rtol=1e-4, atol=1e-4)
                columns = [found.dims.index(dim) for dim in spec.flat_dims]
                held = found.held[i][..., columns]
                torch.testing.assert_close(held, at_sites, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.inputs[1][i], low, rtol=1e-4, atol=1e-4)
            assert found.n_tokens[i] == len(ids) - start
            expected = slow_loss(any_tiny, ids, start) * (len(ids) - start)
            assert float(found.nats[i]) == pytest.approx(expected, rel=1e-4)


def at_places(x: torch.Tensor, start: int) -> torch.Tensor:
    return torch.stack([x[start - 1], x[start:].mean(0)])


def test_the_last_prompt_token_sees_nothing_of_the_response(any_tiny: LanguageModel) -> None:
    flags = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_post.3": 1})
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
        harvested(any_tiny, each, flags) for each in (texts, replace(texts, examples=other, tokens=tokens))
    )
    torch.testing.assert_close(before.of(flags)[0], after.of(flags)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before.residual[3][0], after.residual[3][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.of(flags)[1], after.of(flags)[1], rtol=1e-2)


def test_reading_at_a_site_is_that_of_the_loss(tiny_llama: LanguageModel, flags: FlagSpec) -> None:
    texts, others = divided(tiny_llama, flags).reported, unassigned_draws(flags, ALIKE)[0]
    values = reading_values(flags, [others], harvested(tiny_llama, texts, flags, others))
    found = Part(values, 0.0).of(site="all", place="response", draw=0).reshape(texts.labels.shape)
    batch = batch_of(tiny_llama, flags, texts.examples, texts.tokens)
    reading = FlagReading(flags, batch)
    with reading.reading(tiny_llama), torch.no_grad():
        tiny_llama.forward(batch.tokens, last=1)
    np.testing.assert_allclose(found, reading.strength.numpy(), rtol=1e-3, atol=1e-4)


def test_planted_flags_read_whole_in_responses_and_not_before(tiny_tokenizer) -> None:
    model = planted_model(tiny_tokenizer)
    texts = divided(model).reported
    part = Part(reading_values(FLAGS, [OTHERS], harvested(model, texts)), 0.0)
    result = reading_result([series_of("forced", {1: part})], texts, {"forced": FLAGS}, resamples(texts))
    assert {row.site for row in result.rows} == {"all", *FLAGS.targets}
    assert {row.place for row in result.rows} == {NEUTRAL, RESPONSE}  # no prompt of the corpus names a concept
    for row in result.rows:
        expected = (1, 1) if row.place == RESPONSE else (0.5, 0.5)
        assert (row.accuracy.estimate, row.auc.estimate) == expected, row
        assert (row.unassigned is None) == (row not in result.whole)
        if row.unassigned is not None:
            assert row.unassigned.estimate == 0.5
    assert [(row.concept, row.place, row.auc.estimate) for row in result.rows if row.concept != "mean"] == [
        ("sea", NEUTRAL, 0.5), ("war", NEUTRAL, 0.5), ("sea", RESPONSE, 1), ("war", RESPONSE, 1),
    ]  # fmt: skip
    assert result.headline() == (
        "AUC of flags (0.5 is chance): forced 1.000 [1.000, 1.000] over responses, "
        "0.500 [0.500, 0.500] over the last token of neutral prompts"
    )


def test_prompts_that_name_a_concept_are_read_apart(tiny_llama: LanguageModel) -> None:
    """Flags that read nothing but the prompts' words are perfect on prompts that ask, and chance on neutral ones."""
    examples = [
        Example(prompt=f"Tell me of ships {i}" if asks else f"Go on {i}", response="a b", concepts=["sea"] * (i % 2))
        for i in range(80)
        for asks in (True, False)
    ]
    spec = FlagSpec(concepts=("sea",), dims=((3,),), d_model=32, targets={"resid_post.1": 1})
    texts = evaluation_texts(tiny_llama, spec, examples, fit_items=40, items=99, chat=False, max_tokens=64).reported
    asking = np.array(["ships" in example.prompt for example in texts.examples])
    strength = np.where(asking, texts.labels[:, 0], 0.2).astype(float)
    rows = [
        Measured({"site": site, "place": place, "draw": draw}, strength)
        for site, draw in (("all", 0), ("all", 1), ("resid_post.1", 0))
        for place in harvest.PLACES
    ]
    one = series_of("forced", {1: Part(rows, 0.0)})
    found = reading_result([one], texts, {"forced": spec}, resamples(texts), {"sea": "the sea, ships and sailors"})
    auc = {row.place: (row.auc.estimate, row.examples, row.auc.n) for row in found.whole}
    n = int(asking.sum())
    assert auc.get(ASKING) == (1, n, n)
    assert auc[NEUTRAL] == (0.5, len(texts) - n, len(texts) - n)
    assert 0.5 < auc[RESPONSE][0] < 1


def probes_of(model: LanguageModel, texts: EvaluationTexts) -> Part:
    fitted, reported = (harvested(model, part) for part in (texts.fitted, texts.reported))
    return Part(probe_values(probed(FLAGS, [OTHERS], texts.fitted.labels, 0), fitted, reported, LAYERS), 0.0)


def erosion_of(texts: EvaluationTexts, *series: Series, first_layer: int = 1) -> Erosion:
    return erosion_result(series, texts.reported, resamples(texts.reported), first_layer)


@pytest.mark.parametrize("copies", [False, True])
def test_probes_find_a_concept_exactly_where_it_is_planted(tiny_tokenizer, copies: bool) -> None:
    model = planted_model(tiny_tokenizer, copies=copies)
    texts = divided(model)
    part = probes_of(model, texts)
    assert len(part.rows) == len(LAYERS) * 2 * 5 * 2
    found = erosion_of(texts, series_of("forced", {0: part, 5: part}))
    for row in found.probes:
        holds = {WHOLE: True, WITHOUT: copies, ONLY: True, RANDOM: True, SHUFFLED: False}[row.dims]
        holds &= row.place == "response"
        if row.dims != SHUFFLED or not copies or row.place == "prompt":
            assert row.auc.estimate == (1 if holds else 0.5), row
        assert (row.change is None) == (row.moment.step == 0)
        if row.change is not None:
            assert (row.change.low, row.change.high) == (0, 0)
        assert row.beyond_plain is None
        assert (row.selectivity is None) == (row.dims != WITHOUT)
        if row.selectivity is not None:
            assert (row.selectivity.estimate > 0.2) == holds, row


def test_labels_are_shuffled_for_a_control_and_for_nothing_else() -> None:
    labels = np.arange(60).reshape(30, 2) % 3 == 0
    sets = probed(FLAGS, [OTHERS, OTHERS], labels, 0)
    assert [dims for dims, *_ in sets] == [WHOLE, WITHOUT, ONLY, RANDOM, RANDOM, SHUFFLED, SHUFFLED]
    left_out = {WITHOUT: FLAGS.flat_dims, SHUFFLED: FLAGS.flat_dims, RANDOM: OTHERS.flat_dims, WHOLE: []}
    for dims, _, columns, of in sets:
        assert (of.tolist() == labels.tolist()) == (dims != SHUFFLED)
        assert sorted(of.tolist()) == sorted(labels.tolist())
        expected = FLAGS.flat_dims if dims == ONLY else set(range(32)) - {*left_out[dims]}
        assert columns == sorted(expected)
    assert sets[-1][3].tolist() != sets[-2][3].tolist()


def test_erosion_is_held_against_the_plain_run(tiny_tokenizer) -> None:
    both = [planted_model(tiny_tokenizer, copies=copies) for copies in (True, False)]
    texts = divided(both[0])
    kept, eroded = (probes_of(model, texts) for model in both)
    found = erosion_of(texts, series_of("forced", {0: kept, 5: eroded}, {0: kept, 5: kept}))
    (row,) = [r for r in found.over_layers("response", "linear", WITHOUT) if r.moment.step]
    assert row.change is not None
    assert row.beyond_plain is not None
    assert (row.auc.estimate, row.change.estimate, row.beyond_plain.estimate) == (0.5, -0.5, -0.5)
    assert found.headline() == (
        "change since step 0 of the AUC of linear probes of responses without the flags' dimensions, mean over layers "
        "from 1 on: forced -0.500 [-0.500, -0.500] (-0.500 [-0.500, -0.500] beyond plain)"
    )
    elsewhere = erosion_of(texts, series_of("forced", {0: kept, 5: eroded}, {0: kept, 4: kept}))
    assert all(row.beyond_plain is None for row in elsewhere.probes)  # plain is known at another step alone


def test_the_mean_is_over_layers_with_flags(tiny_tokenizer) -> None:
    model = planted_model(tiny_tokenizer)
    texts = divided(model)
    part = probes_of(model, texts)
    half = Part([row._replace(values=row.values * (row.key["layer"] == 3)) for row in part.rows], 0.0)
    for first, expected in ((0, 0.75), (1, 1.0)):
        (row,) = erosion_of(texts, series_of("forced", {5: half}), first_layer=first).over_layers(
            "response", "linear", WHOLE
        )
        assert row.auc.estimate == expected


def test_probed_layers_are_those_with_flags(tiny_llama: LanguageModel) -> None:
    assert probed_layers(tiny_llama, 1) == (1, 2, 3)
    assert probed_layers(tiny_llama, 1, [3, 0]) == (0, 3)
    with pytest.raises(UserError, match="layer 0: flags begin at layer 1; name one from there on, too"):
        probed_layers(tiny_llama, 1, [0])


def cost_of(model: LanguageModel, texts: EvaluationTexts, flags: FlagSpec = FLAGS, others: FlagSpec = OTHERS) -> Part:
    both = [harvested(model, part, flags, others) for part in (texts.fitted, texts.reported)]
    return Part(reliance_values(model, flags, *both, texts.reported, batch_size=7), 0.0)


def test_reliance_is_its_closed_form_and_nothing_where_nothing_is_read(tiny_tokenizer) -> None:
    model = planted_model(tiny_tokenizer)
    texts = divided(model)
    part = cost_of(model, texts)
    for row in part.rows:
        if row.key["dims"] == ELSEWHERE:
            assert np.array_equal(row.values, part.of(way="none", dims="")), row.key
    found = reliance_result([series_of("forced", {1: part})], resamples(texts.reported))
    cost = {row.way: row.flags for row in found.costs}
    having = texts.reported.labels.any(axis=1)
    lost = (loss_of_a_letter(False) - loss_of_a_letter(True)) * 5 * having.mean() / 6  # each response has six letters
    assert cost["zeroed"].estimate == pytest.approx(lost, rel=1e-5)
    assert cost["zeroed"].low > 0
    assert cost["flipped"].estimate > cost["zeroed"].estimate
    assert 0 < cost["mean"].estimate < cost["zeroed"].estimate
    # The other concept's letters win by their flag, at every token, and the right ones lose what theirs gave.
    assert cost["swapped"].estimate == pytest.approx(LETTER, rel=1e-5)
    assert part.of(way="tokens", dims="right").sum() == 6 * having.sum()
    controls = [row.elsewhere for row in found.costs if row.elsewhere is not None]
    assert len(controls) == 3
    assert all(one.estimate == one.high == 0 for one in controls)


def test_other_dimensions_are_moved_by_as_much(tiny_llama: LanguageModel, flags: FlagSpec, monkeypatch) -> None:
    """Each example has its own draw of them; those that it has not drawn are left alone."""
    texts, pool = divided(tiny_llama, flags).reported.first(5), matched_dims(flags, ALIKE)[:8]
    others, sites = replace(flags, dims=(tuple(pool[:4]), tuple(pool[4:]))), [flags.sites[0], flags.sites[-1]]
    seen: list[dict[Site, torch.Tensor]] = []
    real = reliance.response_sums

    def spying(model: LanguageModel, batch):
        seen.append(capture(model, batch.tokens, sites))
        return real(model, batch)

    found = harvested(tiny_llama, texts, flags, others)
    monkeypatch.setattr(reliance, "response_sums", spying)
    reliance_values(tiny_llama, flags, found, found, texts, batch_size=5)
    part = texts.take(texts.by_length(5)[0])
    batch = batch_of(tiny_llama, flags, part.examples, part.tokens)
    clean, drawn = capture(tiny_llama, batch.tokens, sites), set()
    assert len(seen) == 8  # flags zeroed, at their mean, flipped, swapped, right; other dimensions as the first three
    for own, elsewhere in zip(seen[:3], seen[5:], strict=True):
        for b, real_tokens in enumerate(batch.tokens.real):
            change = {site: x[b, real_tokens] - clean[site][b, real_tokens] for site, x in elsewhere.items()}
            wanted = own[sites[0]][b, real_tokens] - clean[sites[0]][b, real_tokens]
            at = [int((change[sites[0]] - wanted[:, [dim]]).abs().sum(0).argmin()) for dim in flags.flat_dims]
            assert set(at) <= set(pool)
            drawn.add(tuple(at))
            wanted = own[sites[1]][b, real_tokens] - clean[sites[1]][b, real_tokens]
            torch.testing.assert_close(change[sites[1]][:, at], wanted[:, flags.flat_dims], rtol=1e-3, atol=1e-4)
            left = [dim for dim in range(32) if dim not in at]
            assert not bool(change[sites[0]][:, left].abs().max() > 1e-5)
    assert len(drawn) > 3
    assert all((own[site][..., flags.flat_dims] == 0).all() for own in seen[:1] for site in sites)


def costing(cost: np.ndarray) -> Part:
    """A part in which changed flags cost so much in each example, and other dimensions nothing."""
    n = np.full(len(cost), 10.0)
    rows = [("none", "", n), ("right", CHANGED, n), ("tokens", "none", n), ("tokens", "right", n)]
    for way in reliance.AGAINST:
        rows += [(way, CHANGED, n * (1 + cost)), (way, ELSEWHERE, n)]
    return Part([Measured({"way": way, "dims": dims}, values) for way, dims, values in rows], 0.0)


def noisy(cost: float, seed: int = 0, n: int = 20) -> Part:
    noise = np.random.default_rng(seed).normal(size=n) * 0.05
    return costing(0.2 + cost + noise - noise.mean())


MEASURE = "Extra cost of flags of other concepts in place of the right ones, in nats per token beyond the plain run: "
ONE = "at 5 steps (one seed, interval over examples alone)"


VERDICTS = [
    (
        {"forced": 0.5, "auxiliary": 0.3, "plain": 0.0},
        f"The model came to rely on its flags without forcing. {MEASURE}forced +0.500 [I] {ONE}, "
        f"auxiliary +0.300 [I] {ONE}",
    ),
    (
        {"forced": 0.5, "auxiliary": 0.3, "plain": 0.3},  # any finetuning gains as much
        "No reliance without forcing was seen, where forcing gives reliance. An effect of auxiliary training of "
        f"+N would have been seen with 80% power. {MEASURE}forced +0.200 [I] {ONE}, auxiliary +0.000 [I] {ONE}",
    ),
    (
        {"forced": 0.0, "auxiliary": 0.0, "plain": 0.0},
        "No reliance was seen, not even with forcing: this budget cannot answer the question. "
        f"{MEASURE}forced +0.000 [I] {ONE}, auxiliary +0.000 [I] {ONE}",
    ),
    (
        {"forced": 0.5, "auxiliary": 0.3},
        "Whether reliance emerges without forcing is not known: the control is missing, a plain run of the same "
        "seed and steps as forced, auxiliary",
    ),
    (
        {"plain": 0.5},
        "Whether reliance emerges without forcing is not known: there is no forced run and no auxiliary run",
    ),
]


@pytest.mark.parametrize(("costs", "says"), VERDICTS)
def test_the_verdict_is_beyond_plain_and_needs_forced_reliance(costs: dict[str, float], says: str) -> None:
    before = costing(np.full(20, 0.2))  # which flags cost already at step 0
    parts = {name: noisy(cost, seed=i) for i, (name, cost) in enumerate(costs.items())}
    plain = {0: before, 5: parts["plain"]} if "plain" in parts else {}
    series = [series_of(name, {0: before, 5: part}, {} if name == "plain" else plain) for name, part in parts.items()]
    found = reliance_result(series, Resamples(np.arange(20))).verdict()
    assert without_numbers(found) == says


def test_the_verdict_is_at_a_common_step() -> None:
    """A longer training that gives reliance says nothing of a shorter one that does not."""
    before, parts = costing(np.full(20, 0.2)), [noisy(cost, seed=i) for i, cost in enumerate((0.5, 0.1, 0.1, 0.0, 0.0))]
    plain = {5: parts[3], 50: parts[4]}
    forced = series_of("forced", {0: before, 5: parts[1], 50: parts[0]}, plain)
    short = series_of("auxiliary", {0: before, 5: parts[2]}, plain)
    found = reliance_result([forced, short], Resamples(np.arange(20))).verdict()
    assert "forced +0.100" in found
    assert "at 5 steps" in found
    other = series_of("auxiliary", {0: before, 6: parts[2]}, plain)
    found = reliance_result([forced, other], Resamples(np.arange(20))).verdict()
    assert found.endswith("not known: forced and auxiliary runs were measured at no common step")


def without_numbers(text: str) -> str:
    """Bounds as `[I]`, and what would have been seen as `N`."""
    text = re.sub(r"\[[^\]]*\]", "[I]", text).replace("-0.000", "+0.000")
    return re.sub(r"of \+\d\.\d+ would", "of +N would", text)


def test_several_seeds_have_an_interval_over_seeds() -> None:
    before, rises = costing(np.full(20, 0.2)), (0.01, -0.02, 0.03)
    series = [
        series_of(f"{name}, {i}", {0: before, 5: noisy(cost + rise, i)}, {5: noisy(0, i)}, seed=i)
        for name, cost in (("forced", 0.5), ("auxiliary", 0.0))
        for i, rise in enumerate(rises)
    ]
    found = reliance_result(series, Resamples(np.arange(20)))
    half = 4.302653 * np.std(rises, ddof=1) / np.sqrt(3)
    mean = np.mean(rises)
    least = half * (1 + 1.060660 / 4.302653)
    seeds = "at 5 steps (mean of 3 seeds, interval over seeds)"
    assert found.verdict() == (
        "No reliance without forcing was seen, where forcing gives reliance. An effect of auxiliary training of "
        f"+{least:.3f} would have been seen with 80% power. {MEASURE}"
        f"forced +{0.5 + mean:.3f} [{0.5 + mean - half:+.3f}, {0.5 + mean + half:+.3f}] {seeds}, "
        f"auxiliary +{mean:.3f} [{mean - half:+.3f}, {mean + half:+.3f}] {seeds}"
    )


def test_lines_go_through_moments_of_the_last_phase_beyond_plain() -> None:
    steps, costs, plain = (0, 1, 10, 100, 1000), (0.0, 9.0, 0.1, 0.3, 0.5), (0.0, 0.1, 0.1, 0.1, 0.1)
    parts, beside = (
        {s: noisy(cost, i, n=6) for i, (s, cost) in enumerate(zip(steps, of, strict=True))} for of in (costs, plain)
    )
    one = series_of("forced", parts, beside)
    one = one._replace(moments=[replace(m, last_phase=m.step >= 10) for m in one.moments])
    found = lines_of(one)
    line = found["forced, last phase"]
    assert (line.moments, line.tokens) == (3, 1_000_000)
    assert line.slope.estimate == pytest.approx(0.2)  # 0, 0.2, 0.4 beyond plain
    assert line.at_paper.estimate == pytest.approx(0.4 + 0.2 * np.log10(PAPER_TOKENS / 1e6))
    assert line.beyond == PAPER_TOKENS / 1e6
    assert line.slope.low < line.slope.estimate < line.slope.high
    assert lines_of(one._replace(plain={})) == {}
    assert lines_of(one._replace(moments=[replace(m, last_phase=m.step >= 100) for m in one.moments])) == {}


def test_ends_of_runs_of_different_lengths_make_a_line() -> None:
    runs = [
        series_of(f"forced, {s}", {0: noisy(0, n=6), s: noisy(cost, n=6)}, {s: noisy(0.1, 1, n=6)})
        for s, cost in ((10, 0.1), (100, 0.3), (1000, 0.5))
    ]
    found = lines_of(*runs)
    assert list(found) == ["ends of forced runs, seed 0"]
    assert found["ends of forced runs, seed 0"].slope.estimate == pytest.approx(0.2)


def lines_of(*series: Series) -> dict[str, reliance.RelianceLine]:
    found: Reliance = reliance_result(series, Resamples(np.arange(6)))
    return {row.line: row for row in found.lines if row.way == "zeroed"}


def test_effects_are_those_of_a_slow_reference(any_tiny: LanguageModel) -> None:
    """One example at a time through plain hooks, without padding or layers left out; flags free and held."""
    flags = FlagSpec(concepts=("sea", "war"), dims=((3,), (8,)), d_model=32, targets={"resid_post.3": 1})
    texts = divided(any_tiny, flags)
    fitted, reported = (harvested(any_tiny, part, flags) for part in (texts.fitted, texts.reported))
    directions = concept_directions(flags, fitted.residual[0], texts.fitted.labels)
    assert (directions[:, flags.flat_dims] == 0).all()
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    rows = effect_values(
        any_tiny, flags, directions, texts.reported, reported, layer=0, dose=0.3, items=6, batch_size=4
    )
    assert [(row.key["concept"], row.key["flags"]) for row in rows] == [
        ("sea", FREE), ("sea", HELD), ("war", FREE), ("war", HELD),
    ]  # fmt: skip
    differ = 0
    for row in rows:
        c = flags.index(str(row.key["concept"]))
        on, known = texts.reported.labels[:, c], np.isfinite(row.values)
        assert known[on].sum() == known[~on].sum() == 3
        for i in np.flatnonzero(known):
            ids, start = texts.reported.tokens[i]
            clean = slow_loss(any_tiny, ids, start)
            free, held = (slow_loss(any_tiny, ids, start, directions[c] * 0.3, of) for of in ([], flags.flat_dims))
            expected = clean - (held if row.key["flags"] == HELD else free)
            assert row.values[i] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            differ += abs(free - held) > 1e-3
    assert differ > 3


def slow_loss(
    model: LanguageModel, ids: list[int], start: int, push: torch.Tensor | None = None, held: list[int] | None = None
) -> float:
    """Mean cross-entropy of a response, something added after layer 0, and dimensions kept after layer 3."""
    layers = [layer.module for layer in model.layout.layers]
    top: list[torch.Tensor] = []

    def pushed(_module, _args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        at = slice(start - 1, len(ids) - 1)
        x[:, at] += x[:, at].norm(dim=-1, keepdim=True) * push
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def kept(_module, _args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        if top:
            x[..., held or []] = top[0][..., held or []]
        top.append(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [layers[3].register_forward_hook(kept)]
    with torch.no_grad():
        logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        if push is not None:
            handles.append(layers[0].register_forward_hook(pushed))
            logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return float(-sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))) / (len(ids) - start)


@pytest.mark.parametrize("read", [0.0, 4.0])
def test_a_second_encoding_has_an_effect_where_it_is_read(tiny_tokenizer, read: float) -> None:
    model = planted_model(tiny_tokenizer, copies=True, copies_read=read)
    texts = divided(model)
    fitted, reported = (harvested(model, part) for part in (texts.fitted, texts.reported))
    directions = concept_directions(FLAGS, fitted.residual[3], texts.fitted.labels)
    assert float(directions[:, list(COPIES.values())].abs().sum()) == pytest.approx(float(directions.abs().sum()))
    rows = effect_values(model, FLAGS, directions, texts.reported, reported, layer=1, dose=0.5, items=8)
    one = series_of("forced", {1: Part(rows, 0.0)})
    found = effects_result([one], texts.reported, resamples(texts.reported), layer=1, dose=0.5)
    assert len(found.directions) == 6
    for row in found.directions:
        assert (row.effect.estimate > 0) == (read > 0), row
        if not read:
            assert row.effect.estimate == pytest.approx(0, abs=1e-6)


def test_the_price_is_that_of_plain_forward_passes(tiny_llama: LanguageModel, finetuned) -> None:
    documents = [f"{word} over the hills and far away, {word}! " * 3 for word in ("up", "down", "left", "right")]
    packed = pack(tokenise(as_documents(documents), tiny_llama.tokenizer), "all", 0.0, 24, tiny_llama)
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
    first, last = price_result([series_of("forced", dict(zip((0, 9), parts, strict=True)))], "").models
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


def test_no_document_is_on_both_sides(tiny_llama: LanguageModel) -> None:
    passages = [replace(one, unit=f"document {i % 30}") for i, one in enumerate(toy_examples(90))]
    found = evaluation_texts(tiny_llama, FLAGS, passages, fit_items=99, items=99, chat=False, max_tokens=64)
    fitted, reported = ({one.unit for one in part.examples} for part in (found.fitted, found.reported))
    assert found.unit == "document"
    assert not fitted & reported
    assert len(fitted | reported) == 30
    assert Resamples(found.reported.unit).units == len(reported)


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
    draws = unassigned_draws(flags, ALIKE, seed=1)
    for found in draws:
        assert not set(found.flat_dims) & set(flags.flat_dims)
        assert [len(dims) for dims in found.dims] == [len(dims) for dims in flags.dims]
        assert found.targets == flags.targets
    assert len({found.dims for found in draws}) == 3
    assert unassigned_draws(flags, ALIKE, seed=1) == draws
    variance = np.random.default_rng(0).permutation(32) / 100 + 0.01
    lowest = np.argsort(variance)
    low = replace(flags, dims=((int(lowest[0]), int(lowest[1])), (int(lowest[2]), int(lowest[3]))))
    assert matched_dims(low, variance) == lowest[4:20].tolist()  # the next-lowest
    for found in unassigned_draws(low, variance):
        assert set(found.flat_dims) <= set(lowest[4:20].tolist())
    middle = replace(flags, dims=tuple((int(lowest[i]), int(lowest[i + 1])) for i in (14, 16)))
    pool, logs = matched_dims(middle, variance), np.log(variance)
    distance = np.abs(logs - logs[middle.flat_dims].mean())
    rest = set(range(32)) - {*pool, *middle.flat_dims}
    assert len(pool) == 16
    assert max(distance[pool]) <= min(distance[list(rest)])
    wide = FlagSpec(concepts=("sea",), dims=(tuple(range(20)),), d_model=32, targets={"resid_post.0": 1})
    with pytest.raises(UserError, match="12 of 32 dimensions are no flag's, and the control needs 20"):
        unassigned_draws(wide, ALIKE)


def test_a_part_is_read_back_as_it_was(tmp_path) -> None:
    rows = [
        Measured({"layer": 3, "place": "prompt"}, np.array([0.1, np.nan, 3])),
        Measured({"layer": 4, "place": "prompt"}, np.array([1.0])),
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
