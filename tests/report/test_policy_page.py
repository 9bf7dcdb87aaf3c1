"""The page of a policy beside what its commands printed; what is absent names its command, harmful texts are hidden."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from outline import Outline
from real_runs import Made
from test_pages import page, text

from trimtab.cli import COMMANDS
from trimtab.cli.options import parse
from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import load_model
from trimtab.report import policy_arms, write_report
from trimtab.runs import read_record

EVIL = "<script>alert('x')</script>&\""
COLUMNS = ("reward", "difference", "accuracy", "accuracy_well_formed", "malformed")
FORMS = (".3f", "+.3f", ".3f", ".3f", ".3f")


@pytest.fixture(scope="module")
def read(whole: Path) -> Outline:
    return page(whole)


def edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a run."""
    content = json.loads((path / name).read_text())
    content = change(content) or content
    (path / name).write_text(json.dumps(content))


def check_arms(read: Outline, printed: dict[str, Any]) -> None:
    groups = {"own": "At their own strength", "dose": "At the policy's dose", "kl": "At the policy's divergence"}
    rows, at = read.rows, -1
    for match, name in groups.items():
        arms = [arm for arm in printed["arms"] if arm["match"] == match]
        assert arms, match
        at = rows.index([name], at + 1)
        for arm, row in zip(arms, rows[at + 1 :], strict=False):
            assert row[0] == arm["label"]
            assert row[1:6] == [text(arm[column], form) for column, form in zip(COLUMNS, FORMS, strict=True)]
            dose = "–" if arm["dose"] is None else text(arm["dose"]["relative"], ".3g")
            assert row[6:8] == [text(arm["kl"], ".3g"), dose + " ≠" * (arm["equal_dose"] is False)]


def test_every_arm_stands_in_its_group_with_its_own_numbers(read: Outline, made: Callable[[str], Made]) -> None:
    result = made("evaluation").printed["result"]
    check_arms(read, result)
    for arm in result["arms"]:
        if arm["difference"] is not None:
            assert text(arm["difference"], "+.3f") in read.drawn
    assert {"At their own strength", "At the policy's dose", "At the policy's divergence"} <= set(read.drawn)
    assert f"gain over the unsteered model is {text(result['gain']['total'], '+.3f')}" in read.words


