"""A policy's report shows what its run holds, names the command for what it lacks, and hides harmful texts."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from outline import Outline
from policy_run import (
    EVIL,
    HEADROOM,
    SECRET,
    add_analysis,
    add_evaluation,
    add_headroom,
    add_metrics,
    add_trace,
    whole_run,
    write_run,
)

from trimtab import cli
from trimtab.errors import UserError
from trimtab.report import write_policy_report
from trimtab.report.policy_training import LINES


def written(path: Path) -> Outline:
    assert write_policy_report(path) == path / "report.html"
    return Outline((path / "report.html").read_text(encoding="utf-8"))


def row(page: Outline, first: str) -> str:
    """The words of the table row, from its name on."""
    at = page.words.index(first)
    return page.words[at : at + 400]


def test_evaluation_numbers_are_on_the_page(tmp_path: Path):
    page = written(whole_run(tmp_path / "run"))
    answer = (
        "on 1,234 items (test) its reward is 0.730 [0.710, 0.750], +0.222 [+0.202, +0.242] over the unsteered model"
    )
    assert f"Yes: {answer}. It is clearly above 2 of 2 arms." in page.words
    policy = row(page, "policy0.730")
    for shown in ("0.730 [0.710, 0.750]", "0.733 [0.713, 0.753]", "0.741 [0.721, 0.761]", "0.077 [0.057, 0.097]",
                  "0.0345", "0.473", "4,321"):  # fmt: skip
        assert shown in policy, shown
    static = row(page, f"static {EVIL}0.607")
    assert "+0.123 [+0.103, +0.143]" in static
    assert "0.473 ≠" in static
    assert "+12.3 [+10.3, +14.3]" in page.words  # in the drawing, as points
    assert "+0.200 [+0.180, +0.220] where the answer became well formed or malformed" in page.words
    assert "Without the change of format the gain is not shown." in page.words
    for shown in ("Beside it: other-task, all", "because ", "lora: no room", "the test split was opened before",
                  "0.473 against 0.9", "resid_post.9"):  # fmt: skip
        assert shown in page.words, shown
    assert "left10.2500.625+0.375" in page.words  # by group, of this task alone
    assert "right10.5000.500+0.000" in page.words


def test_how_controls_were_chosen_is_told_in_words(tmp_path: Path):
    path = write_run(tmp_path / "run")
    add_evaluation(path)
    found = json.loads((path / "evaluation.json").read_text())
    unsteered, policy, static = found["result"]["arms"]
    gate = {"helped": 61, "penalty": 10.0}
    unsteered["chosen"] = [{"feature": 1404, "doses_tried": [0.5, 1.0], "gate": gate, "objective": None}] * 3
    match = {"scale": 1.18034, "target": 0.83442, "reached": 0.95, "tries": 4, "tolerance": 0.05, "within": False}
    policy["chosen"], policy["kl_matches"] = [{"draws": 3}], [match, match | {"scale": 0.5, "within": True}]
    static["chosen"] = []
    (path / "evaluation.json").write_text(json.dumps(found))
    page = written(path)
    at = page.words.index("How controls were chosen")
    words = page.words[at : at + 700]
    assert "unsteeredallfeature: 1404doses tried: 0.5, 1gate, helped: 61gate, penalty: 10objective: –" in words
    first = "policy1draws: 3doses × 1.18: KL 0.95 nats on validation, the policy's 0.8344; not equal within 5%"
    assert first + "policy2draws: 3doses × 0.5: KL 0.95 nats on validation, the policy's 0.8344" in words
    assert not {"{", "}", '"'} & set(words.replace(EVIL, ""))


def test_tables_without_rows_are_left_out(tmp_path: Path):
    path = whole_run(tmp_path / "run")
    place = path / "analysis/analysis.json"
    found = json.loads(place.read_text())
    found["critic"]["separations"] = found["ledger"]["entries"] = found["branch_points"]["tokens"] = []
    place.write_text(json.dumps(found))
    page = written(path)
    raw = (path / "report.html").read_text(encoding="utf-8")
    assert "<tbody></tbody>" not in raw
    assert "How well the critic tells answers" not in page.words
    assert "most used features" not in page.words


@pytest.mark.parametrize(("gain", "static", "css"), [(0.222, 0.123, "yes"), (0.222, 0.01, "no"), (0.015, -0.1, "no")])
def test_the_answer_is_no_unless_every_arm_is_below(tmp_path: Path, gain: float, static: float, css: str):
    path = write_run(tmp_path / "run")
    add_evaluation(path, gain=gain, static=static)
    page = written(path)
    (answer,) = [a for _, a in page.tags if "verdict" in (a.get("class") or "")]
    assert answer["class"] == f"verdict {css}"
    assert (f"not above: static {EVIL}." in page.words or "not above: unsteered" in page.words) == (css == "no")
    assert ("Not shown: on" in page.words) == (gain < 0.02)


def test_the_policy_stands_between_the_lines_of_its_own_headroom(tmp_path: Path):
    page = written(whole_run(tmp_path / "run"))
    for name, label in LINES:
        assert f"{label} {HEADROOM[name]:.3f}" in page.words, name
        assert f"{HEADROOM[name]:.3f} [{HEADROOM[name] - 0.02:.3f}, {HEADROOM[name] + 0.02:.3f}]" in page.words
    assert "ceiling 0.111" not in page.words  # of another dose; in the table only
    assert "+0.341" in page.words
    assert f"nothing to learn {EVIL}" in page.words
    dots = [words for words in re.findall(r"validation/reward, \d+: [\d.]+", page.words)]
    assert dots == ["validation/reward, 0: 0.512", "validation/reward, 40: 0.731"]


def test_lines_are_drawn_where_they_belong(tmp_path: Path):
    path = write_run(tmp_path / "run")
    add_metrics(path)
    add_headroom(path)
    page = written(path)
    dashed = [float(str(a["y1"])) for t, a in page.tags if t == "line" and "stroke-dasharray" in a]
    dots = [float(str(a["cy"])) for t, a in page.tags if t == "circle"][:2]
    values = [*HEADROOM.values(), 0.512, 0.731]
    heights = [*dashed, *dots]
    assert len(dashed) == 6
    scale = (heights[5] - heights[0]) / (values[5] - values[0])
    for value, height in zip(values, heights, strict=True):
        assert height == pytest.approx(heights[0] + scale * (value - values[0]), abs=0.11)


def test_headroom_of_another_dose_is_no_line(tmp_path: Path):
    path = write_run(tmp_path / "run")
    add_metrics(path)
    add_headroom(path, dose=0.7)
    page = written(path)
    assert "best static 0.613" not in page.words
    assert "was not measured at the policy's own site, dose, unit and mask" in page.words
    assert "0.7 relative" in page.words


def test_it_says_where_the_edit_is_and_how_many_features_were_tried(tmp_path: Path):
    path = write_run(tmp_path / "run")
    add_metrics(path)
    add_headroom(path)
    assert "what one edit at the last prompt token gains on 32 items" in written(path).words
    assert "with every feature tried." in written(path).words
    found = json.loads((path / "headroom.json").read_text())
    for line in found["lines"]:
        line |= {"features": 48, "of_features": 4096, "scheme": "every answer token", "ceiling_is_lower_bound": True}
    (path / "headroom.json").write_text(json.dumps(found))
    words = written(path).words
    assert "what one feature held over the whole answer gains on 32 items" in words
    assert "with 48 of 4,096 features (a lower bound on the ceiling over all) tried" in words
    assert "every feature" not in words


def test_training_curves_hold_what_was_logged(tmp_path: Path):
    page = written(whole_run(tmp_path / "run"))
    assert "charts/episodic_return, 40: 0.8" in page.words
    assert "policy/effective_features, 1: 899" in page.words
    assert "losses/explained_variance−0.23750.2540" in page.words  # first, last, how often
    assert "policy/kl_unsteered" not in page.words  # never measured


def test_tokens_show_their_own_edit(tmp_path: Path):
    page = written(whole_run(tmp_path / "run"))
    titles = page.titles("k")
    assert len(titles) == 6
    first, second = titles[:2]
    for shown in ("position 10", "feature 1705: dose 0.5 relative, ‖Δ‖/‖x‖ 0.47", "probability 0.25 among 1,234",
                  "value 0.625", "KL of this edit 0.0456 nats", "KL of all edits 1.25 nats", f"{SECRET} 0.90",
                  "without:"):  # fmt: skip
        assert shown in first, shown
    assert "no edit" in second
    assert "probability 0.5 among 77" in second
    assert "1705" not in second
    colours = [a["class"] for _, a in page.tags if "title" in a and "k" in (a.get("class") or "").split()]
    assert colours == ["k k2", "k k0", "k k2 branch", "k k0", "k k2", "k k0"]  # item-1's token at 9 is a branch point
    assert "#1 item-1reward 0.875" in page.words
    assert "The first 3 of 3 answers, not picked; 3 edits at 6 tokens in all" in page.words


def test_strips_are_bounded(tmp_path: Path):
    path = write_run(tmp_path / "run")
    add_trace(path, answers=90, tokens=300)
    page = written(path)
    assert "The first 38 of 90 answers" in page.words
    assert len(page.titles("k")) == 6_000
    assert "… 140 more" in page.words
    add_trace(path, answers=90, tokens=1)
    assert "The first 60 of 90 answers" in written(path).words


def test_analysis_numbers_are_on_the_page(tmp_path: Path):
    page = written(whole_run(tmp_path / "run"))
    for shown in (
        "1 branch points among 2 tokens of 8 items (test, 100 items, greedy actions), false discovery rate 0.05",
        "+0.311 [+0.291, +0.331]", "0.271 [0.251, 0.291]", "7/8", "1/8", "0.0051", "0.01", "3 candidates were left out",
        "Forks at item-1, position 9", "random20480.7770.04440.25flips",
        "40 correct, 22 corrected, 3 misguided, 35 incorrect", "policy limited: the critic knows, and no action helps",
        "correct, 0: 0.671", "0.811 [0.791, 0.831]", "0.862 [0.842, 0.882]", "+0.051 [+0.031, +0.071]",
        "0.231 [0.211, 0.251]", "0.191 [0.171, 0.211]", "0.5 relative (trained)0.733 [0.713, 0.753]",
        "0.414 [0.394, 0.434]0.399", "tolerates doses up to 0.5 (relative); 12 features used",
        "17053210.283540, 1.5, 30.047 [0.027, 0.067]+0.154 [+0.134, +0.174]", "1,134 decisions", f"{SECRET} 17",
    ):  # fmt: skip
        assert shown in page.words, shown


@pytest.mark.parametrize(("task", "said"), [("harmbench", True), ("my_tasks:Poisons", True), ("ioi", None)])
def test_harmful_texts_are_not_on_the_page(tmp_path: Path, task: str, said: bool | None):
    """Nor are those of a run that does not say whether its task's texts may be shown."""
    path = whole_run(tmp_path / "run", task=task, hides_text=said)
    page = written(path)
    raw = (path / "report.html").read_text(encoding="utf-8")
    assert SECRET not in raw
    assert "word0" not in raw
    assert "item-1" not in raw  # ids may say what is asked for
    assert "@10" in page.words
    assert any("feature 1705" in title for title in page.titles("k"))
    assert "7/8" in page.words


