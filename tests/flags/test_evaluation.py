"""Whole evaluations: finetunings of the tiny model side by side, kept, resumed and shown."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letter_judge import LetterJudge
from numpy.typing import NDArray
from toy_corpus import toy_examples

from trimtab.errors import UserError
from trimtab.flags import TrainedFlags
from trimtab.flags.evaluation import FlagControl, FlagEvaluation, FlagEvaluationOptions, evaluate_flags, evaluating
from trimtab.flags.evaluation.erosion import ONLY
from trimtab.lm import LanguageModel
from trimtab.report import write_report
from trimtab.runs import json_safe, read_record, read_typed

SMALL: dict[str, Any] = {
    "items": 40, "fit_items": 60, "layer": [1, 3], "effect_items": 8, "reliance_items": 24, "text_tokens": 256,
    "context": 32, "n_resamples": 100, "max_tokens": 64,
}  # fmt: skip
EXAMPLES = toy_examples(160, seed=5)


@pytest.fixture(scope="module")
def evaluated(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FlagEvaluation, Path]:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    return evaluate_flags(tiny_llama, list(finetuned.values()), EXAMPLES, run=run, **SMALL), run


def test_curricula_differ_in_what_they_say_and_lose(evaluated: tuple[FlagEvaluation, Path]) -> None:
    found, _ = evaluated
    assert found.reading is not None
    assert found.erosion is not None
    assert found.reliance is not None
    read = {row.moment.curriculum: row.accuracy.estimate for row in found.reading.last("response")}
    assert read["forced"] > 0.97
    assert read["auxiliary"] > 0.97
    assert read["plain"] < 0.75
    assert all(row.auc.estimate < 0.75 for row in found.reading.last("neutral prompt"))  # the prompt says nothing
    only = {row.moment.curriculum: row.auc.estimate for row in found.erosion.over_layers("response", "linear", ONLY)}
    assert only["forced"] > 0.95
    lost = {row.moment.curriculum: row for row in found.reliance.last("flipped")}
    assert lost["forced"].difference.low > 0
    assert lost["forced"].flags.estimate > lost["plain"].flags.estimate + 0.1
    assert found.reliance.lines == ()  # each takes three moments
    zeroed = found.reliance.verdict("zeroed")
    assert zeroed.startswith("No reliance without forcing was seen, where forcing gives reliance.")
    gained = {row.moment.curriculum: row.beyond_plain for row in found.reliance.last("swapped")}
    assert gained["forced"].low > 2 * gained["auxiliary"].high


def test_it_says_what_it_measured_on(evaluated: tuple[FlagEvaluation, Path]) -> None:
    found, _ = evaluated
    assert (found.unit, found.runs) == ("example", ("plain, seed 0", "auxiliary, seed 0", "forced, seed 0"))
    assert found.fitted <= 60
    assert found.reported <= 40
    assert found.price is not None
    assert found.price.task == ""
    assert found.notes[0].startswith(
        "the part control is left out: it takes a judge of concepts that is not the model; "
    )
    assert found.notes[1].startswith("the unrelated task is left out: task ioi: only 0 of")
    plain = [row for row in found.price.models if row.moment.step]
    assert all(row.increase is not None and row.kl is not None and row.kl.estimate > 0 for row in plain)
    assert {(row.moment.run, row.moment.step) for row in found.seconds} == {
        ("original", 0), *((name, 100) for name in found.runs),
    }  # fmt: skip
    for title, part in found.parts.items():
        assert part.headline(), title
        assert all(table.rows for name, table in part.tables().items() if name != "growth"), title


def test_results_are_read_back_as_they_were(evaluated: tuple[FlagEvaluation, Path]) -> None:
    found, run = evaluated
    assert json_safe(read_typed(FlagEvaluation, json_safe(found))) == json_safe(found)
    assert read_record(run)["results"] == json_safe(found)
    assert found.to_frame("reliance").columns.tolist()[:4] == [
        "moment_run", "moment_curriculum", "moment_step", "moment_tokens",
    ]  # fmt: skip


def test_what_is_measured_is_not_measured_again(
    evaluated: tuple[FlagEvaluation, Path], tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], monkeypatch
) -> None:
    found, run = evaluated
    (lost,) = (run / "parts" / "forced, seed 0").glob("100-reliance-*.parquet")
    bits = lost.read_bytes()
    lost.unlink()
    measured: list[str] = []
    real = evaluating.MeasuredModel.measure

    def counting(self: Any, part: Any) -> Any:
        measured.append(part)
        return real(self, part)

    monkeypatch.setattr(evaluating.MeasuredModel, "measure", counting)
    again = evaluate_flags(tiny_llama, list(finetuned.values()), EXAMPLES, run=run, **SMALL)
    assert measured == ["reliance"]
    assert json_safe(again.reliance) == json_safe(found.reliance)
    assert len(lost.read_bytes()) > len(bits) // 2

    some = evaluate_flags(tiny_llama, finetuned["forced"], EXAMPLES, run=run, **{**SMALL, "part": ["reliance"]})
    assert list(some.parts) == ["Reliance"]  # other runs and parts may be asked for
    other = evaluate_flags(
        tiny_llama, finetuned["forced"], EXAMPLES, run=run, texts=["A walk over the hills. " * 90], **SMALL
    )
    assert measured == ["reliance", "price", "price"]  # of the original and of the finetuning
    changed = [note for note in other.notes if "is measured anew" in note]
    assert changed[1].startswith("price of forced, seed 0, step 100, is measured anew: it was of another model, ")
    assert json_safe(other.reading) is not None
    with pytest.raises(UserError, match="its data had hash"):
        evaluate_flags(tiny_llama, list(finetuned.values()), EXAMPLES[1:], run=run, **SMALL)
    with pytest.raises(UserError, match=r"dose was 0\.2 and is now 0\.3"):
        evaluate_flags(tiny_llama, list(finetuned.values()), EXAMPLES, run=run, dose=0.3, **SMALL)


def test_what_was_measured_otherwise_is_measured_anew(
    evaluated: tuple[FlagEvaluation, Path], tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags],
    tmp_path: Path, monkeypatch,
) -> None:  # fmt: skip
    shutil.copytree(evaluated[1], tmp_path / "run")
    options = {**SMALL, "part": ["price"], "run": tmp_path / "run"}
    assert not any("anew" in note for note in evaluate_flags(tiny_llama, finetuned["plain"], EXAMPLES, **options).notes)
    monkeypatch.setitem(evaluating.MEASURED, "price", 3)
    notes = evaluate_flags(tiny_llama, finetuned["plain"], EXAMPLES, **options).notes
    assert sum("measured anew" in note and "another version of trimtab" in note for note in notes) == 2
    evaluating_hash = evaluating._hash(EXAMPLES)
    assert evaluating._hash([replace(EXAMPLES[0], unit="another"), *EXAMPLES[1:]]) != evaluating_hash


def test_the_page_shows_every_part(evaluated: tuple[FlagEvaluation, Path]) -> None:
    found, run = evaluated
    page = write_report(run).read_text(encoding="utf-8")
    for title in found.parts:
        assert f"<h2>{title}</h2>" in page
    assert "Flags in tiny-llama" in page
    assert len(re.findall("<img alt=", page)) >= 8


def test_one_part_alone(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    options = {**SMALL, "part": ["reading"]}
    found = evaluate_flags(tiny_llama, finetuned["forced"], EXAMPLES, **options)
    assert list(found.parts) == ["Reading"]
    assert found.headline().startswith("1 run of tiny-llama with flags for sea, war, measured on ")


class Stern(LetterJudge):
    """Finds nothing."""

    def has(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        return super().has(texts) & False


def test_control_is_measured_at_the_end_of_each_run(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags], tmp_path: Path, monkeypatch
) -> None:
    options = {**SMALL, "part": ["control"], "text_length": 6, "compared": 0}
    both, judge = [finetuned["forced"], finetuned["plain"]], LetterJudge()

    def evaluate(trained: Any = both, **given: Any) -> FlagEvaluation:
        return evaluate_flags(
            tiny_llama, trained, EXAMPLES, **{"judge": judge, "run": tmp_path / "run"} | options | given
        )

    found = evaluate()
    rates = {one.run: one.control.difference for one in found.controls}
    assert rates["forced, seed 0"].low > 0.4
    assert abs(rates["plain, seed 0"].estimate) < 0.3
    assert found.controls[0].control.missing == {"other ways of control": "compared is 0"}
    assert found.controls[1].control.missing == {
        "other ways of control": "a plain run has no flags to compare them with"
    }
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h2>Control, forced, seed 0</h2>" in page
    assert "Switchboard" in page
    assert "<h2>Control of all runs</h2>" in page
    assert [row.run for row in found.tables()["control"].rows] == ["forced, seed 0", "plain, seed 0"]
    assert json_safe(read_typed(FlagEvaluation, json_safe(found))) == json_safe(found)

    seen: list[dict[str, Any]] = []
    known = {id(one.model): of.control for one, of in zip(both, found.controls, strict=True)}

    def control(model: LanguageModel, *_: Any, **given: Any) -> FlagControl:
        seen.append(given)
        return known[id(model)]

    monkeypatch.setattr(evaluating, "measure_control", control)
    assert json_safe(evaluate()) == json_safe(found)
    assert seen == []
    anew = "control of forced, seed 0, step 100, is measured anew: it was of another model, examples, judge, "
    for changed in ({"judge": Stern()}, {"descriptions": {"sea": "the sea"}}, {"trained_on": EXAMPLES[:9]}):
        assert any(note.startswith(anew) for note in evaluate(**changed).notes)
        assert len(seen) == 2
        seen.clear()
    assert json_safe(evaluate()) == json_safe(found)  # what was measured first is still there
    assert seen == []

    alone = evaluate(both[:1], run=tmp_path / "compared", compared=2, trained_on=toy_examples())
    assert seen.pop()["plain"] is None
    assert alone.notes == ()
    together = evaluate(
        run=tmp_path / "compared", compared=2, trained_on=toy_examples()
    )  # with plain it is another one
    assert together.notes[0].startswith(anew)
    forced, plain = seen
    assert (forced["original"], forced["plain"], forced["compared"]) == (tiny_llama, finetuned["plain"].model, 2)
    assert forced["examples"] == tuple(toy_examples())
    assert not {*forced["examples"]} & {*forced["heldout"]}
    assert (plain["compared"], plain["plain"]) == (0, None)


def test_control_takes_a_judge(tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]) -> None:
    with pytest.raises(
        UserError, match="the part control: it takes a judge of concepts that is not the model; give lab"
    ):
        evaluate_flags(tiny_llama, finetuned["plain"], EXAMPLES, **SMALL, part=["control", "reading"])


def test_a_plain_run_of_other_settings_is_no_control(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    plain, forced = finetuned["plain"], finetuned["forced"]
    options = {**SMALL, "part": ["reading"]}
    others = {
        "steps 200, not 100, lr 0.001, not 0.003, flag_lr_factor 1, not 10.0": replace(
            plain, config=replace(plain.config, steps=200, lr=1e-3, flag_lr_factor=1)
        ),
        f"examples of hash other, not {forced.data}": replace(plain, data="other"),
    }
    for differs, other in others.items():
        found = evaluate_flags(tiny_llama, {"with flags": forced, "other": other}, EXAMPLES, **options)
        assert found.runs == ("with flags", "other")
        assert found.notes == (f"other is no control of with flags: {differs}",)
    same = replace(plain, config=replace(plain.config, loss="squared", flag_weight=3.0))  # mean nothing to plain
    assert evaluate_flags(tiny_llama, [forced, same], EXAMPLES, **options).notes == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": [4]}, "layer 4: tiny-llama has layers 0 to 3; choose one of them"),
        ({"layer": [1, 1]}, "layer 1: it is named twice; name it once"),
        ({"effect_layer": 9}, "layer 9: tiny-llama has layers 0 to 3"),
        ({"part": ["readings"]}, "part"),
        ({"part": []}, "part: there is none; choose among reading, erosion, effects, reliance, price, control"),
        ({"dose": 0.0}, "dose 0.0: it must be above 0 and below 10"),
        ({"items": 0}, "items 0: it must be at least 1"),
        ({"itmes": 3}, "did you mean items?"),
    ],
)
def test_what_is_not_allowed_is_refused(
    options: dict, says: str, tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        evaluate_flags(tiny_llama, finetuned["plain"], EXAMPLES, **{**SMALL, **options})


def test_finetunings_must_be_of_the_same_concepts(
    tiny_llama: LanguageModel, finetuned: dict[str, TrainedFlags]
) -> None:
    other = finetuned["forced"]
    other = replace(other, flags=replace(other.flags, concepts=("sea", "love")))
    with pytest.raises(UserError, match="run forced, seed 0: its concepts are sea, love, not sea, war"):
        evaluate_flags(tiny_llama, [finetuned["plain"], other], EXAMPLES, **SMALL)
    with pytest.raises(
        UserError, match="run forced, seed 0: two runs have this name; give each run once; in Python, gi"
    ):
        evaluate_flags(tiny_llama, [finetuned["forced"]] * 2, EXAMPLES, **SMALL)
    with pytest.raises(UserError, match="there is no finetuning to evaluate"):
        evaluate_flags(tiny_llama, [], EXAMPLES, **SMALL)


def test_defaults_are_those_of_the_options() -> None:
    assert FlagEvaluationOptions().part == ("reading", "erosion", "effects", "reliance", "price", "control")
