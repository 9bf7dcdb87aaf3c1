"""Comparisons of objects: a toy arm goes through all of it, and named mistakes are noticed."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from planted_readout import SITE, HalfHurt, Planted, readout_prompts, readout_setting
from rich.console import Console

from trimtab.control import answers, comparison, replicates
from trimtab.control.answers import Answers, EditSchedule, ItemSet, MatchedSource
from trimtab.control.arm import ARM_KINDS, Arm, ArmKind, Choosing, answers_under, arm_kinds, register
from trimtab.control.arms import BestStatic, GatedStatic, Lora, Prompting, RandomFeatures, Vector
from trimtab.control.comparison import Comparison, compare, compare_on, few
from trimtab.control.item_table import ITEM_SCHEMA, item_rows
from trimtab.control.replicates import EqualKl, Replicate, choose_arms
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import EditRequest, LanguageModel
from trimtab.steering import Choice, DirectionSource, StaticSource, TopActiveSource
from trimtab.tasks import Companion, Task

Patch = pytest.MonkeyPatch


class FeatureSeven(ArmKind):
    """The toy arm: one feature, whose strength can be scaled."""

    name = "seven"

    def arms(self, choosing: Choosing) -> list[Arm]:
        return self.steered(lambda items, draw: items.setting.static_source(7, 1.0), {"feature": 7})


class WhereNegative(StaticSource):
    """A static edit where coordinate 0 is negative, and none elsewhere."""

    def pick(self, request: EditRequest) -> Choice:
        choice = super().pick(request)
        return choice._replace(feature=torch.where(request.x[:, :1] < 0, choice.feature, -1))


@dataclass(frozen=True, kw_only=True)
class Reference(ArmKind):
    """Makes every answer Y, by an edit where it is needed."""

    name: ClassVar[str] = "chooser"
    feature: int = 0
    dose: float = 2.0

    def arms(self, choosing: Choosing) -> list[Arm]:
        def answer(items: ItemSet, scale: float) -> list[Answers]:
            setting = items.setting
            return answers_under(
                items, [WhereNegative(setting.needed_dictionary(), self.feature, self.dose, setting.needed_site())]
            )

        return [self.arm(answer)]


@pytest.fixture
def seven() -> Iterator[type[FeatureSeven]]:
    yield register(FeatureSeven)
    del ARM_KINDS[FeatureSeven.name]


def splits(model: LanguageModel, **tasks: type[Task]) -> dict[str, TaskPrompts]:
    """Some items of each split, of a task that may differ from split to split."""
    found = {
        split: readout_prompts(model, tasks.get(split, Planted), split) for split in ("train", "validation", "test")
    }
    return {split: prompts.take(range(24)) for split, prompts in found.items()}


def run(
    model: LanguageModel, dictionary: Standard, arms: Sequence[str | ArmKind], n: int = 1, /, **options: Any
) -> Comparison:
    """A comparison with the reference above; n trainings."""
    settings = [readout_setting(model, dictionary, seed=seed) for seed in range(n)]
    prompts = options.pop("prompts", None) or splits(model)
    return compare(settings, prompts, arms, **({"reference": Reference(), "equal_kl": EqualKl(24)} | options))


def text_of(comparison: Comparison) -> str:
    screen = Console(width=300, record=True, no_color=True)
    screen.print(comparison.render())
    return screen.export_text()


def test_a_toy_arm_goes_through_the_whole_comparison(
    planted: LanguageModel, planted_dictionary: Standard, seven: type[FeatureSeven]
) -> None:
    """Own strength, equal dose, equal KL, differences, tables and JSON, with nothing changed for it."""
    assert len(inspect.getsource(seven).splitlines()) < 30
    found = run(planted, planted_dictionary, ["seven", "random"], 2)
    labels = ["unsteered", "chooser", "random at equal dose", "random at equal kl", "seven", "seven at equal dose",
              "seven at equal kl"]  # fmt: skip
    assert [arm.label for arm in found.result.arms] == labels
    reference, toy, dose, kl = (found.result.arm(name) for name in ("chooser", *labels[4:]))
    assert reference.reward.estimate == 1
    assert reference.difference is None
    assert found.result.reference == "chooser"
    assert dose.equal_dose is True
    assert dose.dose is not None
    assert reference.dose is not None
    assert (dose.dose.n_edits, dose.dose.relative) == (reference.dose.n_edits, pytest.approx(2.0, rel=1e-4))
    assert toy.dose is not None
    assert toy.dose.n_edits == 24
    for arm in (toy, dose, kl):
        assert arm.chosen[0] == {"feature": 7}
        assert arm.difference is not None
        assert arm.difference.estimate == pytest.approx(1 - arm.reward.estimate)
        assert arm.difference_over_runs is not None
    assert [match["scale"] > 1 for match in kl.kl_matches] == [True, True]
    assert not found.missing
    said = json.loads(json.dumps(found.to_json()))
    assert [arm["label"] for arm in said["result"]["arms"]] == labels
    text = text_of(found)
    assert all(label in text for label in (*labels, "chooser − arm", "The chooser's gain over the unsteered model is"))


def test_rows_of_items_say_run_and_draw(
    planted: LanguageModel, planted_dictionary: Standard, seven: type[FeatureSeven]
) -> None:
    prompts = splits(planted)
    made = [
        Replicate.of(readout_setting(planted, planted_dictionary, seed=s), Reference(), prompts["train"],
                     prompts["validation"], name=f"run{s}")
        for s in (3, 4)
    ]  # fmt: skip
    choose_arms(made, arm_kinds(["seven", "random"], {"draws": 2}), equal_kl=None)
    compared = compare_on(made, prompts["test"], "test")
    rows = item_rows(compared, made)
    assert set(rows[0]) == set(ITEM_SCHEMA.names)
    of = {label: [row for row in rows if row["arm"] == label] for label in ("seven", "random at equal dose")}
    assert {(row["run"], row["seed"], row["draw"]) for row in of["seven"]} == {("", None, 0)}
    assert [row["item"] for row in of["seven"]] == [item.id for item in prompts["test"].items]
    expected = {(f"run{s}", s, draw) for s in (3, 4) for draw in (0, 1)}
    assert {(row["run"], row["seed"], row["draw"]) for row in of["random at equal dose"]} == expected
    (drawn,) = (one for one in compared.answered if one.arm.label == "random at equal dose")
    for seed, run in zip((3, 4), drawn.runs, strict=True):
        for draw, answers_of_draw in enumerate(run):
            mine = [row for row in of["random at equal dose"] if (row["seed"], row["draw"]) == (seed, draw)]
            assert answers_of_draw.kl is not None
            assert [row["kl"] for row in mine] == answers_of_draw.kl.tolist()


def check_matched_to_the_items_own_schedule(model: LanguageModel, dictionary: Standard) -> None:
    """An arm at equal dose edits exactly the items that the reference edits, among others too."""
    prompts = splits(model)
    setting = readout_setting(model, dictionary)
    made = [Replicate.of(setting, Reference(), prompts["train"], prompts["validation"])]
    choose_arms(made, [FeatureSeven()], equal_kl=None)
    by_label = {one.arm.label: one.runs[0][0].edits for one in compare_on(made, prompts["test"], "test").answered}
    edited = {label: log.row[log.feature[:, 0] >= 0].unique().tolist() for label, log in by_label.items()}
    assert 0 < len(edited["chooser"]) < 24, "the reference does not choose"
    assert edited["seven at equal dose"] == edited["chooser"], "other items are edited"


def check_scaled_to_the_references_divergence(model: LanguageModel, dictionary: Standard) -> None:
    """Answers of an arm at equal KL diverge on validation as far as the reference's."""
    prompts = splits(model)
    setting, reference = readout_setting(model, dictionary), Reference(feature=4, dose=0.25)
    made = Replicate.of(setting, reference, prompts["train"], prompts["validation"])
    choose_arms([made], [FeatureSeven()], equal_kl=EqualKl(24, 0.05))
    arm = next(arm for arm in made.arms if arm.label == "seven at equal kl")
    kl = answers.mean_kl(arm.answers(made.validation))
    assert kl == pytest.approx(answers.mean_kl(made.reference.answers(made.validation)), rel=0.05), "another divergence"


