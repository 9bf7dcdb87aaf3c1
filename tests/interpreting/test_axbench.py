"""AxBench's protocol on tiny models: what is written, chosen, read and reported, each against loops or a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting_judge import CountingJudge, letters
from sklearn.metrics import roc_auc_score

from trimtab.dictionaries import DictionaryInfo, FeatureStats, Standard
from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, Meaning, ToRate
from trimtab.interpreting.axbench import ARMS, Aim, AxBenchOptions, Concept, Ground, axbench, labelled_concepts
from trimtab.interpreting.axbench.arms import Read, _best_reader
from trimtab.interpreting.axbench.result import ArmUtility, make_result, over_both
from trimtab.interpreting.axbench.writing import FluencyCheck, Writer
from trimtab.interpreting.calibration import JudgeCalibration, Right
from trimtab.interpreting.instructions import Instructions, read_instructions
from trimtab.judges import Unjudged
from trimtab.lm import DecodeConfig, LanguageModel
from trimtab.stats import Interval, crossed_mean

SITE = "resid_post.3"
INSTRUCTIONS = Instructions(choosing=("the end", "an era"), reporting=("her hat", "in the inn", "a rather"))
OPTIONS = AxBenchOptions(arm=("features", "random"), factor=(0.5, 4.0), max_new_tokens=6, batch_size=5)
NOTHING = Interval(estimate=0, low=0, high=0, n=1)
CHECK = FluencyCheck(unsteered=NOTHING, loops=NOTHING, spam=NOTHING, shuffled=NOTHING)


def concepts(names: str) -> list[Concept]:
    return [Concept(exemplars=letters(name, "ghk")) for name in names]


@pytest.fixture
def planted(tiny_llama: LanguageModel) -> Standard:
    """Features 0 and 1 write z and q: the rows of the head that belong to them. The others are random."""
    head = tiny_llama.hf.get_output_embeddings().weight.detach()
    rows = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    for place, letter in enumerate("zq"):
        rows[place] = head[tiny_llama.tokenizer.convert_tokens_to_ids(letter)] - head.mean(0)
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", site=SITE)
    sae = Standard(rows.T, torch.zeros(12), rows, torch.zeros(32), info=info)
    largest = np.full(12, 20, np.float32)
    sae.feature_stats = FeatureStats(
        max_activation=largest, mean_activation=largest, firing_rate=np.ones(12), n_tokens=100
    )
    return sae


def writer(model: LanguageModel, unit: str = "relative", **more: Any) -> Writer:
    config = DecodeConfig(max_new_tokens=6, temperature=0, batch_size=4, **more)
    return Writer(model, model.site("resid_post.1"), INSTRUCTIONS, config, chat=True, positions="generated", unit=unit)


def steered_greedily(
    model: LanguageModel, prompt: list[int], direction: torch.Tensor, dose: float, n: int
) -> list[int]:
    """A loop without a cache, the direction added by a hook of the model's own layer at all decisions."""
    ids = list(prompt)

    def add(_module: object, _inputs: object, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = x.clone()
        x[:, len(prompt) - 1 :] += dose * x[:, len(prompt) - 1 :].norm(dim=-1, keepdim=True) * direction
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.hf.model.layers[1].register_forward_hook(add)
    try:
        for _ in range(n):
            with torch.no_grad():
                ids.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in model.eos_ids:
                break
    finally:
        handle.remove()
    return ids[len(prompt) :]


def test_one_decode_call_writes_what_a_loop_with_a_hook_does(tiny_llama: LanguageModel) -> None:
    """Mutation: pair rows with the edits of their neighbours, or instructions with factors in another order."""
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    aims = [Aim(row / row.norm(), 1.0) for row in rows]
    factors = [(0.3, 1.0), (0.7,), (0.2, 0.5)]
    made = writer(tiny_llama)
    found = made.under_directions(aims, factors)
    prompts = [tiny_llama.encode_text(text, chat=True) for text in INSTRUCTIONS.all]
    differ = set()
    for aim, mine, texts in zip(aims, factors, found, strict=True):
        for dose, by_instruction in zip(mine, texts, strict=True):
            for prompt, text in zip(prompts, by_instruction, strict=True):
                expected = steered_greedily(tiny_llama, prompt, aim.direction, dose, 6)
                assert text.text == tiny_llama.decode_ids(expected)
                differ.add(text.text)
                with torch.no_grad():
                    logp = tiny_llama.hf(torch.tensor([prompt + expected])).logits[0].log_softmax(-1)
                nll = -np.mean([float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(expected)])
                assert text.nll == pytest.approx(nll, abs=1e-4)
    assert len(differ) > 8


def test_the_feature_that_writes_a_letter_is_found_and_beats_random(
    tiny_llama: LanguageModel, planted: Standard
) -> None:
    """Mutation: report the first factor instead of the chosen one."""
    judge = CountingJudge()
    named = [replace(concept, feature=i) for i, concept in enumerate(concepts("zq"))]
    lines: list[str] = []
    found = axbench(
        tiny_llama,
        named,
        judge,
        INSTRUCTIONS,
        dictionary=planted,
        options=replace(OPTIONS, temperature=0),
        say=lines.append,
    )
    assert lines[0].startswith("28 answers to write and judge, of 168 tokens")  # 2 choose at 2 factors, 3 report at one
    assert judge.asked == 28 + 2 * 2 * 3  # the reported answers are read for other concepts, too
    assert len(found.answers()["text"]) == 28
    texts = found.by_arm["features"].texts
    assert all("zzz" in text for text in texts[0][1][:2])
    assert all("qqq" in text for text in texts[1][1][:2])
    scores = found.by_arm["features"].scores[..., 0]
    assert scores[:, 1, :2].min() > 1.5
    assert scores[:, 1, :2].min() > np.nanmax(found.by_arm["random"].scores[..., 0])
    assert [one.feature for one in found.concepts if one.arm == "features"] == [0, 1]
    assert (found.judge, found.version, found.choosing, found.reporting) == ("letters", "3", 2, 3)
    # zzz is no text that the model would write, so that it is not fluent.
    assert not found.by_arm["features"].ordinary[:, 1].any()
    assert found.by_arm["features"].scores[:, 1, :2, 2].max() == 0
    assert found.arms[0].of_others.estimate == 0
    assert found.arms[0].score is not None
    assert "not judged" in found.tables()["arms"].columns[-1].title


def utility(scores: np.ndarray[Any, Any], arm: str = "features") -> ArmUtility:
    shape = scores.shape[:3]
    return ArmUtility(
        arm=arm, factors=tuple(np.arange(1.0, shape[1] + 1)), features=(None,) * shape[0], scores=scores,
        ordinary=np.ones(shape, bool), texts=np.full(shape, "text").tolist(),
    )  # fmt: skip


def result(model: LanguageModel, *arms: ArmUtility) -> Any:
    made = concepts("abcdef"[: len(arms[0].scores)])
    ground = Ground(model=model, site=model.site(SITE), concepts=made, meanings=meanings_of(made), prompts=[])
    return make_result(ground, CountingJudge(), INSTRUCTIONS, "relative", CHECK, {}, arms)


def test_factors_are_chosen_on_some_instructions_and_scores_are_of_the_others(tiny_llama: LanguageModel) -> None:
    """Mutation: choose on all instructions, or on those that report."""
    rng = np.random.default_rng(0)
    scores, random = rng.uniform(0, 2, (2, 6, 4, 5, 3))
    scores[0, 1, 0, 1] = 0  # one score of three is 0
    found = result(tiny_llama, utility(scores), utility(random, "random"))

    def harmonic(values: np.ndarray[Any, Any]) -> float:
        return 0.0 if min(values) == 0 else 3 / sum(1 / v for v in values)

    table = {}
    for name, every in (("features", scores), ("random", random)):
        rows = []
        for concept in every:
            means = [np.mean([harmonic(concept[d, i]) for i in range(2)]) for d in range(4)]
            best = int(np.argmax(means))
            rows.append([harmonic(concept[best, i]) for i in range(2, 5)])
            table.setdefault(f"{name} factor", []).append(best + 1.0)
        table[name] = np.array(rows)
    features, of_random = found.arms
    expected = crossed_mean(table["features"].T)
    assert [features.score.estimate, features.score.low] == pytest.approx([expected.estimate, expected.low])
    paired = crossed_mean((table["features"] - table["random"]).T)
    assert [features.over_random.estimate, features.over_random.high] == pytest.approx([paired.estimate, paired.high])
    assert of_random.over_random is None
    mine = [one for one in found.concepts if one.arm == "features"]
    assert [one.factor for one in mine] == table["features factor"]
    assert [one.score.estimate for one in mine] == pytest.approx(table["features"].mean(1))
    assert features.factor == np.median(table["features factor"])


def test_answers_are_read_for_other_concepts(tiny_llama: LanguageModel) -> None:
    """Mutation: read them for their own, at the first factor, or those that chose."""
    scores = np.zeros((3, 2, 5, 3))
    scores[:, 1, :2] = 1  # the second factor is chosen
    unsteered = ["eeee"] * 5
    texts = np.full((3, 2, 5), "eeee", dtype=object)
    texts[:, 1, 2:] = np.array([["aaeb", "aaee", "abee"], ["bbea", "bbee", "beee"], ["acee", "abee", "bbbb"]])
    one = replace(utility(scores), texts=texts.tolist())
    made, judge = concepts("abc"), CountingJudge()
    found = result(tiny_llama, one).read_for_others(judge, meanings_of(made), unsteered, seed=0)
    assert judge.asked == 3 * 3
    possible = []
    for cycle in ((1, 2, 0), (2, 0, 1)):
        rows = [
            [
                judge.rate([ToRate(meaning=meanings_of(made)[cycle[c]], instruction="", text=text, unsteered="eeee")])
                for text in texts[c, 1, 2:]
            ]
            for c in range(3)
        ]
        possible.append(np.mean([[ratings[0].overall for ratings in row] for row in rows]))
    assert possible[0] != pytest.approx(possible[1])
    assert min(abs(found.arms[0].of_others.estimate - value) for value in possible) < 1e-12
    alone = result(tiny_llama, replace(one, scores=scores[:1], ordinary=one.ordinary[:1]))
    assert alone.read_for_others(judge, meanings_of(made[:1]), unsteered).arms[0].of_others is None


def test_what_the_judge_is_worth_stands_beside_scores(
    tiny_llama: LanguageModel, planted: Standard, tmp_path: Path
) -> None:
    """Mutation: take the calibration of any judge."""
    share = Interval(estimate=0.9, low=0.8, high=1.0, n=3)
    right = tuple(Right(what=what, accuracy=share, auc=share) for what in ("fires", "rates"))
    calibration = JudgeCalibration(
        judge="letters", version="3", concepts=3, texts=9, unjudged=0, seed=0, right=right, kinds=(),
        instruction=share, fluency=(),
    )  # fmt: skip
    found = kept_run(tiny_llama, planted, tmp_path, CountingJudge(), names="zq", calibration=calibration)
    assert found.judge_accuracy == share
    assert "itself right on 0.900 [0.800, 1.000] of labelled texts" in found.tables()["arms"].caption
    other = replace(calibration, version="2")
    with pytest.raises(UserError, match="the judge is letters, version 3"):
        kept_run(tiny_llama, planted, tmp_path / "other", CountingJudge(), calibration=other)


class Paid(CountingJudge):
    """Takes a coin for each text, and has some."""

    left: float = 41.0

    def cost(self, texts: Sequence[ToRate]) -> float:
        return float(len(texts))


def test_a_budget_that_would_be_exceeded_stops_before_anything_is_written(
    tiny_llama: LanguageModel, planted: Standard, tmp_path: Path
) -> None:
    """Mutation: ask until the budget is spent."""
    judge = Paid()
    with pytest.raises(UserError, match="judging 42 answers: it costs about 42, and 41 is left of the budget"):
        kept_run(tiny_llama, planted, tmp_path, judge)
    assert (judge.asked, list(tmp_path.iterdir())) == (0, [])
    judge.left = 42.0
    assert kept_run(tiny_llama, planted, tmp_path, judge).arms[0].gaps == 0


def test_what_is_not_judged_is_counted_and_is_no_zero(tiny_llama: LanguageModel) -> None:
    """Mutation: read NaN as 0."""
    scores = np.full((3, 2, 5, 3), 1.5)
    scores[0, 0, 3] = np.nan  # reports
    scores[1, 0, :2] = np.nan  # one factor cannot be chosen
    scores[2] = np.nan
    found = result(tiny_llama, utility(scores))
    (arm,) = found.arms
    assert arm.score.estimate == pytest.approx(1.5)
    assert (arm.concepts, arm.gaps) == (2, 1 + 2 + 10)
    first, second, third = found.concepts
    assert (first.score.n, first.gaps) == (2, 1)
    assert (second.factor, second.gaps) == (2.0, 2)
    assert (third.factor, third.score, third.gaps) == (None, None, 10)
    assert "13 answers were not judged" in found.headline()


def test_intervals_without_gaps_are_crossed_and_with_gaps_stay_near() -> None:
    values = np.random.default_rng(1).normal(size=(8, 5))
    expected = crossed_mean(values.T)
    found = over_both(values)
    assert found is not None
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high])
    values[0, 0] = np.nan
    with_gap = over_both(values)
    assert with_gap is not None
    assert with_gap.estimate == pytest.approx(np.mean([np.nanmean(row) for row in values]))
    assert with_gap.high - with_gap.low == pytest.approx(found.high - found.low, rel=0.3)
    assert over_both(np.full((2, 3), np.nan)) is None


