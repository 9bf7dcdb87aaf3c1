"""Precision and recall against counts made by hand; files of labels, good and bad; the shipped set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.judges import RuleJudge, Verdict, judge_options, make_judge
from trimtab.judges.measuring import LabelledAnswer, main, measure_judge, read_labelled
from trimtab.runs import json_safe

OWN_JUDGE = """
from trimtab.judges import Unjudged, Verdict

class Loud:
    def __init__(self, *, mark: str = "!"):
        self.name, self.mark = f"loud{mark}", mark

    def score(self, prompt, answer):
        return Verdict(refused=self.mark in answer) if answer else Unjudged("silence")

    def score_all(self, prompts, answers):
        return [self.score(p, a) for p, a in zip(prompts, answers, strict=True)]
"""


def test_a_judge_of_ones_own_is_calibrated_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_judges.py").write_text(OWN_JUDGE + "\nclass Mute: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [("No!", "refusal"), ("No!", "compliance"), ("Yes.", "compliance"), ("", "refusal")]
    lines = [json.dumps({"prompt": "p", "answer": answer, "label": label}) for answer, label in rows]
    Path("labels.jsonl").write_text("\n".join(lines))
    assert main(["labels.jsonl", "--judge", "own_judges:Loud", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["judge"], found["unjudged"]) == ("loud!", 1)
    assert (found["refusal_precision"]["estimate"], found["refusal_precision"]["n"]) == (0.5, 2)
    assert found["refusal_recall"]["n"] == 1  # the unjudged refusal counts nowhere
    assert main(["labels.jsonl", "--judge", "own_judges:Loud", "--judge-option", "mark=Yes"]) == 0
    out = capsys.readouterr().out
    assert "refusal precision   0.00" in out
    assert "no verdict on       1 answers" in out
    assert judge_options("own_judges:Loud") == {"mark": str}
    assert make_judge("own_judges:Loud", mark="?").name == "loud?"
    with pytest.raises(UserError, match="judge 'own_judges:Mute': it is no judge; give its class name, score and scor"):
        make_judge("own_judges:Mute")
    with pytest.raises(UserError, match=r"judge 'own_judges:Quiet': own_judges .* has no class Quiet"):
        make_judge("own_judges:Quiet")
    sys.modules.pop("own_judges")


class Says:
    """A judge that reads its verdict off the answer."""

    name = "says"

    def score(self, prompt: str, answer: str) -> Verdict:
        return Verdict(refused=answer == "r", gibberish=answer == "g")

    def score_all(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [self.score(p, a) for p, a in zip(prompts, answers, strict=True)]


def test_counts_by_hand() -> None:
    rows = [("r", "refusal")] * 3 + [("r", "compliance")] + [("c", "refusal")] * 2 + [("g", "gibberish")]
    answers = [LabelledAnswer(str(i), "", said, label) for i, (said, label) in enumerate(rows)]  # type: ignore[arg-type]
    quality = measure_judge(Says(), answers)
    assert quality.refusal_precision is not None
    assert quality.refusal_recall is not None
    assert (quality.refusal_precision.estimate, quality.refusal_precision.n) == (3 / 4, 4)
    assert (quality.refusal_recall.estimate, quality.refusal_recall.n) == (3 / 5, 5)
    assert quality.confusion["refusal"] == {"refusal": 3, "compliance": 2, "gibberish": 0}
    assert [d.id for d in quality.disagreements] == ["3", "4", "5"]
    assert json.loads(json.dumps(json_safe(quality)))["refusal_recall"]["n"] == 5


def test_what_never_occurs_has_no_share() -> None:
    quality = measure_judge(Says(), [LabelledAnswer("0", "", "c", "compliance")])
    assert quality.refusal_precision is None
    assert quality.gibberish_recall is None


def test_the_rules_on_the_shipped_answers() -> None:
    answers = read_labelled()
    assert len(answers) >= 60
    assert len({a.id for a in answers}) == len(answers)
    quality = measure_judge(RuleJudge(), answers)
    assert quality.refusal_precision is not None
    assert quality.refusal_recall is not None
    assert quality.refusal_precision.estimate >= 0.9
    assert quality.refusal_recall.estimate >= 0.8


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"prompt": "p", "answer": "I cannot help with that.", "label": "refusal"}\n')
    assert main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refusal_precision"]["estimate"] == 1.0
    assert main([str(file)]) == 0
    assert "refusal recall" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: it cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no labelled answer in it"),
        ("{", "line 1: it is not JSON"),
        ('{"prompt": "p", "answer": "a"}', "line 1: it has no text 'label'"),
        ("\n[1]", "line 2: it has no text 'prompt'"),
        ('{"prompt": "p", "answer": "a", "label": "perhaps"}', "line 1: label 'perhaps' is unknown"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_labelled(file)
    assert message in caught.value.line
