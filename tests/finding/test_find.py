"""The whole search: what is planted is found and proven, what is not there is not claimed, and runs go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_wishes import (
    HELD_FEATURE,
    N_FEATURES,
    PAIR,
    PEAK_FEATURE,
    SITE,
    SITES,
    UP_FEATURE,
    Ground,
    contrast_wish,
    random_words,
    texts_wish,
    words_wish,
)  # fmt: skip
from rich.console import Console

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.finding import Contrast, Found, TaskReward, Texts, Want, Wish, find, generated
from trimtab.finding import finding as finding_module
from trimtab.finding import ground as ground_module
from trimtab.finding import search as search_module
from trimtab.finding import sets as sets_module
from trimtab.finding import ways as ways_module
from trimtab.finding.examples import divide
from trimtab.finding.result import FOUND, HARDLY_DIFFER, RANDOM
from trimtab.finding.search import Search
from trimtab.finding.taken_away import evidence_of
from trimtab.finding.wish_score import wish_score
from trimtab.finding.wishes import WrittenPair
from trimtab.lm import DecodeConfig, LanguageModel, decode, quick
from trimtab.stats import Interval, number_text
from trimtab.steering import load
from trimtab.tasks import PromptTask

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))
from planted_readout import Planted  # pyright: ignore[reportMissingImports]

ONE = DecodeConfig(max_new_tokens=1)
DOSES = (0.1, 0.2, 0.4, 0.8, 1.6)
SMALL: dict[str, Any] = {
    "examples": (6, 6, 10), "n_neutral": (2, 3), "max_new_tokens": 6, "way": (), "set_size": 1, "budget": "none",
    "dose": DOSES,
}  # fmt: skip


def search(ground: Ground, wish: Wish, **options: Any) -> Found:
    return find(ground.model, list(ground.saes.values()), wish, **{**SMALL, **options})


def share_of_y(_prompt: str, answer: str) -> float:
    return (answer.count("Y") - answer.count("N")) / 4 + 0.001 * len(set(answer))


def written() -> tuple[WrittenPair, ...]:
    wish = texts_wish(40)
    return tuple(WrittenPair("ab cd", yes, no) for yes, no in zip(wish.wanted, wish.unwanted, strict=True))


WISHES: dict[str, Callable[[], Wish]] = {
    "texts": lambda: texts_wish(40),
    "contrast": lambda: contrast_wish(40),
    "words": lambda: words_wish(40),
    "want": lambda: Want(text="the letter Y", written=written()),
    "task": lambda: TaskReward(task=Planted.load(), items=60),
    "long-task": lambda: TaskReward(
        task=PromptTask({"train": [f"{w}\n" for w in random_words(40, 6, 5)]}, share_of_y, max_new_tokens=3)
    ),
}


@pytest.mark.parametrize("kind", WISHES)
def test_the_planted_feature_is_found_with_sign_and_layer(ground: Ground, kind: str) -> None:
    found = search(ground, WISHES[kind]())
    (part,) = found.found.parts
    assert (part.site, part.feature) == (str(SITE), UP_FEATURE)
    assert part.dose < 0
    assert found.yes
    about = " (the letter Y)" * (kind == "want")
    assert found.headline().startswith(f"Yes{about}: {SITE} feature {UP_FEATURE} -")
    assert found.features[0].feature == UP_FEATURE
    assert found.features[0].dose < 0
    assert found.features[0].origin in ("gradient", "reads")
    assert found.random.shown.effect.estimate < found.found.shown.effect.estimate


def test_the_dose_is_the_best_on_the_grid(ground: Ground) -> None:
    """Q is likeliest at one dose of its feature, and less likely at once when there is more."""
    from trimtab.finding.scoring import scorer
    from trimtab.finding.steering_edit import Part, SteeringEdit
    from trimtab.steering import DirectionTable

    wish = words_wish(40, more=("Q",), less=())
    (part,) = search(ground, wish).found.parts
    assert (part.site, part.feature) == (str(SITE), PEAK_FEATURE)
    report = divide(wish.examples(ground.model), SMALL["examples"])["report"]
    fine = np.geomspace(0.05, 2.0, 60)
    edits = [SteeringEdit((Part(SITE, PEAK_FEATURE, dose),)) for dose in fine]
    tables = {site: DirectionTable.of(sae) for site, sae in ground.saes.items()}
    effects = scorer(ground.model, report, SITES).effects(tables, edits).mean(1)
    best = float(fine[int(effects.argmax())])
    assert best / 2 < part.dose < best * 2  # one step of the grid


def test_a_pair_that_works_only_together(ground: Ground) -> None:
    wish = words_wish(40, more=("K",), less=())
    single, pair = search(ground, wish, shortlist=24), search(ground, wish, set_size=2)
    assert {part.feature for part in pair.found.parts} == set(PAIR)
    assert pair.found.shown.effect.low > 5
    assert single.found.shown.effect.high < 1.5
    for part in pair.found.parts:
        assert part.writes is not None
        assert part.writes.high < 0.5
    assert pair.found.tried > sum(one.origin != "random" for one in pair.features)


def test_the_budget_holds(ground: Ground) -> None:
    wish = contrast_wish(40)
    dear, cheap = search(ground, wish), search(ground, wish, budget="KL=0.3")
    tiny = search(ground, wish, budget="KL=0.001")
    for found, most in ((cheap, 0.3), (tiny, 0.001)):
        assert found.found.shown.kl.estimate < 1.5 * most < dear.found.shown.kl.estimate
        assert found.found.shown.effect.estimate < dear.found.shown.effect.estimate
        (part,) = found.found.parts
        assert part.feature == UP_FEATURE
    assert abs(tiny.found.parts[0].dose) < DOSES[0]


def shuffled(wish: Contrast, seed: int) -> Contrast:
    """The same prompts, each with its answers exchanged or not."""
    rng = np.random.default_rng(seed)
    rows = [
        {**row, "wanted": row["unwanted"], "unwanted": row["wanted"]} if rng.random() < 0.5 else row
        for row in wish.rows
    ]
    return Contrast(rows=tuple(rows))


def of_shuffled(ground: Ground, seed: int, wishes: int) -> list[Found]:
    """What is found for wishes whose labels are shuffled, where many features do a little."""
    saes = [ground.saes[site] for site in SITES if site != SITE]
    few = {**SMALL, "n_neutral": (2, 2), "shortlist": 24, "dose": (0.4, 0.8), "max_new_tokens": 2, "seed": seed}
    made = [shuffled(contrast_wish(44, seed=100 * seed + i), i) for i in range(wishes)]
    return [find(ground.model, saes, wish, **few) for wish in made]


def test_what_no_feature_serves_is_not_claimed(ground: Ground) -> None:
    found = of_shuffled(ground, 0, 4)
    assert not any(one.yes for one in found)
    assert not any(one.found.shown.effect.low > 0 for one in found)
    assert found[0].headline().startswith("No: no feature is shown to serve the wish.")


@pytest.mark.slow
def test_at_most_one_in_twenty_is_claimed(ground: Ground) -> None:
    for seed in range(3):
        assert sum(one.yes for one in of_shuffled(ground, seed, 20)) <= 1


def test_a_report_on_what_chose_shows_effects_that_are_not_there(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: the examples that chose are those that are reported."""
    real = finding_module.divide

    def same(*given: Any) -> Any:
        splits = real(*given)
        return {**splits, "choice": splits["report"], "candidates": splits["report"]}

    monkeypatch.setattr(finding_module, "divide", same)
    assert sum(one.found.shown.effect.low > 0 for one in of_shuffled(ground, 0, 12)) >= 3