OTHERS = 3 * 2 * 3
"""Answers of three concepts and two arms that report, read for other concepts at each call."""


class Unsure(CountingJudge):
    """Says nothing of every second text."""

    def rate(self, texts: Any) -> list[Any]:
        self.asked += len(texts)
        return [Unjudged("down") if i % 2 else self._rate(one) for i, one in enumerate(texts)]


def kept_run(
    model: LanguageModel, planted: Standard, keep: Path, judge: CountingJudge, names: str = "zqg", **more: Any
) -> Any:
    named = [replace(concept, feature=i) for i, concept in enumerate(concepts(names))]
    return axbench(
        model, named, judge, INSTRUCTIONS, dictionary=planted, options=OPTIONS, keep=keep, say=lambda line: None, **more
    )


def test_a_run_goes_on_where_it_was_cut_off(tiny_llama: LanguageModel, planted: Standard, tmp_path: Path) -> None:
    """Mutation: keep what one decode call wrote in one file."""
    first, second, third = (CountingJudge() for _ in range(3))
    whole = kept_run(tiny_llama, planted, tmp_path, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"answers-000{i}.json" for i in range(3)]
    (tmp_path / "answers-0001.json").unlink()
    again = kept_run(tiny_llama, planted, tmp_path, second)
    kept_run(tiny_llama, planted, tmp_path, third)
    assert (first.asked, second.asked, third.asked) == (42 + OTHERS, 14 + OTHERS, OTHERS)
    for name in ("features", "random"):
        np.testing.assert_array_equal(whole.by_arm[name].scores, again.by_arm[name].scores)
        assert whole.by_arm[name].texts == again.by_arm[name].texts
    assert str(whole.result.concepts) == str(again.result.concepts)  # bounds may be NaN, which equals nothing