class TellsTheOther(Planted):
    """N is right: what validation says to choose is wrong here."""

    name = "tells-the-other"

    @staticmethod
    def right(text: str) -> str:
        return "N"


def check_nothing_is_chosen_on_test(model: LanguageModel, dictionary: Standard) -> None:
    """Validation asks for feature 0, the test items for feature 1."""
    prompts = splits(model, test=TellsTheOther)
    found = run(model, dictionary, [BestStatic(dose_factor=(1.0,))], candidates={"all": range(4)}, prompts=prompts)
    static = found.result.arm("static")
    assert static.chosen[0]["feature"] == 0, "chosen on test items"
    assert static.reward.estimate == 0, "chosen on test items"


def check_differences_are_paired(model: LanguageModel, dictionary: Standard) -> None:
    """An arm that answers as the reference does has no difference to it, with certainty."""

    @dataclass(frozen=True, kw_only=True)
    class Same(Reference):
        name: ClassVar[str] = "same"

    prompts = splits(model, train=HalfHurt, validation=HalfHurt, test=HalfHurt)
    difference = run(model, dictionary, [Same()], prompts=prompts).result.arm("same").difference
    assert difference is not None
    assert (difference.estimate, difference.low, difference.high) == (0, 0, 0), "an interval of no difference"