@pytest.mark.parametrize("mutation", ["numbers", "groups"])
def test_numbers_of_another_arm_or_group_are_caught(
    mutation: str, copied: Path, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations: rewards stand a row too low; arms at equal divergence stand among those at equal dose."""
    if mutation == "groups":
        monkeypatch.setattr(policy_arms, "GROUPS", dict.fromkeys(policy_arms.GROUPS, "At the policy's dose"))
    else:

        def shift(found: dict[str, Any]) -> None:
            arms = found["result"]["arms"]
            rewards = [arm["reward"] | {"estimate": arm["reward"]["estimate"] + i / 100} for i, arm in enumerate(arms)]
            for arm, reward in zip(arms, rewards[-1:] + rewards, strict=False):
                arm["reward"] = reward

        edit(copied, "evaluation.json", shift)
    with pytest.raises((AssertionError, ValueError)):
        check_arms(page(copied), made("evaluation").printed["result"])


def test_how_controls_were_chosen_is_told_in_words(
    read: Outline, copied: Path, whole: Path, made: Callable[[str], Made]
) -> None:
    arms = {arm["label"]: arm for arm in made("evaluation").printed["result"]["arms"]}
    choices = {row[0]: row[2] for row in read.rows if len(row) == 3 and row[1] in ("–", "all")}
    (static,) = arms["static"]["chosen"]
    assert choices["static"].startswith(f"feature: {static['feature']} ({meaning(whole, static['feature'])[0]}")
    label = next(label for label, arm in arms.items() if arm["match"] == "kl" and arm["kl_matches"])
    match = arms[label]["kl_matches"][0]
    assert f"doses × {match['scale']:.4g}: KL {match['reached']:.4g} nats on validation" in choices[label]

    def several(found: dict[str, Any]) -> None:
        arm = next(arm for arm in found["result"]["arms"] if arm["label"] == "static")
        gate = {"helped": 61, "penalty": 10.0}
        arm["chosen"] = [{"gate": gate, "doses_tried": [0.5, 1.0], "objective": None, "kept": True}] * 2
        missed = {"scale": 0.5, "reached": 0.9, "target": 0.8, "within": False, "tolerance": 0.05}
        arm["kl_matches"] = [missed, missed | {"within": True}]

    edit(copied, "evaluation.json", several)
    first, second = [row[1:] for row in page(copied).rows if len(row) == 3 and row[0] == "static" and row[1] in "12"]
    chosen = "gate, helped: 61 gate, penalty: 10 doses tried: 0.5, 1 objective: – kept: yes"
    match = "doses × 0.5: KL 0.9 nats on validation, the policy's 0.8"
    assert first == ["1", f"{chosen} {match}; not equal within 5%"]
    assert second == ["2", f"{chosen} {match}"]


def said(path: Path) -> tuple[str, str | None]:
    """The verdict's first sentence, and its class."""
    write_report(path)
    raw = (path / "report.html").read_text()
    (found,) = re.findall(r'<p class="verdict (\w+)" role="status">(.*?)</p>', raw)
    return found[1].partition(". ")[0], found[0]


@pytest.mark.parametrize(
    ("reward", "low", "high", "begins", "css"),
    [(0.9, -0.2, 0.3, "Not shown to gain more than its best control, static", "no"),
     (0.9, -0.3, -0.1, "Less than its best control, static", "no"),
     (0.9, 0.1, 0.3, "More than its best control, static", "yes")],
)  # fmt: skip
def test_the_first_sentence_names_the_best_control(
    copied: Path, reward: float, low: float, high: float, begins: str, css: str
) -> None:
    """However large the gain over the unsteered model is."""

    def change(found: dict[str, Any]) -> None:
        for arm in found["result"]["arms"]:
            if arm["difference"] is not None:
                arm["reward"]["estimate"] = reward if arm["label"] == "static" else 0.2
                bounds = (low, high) if arm["label"] == "static" else (0.2, 0.6)
                arm["difference"] |= {"estimate": sum(bounds) / 2, "low": bounds[0], "high": bounds[1]}

    edit(copied, "evaluation.json", change)
    sentence, shown = said(copied)
    assert sentence.startswith(begins)
    assert shown == css


def test_the_policy_stands_between_the_lines_of_its_own_headroom(whole: Path, read: Outline) -> None:
    (line,) = json.loads((whole / "headroom.json").read_text())["lines"]
    names = {"unsteered": "unsteered", "static": "best static", "readout": "readout", "ceiling": "ceiling"}
    for name, label in names.items():
        assert f"{label} {line[name]['estimate']:.3f}" in read.drawn
    row = read.row(f"{line['site']}, {line['mask']}")
    assert row[2] == text(line["unsteered"])
    assert row[-1] == text(line["over_static"], "+.3f")
    assert f"what one edit at the last prompt token gains on {line['items']} items" in read.words


def test_headroom_of_another_dose_is_no_line(copied: Path) -> None:
    edit(copied, "headroom.json", lambda found: found["lines"][0].update(dose=0.7))
    found = page(copied)
    assert not any(words.startswith("best static ") for words in found.drawn)
    assert "was not measured at the policy's own site, dose, unit and mask" in found.words
    assert found.row("resid_post.3, none")[1] == "0.7 relative"


def test_it_says_how_many_features_were_tried(copied: Path) -> None:
    few = {"features": 8, "of_features": 4096, "scheme": "every answer token", "ceiling_is_lower_bound": True}
    edit(copied, "headroom.json", lambda found: found["lines"][0].update(few))
    words = page(copied).words
    assert "what one feature held over the whole answer gains on" in words
    assert "with 8 of 4,096 features (a lower bound on the ceiling over all) tried" in words


def test_training_curves_and_metrics_are_those_logged(whole: Path, read: Outline) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    for name in ("charts/reward", "losses/approx_kl", "validation/reward"):
        values = [line[name] for line in lines if line.get(name) is not None]
        assert read.row(name)[1:] == [text(values[0], ".4g"), text(values[-1], ".4g"), str(len(values))]


def meaning(whole: Path, feature: int) -> str:
    """The likeliest tokens of a feature's row by final norm and head of the untouched transformers model."""
    config = read_record(whole)["config"]
    model = load_model(config["model"])
    row = load_dictionary(config["sae"], model=model).W_dec[feature]
    with torch.no_grad():
        logits = model.hf.lm_head(model.hf.model.norm(row[None]))[0]  # pyright: ignore
    return " ".join(model.decode_ids([int(i)], special=True).strip() or "␣" for i in logits.topk(3).indices)


def test_tokens_show_their_own_edit_and_what_its_feature_means(whole: Path, read: Outline) -> None:
    tokens, edits = (pq.read_table(whole / f"{name}.parquet").to_pylist() for name in ("tokens", "edits"))
    titles = read.titles("k")
    assert len(titles) == len(tokens)
    feature = edits[0]["feature"]
    first = titles[0]
    assert f"position {tokens[0]['position']}" in first
    assert f"feature {feature} (" in first
    words = first.partition(f"feature {feature} (")[2].partition("): dose")[0]
    assert words.split()[0] == (meaning(whole, feature).replace("\n", "⏎").split() or ["∅"])[0]
    assert f"‖Δ‖/‖x‖ {abs(edits[0]['relative_dose']):.3g}" in first
    assert f"KL of this edit {tokens[0]['kl_local']:.3g} nats" in first
    assert f"The first {len(tokens)} of {len(tokens)} answers, not picked; {len(edits)} edits" in read.words


def test_strips_are_bounded(copied: Path) -> None:
    table = pq.read_table(copied / "tokens.parquet")
    (token, *_) = table.to_pylist()
    for answers, length, shown in ((90, 300, 38), (90, 1, 60)):
        rows = [token | {"sample": i, "position": j} for i in range(answers) for j in range(length)]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copied / "tokens.parquet")
        found = page(copied)
        assert f"The first {shown} of 90 answers" in found.words
        assert len(found.titles("k")) == min(6_000, 60 * length)
        assert ("… 140 more" in found.words) == (length == 300)