def test_a_run_that_was_cut_off_before_it_reported_says_what_is_left(
    tiny_llama: LanguageModel, planted: Standard, tmp_path: Path
) -> None:
    """Mutation: count concepts whose answers are kept as written."""
    whole = kept_run(tiny_llama, planted, tmp_path, CountingJudge())
    for file in sorted(tmp_path.iterdir())[:2]:
        kept = json.loads(file.read_text())
        kept["arms"] = {name: [texts[:2] for texts in by_factor] for name, by_factor in kept["arms"].items()}
        file.write_text(json.dumps(kept))
    lines: list[str] = []
    judge = CountingJudge()
    named = [replace(concept, feature=i) for i, concept in enumerate(concepts("zqg"))]
    again = axbench(
        tiny_llama, named, judge, INSTRUCTIONS, dictionary=planted, options=OPTIONS, keep=tmp_path, say=lines.append
    )
    assert lines[0].startswith("12 answers to write and judge, of 72 tokens")  # two concepts, two arms, three report
    assert judge.asked == 12 + OTHERS
    assert str(again.result.concepts) == str(whole.result.concepts)


def test_judgements_that_are_missing_are_asked_for_again(
    tiny_llama: LanguageModel, planted: Standard, tmp_path: Path
) -> None:
    """Mutation: take an answer without a judgement as finished."""
    expected = kept_run(tiny_llama, planted, tmp_path / "whole", CountingJudge())
    with_gaps = kept_run(tiny_llama, planted, tmp_path / "kept", Unsure())
    assert sum(one.gaps for one in with_gaps.arms) == 12 + 9
    for first in (True, False):
        judge = CountingJudge()
        again = kept_run(tiny_llama, planted, tmp_path / "kept", judge)
        # Where what is judged now chooses another factor, answers that report are written anew.
        assert judge.asked >= 21 + OTHERS if first else judge.asked == OTHERS
        assert sum(one.gaps for one in again.arms) == 0
        assert str(again.result.concepts) == str(expected.result.concepts)
        for name in ("features", "random"):
            written = ~np.isnan(expected.by_arm[name].scores)
            np.testing.assert_array_equal(expected.by_arm[name].scores[written], again.by_arm[name].scores[written])