def match_to_the_next_items(patch: Patch) -> None:
    """The schedule of another item: as many edits, as strong."""

    def scheduled(items: ItemSet, reference: Arm, found: Answers) -> ItemSet:
        return replace(items, schedule=EditSchedule(EditSchedule.of(found).relative.roll(1, 0)))

    patch.setattr(comparison, "scheduled", scheduled)


def match_to_validations_schedule(patch: Patch) -> None:
    """Test items follow what the reference did on validation."""
    kept: list[EditSchedule] = []
    original = replicates.scheduled

    def first(items: ItemSet, reference: Arm, found: Answers) -> ItemSet:
        kept.append(EditSchedule.of(found))
        return original(items, reference, found)

    patch.setattr(replicates, "scheduled", first)
    patch.setattr(comparison, "scheduled", lambda items, reference, found: replace(items, schedule=kept[0]))


def forget_the_scale(patch: Patch) -> None:
    original = MatchedSource.__init__

    def init(self: MatchedSource, inner: DirectionSource, schedule: EditSchedule, scale: float = 1.0) -> None:
        original(self, inner, schedule)

    patch.setattr(MatchedSource, "__init__", init)


def choose_on_test(patch: Patch) -> None:
    original = Replicate.of

    def of(setting: Any, kind: ArmKind, train: TaskPrompts, validation: TaskPrompts, *rest: Any) -> Replicate:
        test = readout_prompts(setting.model, TellsTheOther, "test").take(range(24))
        return original(setting, kind, train, test, *rest)

    patch.setattr(comparison.Replicate, "of", of)


def compare_unpaired(patch: Patch) -> None:
    from trimtab.control import task_result

    original = task_result.bootstrap_difference
    patch.setattr(
        task_result, "bootstrap_difference", lambda *args, **options: original(*args, **options, paired=False)
    )


