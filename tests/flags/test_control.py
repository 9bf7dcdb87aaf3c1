"""What flags decide, measured where it is known: a tiny model with planted flags, and a judge of letters."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from letter_judge import LetterJudge
from numpy.typing import NDArray
from toy_corpus import PROMPTS, share_of, toy_examples

from trimtab.control import Setting, TaskPrompts
from trimtab.control.answers import ItemSet
from trimtab.control.arms.corrsteer import Correlations
from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.errors import UserError
from trimtab.flags import Example, FlagSource, FlagSpec, TrainedFlags, switched
from trimtab.flags.data.prompts import FRAMES, NEUTRAL_PROMPTS
from trimtab.flags.evaluation import FlagControl, control_prompts, measure_control
from trimtab.flags.evaluation.control_fit import fit_controls
from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.flags.evaluation.control_rates import Counts, difference, mean_difference, mean_rate, rate
from trimtab.flags.evaluation.control_result import ArmRate
from trimtab.flags.evaluation.control_task import ConceptTask
from trimtab.flags.switches import SwitchedRows
from trimtab.judges.concept_quality import measure_quality
from trimtab.lm import DecodeConfig, LanguageModel, Site, applied, capture, decode
from trimtab.lm.batch import TokenBatch
from trimtab.runs import json_safe, read_typed
from trimtab.stats import bootstrap_mean

NEUTRAL = (*PROMPTS, "Ho", "Gm", "Og", "Sm", "Hh", "SS")
ASKING = {"sea": ["Go", "Hm"], "war": ["Oh", "So"]}
OPTIONS = {"max_new_tokens": 6, "temperature": 0.5, "samples": 2, "validation_prompts": 3}


@pytest.fixture(scope="module")
def measured(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> FlagControl:
    return control_of(tiny_llama, finetuned)


def control_of(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], **changed) -> FlagControl:
    trained = finetuned["forced"]
    given = {
        "original": tiny_llama, "examples": toy_examples(), "plain": finetuned["plain"].model,
        "heldout": toy_examples(30, seed=7), "neutral": NEUTRAL, "asking": ASKING, **OPTIONS, **changed,
    }  # fmt: skip
    return measure_control(trained.model, trained.flags, LetterJudge(), **given)


def check_switchboard(result: FlagControl) -> None:
    """On is 1 and off is 0, on the diagonal and nowhere else."""
    assert [one.concept for one in result.concepts] == ["sea", "war"]
    for one in result.concepts:
        assert one.on is not None
        assert one.off is not None
        assert one.free is not None
        assert one.on.estimate > 0.9
        assert one.off.estimate < 0.2
        assert 0.1 < one.free.estimate < 0.8
        assert one.difference.estimate == pytest.approx(one.on.estimate - one.off.estimate)
        assert one.difference.low > 0.4
        assert one.suppressed.estimate == pytest.approx(one.asked_free.estimate - one.asked_off.estimate)
        assert one.conflict_asked.estimate < 0.05
        assert one.conflict_other.estimate > 0.9
    assert result.difference.estimate > 0.8
    rates = {row.switch: [one.estimate for one in row.rates] for row in result.board}
    assert rates["sea on"][0] > 0.9 > 0.2 > rates["sea on"][1]
    assert rates["war on"][1] > 0.9 > 0.2 > rates["war on"][0]


def test_on_is_one_and_off_is_zero(measured: FlagControl) -> None:
    check_switchboard(measured)


def ways(result: FlagControl, concept: str, prompts: str = "neutral") -> dict[str, ArmRate]:
    """Ways of control as they are, by name."""
    return {one.arm: one for one in result.arms if (one.prompts, one.concept, one.scale) == (prompts, concept, None)}


def check_arms(result: FlagControl) -> None:
    """Flags decide; writes of the same values elsewhere do not, and a finetuning without flags has no switch."""
    for concept in ("sea", "war"):
        arms = ways(result, concept)
        rates = {name: one.rate.estimate for name, one in arms.items() if one.rate is not None}
        assert rates["flags on"] > 0.9
        assert rates["flags off"] < 0.2
        assert rates["finetuned"] < 0.8
        assert rates["unsteered"] < 0.2
        assert arms["flags on"].difference is None
        assert arms["unsteered"].difference.estimate == pytest.approx(rates["flags on"] - rates["unsteered"])
        assert arms["unsteered"].kl.estimate == 0 < arms["flags on"].kl.estimate
        assert arms["prompting"].kl is None
        assert arms["flags on"].relative_dose > 0
        assert arms["mean difference"].chosen["tried"] == 8
        matched = arms["mean difference at equal kl"]
        assert matched.equal_kl == f"{int(matched.chosen['within'])} of 1"
        assert abs(matched.chosen["reached"] / matched.chosen["target"] - 1) <= 0.1 or not matched.chosen["within"]
        assert arms["mean difference"].equal_kl == ""
    check_elsewhere(result)


def check_elsewhere(result: FlagControl) -> None:
    """The same values along other dimensions decide nothing: the rate is as with flags free."""
    arms = ways(result, "all concepts")
    found, on = arms["unassigned dimensions"], arms["flags on"]
    assert found.rate.estimate == pytest.approx(arms["flags free"].rate.estimate, abs=0.25)
    assert found.difference.low > 0.1
    assert 0.3 < found.relative_dose / on.relative_dose < 3  # flags that a model holds by itself need less


def test_one_quantity_has_one_number(measured: FlagControl) -> None:
    """Rows of the comparison are those of the switchboard."""
    for one in measured.concepts:
        arms = ways(measured, one.concept)
        assert (arms["flags on"].rate, arms["flags off"].rate, arms["flags free"].rate) == (one.on, one.off, one.free)
        assert arms["flags off"].difference == one.difference
        asked = ways(measured, one.concept, "asked")
        assert (asked["flags off"].rate, asked["flags free"].rate) == (one.asked_off, one.asked_free)


def test_other_ways_of_control_stand_beside(measured: FlagControl) -> None:
    check_arms(measured)
    assert {*ways(measured, "all concepts")} >= {"flags on", "flags free", "finetuned", "finetuned, prompting"}
    assert "no SAE was given" in measured.missing["SAE feature"]
    for kind, way, expected in (("asked", "flags off", 0), ("conflict", "flags on", 1)):
        arms = ways(measured, "all concepts", kind)
        assert arms[way].rate.estimate == pytest.approx(expected, abs=0.3)
        assert arms[way].difference is None
        assert arms["flags free"].difference is not None
        assert arms["prompting"].kl is None
    assert "mean difference, subtracted" in {one.arm for one in measured.arms if one.prompts == "asked"}


def test_the_frontier_rises_with_strength(measured: FlagControl) -> None:
    of_flags = {one.scale: one for one in measured.frontier if one.arm == "flags on"}
    assert list(of_flags) == [0.0, 0.5, 1.0, 1.5]
    assert of_flags[0.0].rate.estimate < 0.2 < 0.9 < of_flags[1.0].rate.estimate
    whole = {one.scale: one for one in measured.frontier if one.arm == "mean difference"}
    assert whole[0.0].kl.estimate == 0 < whole[1.5].kl.estimate
    alone = {one.arm: one for one in measured.frontier if one.scale is None}
    assert list(alone) == ["flags free", "finetuned"]
    assert all(one.kl.estimate > 0 for one in alone.values())


def test_it_is_read_back_and_shows_itself(measured: FlagControl) -> None:
    assert json_safe(read_typed(FlagControl, json_safe(measured))) == json_safe(measured)
    assert re.match(
        r"concept rate with the flag on minus off: \+\d\.\d+ \[.*\] \(mean of 2 concepts, 7 neutral prompts, 2 texts "
        r"each; the judge's accuracy is 1.000 \[.*\] on 30 labelled texts, and not known on the model's\)",
        measured.headline(),
    )
    shown = measured.shown()
    titles = [table.title for table in shown.tables]
    assert titles[:3] == ["Flags on, off and free", "Switchboard", "Asked for one, another one on"]
    assert {"Ways of control", "Effect and divergence", "Accuracy of the judge"} <= {*titles}
    assert "Ways of control by concept" not in titles  # too long for a page
    assert {row.concept for row in measured.tables()["by concept"].rows} == {"sea", "war"}
    assert len(shown.figures) == 2
    assert measured.judge is not None
    assert [one.concept for one in measured.judge.concepts] == ["sea", "war"]
    assert len(measured.texts) == 4
    assert share_of("sea", [measured.texts[0].on]) == 1


def test_features_of_an_sae_are_tried(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(24, tiny_llama.d_model, generator=generator)
    info = DictionaryInfo(architecture="standard", model=tiny_llama.name, site="resid_post.1")
    sae = Standard(rows.T.clone(), torch.zeros(24), rows, torch.zeros(tiny_llama.d_model), info=info)
    result = control_of(
        tiny_llama, finetuned, dictionary=sae, features=3, compared=1, strength=(1.0,), equal_kl=False, plain=None
    )
    assert {one.concept for one in result.arms} == {"sea"}  # one concept needs no mean
    arm = ways(result, "sea")["SAE feature"]
    assert arm.chosen["features_tried"] == 3
    assert arm.chosen["origins"] == {"correlated with the label": 3}
    assert {one.arm for one in result.frontier} == {"flags free", "flags on", "mean difference", "SAE feature"}
    said = result.missing["finetuned without flags"]
    assert said == "no plain finetuning with the same settings and seed was given"


def test_without_the_original_there_is_the_switchboard_alone(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    result = control_of(tiny_llama, finetuned, original=None, heldout=())
    check_switchboard(result)
    assert (result.arms, result.frontier) == ((), [])
    assert result.missing == {"other ways of control": "the original model was not given"}
    assert "the judge's accuracy is not known" in result.headline()
    for changed, why in (
        ({"compared": 0}, "compared is 0"),
        ({"examples": ()}, "the examples that flags were trained on"),
    ):
        result = control_of(tiny_llama, finetuned, max_new_tokens=1, samples=1, **changed)
        assert result.missing["other ways of control"].startswith(why)
        assert result.arms == ()


def test_what_cannot_be_scaled_is_said(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags that change no distribution have no divergence that others could be brought to."""
    few = {"dose": (0.5,), "strength": (1.0,), "plain": None, "samples": 1, "max_new_tokens": 2, "compared": 1}
    monkeypatch.setattr("trimtab.flags.evaluation.control_comparison.mean_kl", lambda answers: 0.0)
    result = control_of(tiny_llama, finetuned, **few)
    why = result.missing["mean difference at equal kl, sea"]
    assert why == "flags on change no distribution on validation"
    assert "mean difference at equal kl" not in {one.arm for one in result.arms}