def test_analysis_numbers_are_on_the_page(read: Outline, made: Callable[[str], Made]) -> None:
    printed = made("analysis").printed
    points, ledger = printed["branch_points"], printed["ledger"]
    found = sum(token["branch_point"] for token in points["tokens"])
    assert f"{found} branch points among {len(points['tokens'])} tokens" in read.words
    assert f"features: {text(points['excess'], '+.3f')}; wrong items" in read.words
    for token in points["tokens"]:
        row = next(row for row in read.rows if row[:2] == [token["item"], str(token["position"])])
        assert row[3].partition(" ")[0] == str(token["feature"])
        assert row[5:7] == [f"{token['flips']}/{token['tried']}", f"{token['random_flips']}/{token['tried']}"]
    assert ", ".join(f"{n} {group}" for group, n in printed["critic"]["counts"].items()) in read.words
    for entry in ledger["entries"]:
        row = next(row for row in read.rows if len(row) == 8 and re.match(rf"{entry['feature']} \(", row[0]))
        numbers = [f"{entry['uses']:,}", text(entry["share"]), str(entry["items"])]
        assert row[1:4] == numbers
        assert row[5:7] == [text(entry["kl_local"]), text(entry["reward_difference"], "+.3f")]
    for point in printed["layers"][0]["doses"]:
        row = next(row for row in read.rows if len(row) == 6 and row[1].startswith(f"{point['dose']:g} relative"))
        assert row[2:5] == [text(point["reward"]), text(point["difference"], "+.3f"), text(point["kl"])]