def test_texts_of_a_task_that_is_said_to_be_harmless_are_shown(tmp_path: Path):
    assert SECRET in written(whole_run(tmp_path / "run", task="my_tasks:Riddles", hides_text=False)).words


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path):
    path = whole_run(tmp_path / "run")
    page = written(path)
    assert not {"script", "b>", "i", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert EVIL in page.words
    assert html.escape(EVIL, quote=True) in (path / "report.html").read_text(encoding="utf-8")
    assert not any({"src", "href", "onclick", "onload"} & set(attributes) for _, attributes in page.tags)


PARTS = {
    "headroom": (add_headroom, "Headroom was not measured"),
    "evaluation": (add_evaluation, "has not been evaluated beside its controls"),
    "trace": (add_trace, "There is no trace"),
    "analysis": (add_analysis, "Branch points were not looked for"),
    "metrics": (add_metrics, "No training is logged"),
}


@pytest.mark.parametrize("part", [*PARTS, None])
def test_what_is_absent_names_its_command(tmp_path: Path, part: str | None):
    path = write_run(tmp_path / "run")
    if part is not None:
        PARTS[part][0](path)
    page = written(path)
    for name, (_, said) in PARTS.items():
        assert (said in page.words) == (name != part), name
    assert f"trimtab policy evaluate {path}" in page.words  # makes the evaluation and the trace
    for name, command in (
        ("analysis", f"trimtab policy analyze {path} --parts critic"),
        ("headroom", "trimtab policy headroom --task ioi-mixture --model a-model --sae an-sae --dose 0.5 --unit "
         f"relative --masks accumulated --options-only --split validation --out {path}/headroom.json"),
    ):  # fmt: skip
        assert (command in page.words) == (name != part), name


def test_an_analysis_of_some_parts_names_the_others(tmp_path: Path):
    path = whole_run(tmp_path / "run")
    file = path / "analysis/analysis.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"critic": None, "layers": []}))
    page = written(path)
    assert "The critic was not judged." in page.words
    assert "Doses and kinds of features were not compared." in page.words
    assert "1,134 decisions" in page.words


def test_training_that_goes_on_and_runs_of_an_evaluation_alone(tmp_path: Path):
    path = write_run(tmp_path / "running", results=None, status="running")
    add_metrics(path)
    assert "Not finished" in written(path).words
    alone = write_run(tmp_path / "out", command="policy evaluate", config={"run": ["a", "b"]}, results={})
    add_evaluation(alone)
    assert "its reward is 0.730" in written(alone).words


def test_bad_runs_are_mistakes_of_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no run\.json; name a directory that a command wrote"):
        write_policy_report(tmp_path)
    other = write_run(tmp_path / "other", command="demo")
    with pytest.raises(UserError, match="it belongs to `demo`, and is no policy's; name a run of `policy train`"):
        write_policy_report(other)
    broken = whole_run(tmp_path / "broken")
    (broken / "tokens.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(UserError, match=r"tokens\.parquet: not readable as Parquet .*; run its command again"):
        write_policy_report(broken)
    (broken / "headroom.json").write_text("{")
    with pytest.raises(
        UserError, match=r"headroom\.json: it is not JSON; write it again with the command that made it"
    ):
        write_policy_report(broken)
    assert not (broken / "report.html").exists()


def test_the_report_loads_no_torch(tmp_path: Path):
    path = whole_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from trimtab.report import write_policy_report; "
        f"write_policy_report(Path({str(path)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_command_line_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = whole_run(tmp_path / "run")
    assert cli.main(["policy", "report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(path / "report.html")}
    assert (path / "report.html").exists()
    assert cli.main(["policy", "report", str(tmp_path / "none")]) == 2
    assert "there is no run.json" in capsys.readouterr().err