def test_prompts_are_none_that_were_trained_on() -> None:
    assert not {*control_prompts.NEUTRAL, *control_prompts.ASKING} & {*NEUTRAL_PROMPTS, *FRAMES}
    words = {"news": "newspapers and magazines", "sea": "the sea"}
    trained = [Example(prompt="Say something.", response="Well.")]
    found = control_prompts.neutral_prompts(words, trained)
    assert not {"Say something.", "Write some lines for a newspaper.", "Write a paragraph for a magazine."} & {*found}
    assert len(found) == len(control_prompts.NEUTRAL) - 3 >= 48


def check_judge_sees_texts(model: LanguageModel, trained: TrainedFlags) -> None:
    """What it is shown are the letters that were written, and no prompt."""
    judge = LetterJudge()
    measure_control(trained.model, trained.flags, judge, neutral=NEUTRAL, asking=ASKING, **OPTIONS)
    assert len(judge.shown) == 2 * (5 * 7 + 2 * 3 * 2)
    assert not any(prompt in text for text in judge.shown for prompt in NEUTRAL)


def test_the_judge_sees_texts_only(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    check_judge_sees_texts(tiny_llama, finetuned["forced"])


def test_rows_are_switched_each_by_itself(finetuned: dict[str, TrainedFlags]) -> None:
    """The same tokens as one source for each switch gives, and no log."""
    trained = finetuned["forced"]
    switches = [{"sea": True}, {}, {"war": 0.5, "sea": False}, {"war": None}]
    prompts = [trained.model.encode_text(prompt) for prompt in PROMPTS]
    config = DecodeConfig(max_new_tokens=6, temperature=1.0)
    source = SwitchedRows(trained.flags, switches)
    together = decode(trained.model, prompts, config, source, samples=range(4))
    for i, one in enumerate(switches):
        alone = FlagSource(trained.flags, one) if any(v is not None for v in one.values()) else None
        assert together.token_ids[i] == decode(trained.model, [prompts[i]], config, alone, samples=[i]).token_ids[0]
    assert len(together.edits) == 0
    assert source.relative_dose() > 0
    assert np.isnan(source.relative_dose(slice(1, 2)))  # all free


def check_divergence(original: LanguageModel, trained: TrainedFlags) -> None:
    """KL of each chosen token to the original model, against both models of transformers on the same tokens."""
    reader = TextReader(LetterJudge(), trained.flags.concepts)
    task = ConceptTask({"test": ["Go", "Hmm"]}, "sea", reader, max_new_tokens=5)
    items = ItemSet.of(
        Setting(model=original, dictionary=None, site=None), TaskPrompts.of(original, task, task.items("test"))
    )
    found = items.answer(SwitchedRows(trained.flags, [{"sea": 1.0}]), model=trained.model, kl=True)
    assert found.decoded is not None
    assert found.kl is not None
    for row, prompt in enumerate(found.decoded.prompts):
        tokens = found.decoded.token_ids[row]
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            q = original.hf(ids).logits[0, -len(tokens) :].log_softmax(-1)
            with switched(trained.model, trained.flags, sea=True):
                p = trained.model.hf(ids).logits[0, -len(tokens) :].log_softmax(-1)
        assert float(found.kl[row]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_divergence_is_from_the_original_model(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    check_divergence(tiny_llama, finetuned["forced"])


def test_directions_are_differences_of_means_over_responses(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    flags, examples = finetuned["forced"].flags, toy_examples(9)
    site = Site.parse("resid_post.2")
    fitted = fit_controls(tiny_llama, flags, examples, [site], batch_size=4)
    means = []
    for example in examples:
        prompt, response = (tiny_llama.encode_text(text) for text in (example.prompt, example.response))
        x = capture(tiny_llama, TokenBatch.full(torch.tensor([[*prompt, *response]])), [site])[site]
        means.append(x[0, len(prompt) :].mean(dim=0))
    has = torch.tensor(["war" in example.concepts for example in examples])
    x = torch.stack(means)
    torch.testing.assert_close(fitted.directions["war"][site], x[has].mean(0) - x[~has].mean(0), rtol=1e-4, atol=1e-5)
    assert fitted.features == {"sea": [], "war": []}


def test_features_are_those_that_go_with_the_label() -> None:
    rng = np.random.default_rng(0)
    has = rng.random(40) < 0.5
    codes = rng.random((40, 6))
    codes[:, 3] += 2 * has
    codes[:, 4] = 0.7
    codes[:, 5] -= 2 * has
    sums, y = Correlations(6), torch.tensor(has).double()
    for part in (slice(0, 17), slice(17, 40)):
        sums.see(torch.tensor(codes[part]), y[part])
    found = sums.values(y)
    known = [0, 1, 2, 3, 5]
    assert found[known].tolist() == pytest.approx([np.corrcoef(codes[:, i], has)[0, 1] for i in known])
    assert found[4] == -np.inf


def check_prompts_are_resampled() -> None:
    """Copies of a text add nothing to what is known."""
    rng = np.random.default_rng(3)
    has = rng.random((20, 1)) < 0.4
    many = Counts.of(np.repeat(has, 8, axis=1), np.ones((20, 8), bool))
    of_prompts = bootstrap_mean(has[:, 0].astype(float))
    found = rate(many)
    assert found is not None
    assert found.n == 20
    assert found.high - found.low == pytest.approx(of_prompts.high - of_prompts.low, rel=0.1)
    other = Counts.of(np.repeat(~has, 8, axis=1), np.ones((20, 8), bool))
    gap, single = difference(many, other), difference(Counts.of(has, has | True), Counts.of(~has, has | True))
    assert gap is not None
    assert single is not None
    assert gap.high - gap.low == pytest.approx(single.high - single.low, rel=0.1)


def test_intervals_resample_prompts() -> None:
    check_prompts_are_resampled()


def test_rates_count_fluent_texts_alone() -> None:
    has = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)
    fluent = np.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool)
    counts = Counts.of(has, fluent)
    assert counts.rate == pytest.approx(2 / 5)
    found = rate(counts)
    assert found is not None
    assert found.estimate == pytest.approx(2 / 5)
    assert found.n == 3  # a prompt without a fluent text says nothing
    assert rate(Counts.of(has, fluent & False)) is None
    assert difference(counts, Counts.of(has, fluent & False)) is None
    assert mean_rate([counts, Counts.of(has, fluent & False)]) is None


def test_where_all_prompts_agree_there_still_is_an_interval() -> None:
    all_, none = (Counts.of(np.full((12, 2), value), np.ones((12, 2), bool)) for value in (True, False))
    on, off, gap = rate(all_), rate(none), difference(all_, none)
    assert on is not None
    assert off is not None
    assert gap is not None
    assert (on.estimate, on.high) == (1, 1)
    assert 0.7 < on.low < 0.8  # Wilson, 12 of 12
    assert gap.estimate == gap.high == 1
    assert gap.low == pytest.approx(1 - np.hypot(1 - on.low, off.high))
    both = mean_difference([(all_, none), (all_, none)])
    assert both is not None
    assert both.low == pytest.approx(gap.low)
    assert mean_rate([all_, all_]).low == pytest.approx(on.low)


class Silent:
    concepts = ("sea", "war")

    def has(self, texts: list[str]) -> list[bool]:
        return [True] * len(texts)


WRONG = {
    "a judge of nothing": ({"judge": object()}, "the object that is to judge: it has no method has(texts); give a"),
    "a judge of other things": (
        {"judge": type("Other", (LetterJudge,), {"concepts": ("sea", "wars")})()},
        "concept 'war': the judge knows sea, wars; did you mean wars?",
    ),
    "a judge that says too little": ({"judge": Silent()}, "it answers ("),
    "an option": ({"sampels": 2}, "measure_control(sampels=…)"),
    "greedy samples": ({"temperature": 0.0}, "samples 2: greedy decoding gives the same text every time"),
    "few prompts": (
        {"neutral": ("Go", "Hm", "Oh")},
        "the neutral prompts: there are 3: 3 for validation, and at least 2 must",
    ),
    "a prompt twice": (
        {"neutral": ("Go", "Go", "Oh", "Hm", "So")},
        "the neutral prompts: the same prompt is in the list",
    ),
    "one text": ({"neutral": "Go"}, "the neutral prompts: they must be several texts"),
    "asking for something else": ({"asking": {"see": ["Go"]}}, "concept 'see': the flags are sea, war; did you mean"),
    "asking for one alone": ({"asking": {"sea": ["Go"]}}, "prompts that ask for 'war': there is none"),
    "too few examples": ({"examples": toy_examples(3)}, "concept 'sea': 1 of 3 examples have it"),
    "an unknown label": (
        {"heldout": [Example(prompt="a", response="b", concepts=["saa"])]},
        "concept 'saa': the flags are sea, war; did you mean sea?",
    ),
    "a strength": ({"strength": (-1.0,)}, "strength -1.0: it must be from 0 to below 1000; change it"),
    "no dose": ({"dose": ()}, "dose: there is none; give at least one number"),
    "a judge that knows the examples": (
        {"judge": type("Knows", (LetterJudge,), {"has_seen": lambda _, texts: [True, *[False] * (len(texts) - 1)]})()},
        "the judge: 1 of the texts that it was fitted or measured on are responses that the model was trained on",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], case: str) -> None:
    changed, message = WRONG[case]
    trained = finetuned["forced"]
    given = {
        "judge": LetterJudge(), "original": tiny_llama, "examples": toy_examples(), "neutral": NEUTRAL,
        "asking": ASKING, **OPTIONS, **changed,
    }  # fmt: skip
    with pytest.raises(UserError, match=re.escape(message)):
        measure_control(trained.model, trained.flags, given.pop("judge"), **given)


def test_writes_that_nothing_reads_do_nothing(tiny_llama: LanguageModel) -> None:
    """But for the scale of the norm, of second order where the dimensions hold nothing. Where they are read, the same
    write shows."""
    hf, dims = copy.deepcopy(tiny_llama.hf), [3, 17]
    spec = FlagSpec(concepts=("sea",), dims=((3, 17),), d_model=32, targets={"resid_mid.1": 0.05, "resid_post.2": 0.1})
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "norm" in name or "o_proj" in name or "down_proj" in name:
                weight[dims] = 0
            elif "embed" in name:
                weight[:, dims] = 0
    deaf = LanguageModel.from_hf(hf, tiny_llama.tokenizer, "deaf")
    ids, last = torch.tensor([tiny_llama.encode_text("over the hills")]), Site.parse("resid_post.3")
    moved = []
    for model in (deaf, tiny_llama):
        with torch.no_grad():
            plain = model.hf(ids).logits
            with applied(model, SwitchedRows(spec, [{"sea": True}])):
                moved.append(float((model.hf(ids).logits - plain).abs().max()))
                x = capture(model, TokenBatch.full(ids), [last])[last]
        assert torch.equal(x[0, :, dims], torch.full_like(x[0, :, dims], 0.1)) == (model is deaf)  # it stays there
    assert moved[0] < 0.1 * moved[1]


class Careless(LetterJudge):
    """Right about `sea`; finds `war` in every text."""

    def has(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        found = super().has(texts)
        found[:, 0] = True
        return found


def test_the_accuracy_of_the_judge_is_balanced() -> None:
    """Half of what is found where it should be and of what is not where it should not: 0.5 for who says always yes."""
    judge = Careless()
    found = TextReader(judge, ("sea", "war")).quality(toy_examples(30))
    assert found is not None
    sea, war = found.concepts
    assert (sea.accuracy.estimate, sea.recall.estimate, sea.false_positives.estimate) == (1, 1, 0)
    assert (war.accuracy.estimate, war.recall.estimate, war.false_positives.estimate) == (0.5, 1, 1)
    assert TextReader(judge, ("sea", "war")).quality(()) is None


def test_a_judge_may_say_itself_how_good_it_is() -> None:
    judge, examples = Careless(), toy_examples(30)
    labels = np.array([[concept in example.concepts for concept in judge.concepts] for example in examples])
    judge.quality = measure_quality(judge.concepts, judge.has([one.response for one in examples]), labels, fitted=9)
    assert TextReader(judge, ("sea", "war")).quality(()) is judge.quality


def test_ties_are_decided_by_how_sure_the_judge_is() -> None:
    class Sure(LetterJudge):
        def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
            return np.array([[0, min(len(text), 10) / 10] for text in texts])

    found = []
    for judge in (Sure(), LetterJudge()):
        task = ConceptTask({"test": ["Go", "Hm", "Oh"]}, "sea", TextReader(judge, ("sea", "war")))
        found.append([one.reward for one in task.score(task.items("test"), ["a cab", "a cabbac", "xyz zyx"])])
    assert found[0] == pytest.approx([0.9995, 0.9998, 0.0007])
    assert found[1] == [1, 1, 0]