class Stuck(CountingJudge):
    """Explains all but one letter."""

    def explain(self, exemplars: Any) -> list[Any]:
        return [Unjudged("down") if one.name == "q" else meaning
                for one, meaning in zip(exemplars, super().explain(exemplars), strict=True)]  # fmt: skip


def test_a_concept_that_is_explained_later_is_added(
    tiny_llama: LanguageModel, planted: Standard, tmp_path: Path
) -> None:
    """Mutation: keep answers of the concepts that were explained, as such."""
    before = kept_run(tiny_llama, planted, tmp_path, Stuck())
    assert before.unexplained == (("q", "down"),)
    judge = CountingJudge()
    after = kept_run(tiny_llama, planted, tmp_path, judge)
    assert (judge.asked, after.names, after.unexplained) == (14 + OTHERS, ("z", "q", "g"), ())
    for name in ("features", "random"):
        assert [before.by_arm[name].texts[i] for i in (0, 1)] == [after.by_arm[name].texts[i] for i in (0, 2)]


def test_answers_to_something_else_are_refused(tiny_llama: LanguageModel, planted: Standard, tmp_path: Path) -> None:
    """Mutation: know concepts by their names, or leave out the arms that are given."""
    kept_run(tiny_llama, planted, tmp_path, CountingJudge())

    class Own:
        name, model, factors = "own", tiny_llama, (1.0,)

        def source(self, rows: Any) -> Any:
            raise AssertionError("it must not come so far")

    match = "made of other concepts or instructions, or with other options or arms"
    with pytest.raises(UserError, match=match):
        kept_run(tiny_llama, planted, tmp_path, CountingJudge(version="4"))
    with pytest.raises(UserError, match=match):
        kept_run(tiny_llama, planted, tmp_path, CountingJudge(), own_arms=[Own()])
    other = replace(concepts("z")[0], feature=0)
    other = replace(other, exemplars=replace(other.exemplars, has=other.exemplars.has[1:]))
    with pytest.raises(UserError, match=match):
        axbench(
            tiny_llama, [other, *(replace(c, feature=i) for i, c in enumerate(concepts("qg"), 1))], CountingJudge(),
            INSTRUCTIONS, dictionary=planted, options=OPTIONS, keep=tmp_path, say=lambda line: None,
        )  # fmt: skip