@pytest.mark.parametrize("hides", [True, None])
def test_harmful_texts_are_not_on_the_page(copied: Path, hides: bool | None) -> None:
    """Nor are those of a run that does not say whether its task's texts may be shown."""
    ids = read_record(copied)["splits"]["test[:12]"]
    shown = (write_report(copied)).read_text()
    assert all(item in shown for item in ids)
    edit(copied, "run.json", lambda record: record.update(hides_text=hides))
    raw = write_report(copied).read_text()
    assert not any(item in raw for item in ids)
    assert "How controls were chosen" not in raw
    assert ">@3<" in raw
    assert any("feature " in title and "top" not in title for title in Outline(raw).titles("k"))
    assert not re.search(r"position \d+: ", raw)


def test_nothing_that_a_run_holds_becomes_markup(copied: Path) -> None:
    for name in ("run.json", "evaluation.json", "analysis/analysis.json", "headroom.json"):
        file = copied / name
        file.write_text(re.sub(r"half-hurt|vector|resid_post\.3", lambda _: json.dumps(EVIL)[1:-1], file.read_text()))
    found = page(copied)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.words.count(EVIL) > 10


PARTS = {
    "headroom.json": "Headroom was not measured",
    "evaluation.json": "has not been evaluated beside its controls",
    "tokens.parquet": "There is no trace",
    "analysis/analysis.json": "Branch points were not looked for",
    "metrics.jsonl": "No training is logged",
}


@pytest.mark.parametrize("part", [*PARTS, None])
def test_what_is_absent_names_its_command(copied: Path, part: str | None) -> None:
    if part is not None:
        (copied / part).unlink()
    found = page(copied)
    for name, words in PARTS.items():
        assert (words in found.words) == (name == part), name
    commands = {
        "evaluation.json": f"trimtab policy evaluate {copied}",
        "tokens.parquet": f"trimtab policy evaluate {copied}",
        "analysis/analysis.json": f"trimtab policy analyze {copied} --part critic",
        "headroom.json": "trimtab policy headroom --task planted_readout:HalfHurt --model",
    }
    for name, command in commands.items():
        assert (command in found.words) == (part is not None and command == commands.get(part)), name
    for words in re.findall(r"trimtab policy headroom (.*? --run \S+)", found.words):
        _, config = parse("policy headroom", COMMANDS["policy headroom"](), shlex.split(words))
        assert (config.mask, config.dose) == (("none",), (2.0,))


def test_an_analysis_of_some_parts_names_the_others(copied: Path) -> None:
    edit(copied, "analysis/analysis.json", lambda found: found | {"critic": None, "layers": []})
    words = page(copied).words
    assert "The critic was not judged." in words
    assert "Doses and kinds of features were not compared." in words
    assert "There is no ledger" not in words


def test_a_training_that_goes_on_says_so(copied: Path) -> None:
    (copied / "evaluation.json").unlink()
    assert said(copied)[0].startswith("Validation reward ")
    edit(copied, "run.json", lambda record: record.update(results=None, status="running"))
    assert said(copied) == ("Not finished: the training goes on with the same command.", "no")


def test_damaged_files_are_mistakes_of_one_line(copied: Path) -> None:
    (copied / "report.html").unlink(missing_ok=True)
    (copied / "tokens.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(UserError, match=r"tokens\.parquet: not readable as Parquet .*; run its command again"):
        write_report(copied)
    (copied / "headroom.json").write_text("{")
    with pytest.raises(UserError, match=r"headroom\.json: it is not JSON"):
        write_report(copied)
    assert not (copied / "report.html").exists()


def test_the_page_loads_no_torch(whole: Path) -> None:
    code = "import sys, trimtab.report as r; r.write_report(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
