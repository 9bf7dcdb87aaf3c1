"""How often a judge is right, against a slow count; AxBench's files; the command."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_passages import CONCEPTS

from trimtab import cli
from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate, calibrate, read_axbench
from trimtab.interpreting.calibration import JudgeCalibration
from trimtab.interpreting.calibration_command import read_calibration
from trimtab.judges import Unjudged

DATA = Path(os.environ.get("TRIMTAB_DATA", "nowhere")) / "axbench"


class Reader:
    """Looks for the concept's word, and is wrong in a share of cases that a draw from the text decides."""

    name, version = "reader", "7"

    def __init__(self, wrong: float = 0.0, silent: bool = False) -> None:
        self.wrong, self.silent = wrong, silent

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        return [
            Unjudged("a gap") if one.name == "law" and self.silent else Meaning(name=one.name, text="")
            for one in exemplars
        ]

    def says(self, meaning: Meaning, text: str) -> float:
        right = float(CONCEPTS[meaning.name] in text.split())
        draw = np.random.default_rng(len(text) * 1000 + sum(map(ord, text))).random()
        return abs(right - (draw < self.wrong))

    def fires(self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]) -> list[np.ndarray | Unjudged]:
        return [np.array([self.says(m, p.text) for p in texts]) for m, texts in zip(meanings, passages, strict=True)]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        def answers(one: ToRate) -> bool:
            return one.text in self.answers.get(one.instruction, ())

        return [
            Rating(concept=2 * self.says(one.meaning, one.text), instruction=2.0 * answers(one), fluency=2.0)
            for one in texts
        ]

    answers: ClassVar[dict[str, str]] = {}


def test_it_is_right_as_often_as_a_slow_count_says(axbench: Path) -> None:
    """Mutations: texts with other concepts count as having it; the decision on rates is at another score than 1."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    labelled = read_axbench(axbench, lacking=20, others=6)
    judge = Reader(wrong=0.2)
    Reader.answers = {text.instruction: text.text for one in labelled for text in one.texts}
    found = calibrate(judge, labelled)
    said, truth = [], []
    for one in labelled:
        for text in one.texts:
            said.append(judge.says(Meaning(name=one.exemplars.name, text=""), text.text))
            truth.append(CONCEPTS[one.exemplars.name] in text.text.split())
    wanted = balanced_accuracy_score(truth, np.array(said) > 0.5)
    assert 0.6 < wanted < 0.95
    assert found.fires.accuracy.estimate == pytest.approx(wanted)
    assert found.rates.accuracy.estimate == pytest.approx(wanted)
    assert found.fires.auc.estimate == pytest.approx(roc_auc_score(truth, said))
    assert found.fires.accuracy.n == 3  # intervals are over concepts
    assert [(row.kind, row.texts) for row in found.kinds] == [
        ("positive", 24), ("negative", 24), ("hard negative", 6), ("other concept", 18),
    ]  # fmt: skip
    hits = [s == t for s, t in zip(said, truth, strict=True) if t]
    assert found.kinds[0].fires.estimate == pytest.approx(np.mean(hits))
    assert found.instruction.estimate == 1.0
    assert "judge reader, version 7" in found.headline()


def test_gaps_count_nowhere(axbench: Path) -> None:
    """Mutation: a concept that was not explained counts as wrong."""
    found = calibrate(Reader(silent=True), read_axbench(axbench, lacking=20, others=6))
    assert (found.concepts, found.unjudged, found.fires.accuracy.estimate) == (2, 1, 1.0)

    class Mute(Reader):
        def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
            return [Unjudged("it is down")] * len(exemplars)

    with pytest.raises(UserError, match=r"it explained no concept \(it is down\)"):
        calibrate(Mute(), read_axbench(axbench))


def test_no_text_that_explains_is_tested_on(axbench: Path) -> None:
    """Mutation: plain answers are drawn among exemplars, too."""
    labelled = read_axbench(axbench, having=10, lacking=20, others=6)
    assert [one.exemplars.name for one in labelled] == list(CONCEPTS)
    for one in labelled:
        shown = {passage.text for passage in (*one.exemplars.has, *one.exemplars.lacks)}
        assert len(one.exemplars.has) == 10
        assert len(one.exemplars.lacks) == 20
        assert not shown & {text.text for text in one.texts}
        assert one.plain
        assert not shown & set(one.plain)
        word = CONCEPTS[one.exemplars.name]
        assert all(word in passage.text.split() for passage in one.exemplars.has)
        assert not any(word in passage.text.split() for passage in one.exemplars.lacks)
        halves = [{p.text for p in one.exemplars.lacks[first::2]} for first in (0, 1)]
        other = set(CONCEPTS.values()) - {word}
        assert all(any(other & set(text.split()) for text in half) for half in halves)  # either half has both kinds
        assert all(any(not other & set(text.split()) for text in half) for half in halves)


def test_files_that_are_none_are_refused(tmp_path: Path, axbench: Path) -> None:
    with pytest.raises(UserError, match=r"no \*_train_data.parquet lies there"):
        read_axbench(tmp_path / "empty")
    pq.write_table(pa.table({"a": [1]}), axbench / "a_train_data.parquet")
    with pytest.raises(UserError, match="not readable as AxBench's texts"):
        read_axbench(axbench)
    (axbench / "a_latent_eval_data.parquet").unlink()
    with pytest.raises(UserError, match=r"not readable|no such file"):
        read_axbench(axbench)


def test_the_command_measures_once(
    axbench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ["evaluate", "judge", "--labelled", str(axbench), "--judge", "rules", "--run", str(run), "--json"]
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["judge"] == "rules"
    assert first["right"][0]["accuracy"]["estimate"] > 0.6
    assert "How often the judge rules is right" in (run / "report.html").read_text("utf-8")
    monkeypatch.setattr("trimtab.interpreting.calibration_command.calibrate", None)
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert isinstance(read_calibration(run), JudgeCalibration)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"command": "rank"}))
    with pytest.raises(UserError, match="it is no finished run of evaluate judge"):
        read_calibration(run)


@pytest.mark.real
@pytest.mark.skipif(not DATA.is_dir(), reason="AxBench's texts are not part of trimtab; set TRIMTAB_DATA")
def test_the_exemplar_judge_on_axbench() -> None:
    from trimtab.interpreting import make_feature_judge

    found = calibrate(make_feature_judge("exemplar"), read_axbench(DATA, most=2))
    assert found.fires.accuracy.estimate > 0.85
    assert found.rates.accuracy.estimate > 0.85