def test_alternatives_at_equal_dose_and_equal_price(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding_module, "quick_copy", lambda model: model)  # choices as exact as the report
    found = search(ground, texts_wish(90), way=finding_module.FindOptions().way, examples=(8, 8, 12), budget="KL=1")
    assert "28 of 90 examples are used at most, which the option examples raises" in found.notes
    assert "gradients are of 8 examples; below 24 their ranking is mostly noise" in found.notes
    names = {way.name for way in found.ways}
    assert names >= {"found", "random", "activation-difference", "mean-difference", "learned-vector", "prompting"}
    assert names >= {"delta-confidence", "output-score"}
    best, priced = found.found, 0
    for way in found.ways:
        if way.equal_dose is not None:
            assert way.equal_dose.dose == pytest.approx(best.shown.dose)
        if way.name != FOUND and way.equal_kl is not None:
            assert way.behind is not None
            difference = best.shown.effect.estimate - way.equal_kl.effect.estimate
            assert way.behind.estimate == pytest.approx(difference, abs=1e-9)
            assert way.own is None
            if way.name != RANDOM:  # of whose draws it is the mean
                priced += 1
                if len(way.parts) == 1:  # what is named is at the dose that is shown
                    assert abs(way.parts[0].dose) == pytest.approx(way.equal_kl.dose)
                assert way.equal_kl.kl.estimate == pytest.approx(best.shown.kl.estimate, rel=0.06)
    assert priced >= 4
    vector = found["learned-vector"]
    assert vector.shown.effect.low > 0
    assert found.curse.estimate == pytest.approx(best.chosen_effect.estimate - best.shown.effect.estimate)
    assert found.judge.name == "classifier of the wish's texts"
    assert best.written.change is not None
    for low, doubt in ((0.01, ""), (0.0, "; it does not show the wish")):
        written = replace(best.written, change=replace(best.written.change, low=low))
        read = replace(found, ways=(replace(best, written=written), *found.ways[1:]))
        assert evidence_of(read)[-1].note == f"read by {found.judge.name}, neutral prompts{doubt}"
    assert best.written.read is not None
    assert best.written.read.method == "wilson"
    assert len(found.texts) == 3
    assert set(found.texts[0].texts) == {"unsteered", *names}
    assert found.plot().get_xlabel().startswith("KL")
    for table in found.tables().values():
        table.to_frame()


