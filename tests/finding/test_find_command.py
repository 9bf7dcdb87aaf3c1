"""`trimtab find` from files to a run with a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted_wishes import SITE, UP_FEATURE, Ground, contrast_wish, texts_wish

from trimtab import cli
from trimtab.activations import read_documents, sample_text
from trimtab.dictionaries import load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.finding import FindConfig, Texts, find
from trimtab.finding.examples import divide
from trimtab.finding.generated import make_reader
from trimtab.finding.options import FindOptions
from trimtab.finding.wishes.files import read_labelled, read_rows, read_sides, read_texts
from trimtab.lm import load_model
from trimtab.stats import Interval
from trimtab.steering import load, steer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its SAEs and a wish on disk."""
    place = tmp_path_factory.mktemp("find")
    ground.model.hf.save_pretrained(place / "planted")
    ground.model.tokenizer.save_pretrained(place / "planted")
    for site, sae in ground.saes.items():
        save_dictionary(sae, place / str(site))
    rows = [json.dumps(dict(row)) for row in contrast_wish(40).rows]
    (place / "contrast.jsonl").write_text("\n".join(rows), "utf-8")
    return place


def command(files: Path, *words: str) -> list[str]:
    saes = [str(files / f"resid_post.{layer}") for layer in range(3)]
    small = ["--examples", "6", "6", "10", "--n-neutral", "2", "3", "--max-new-tokens", "6", "--set-size", "1"]
    return ["find", "--model", str(files / "planted"), "--sae", *saes, "--way", "mean-difference", *small, *words]


def test_from_a_file_to_a_page(ground: Ground, files: Path, tmp_path: Path, capsys: Capture) -> None:
    words = command(files, "--contrast", str(files / "contrast.jsonl"), "--run", str(tmp_path / "run"), "--json")
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    (part,) = found["ways"][0]["parts"]
    assert (part["site"], part["feature"]) == (str(SITE), UP_FEATURE)
    assert found["yes"] is True
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "What brings a wish about" in page
    assert "data:image/svg+xml" in page
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert [one["split"] for one in record["test_split_openings"]] == ["report"]
    steering = load(tmp_path / "run")
    (kept,) = steering.parts
    assert (kept.site, kept.feature, kept.dose) == (str(SITE), (UP_FEATURE,), pytest.approx((part["dose"],)))
    assert kept.norm is not None
    assert kept.norm > 0
    effect = steering.evidence[0].value
    assert isinstance(effect, Interval)
    assert effect.estimate == found["ways"][0]["own"]["effect"]["estimate"]
    steered = steer(ground.model, steering, "ab cd", max_new_tokens=4, kl=False)
    assert steered.steered[0].realised.relative == pytest.approx(abs(part["dose"]), rel=1e-3)
    run, small = str(tmp_path / "run"), ["--max-new-tokens", "3"]
    scored = ["steer", "ab cd", "--with", run, "--sweep", "1", "-1", "--controls", "--score", run, *small, "--json"]
    assert cli.main(scored) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert [arm["name"] for arm in arms[3:]] == ["random, 1 × its dose", "random, -1 × its dose"]
    assert "score" not in arms[0]
    assert arms[1]["score"]["estimate"] == pytest.approx(found["ways"][0]["own"]["effect"]["estimate"], abs=1e-4)
    assert arms[2]["score"]["estimate"] < 0 < arms[1]["score"]["estimate"]
    assert abs(arms[3]["score"]["estimate"]) < arms[1]["score"]["estimate"] / 2
    assert cli.main(["steer", "ab", "--with", run, run, "--score", run, *small]) == 2
    assert "only one steering of constant doses is scored" in capsys.readouterr().err
    assert cli.main(["steer", "ab", "--with", run, "--score", str(tmp_path), *small]) == 2
    assert "there is no run.json" in capsys.readouterr().err
    (files / "contrast.jsonl").rename(files / "moved.jsonl")
    assert cli.main(["steer", "ab", "--with", run, "--score", run, *small]) == 2
    assert "contrast.jsonl" in capsys.readouterr().err
    (files / "moved.jsonl").rename(files / "contrast.jsonl")
    assert cli.main(words) == 0  # read back
    assert json.loads(capsys.readouterr().out) == found


