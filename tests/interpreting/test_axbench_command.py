"""`trimtab evaluate axbench` on a tiny model: features or labelled texts in, a run with a page out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from trimtab.cli import main
from trimtab.dictionaries import DictionaryInfo, FeatureStats, Standard, load_dictionary, save_dictionary
from trimtab.features import examples
from trimtab.interpreting.axbench import AxBenchConfig, AxBenchResult, feature_concepts, run_axbench
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
    labelled = [{"text": f"{letter}{letter} " * n, "label": letter} for letter in "zqg" for n in (2, 3, 4, 5)]
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
    assert len(rows) == 3 * 4 * (3 * 2 + 1)
    assert sum(row["reports"] for row in rows) == len(rows) / 2
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
    """Mutation: take what lacks a feature from the documents in which it fires."""
    found = load_dictionary(str(files / "sae"), any_model=True).feature_examples
    assert found is not None
    live = found.live.tolist()
    made = feature_concepts(found, live[:4], has=2, lacks=3)
    for feature, concept in zip(live, made, strict=False):
        own = found[feature].windows
        assert concept.feature == feature
        assert len(concept.exemplars.has) == min(2, len(own))
        assert max(concept.exemplars.has[0].activations) == pytest.approx(own[0].activation)
        documents = {window.document for window in own}
        inside = {"".join(w.tokens) for i in live for w in found[i].windows if w.document in documents}
        assert all(not passage.activations for passage in concept.exemplars.lacks)
        assert not {passage.text for passage in concept.exemplars.lacks} & inside