CHECKS = (
    check_matched_to_the_items_own_schedule,
    check_scaled_to_the_references_divergence,
    check_nothing_is_chosen_on_test,
    check_differences_are_paired,
)
MUTATIONS: Mapping[Callable[[Patch], None], tuple[Callable[[LanguageModel, Standard], None], str]] = {
    match_to_the_next_items: (check_matched_to_the_items_own_schedule, "other items are edited"),
    match_to_validations_schedule: (check_matched_to_the_items_own_schedule, "other items are edited"),
    forget_the_scale: (check_scaled_to_the_references_divergence, "another divergence"),
    choose_on_test: (check_nothing_is_chosen_on_test, "chosen on test items"),
    compare_unpaired: (check_differences_are_paired, "an interval of no difference"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_comparisons(
    planted: LanguageModel, planted_dictionary: Standard, check: Callable[[LanguageModel, Standard], None]
) -> None:
    check(planted, planted_dictionary)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_check_fails(
    planted: LanguageModel,
    planted_dictionary: Standard,
    monkeypatch: Patch,
    mutation: Callable[[Patch], None],
) -> None:
    check, match = MUTATIONS[mutation]
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match=match):
        check(planted, planted_dictionary)


def test_without_a_reference_arms_are_compared_with_the_unsteered_model(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    found = run(planted, planted_dictionary, ["random", Vector(steps=0), "prompting"], reference="unsteered")
    assert [arm.label for arm in found.result.arms] == ["unsteered", "prompting", "vector"]
    assert found.result.reference == "unsteered"
    assert found.result.arm("vector").chosen[0]["relative_dose"] == 2.0
    assert found.missing == {"arms at equal dose and equal KL": "unsteered edits none of the validation items"}
    assert "gain" not in text_of(found)


def test_a_vector_has_the_dose_that_the_reference_has_on_validation(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    found = run(planted, planted_dictionary, [Vector(steps=0)], reference=Reference(dose=0.7), equal_kl=None)
    assert found.result.arm("vector").chosen[0]["relative_dose"] == pytest.approx(0.7, rel=1e-5)


def test_any_arm_can_be_the_reference(planted: LanguageModel, planted_dictionary: Standard) -> None:
    static = BestStatic(dose_factor=(1.0,))
    found = run(
        planted, planted_dictionary, ["random", static], reference=static, candidates={"two": [0, 1]}, equal_kl=None
    )
    assert [arm.label for arm in found.result.arms] == ["unsteered", "static", "random at equal dose"]
    assert found.result.reference == "static"


def test_a_comparison_is_a_frame_and_a_figure(planted: LanguageModel, planted_dictionary: Standard) -> None:
    comparison = run(planted, planted_dictionary, ["random"], reference="static")
    arms = comparison.result.arms
    frame = comparison.to_frame()
    assert frame.label.tolist() == [arm.label for arm in arms]
    assert frame.reward.tolist() == [arm.reward.estimate for arm in arms]
    assert frame.kl.dtype == float
    assert frame.kl.dropna().tolist() == [arm.kl for arm in arms if arm.kl is not None]
    assert frame.dose_relative.dtype == float
    assert frame.dose_relative.dropna().tolist() == [arm.dose.relative for arm in arms if arm.dose]
    assert frame.equal_dose.tolist() == [arm.equal_dose for arm in arms]
    assert frame.equal_kl.tolist() == [arm.equal_kl for arm in arms]
    assert frame.difference_low.dropna().tolist() == [arm.difference.low for arm in arms if arm.difference]
    ax = comparison.plot(Figure().add_subplot())
    drawn = [label.get_text() for label in ax.get_yticklabels()]
    assert drawn == [arm.label for arm in arms if arm.difference]
    whiskers = [tuple(map(float, line.get_xdata())) for line in ax.lines[1:]]  # type: ignore[arg-type]
    assert whiskers == [(arm.difference.low, arm.difference.high) for arm in arms if arm.difference]
    assert "static beside" in repr(comparison)
    with pytest.raises(
        UserError, match=r"arm 'random at equal doze': there is .*; did you mean random at equal dose\?"
    ):
        comparison.result.arm("random at equal doze")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison)
    said = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in said)
    for arm in arms:  # at 80 columns labels and intervals stay whole
        (place,) = [i for i, line in enumerate(said) if line.startswith(f"│ {arm.label} ")]
        assert f"{arm.reward.estimate:.3f} │" in said[place]
        assert arm.reward.bounds(".3f") in said[place + 1]


def test_what_a_setting_lacks_makes_arms_missing_and_no_other(planted: LanguageModel) -> None:
    setting = Setting(model=planted, dictionary=None, site=None)
    arms = [BestStatic(), GatedStatic(), RandomFeatures(), Vector(), Lora(steps=1), Prompting(instruction=("a", "b"))]
    found = compare(setting, splits(planted), arms)
    assert [arm.label for arm in found.result.arms] == ["unsteered", "lora", "prompting"]
    why = "this arm: it needs a dictionary, and the setting has none"
    assert found.missing["static"] == found.missing["gated"] == why
    assert found.missing["vector"] == "this arm: it needs a site, and the setting has none"


def test_companions_are_shown_or_said_to_be_missing(planted: LanguageModel, planted_dictionary: Standard) -> None:
    class Accompanied(Planted):
        name = "accompanied"
        companions = (
            Companion("half-hurt", "test", "always saying Y would win"),
            Companion("mmlu", "test", "it must not be forgotten"),
        )

    prompts = splits(planted, train=Accompanied, validation=Accompanied, test=Accompanied)
    beside = readout_prompts(planted, HalfHurt, "test").take(range(20))
    found = run(planted, planted_dictionary, ["random", "most-active"], prompts=prompts, companions=[beside])
    (companion,) = found.companions
    assert (companion.task, companion.items, companion.why) == ("half-hurt", 20, "always saying Y would win")
    assert [arm.label for arm in companion.arms] == ["unsteered", "chooser", "random at equal dose"]
    assert found.missing == {"companion mmlu": "it must not be forgotten; but it was not given"}


def test_what_has_no_dose_per_decision_is_refused(planted: LanguageModel, planted_dictionary: Standard) -> None:
    items = ItemSet.of(readout_setting(planted, planted_dictionary), splits(planted)["test"])
    clamps = StaticSource(planted_dictionary, 3, 1.0, items.setting.site, operation="clamp", unit="absolute")
    with pytest.raises(UserError, match="only what adds a direction at one site can take another's doses"):
        MatchedSource(clamps, EditSchedule(torch.ones(len(items), 1)))
    everywhere = StaticSource(planted_dictionary, 3, 1.0, items.setting.site, positions="all")
    with pytest.raises(UserError, match="the reference edits prompts, or at several sites"):
        EditSchedule.of(items.answer(everywhere))


def test_the_doses_of_several_features_are_their_common_length(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    """‖Δ‖/‖x‖ of the sum, which is not the sum of doses."""
    items = ItemSet.of(readout_setting(planted, planted_dictionary), splits(planted)["test"])
    log = items.answer(items.setting.static_source([[3, 4]] * len(items), 1.0)).edits
    rows = planted_dictionary.directions
    schedule = EditSchedule.of(items.answer(items.setting.static_source([[3, 4]] * len(items), 1.0)))
    expected = float((rows[3] + rows[4]).norm())
    assert schedule.relative[:, 0].numpy() == pytest.approx(np.full(len(items), expected), rel=1e-4)
    assert len(log) == schedule.edits


def test_kinds_are_found_by_name_with_their_options() -> None:
    found = arm_kinds(["lora", "random", FeatureSeven()], {"lora_rank": 3, "draws": 5, "rank": 9, "run": "x"})
    assert found[0] == RandomFeatures(draws=5)
    assert found[1] == Lora(rank=3)
    assert isinstance(found[2], FeatureSeven)
    with pytest.raises(UserError, match=r"control 'sattic'.*did you mean static"):
        arm_kinds(["sattic"])
    (made,) = arm_kinds(Lora, {"rank": 3})  # a class is a kind with the options, too
    assert made == Lora(rank=3)
    assert [kind.name for kind in arm_kinds("random")] == ["random"]
    with pytest.raises(UserError, match=r"arm 3\.5: it is neither the name of a kind nor one; derive it from ArmKind"):
        arm_kinds([3.5])  # type: ignore[list-item]


def test_names_are_given_once() -> None:
    class Other(FeatureSeven):
        name = "static"

    for name in ("static", "unsteered"):
        Other.name = name
        with pytest.raises(UserError, match=f"arm '{name}'.*already a kind of arm of this name"):
            register(Other)


class Odd(FeatureSeven):
    """A toy arm that cannot take another's strength, or does not say how far it diverges."""

    name = "odd"

    def __init__(self, source: Callable[[ItemSet], StaticSource] | None = None) -> None:
        self.source = source

    def arms(self, choosing: Choosing) -> list[Arm]:
        if self.source is not None:
            return self.steered(lambda items, draw: self.source(items))  # pyright: ignore[reportOptionalCall]
        return [self.arm(lambda items, scale: [items.answer(items.setting.static_source(7, scale))], match="kl")]


@pytest.mark.parametrize(
    ("source", "labels", "why"),
    [
        (
            lambda items: items.setting.static_source([[3, 4]] * len(items), 1.0), ["odd"],
            "equal dose: the arm adds 2 features at once",
        ),
        (
            lambda items: StaticSource(
                items.setting.dictionary, 3, 1.0, items.setting.site, operation="clamp", unit="absolute"
            ),
            ["odd"], "equal dose: only what adds a direction at one site can take another's doses",
        ),
        (None, [], "equal KL: its answers do not measure their divergence"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_missing_before_a_test_item_is_answered(
    planted: LanguageModel, planted_dictionary: Standard, source: Any, labels: list[str], why: str
) -> None:
    found = run(planted, planted_dictionary, [Odd(source)])
    assert [arm.label for arm in found.result.arms][2:] == labels
    assert set(found.missing) == ({"odd at equal dose", "odd at equal kl"} if source else {"odd at equal kl"})
    assert set(found.missing.values()) == {why}


def test_a_reference_of_no_known_divergence_is_named(planted: LanguageModel, planted_dictionary: Standard) -> None:
    class Silent(Reference):
        def arms(self, choosing: Choosing) -> list[Arm]:
            (arm,) = super().arms(choosing)
            return [replace(arm, answer=lambda items, scale: [arm.answer(items, scale)[0]._replace(kl=None)])]

    found = run(planted, planted_dictionary, ["random"], reference=Silent())
    assert found.missing == {"random at equal kl": "chooser does not measure its divergence on validation"}


def test_test_items_are_none_that_something_was_chosen_on(planted: LanguageModel, planted_dictionary: Standard) -> None:
    for split in ("train", "validation"):
        prompts = splits(planted)
        prompts["test"] = replace(
            prompts["test"],
            items=(*prompts["test"].items[:-1], prompts[split].items[3]),
            ids=(*prompts["test"].ids[:-1], prompts[split].ids[3]),
        )
        with pytest.raises(UserError, match=r"test item planted/\d+: it is among those that arms are chosen"):
            run(planted, planted_dictionary, ["random"], prompts=prompts)


def test_settings_are_trainings_on_one_ground(planted: LanguageModel, planted_dictionary: Standard) -> None:
    one, two = (readout_setting(planted, planted_dictionary, seed=seed) for seed in (0, 1))
    for settings, reference, message in (
        ([], Reference(), "1 references: there are 0 settings"),
        ([one, two], [Reference()] * 3, "3 references: there are 2 settings; give one for all, or one for each"),
        ([one, one], Reference(), "the settings: two have seed 0; give each seed once"),
        ([one, replace(two, dose=1.5)], Reference(), "settings with dose 2.0 and 1.5: only their seeds may differ"),
    ):
        with pytest.raises(UserError) as caught:
            compare(settings, splits(planted), ["random"], reference=reference)
        assert message in caught.value.line


def test_a_static_reference_is_chosen_among_the_candidates(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    static = BestStatic(dose_factor=(1.0,))
    found = run(
        planted, planted_dictionary, ["static", BestStatic(finalists=2)][:1], reference=static,
        candidates={"two": [4, 5]}, equal_kl=None,
    )  # fmt: skip
    assert found.result.arm("static").chosen[0]["origins"] == {"two": 2}
    assert found.missing == {"another static": "the reference has this name"}
    assert not run(planted, planted_dictionary, [static], reference=static, candidates={"two": [4]}).missing


def test_answers_to_other_prompts_have_no_divergence(planted: LanguageModel, planted_dictionary: Standard) -> None:
    items = ItemSet.of(readout_setting(planted, planted_dictionary), splits(planted)["test"])
    other = replace(items.prompts, ids=tuple((9, *ids) for ids in items.prompts.ids))
    assert items.answer(prompts=other, kl=True).kl is None
    assert items.answer(items.setting.static_source(3, 1.0), prompts=other, kl=True).kl is None


def test_a_reference_that_looks_at_prompts_but_edits_answers_has_a_schedule(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    items = ItemSet.of(readout_setting(planted, planted_dictionary), splits(planted)["test"])
    looks = TopActiveSource(planted_dictionary, 0.5, items.setting.site, over="context")
    schedule = EditSchedule.of(items.answer(looks))
    assert (schedule.edits, schedule.mean) == (24, pytest.approx(0.5, rel=1e-5))


def test_a_schedule_has_signs_and_ends_with_the_references_answers(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    """A dose below 0 is taken with its sign, its mean without; behind the reference's last token nothing is edited."""
    prompts = readout_prompts(planted, Planted, "test", tokens=3).take(range(6))
    items = ItemSet.of(readout_setting(planted, planted_dictionary), prompts)
    doses = torch.tensor([[-0.5], [0.5], [-0.5], [0.5], [-0.5], [-0.5]])
    schedule = EditSchedule.of(items.answer(items.setting.static_source(torch.full((6, 1), 5), doses)))
    assert schedule.relative[:, 0].numpy() == pytest.approx(doses[:, 0].numpy(), rel=1e-5)
    assert schedule.mean == pytest.approx(0.5, rel=1e-5)
    first = EditSchedule(schedule.relative[:, :1])
    log = items.answer(MatchedSource(items.setting.static_source(7, 1.0), first)).edits
    log = log.take(log.feature[:, 0] >= 0)
    assert len(log) == first.edits == 6
    assert log.coefficient[:, 0].sign().tolist() == doses[:, 0].sign().tolist()


def test_draws_of_a_random_arm_differ(planted: LanguageModel, planted_dictionary: Standard) -> None:
    prompts = splits(planted)
    made = Replicate.of(
        readout_setting(planted, planted_dictionary), Reference(), prompts["train"], prompts["validation"]
    )
    choose_arms([made], [RandomFeatures(draws=3)], equal_kl=None)
    (random,) = (arm for arm in made.arms if arm.label == "random at equal dose")
    drawn = {tuple(one.edits.feature[:, 0].tolist()) for one in random.answers(made.validation)}
    assert len(drawn) == 3


def test_arms_that_one_training_lacks_are_missing_and_divergence_is_of_as_many_items_as_asked(
    planted: LanguageModel, planted_dictionary: Standard
) -> None:
    asked: list[int] = []

    class Sometimes(FeatureSeven):
        name = "sometimes"
        per_training = True

        def arms(self, choosing: Choosing) -> list[Arm]:
            if choosing.train.setting.seed == 1:
                raise UserError("this arm", "it was unlucky")
            return super().arms(choosing)

    class Counting(FeatureSeven):
        name = "counting"

        def arms(self, choosing: Choosing) -> list[Arm]:
            def answer(items: ItemSet, scale: float) -> list[Answers]:
                asked.append(len(items))
                return answers_under(items, [items.setting.static_source(7, scale)])

            return [self.arm(answer, match="kl")]

    found = run(planted, planted_dictionary, [Sometimes(), Counting()], 2, equal_kl=EqualKl(items=5))
    assert [arm.label for arm in found.result.arms] == ["unsteered", "chooser", "counting at equal kl"]
    assert found.missing["sometimes"] == "it could not be made in every run"
    assert set(asked) == {5, 24}  # on validation, and on all test items


def test_a_schedule_is_of_the_items_that_are_answered(planted: LanguageModel, planted_dictionary: Standard) -> None:
    items = ItemSet.of(readout_setting(planted, planted_dictionary), splits(planted)["test"])
    with pytest.raises(AssertionError, match="a row for each item"):
        items.answer(MatchedSource(items.setting.static_source(3, 1.0), EditSchedule(torch.ones(25, 1))))


def test_a_kind_may_be_defined_again(seven: type[FeatureSeven]) -> None:
    again = type("FeatureSeven", (FeatureSeven,), {"__module__": __name__, "__qualname__": "FeatureSeven"})
    place = list(ARM_KINDS).index("seven")
    assert ARM_KINDS[register(again).name] is again
    assert list(ARM_KINDS).index("seven") == place


def test_two_kinds_of_one_name_are_refused(planted: LanguageModel, planted_dictionary: Standard) -> None:
    with pytest.raises(UserError, match=r"arm 'static'.*two kinds of arms have this name"):
        run(planted, planted_dictionary, ["static", BestStatic(finalists=2)])


def test_a_comparison_needs_all_splits(planted: LanguageModel, planted_dictionary: Standard) -> None:
    prompts = splits(planted)
    del prompts["validation"]
    with pytest.raises(UserError, match=r"split validation.*needs train, validation and test"):
        run(planted, planted_dictionary, ["random"], prompts=prompts)


def test_a_reference_that_draws_at_random_is_refused(planted: LanguageModel, planted_dictionary: Standard) -> None:
    with pytest.raises(UserError, match=r"reference random.*no strength of its own"):
        run(planted, planted_dictionary, ["static"], reference="random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dose": float("nan")}, "dose nan: a dose is a finite number"),
        ({"dose": "1"}, "dose '1': a dose is a finite number"),
        ({"mask": "foo"}, "mask 'foo': it is one of none, current"),
        ({"unit": "percent"}, "unit 'percent': it is one of"),
        ({"site": "resid_post.0"}, "site resid_post.0: the dictionary reads"),
    ],
)
def test_a_setting_that_nothing_could_be_compared_on_is_refused(
    planted: LanguageModel, planted_dictionary: Standard, change: dict[str, Any], message: str
) -> None:
    given = {"model": planted, "dictionary": planted_dictionary, "site": planted.site(SITE)}
    planted_dictionary.info = replace(planted_dictionary.info, site=SITE)
    if "site" in change:
        change = {"site": planted.site(change["site"])}
    with pytest.raises(UserError, match=message):
        Setting(**given | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trainings", "items", "said"), [(3, 10, []), (2, 10, ["2 seeds"]), (1, 1, ["1 seed", "1 test item"])]
)
def test_few_trainings_and_few_items_are_told(trainings: int, items: int, said: list[str]) -> None:
    assert [warning.partition(" only")[0] for warning in few(trainings, items)] == said
