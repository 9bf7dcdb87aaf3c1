"""`trimtab evaluate axbench` on a tiny model: features or labelled texts in, a run with a page out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from counting_judge import CountingJudge

from trimtab.cli import main
from trimtab.dictionaries import DictionaryInfo, FeatureStats, Standard, load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.features import examples
from trimtab.interpreting.axbench import AxBenchConfig, AxBenchResult, feature_concepts, run_axbench
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel
from trimtab.runs import read_record, read_typed

TEXTS = [f"{a}{b} {b}{a} the {a} and {b} in {i}" for i, (a, b) in enumerate(zip("zqgkzqgk", "abcdefgh", strict=True))]


@pytest.fixture(scope="module")
def files(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an SAE with statistics and examples, and labelled texts."""
    path = tmp_path_factory.mktemp("axbench")
    tiny_llama.hf.save_pretrained(path / "model")
    tiny_llama.tokenizer.save_pretrained(path / "model")
    rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    info = DictionaryInfo(architecture="standard", site="resid_post.2")
    sae = Standard(rows.T, torch.full((24,), -1.0), rows, torch.zeros(32), info=info)
    largest = np.full(24, 3, np.float32)
    stats = FeatureStats(max_activation=largest, mean_activation=largest, firing_rate=np.ones(24), n_tokens=100)
    save_dictionary(sae, path / "sae", stats)
    found = examples(tiny_llama, sae, TEXTS, top=3, weighted=3, random=3, window=8, context=24)
    found.write(path / "sae" / "feature_examples.parquet")
    labelled = [{"text": f"{letter}{letter} " * n, "label": letter} for letter in "zqg" for n in range(2, 10)]
    (path / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    return path


def config(files: Path, tmp_path: Path, **more: Any) -> AxBenchConfig:
    settings: dict[str, Any] = {
        "arm": ("features", "random", "mean-difference", "prompt"), "factor": (0.5, 2.0), "unit": "relative",
        "max_new_tokens": 4, "n_instructions": 4, "judge": "counting_judge:CountingJudge", "any_model": True,
    }  # fmt: skip
    return AxBenchConfig(model=str(files / "model"), sae=str(files / "sae"), run=tmp_path / "run", **(settings | more))


def test_labelled_texts_in_a_run_with_a_page_out(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: read the run back without its intervals."""
    asked = config(files, tmp_path, concepts=files / "labelled.jsonl")
    found = run_axbench(asked)
    assert "answers to write and judge" in capsys.readouterr().err
    assert [one.arm for one in found.arms] == ["features", "random", "mean-difference", "prompt"]
    assert {one.concept for one in found.concepts} == set("zqg")
    record = read_record(tmp_path / "run")
    assert record["status"] == "done"
    assert len(record["splits"]["choosing"]) == len(record["splits"]["reporting"]) == 2
    assert repr(read_typed(AxBenchResult, record["results"])) == repr(found)
    rows = pq.read_table(tmp_path / "run" / "answers.parquet").to_pylist()
    assert len(rows) == 3 * (2 * (3 * 2 + 1) + 2 * 4)  # two choose, of three arms at two factors; two report
    assert sum(row["reports"] for row in rows) == 3 * 2 * 4
    again = run_axbench(asked)
    assert repr(again.concepts) == repr(found.concepts)
    assert capsys.readouterr().err == ""  # nothing is done twice
    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mean-difference" in page
    assert "texts that count as not fluent" in page


def test_features_with_a_ranking(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: give the scores of a ranking in its own order instead of the features'."""
    words = ["--model", str(files / "model"), "--sae", str(files / "sae"), "--any-model"]
    main(["rank", *words, "--criterion", "max-activation", "random", "--run", str(tmp_path / "ranks")])
    command = ["evaluate", "axbench", *words, "--arm", "features", "--factor", "0.5", "1", "--unit", "relative"]
    command += ["--judge", "counting_judge:CountingJudge", "--n-features", "9", "--max-new-tokens", "4"]
    command += ["--n-instructions", "4", "--ranking", str(tmp_path / "ranks"), "--run", str(tmp_path / "run"), "--json"]
    capsys.readouterr()
    assert not main(command)
    said = json.loads(capsys.readouterr().out)
    assert [one["criterion"] for one in said["selection"]["criteria"]] == ["max-activation", "random"]
    assert said["selection"]["features"] == 9
    assert len({one["feature"] for one in said["concepts"]}) == 9


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", "axbench", *words]) == 2
    return capsys.readouterr().err


def test_what_is_refused(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(files / "model"), "--sae", str(files / "sae"), "--any-model", "--judge", "rules"]
    assert "leave one out" in refused(capsys, *words, "--concepts", "x", "--feature", "1")
    assert "it ranks the features" in refused(capsys, *words, "--ranking", "x", "--arm", "probe")
    assert "no such file" in refused(capsys, *words, "--ranking", str(tmp_path))
    assert "instructions" in refused(capsys, *words, "--instructions", str(tmp_path / "none.json"))
    assert "judge" in refused(capsys, *words[:-1], "nobody")
    assert "flags" in refused(capsys, *words, "--flags", str(tmp_path))
    assert "there are features 0 to 23" in refused(capsys, *words, "--feature", "24")
    assert not list(tmp_path.iterdir())


def test_concepts_of_features_have_windows_of_others(files: Path) -> None:
    """Mutation: take what lacks a feature from the documents in which it fires, or a window twice that was drawn
    twice."""
    found = load_dictionary(str(files / "sae"), any_model=True).feature_examples
    assert found is not None
    live = found.live.tolist()
    made, repeated = feature_concepts(found, live[:4], has=2, lacks=3), 0
    for feature, concept in zip(live, made, strict=False):
        own = found[feature].windows
        assert concept.feature == feature
        assert len(concept.exemplars.has) <= 2
        assert max(concept.exemplars.has[0].activations) == pytest.approx(own[0].activation)
        distinct = len({(window.document, window.position) for window in own})
        assert len(feature_concepts(found, [feature])[0].exemplars.has) == distinct
        repeated += len(own) - distinct
        documents = {window.document for window in own}
        inside = {"".join(w.tokens) for i in live for w in found[i].windows if w.document in documents}
        assert all(not passage.activations for passage in concept.exemplars.lacks)
        assert not {passage.text for passage in concept.exemplars.lacks} & inside
    assert repeated


def test_a_run_of_other_inputs_is_not_read_back(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: record nothing of the texts, or of the ranking."""
    labelled, ranks = tmp_path / "texts.jsonl", tmp_path / "ranks.parquet"
    lines = (files / "labelled.jsonl").read_text().splitlines()
    labelled.write_text("\n".join(lines))
    asked = config(files, tmp_path, concepts=labelled, arm=("prompt",))
    run_axbench(asked)
    labelled.write_text("\n".join([*lines[:-1], json.dumps({"text": "gg gh", "label": "g"})]))
    with pytest.raises(UserError, match="has changed since this run was made of it"):
        run_axbench(asked)
    words = ["--model", str(files / "model"), "--sae", str(files / "sae"), "--any-model", "--criterion", "random"]
    made = []
    for seed in ("1", "2"):
        main(["rank", *words, "--seed", seed, "--run", str(tmp_path / seed)])
        (made_one,) = (tmp_path / seed).glob("*.parquet")
        made.append(made_one.read_bytes())
    ranks.write_bytes(made[0])
    asked = config(files, tmp_path, arm=("features",), n_features=9, ranking=ranks, factor=(1.0,))
    asked = replace(asked, run=tmp_path / "ranked")
    run_axbench(asked)
    ranks.write_bytes(made[1])
    with pytest.raises(UserError, match="has changed since this run was made of it"):
        run_axbench(asked)


def test_gaps_of_a_run_that_is_done_are_asked_about_again(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: read it back as it is."""
    asked = config(files, tmp_path, concepts=files / "labelled.jsonl", arm=("prompt",))
    with monkeypatch.context() as patched:
        patched.setattr(CountingJudge, "rate", lambda self, texts: [Unjudged("down") for _ in texts])
        assert sum(arm.gaps for arm in run_axbench(asked).arms) == 6  # nothing reports where nothing chose
    assert sum(arm.gaps for arm in run_axbench(asked).arms) == 0
    with monkeypatch.context() as patched:
        patched.setattr(CountingJudge, "rate", None)
        assert sum(arm.gaps for arm in run_axbench(asked).arms) == 0
    asked = replace(asked, run=tmp_path / "second")
    usual = CountingJudge.explain
    with monkeypatch.context() as patched:
        patched.setattr(
            CountingJudge, "explain",
            lambda self, some: [
                Unjudged("down") if one.name == "q" else meaning
                for one, meaning in zip(some, usual(self, some), strict=True)
            ],
        )  # fmt: skip
        assert run_axbench(asked).unexplained == (("q", "down"),)
        assert run_axbench(asked).unexplained == (("q", "down"),)
    assert len(run_axbench(asked).concepts) == 3