def test_features_of_a_run_that_was_made_in_python(
    ground: Ground, files: Path, tmp_path: Path, capsys: Capture
) -> None:
    """By the names that model and SAEs were loaded by; what was in memory has to be named, and be the same."""
    small: Any = {"examples": (6, 6, 10), "n_neutral": (2, 3), "max_new_tokens": 6, "set_size": 1, "way": ()}
    model, place = load_model(str(files / "planted")), files / str(SITE)
    find(model, load_dictionary(place), contrast_wish(40), run=tmp_path / "loaded", **small)
    find(ground.model, ground.saes[SITE], contrast_wish(40), run=tmp_path / "memory", **small)
    short = ["--prompt", "ab", "--max-new-tokens", "2"]
    assert cli.main(["feature", "--of", str(tmp_path / "loaded"), *short, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert UP_FEATURE in [one["feature"] for one in printed["profiles"]]
    assert "features/report.html#" in (tmp_path / "loaded" / "report.html").read_text("utf-8")
    of_memory = ["feature", "--of", str(tmp_path / "memory"), *short]
    assert cli.main(of_memory) == 2
    assert "names no model and SAE that could be loaded; give them: --model and --sae" in capsys.readouterr().err
    named = ["--model", str(files / "planted"), "--sae"]
    assert cli.main([*of_memory, *named, str(place)]) == 0  # as the hint says
    other = load_dictionary(place)
    with torch.no_grad():
        other.W_dec[0, 0] += 1
    save_dictionary(other, tmp_path / "other")
    capsys.readouterr()
    assert cli.main([*of_memory, *named, str(tmp_path / "other")]) == 2  # mutation: check no hash
    assert "the run was made with one of hash" in capsys.readouterr().err


@pytest.mark.parametrize(("ending", "told"), [("", True), (" The ships sailed out to sea.", False)])
def test_texts_that_hardly_differ_are_said_to(ending: str, told: bool, ground: Ground) -> None:
    """Mutation: compare the estimate with chance, which half of all such wishes exceed."""
    sentences = [s for d in read_documents([sample_text()]) for s in re.findall(r"[A-Z][^.]{60,140}\.", d.text)][:240]
    wish = Texts(wanted=tuple(s + ending for s in sentences[::2]), unwanted=tuple(sentences[1::2]))
    splits = divide(wish.examples(ground.model), (6, 6, 10))
    reader = make_reader(SimpleNamespace(splits=splits, options=FindOptions()))  # type: ignore[arg-type]
    doubts = reader.doubts()
    assert bool(doubts) == told, reader.accuracy
    assert all("wanted and unwanted texts hardly differ" in doubt for doubt in doubts)


def test_wishes_that_are_refused() -> None:
    for options, message in (
        ({}, "the wish: there is none"),
        ({"want": "a", "task": "mmlu"}, "the wish: --want and --task are given"),
        ({"more": ("a",)}, "--prompt: words need prompts"),
        ({"want": "a", "unwanted": Path("b")}, "--unwanted: there are no wanted texts"),
    ):
        given: dict[str, Any] = dict(options)
        with pytest.raises(UserError) as caught:
            FindConfig(**given)
        assert str(caught.value).startswith(message)


def test_files_that_are_refused(tmp_path: Path) -> None:
    texts, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    texts.write_text("\n \n", "utf-8")
    rows.write_text('{"text": "a", "wanted": true}\n{"text": "b"}\n', "utf-8")
    with pytest.raises(UserError, match=r"texts\.txt: there is no text in it"):
        read_texts(texts)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: it does not hold a text and whether it is wanted"):
        read_labelled(rows)
    with pytest.raises(UserError, match="it cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_too_few_examples_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refused(config: FindConfig) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(FindConfig, "load_model", refused)
    few, rows = tmp_path / "few.txt", [json.dumps(dict(row)) for row in contrast_wish(9).rows]
    few.write_text("one\ntwo\nthree\n", "utf-8")
    contrast, other = tmp_path / "few.jsonl", tmp_path / "other.txt"
    other.write_text("four\nfive\nsix\n", "utf-8")
    contrast.write_text("\n".join(rows), "utf-8")
    for words, counts in (
        (["--contrast", str(contrast)], "9 examples: they make 4 candidates, 2 choice, 3 report; at least 4 are"),
        (["--wanted", str(few), "--unwanted", str(other)], "3 examples: "),
        (["--more", "word", "--prompt", str(few)], "3 examples: "),
    ):
        assert cli.main(["find", *words]) == 2
        assert counts in capsys.readouterr().err
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps(dict(row)) for row in contrast_wish(40).rows), "utf-8")
    with pytest.raises(AssertionError, match="a model was loaded"):
        cli.main(["find", "--contrast", str(many)])


def test_texts_in_lines_and_in_records(tmp_path: Path) -> None:
    wish = texts_wish(3)
    (tmp_path / "a.txt").write_text("\n".join(wish.wanted), "utf-8")
    records = [json.dumps({"text": text}) for text in wish.wanted]
    (tmp_path / "a.jsonl").write_text("\n".join(records), "utf-8")
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == wish.wanted


def test_blank_lines_that_shift_pairs_are_refused(tmp_path: Path) -> None:
    wanted, unwanted, alike = (tmp_path / f"{name}.txt" for name in ("wanted", "unwanted", "alike"))
    wanted.write_text("a\n\nb\nc\n\n", "utf-8")
    unwanted.write_text("d\ne\n\nf\n", "utf-8")
    alike.write_text("d\n\ne\nf\n", "utf-8")
    with pytest.raises(UserError, match="line 2 is blank in one of them alone, so that their lines are no pairs"):
        read_sides(wanted, unwanted)
    assert read_sides(wanted, alike) == (("a", "b", "c"), ("d", "e", "f"))
    unwanted.write_text("d\ne\n", "utf-8")  # of other numbers, which are no pairs anyway
    assert read_sides(wanted, unwanted) == (("a", "b", "c"), ("d", "e"))


def test_wanted_texts_alone(files: Path, capsys: Capture) -> None:
    (files / "wanted").write_text("a b c\n" * 3, "utf-8")
    assert cli.main(command(files, "--wanted", str(files / "wanted"))) == 2
    assert "there are no unwanted texts beside it; give --unwanted, too" in capsys.readouterr().err