def test_arms_and_the_judge_never_share_exemplars(
    tiny_llama: LanguageModel, planted: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: fit arms on all exemplars, or show them all to the judge."""
    judges: list[Exemplars] = []
    arms: list[Exemplars] = []
    usual = ARMS["mean-difference"]

    def spied(ground: Ground) -> list[Aim]:
        arms.extend(concept.exemplars for concept in ground.concepts)
        return usual(ground)

    class Listening(CountingJudge):
        def explain(self, exemplars: Any) -> list[Any]:
            judges.extend(exemplars)
            return super().explain(exemplars)

    def run(made: list[Concept], *names: str) -> Any:
        judges.clear()
        return axbench(
            tiny_llama, made, Listening(), INSTRUCTIONS, dictionary=planted, options=replace(OPTIONS, arm=names),
            say=lambda line: None,
        )  # fmt: skip

    monkeypatch.setitem(ARMS, "mean-difference", spied)
    made = concepts("z")
    found = run(made, "mean-difference")
    whole = made[0].exemplars
    for kind in ("has", "lacks"):
        mine, theirs, every = ([id(one) for one in getattr(some, kind)] for some in (judges[0], arms[0], whole))
        assert sorted(mine + theirs) == sorted(every)
        assert len(mine) == len(theirs) == 4
    assert "Half of each concept's exemplars are the judge's" in found.tables()["arms"].caption
    # The feature of a concept is not fitted on its windows, but one that is found by texts is.
    found = run([replace(made[0], feature=0)], "features", "random")
    assert judges == [whole]
    assert "Half" not in found.tables()["arms"].caption
    run(made, "features")
    assert len(judges[0].has) == 4
    few = replace(made[0], exemplars=replace(whole, has=whole.has[1:]))
    with pytest.raises(UserError, match="7 texts have it and 8 lack it, where 8 of each are needed"):
        run([few], "probe")


def test_prompting_names_a_concept_that_has_a_name(
    tiny_llama: LanguageModel, planted: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: ask for what the judge looks for."""
    asked: list[str] = []
    usual = Writer.prompted

    def spied(self: Writer, wanted: Any, which: range) -> Any:
        asked.extend(wanted)
        return usual(self, wanted, which)

    monkeypatch.setattr(Writer, "prompted", spied)
    named, feature = concepts("zq")
    axbench(
        tiny_llama, [named, replace(feature, feature=1)], CountingJudge(), INSTRUCTIONS, dictionary=planted,
        options=replace(OPTIONS, arm=("prompt",)), say=lambda line: None,
    )  # fmt: skip
    assert asked == ["z", "the letter q"] * 2  # what chooses, and what reports


def test_random_is_not_the_best_arm(tiny_llama: LanguageModel) -> None:
    """Mutation: announce the arm with the highest score, whichever it is."""
    low, high = np.full((2, 2, 5, 3), 0.5), np.full((2, 2, 5, 3), 1.5)
    found = result(tiny_llama, utility(low), utility(high, "random"))
    assert found.headline().startswith(
        "features does best of 1 arm: 0.500 [0.500, 0.500] of 2 (random features 1.500 [1.500, 1.500]) on 3"
    )
    alone = result(tiny_llama, utility(high, "random")).headline()
    assert alone.startswith("random does best of 1 arm: 1.500 [1.500, 1.500] of 2 on")


def meanings_of(made: list[Concept]) -> list[Meaning]:
    explained = CountingJudge().explain([concept.exemplars for concept in made])
    return [meaning for meaning in explained if isinstance(meaning, Meaning)]


def ground(model: LanguageModel, made: list[Concept], dictionary: Standard | None = None) -> Ground:
    prompts = [model.encode_text(text, chat=True) for text in INSTRUCTIONS.choosing]
    meanings = meanings_of(made)
    return Ground(
        model=model, site=model.site(SITE), concepts=made, meanings=meanings, prompts=prompts, dictionary=dictionary
    )


def test_directions_from_texts(tiny_llama: LanguageModel) -> None:
    """Mutation: subtract the texts that have a concept from those that lack it."""
    made = ground(tiny_llama, concepts("zq"))
    read = made.read(0)
    with torch.no_grad():
        out = tiny_llama.hf(torch.tensor([tiny_llama.encode_text("zz zz zz ")]), output_hidden_states=True)
    # Hidden states of the last layer are behind the norm, so that the layer below is compared.
    below = replace(made, site=tiny_llama.site("resid_post.2"), _reads={})
    torch.testing.assert_close(below.read(0).has[0], out.hidden_states[3][0, 1:], rtol=1e-4, atol=1e-4)
    has, lacks = (np.concatenate([x.numpy() for x in rows]) for rows in read)
    (aim, _) = ARMS["mean-difference"](made)
    expected = has.mean(0) - lacks.mean(0)
    np.testing.assert_allclose(aim.direction.numpy(), expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5)
    unit = expected / np.linalg.norm(expected)
    assert aim.largest == pytest.approx((has @ unit).max() - (lacks @ unit).mean(), rel=1e-4)
    probe = ARMS["probe"](made)[0].direction.numpy()
    labels = np.repeat([1, 0], [len(has), len(lacks)])
    assert roc_auc_score(labels, np.concatenate([has, lacks]) @ probe) > 0.95
    random = ARMS["random"](made)
    assert abs(float(random[0].direction @ random[1].direction)) < 0.9


def test_a_direction_is_learned_that_writes_the_texts(tiny_llama: LanguageModel) -> None:
    """Mutation: ascend."""
    made = ground(tiny_llama, concepts("z"))
    learned, start = (ARMS[name](made)[0].direction for name in ("rank-one", "mean-difference"))
    prompt = made.prompts[0]
    answer = tiny_llama.encode_text("zz zz zz")

    def nll(direction: torch.Tensor) -> float:
        def add(_module: object, _inputs: object, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x = x.clone()
            x[:, len(prompt) - 1 :] += 0.4 * x[:, len(prompt) - 1 :].norm(dim=-1, keepdim=True) * direction
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = tiny_llama.hf.model.layers[3].register_forward_hook(add)
        with torch.no_grad():
            logp = tiny_llama.hf(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        handle.remove()
        return -float(np.mean([float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]))

    assert nll(learned) < nll(start) - 0.2
    assert nll(learned) < nll(torch.zeros(32)) - 0.5


def test_the_best_reader_has_the_highest_auc(planted: Standard) -> None:
    """Mutation: take the mean of a text's activations."""
    rng = torch.Generator().manual_seed(2)
    has, lacks = ([0.3 * torch.randn(n, 32, generator=rng) for n in range(3, 9)] for _ in range(2))
    for x, y in zip(has, lacks, strict=True):
        x[0] += 2 * planted.W_dec[5]  # one token of each text
        y += 0.8 * planted.W_dec[5]  # all tokens, less strongly
    read = Read(has, lacks)
    values = torch.stack([planted.encode(x).max(0).values for x in [*has, *lacks]]).detach().numpy()
    aucs = [roc_auc_score([1] * 6 + [0] * 6, column) for column in values.T]
    assert _best_reader(planted, read) == int(np.argmax(aucs))
    means = torch.stack([planted.encode(x).mean(0) for x in [*has, *lacks]]).detach().numpy()
    assert int(np.argmax([roc_auc_score([1] * 6 + [0] * 6, column) for column in means.T])) != int(np.argmax(aucs))


def test_what_cannot_be_is_refused(tiny_llama: LanguageModel, planted: Standard) -> None:
    def run(made: list[Concept], options: AxBenchOptions, dictionary: Standard | None = planted) -> None:
        axbench(
            tiny_llama, made, CountingJudge(), INSTRUCTIONS, site=SITE, dictionary=dictionary, options=options,
            say=lambda line: None,
        )  # fmt: skip

    with pytest.raises(UserError, match="features"):
        run(concepts("z"), replace(OPTIONS, arm=("feature",)))
    with pytest.raises(UserError, match="there is no SAE"):
        run(concepts("z"), OPTIONS, None)
    empty = Concept(exemplars=replace(letters("z", "gh"), has=()))
    with pytest.raises(UserError, match="the judge explains none"):
        run([empty], OPTIONS)
    planted.feature_stats = None
    with pytest.raises(UserError, match="without feature statistics"):
        run(concepts("z"), OPTIONS)
    with pytest.raises(UserError, match="without feature statistics"):
        run(concepts("z"), replace(OPTIONS, arm=("random",)))
    for wrong in ({"arm": ()}, {"factor": (1.0, 1.0)}, {"factor": (float("nan"),)}, {"positions": "some"}):
        with pytest.raises(UserError):
            replace(OPTIONS, **wrong)


def test_instructions_are_fixed_by_what_they_say(tmp_path: Path) -> None:
    """Mutation: take them in the order of the file."""
    texts = [f"Instruction {i}" for i in range(30)]
    files = {
        "as_alpaca.json": json.dumps([{"dataset": "d", "instruction": text} for text in texts]),
        "backwards.json": json.dumps(texts[::-1]),
        "lines.txt": "\n".join([*texts[10:], "", *texts[:10]]),
    }
    found = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        found.append(read_instructions(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert len({*found[0].choosing, *found[0].reporting}) == 10
    assert len(found[0].choosing) == 5
    shipped = read_instructions(n=20)
    assert not set(shipped.choosing) & set(shipped.reporting)
    for text in ("[1]", "{}", "[", json.dumps(["one"])):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="instructions"):
            read_instructions(tmp_path / "bad.json")


def test_labelled_texts_lack_the_other_labels(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [{"text": f"{label} {i}", "label": label} for label in ("sea", "hill") for i in range(3)]
    file.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    sea, hill = labelled_concepts(file)
    assert (
        {p.text for p in sea.exemplars.has} == {p.text for p in hill.exemplars.lacks} == {f"sea {i}" for i in range(3)}
    )
    assert len(sea.exemplars.has) == 3
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="1 labels"):
        labelled_concepts(file)
    file.write_text(json.dumps({"text": 1}))
    with pytest.raises(UserError, match="no text and label"):
        labelled_concepts(file)


@pytest.mark.real
def test_fluency_refuses_loops_spam_and_shuffled_words(real_model: LanguageModel) -> None:
    """Mutation: bound the likelihood from above alone; then loops pass but for their repetition."""
    config = DecodeConfig(max_new_tokens=32, temperature=1.0)
    made = Writer(
        real_model, real_model.site("resid_post.15"), read_instructions(), config, chat=True, positions="generated",
        unit="relative",
    )  # fmt: skip
    check = made.check_fluency(0)
    for spoiled in (check.loops, check.spam, check.shuffled):
        assert spoiled is not None
        assert spoiled.estimate > 0.9
    assert check.unsteered is not None
    assert check.unsteered.estimate < 0.4


def test_the_judge_is_asked_about_the_unsteered_answer(tiny_llama: LanguageModel, planted: Standard) -> None:
    seen: list[ToRate] = []

    class Listening(CountingJudge):
        def rate(self, texts: Any) -> list[Any]:
            seen.extend(texts)
            return super().rate(texts)

    options = replace(OPTIONS, temperature=0)
    axbench(
        tiny_llama, [replace(concepts("z")[0], feature=0)], Listening(), INSTRUCTIONS, dictionary=planted,
        options=replace(options, factor=(0.0, 1.0)), say=lambda line: None,
    )  # fmt: skip
    at_zero = seen[:2]
    assert [one.instruction for one in at_zero] == list(INSTRUCTIONS.choosing)
    assert [one.text for one in at_zero] == [one.unsteered for one in at_zero]