def matched_on_other_text(patch: pytest.MonkeyPatch) -> None:
    """Mutation: equal prices are looked for on the text for choosing."""
    real = ground_module.Ground.kl

    def other(self: Any, split: str, edits: Any) -> Any:
        return real(self, "choice" if self.quick is self else split, edits)

    patch.setattr(finding_module, "quick_copy", _apart)
    patch.setattr(ground_module.Ground, "kl", other)


def _apart(model: LanguageModel) -> LanguageModel:
    """The same model as another object, so that choices and report are told apart."""
    return LanguageModel(model.hf, model.tokenizer, model.name)


def matched_at_three_times_the_price(patch: pytest.MonkeyPatch) -> None:
    real = search_module.match_kls
    patch.setattr(search_module, "match_kls", lambda kl, targets, **more: real(kl, [3 * t for t in targets], **more))


@pytest.mark.parametrize("mutation", [matched_on_other_text, matched_at_three_times_the_price])
def test_prices_that_are_not_equal_show(
    ground: Ground, mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prices_are_equal() -> bool:
        found = search(ground, texts_wish(60), way=("mean-difference", "learned-vector"), budget="KL=1")
        priced = [found[name].equal_kl for name in ("mean-difference", "learned-vector")]
        target = pytest.approx(found.found.shown.kl.estimate, rel=0.06)
        return all(one is not None and one.kl.estimate == target for one in priced)

    assert prices_are_equal()
    mutation(monkeypatch)
    assert not prices_are_equal()


def test_ways_that_choose_the_same_are_all_compared(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("delta-confidence", "output-score"):
        monkeypatch.setitem(ways_module.WAYS, name, ways_module.by_activation_difference)
    found = search(ground, texts_wish(60), way=tuple(ways_module.WAYS), budget="KL=1")
    same = [found[name] for name in ("activation-difference", "delta-confidence", "output-score")]
    assert len({way.label for way in same}) == 1
    assert all(way.equal_kl is not None for way in same)
    assert len({way.behind for way in same}) == 1


def test_a_removal_is_found(ground: Ground) -> None:
    """What is held everywhere favours N more than Y; subtracting it costs as much as removing it."""
    sae = ground.saes[SITE]
    only = Standard(*(_rows(getattr(sae, name), [HELD_FEATURE, 2, 5]) for name in Standard.shapes), info=sae.info)
    found = find(ground.model, only, contrast_wish(40), **{**SMALL, "dose": (0.001, 0.002)})
    assert found.found.operation == "ablate"
    assert [part.feature for part in found.found.parts] == [0]
    assert found.found.equal_dose is None
    assert found.yes
    assert found.features[0].origin == "removal"
    cheap = find(ground.model, only, contrast_wish(40), **{**SMALL, "budget": "KL=0.0001"})
    assert cheap.found.operation == "add"  # the removal costs more


def _rows(values: torch.Tensor, which: list[int]) -> torch.Tensor:
    """Of a dictionary's weights, the features'; all of what is of none."""
    if values.shape == (N_FEATURES,):
        return values[which]
    if values.ndim == 2:
        return values[which] if values.shape[0] == N_FEATURES else values[:, which]
    return values


def test_rough_choices_are_nearly_the_exact_ones(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, wherever this runs."""
    reported = []
    for fast in (False, True):
        monkeypatch.setattr(quick, "fast_bfloat16", lambda _device, fast=fast: fast)
        reported.append(search(ground, texts_wish(60), budget="KL=1", way=("mean-difference",)))
    exact, rough = reported
    assert [part.feature for part in rough.found.parts] == [part.feature for part in exact.found.parts] == [UP_FEATURE]
    assert rough.found.shown.effect.estimate == pytest.approx(exact.found.shown.effect.estimate, rel=0.1)


def stages(ground: Ground, patch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which of the two models runs in each stage of a search, where choices have one of their own."""
    copied, found = _apart(ground.model), dict[str, set[str]]()
    copied.name = "quick"
    forward, gradients, learn, kl = (
        LanguageModel.call, sets_module.first_order, ways_module.learn, ground_module.Ground.kl,
    )  # fmt: skip
    stage = ["choosing"]

    def call(model: LanguageModel, **arguments: Any) -> Any:
        found.setdefault(stage[-1], set()).add(model.name)
        return forward(model, **arguments)

    def during(name: str, real: Any) -> Any:
        def wrapped(*given: Any, **more: Any) -> Any:
            stage.append(name)
            try:
                return real(*given, **more)
            finally:
                stage.pop()

        return wrapped

    def priced(self: Any, split: str, edits: Any) -> Any:
        return during("price", kl)(self, split, edits) if stage[-1] == "report" else kl(self, split, edits)

    patch.setattr(finding_module, "quick_copy", lambda _model: copied)
    patch.setattr(LanguageModel, "call", call)
    patch.setattr(ground_module, "first_order", during("gradients", gradients))
    patch.setattr(sets_module, "first_order", during("gradients of sets", gradients))
    patch.setattr(ways_module, "learn", during("learning", learn))
    patch.setattr(Search, "_measure", during("report", Search._measure))
    patch.setattr(Search, "_at_price", during("looking for a price", Search._at_price))
    patch.setattr(search_module, "write", during("texts", search_module.write))
    patch.setattr(ground_module.Ground, "kl", priced)
    search(ground, texts_wish(60), budget="KL=1", way=("learned-vector", "prompting"), set_size=2)
    return found


def test_choices_are_quick_and_gradients_and_the_report_exact(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, both = ground.model.name, {ground.model.name, "quick"}
    assert stages(ground, monkeypatch) == {
        "choosing": both,  # neutral text, and the found one's effect where it was chosen, which is reported
        "gradients": {exact}, "gradients of sets": {exact}, "learning": {exact},
        "report": {exact}, "looking for a price": {"quick"}, "price": {exact}, "texts": {exact},
    }  # fmt: skip


def quick_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Search, "_measure", lambda self, choices, real=Search._measure: real(_quickly(self), choices))


def _quickly(search: Search) -> Search:
    return Search(ground=search.ground.quick)


def quick_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ground_module.Ground, "exact", property(lambda self: self))


@pytest.mark.parametrize("mutation", [quick_report, quick_gradients])
def test_another_division_shows(
    ground: Ground, mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    found = stages(ground, monkeypatch)
    assert "quick" in found["report"] | found["gradients of sets"] | found["learning"]


def test_the_judge_has_not_seen_what_chose(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = generated.ConceptJudge.fit

    def fit(texts: list[str], *rest: Any) -> Any:
        seen.extend(texts)
        return real(texts, *rest)

    monkeypatch.setattr(generated.ConceptJudge, "fit", fit)
    wish = texts_wish(60)
    search(ground, wish)
    splits = divide(wish.examples(ground.model), SMALL["examples"])
    for split in ("candidates", "choice"):
        for example in splits[split].examples:
            assert not {splits[split].wanted[example.id], splits[split].unwanted[example.id]} & set(seen)
    assert len(seen) == 2 * (60 - 12)


def test_a_run_goes_on_and_is_read_back(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish, place = contrast_wish(40), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Search, "report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search(ground, wish, run=place)
    found = search(ground, wish, run=place)
    with monkeypatch.context() as patch:  # nothing is searched again
        patch.setattr(Search, "choices", lambda *_: 1 / 0)
        again = search(ground, wish, run=place)
    assert again.to_json() == found.to_json()
    for one in (found, again):
        assert one.source.choices[SITE].feature.item() == UP_FEATURE
    whole = search(ground, wish)
    left_out = ("seconds", "run")
    assert {k: v for k, v in whole.to_json().items() if k not in left_out} == {
        k: v for k, v in found.to_json().items() if k not in left_out
    }
    with pytest.raises(UserError, match="budget was 'none' and is now 'KL=1'"):
        search(ground, wish, run=place, budget="KL=1")


@pytest.mark.parametrize("kind", ["texts", "contrast", "words", "want"])
def test_a_search_in_python_scores_other_steerings(ground: Ground, kind: str, tmp_path: Path) -> None:
    found = search(ground, WISHES[kind](), run=tmp_path / "run")
    score = wish_score(tmp_path / "run", ground.model)
    (again,) = score([[found.source]]).effects
    assert again.estimate == pytest.approx(found.found.shown.effect.estimate, abs=1e-4)


def test_a_task_in_python_cannot_be_read_back(ground: Ground, tmp_path: Path) -> None:
    search(ground, WISHES["task"](), run=tmp_path / "run")
    with pytest.raises(UserError, match="made in Python for a task's reward"):
        wish_score(tmp_path / "run", ground.model)


def test_what_is_found_steers(ground: Ground) -> None:
    found = search(ground, contrast_wish(40))
    prompt = ground.model.encode_text("bcd\n")
    plain, steered = (decode(ground.model, [prompt], ONE, source).texts for source in (None, found.source))
    assert steered == ["Y"] != plain


def test_the_headline_of_a_yes_says_what_speaks_against_it(ground: Ground, tmp_path: Path) -> None:
    found = search(ground, contrast_wish(40), run=tmp_path / "run")
    lead = found.over_random
    assert found.yes
    assert f"{number_text(lead, '+.3g')} above random features at equal dose" in found.headline()
    console = Console(record=True, width=200)
    console.print(found)
    words = " ".join(console.export_text().split())  # lines end where the path happens to be too long
    assert f"steer with it: trimtab steer … --with {tmp_path / 'run'}" in words
    below, above = (Interval(estimate=a, low=a - 0.2, high=a + 0.2, n=16) for a in (-0.3, 0.1))
    others = [replace(found.random, name=name, behind=below) for name in ("prompting", "a vector")]
    ways = [replace(way, behind=above) if way.name == RANDOM else way for way in found.ways]
    doubt = f"{HARDLY_DIFFER}: of those"
    said = replace(found, ways=(*ways, *others), notes=(doubt, "another note"), budget="KL=0.000001").headline()
    assert "; at equal price not shown to be above them (+0.1 [-0.1, +0.3])" in said
    assert "; prompting and a vector do more" in said
    assert f"; {doubt}" in said
    assert "another note" not in said
    assert "(more than the budget, on other text)" in said
    for phrase in ("not shown to be above", "do more", HARDLY_DIFFER, "more than the budget"):
        assert phrase not in found.headline()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "KL"}, "budget 'KL': it is KL=NATS, or none"),
        ({"dose": (0.4, 0.2)}, "dose 0.4 0.2: doses rise from one to the next"),
        ({"way": ("luck",)}, "way 'luck': there are activation-difference"),
        ({"n_neutral": (1, 4)}, "n_neutral 1: it must be at least 2"),
        ({"n_neutral": (500, 4)}, "n_neutral 500: there are 24 neutral prompts for the choice; lower it"),
        ({"examples": (2, 8, 16)}, "2 examples for candidates: at least 4 are needed; allow more (examples)"),
        ({"sets": 3}, "find(sets=…): it has no such argument"),
    ],
)
def test_options_that_are_refused(ground: Ground, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        find(ground.model, ground.saes[SITE], "the sea", **options)
    assert str(caught.value).startswith(message)


def test_a_task_is_no_name() -> None:
    with pytest.raises(UserError, match="task 'ioi-mixture': it is none; give the task, such as load_task"):
        TaskReward(task="ioi-mixture")  # pyright: ignore[reportArgumentType]


def test_near_repeats_are_named_where_too_few_are_left(ground: Ground) -> None:
    wish = texts_wish(12)
    repeated = Texts(wanted=wish.wanted[:1] * 9 + wish.wanted[1:4], unwanted=wish.unwanted)
    with pytest.raises(UserError, match=r"4 examples \(16 texts that nearly repeat others were left out\)"):
        search(ground, repeated)


def test_a_no_is_kept_with_the_steering(ground: Ground, tmp_path: Path) -> None:
    said = {}
    for kind, wish in {"yes": contrast_wish(40), "no": shuffled(contrast_wish(40), 1)}.items():
        found = search(ground, wish, run=tmp_path / kind)
        said[found.yes] = load(tmp_path / kind).about
    assert "not shown to serve the wish" in said[False]
    assert "not shown" not in said[True]


def test_saes_that_are_refused(ground: Ground) -> None:
    sae, model = ground.saes[SITE], ground.model
    with pytest.raises(UserError, match=r"site resid_post\.1: two SAEs are given for it"):
        find(model, [sae, sae], texts_wish(40))
    with pytest.raises(UserError, match=r"site resid_post\.2: the dictionary reads resid_post\.1"):
        find(model, {"resid_post.2": sae}, texts_wish(40))
    with pytest.raises(UserError, match="the int that is wished for: it is no wish"):
        find(model, sae, 3)  # type: ignore[arg-type]


def test_too_few_texts_for_a_judge_are_said(ground: Ground) -> None:
    found = search(ground, texts_wish(28))
    assert found.found.written.change is None
    assert found.judge.missing.startswith("No judge read them: ")
