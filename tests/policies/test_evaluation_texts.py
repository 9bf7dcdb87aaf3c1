"""Answers to harmful prompts stay out of an evaluation's files unless they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from planted_readout import planted_sae

from trimtab.errors import UserError
from trimtab.judges import Verdict
from trimtab.lm import LanguageModel
from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_trained
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.policies.trained import TrainedRun
from trimtab.report import write_report
from trimtab.runs import Run, read_record
from trimtab.steering import Trace, replay
from trimtab.tasks import Item
from trimtab.tasks.refusals import RefusalTask
from trimtab.training.checkpoint import Checkpoint, write_checkpoint

HIDDEN_COLUMNS = ("token_id", "text", "top_with", "top_without")


class FirstLetterJudge:
    """An answer that begins with an early letter is a refusal, one that begins with no letter gibberish."""

    name = "first-letter"

    def score(self, prompt: str, answer: str) -> Verdict:
        if not answer[:1].isalpha():
            return Verdict(refused=False, gibberish=True)
        return Verdict(refused=answer[0].lower() < "m")

    def score_all(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [self.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


class Harmful(RefusalTask):
    """Twelve prompts that should be refused."""

    name = "harmful"
    max_new_tokens = 3
    chat = False

    @classmethod
    def load(cls, data: object = None, tokenizer: object = None) -> Harmful:
        items = [Item(id=f"harmful/{i}", prompt=f"{a}ot{b}", answer="refusal") for i, (a, b) in enumerate(
            (a, b) for a in "bcdf" for b in "xyz"
        )]  # fmt: skip
        return cls({"train": items[:4], "validation": items[4:8], "test": items[8:]}, judge=FirstLetterJudge())


@pytest.fixture
def entry(tiny_llama: LanguageModel, tmp_path: Path) -> TrainedRun:
    sae = planted_sae(tiny_llama, "resid_post.1")
    config = PolicyConfig(task="harmful", run=tmp_path / "run", mask="none", dose=1.0, hidden=(8,))
    policy = Policy.build(sae.directions, hidden=(8,), seed=0)
    with torch.no_grad():
        policy.actor.head.bias[5] = 1e4  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    run = Run.open(tmp_path / "run", "policy train", config)
    (run.path / "checkpoints").mkdir()
    tensors = {f"best.{name}": t for name, t in policy.state_dict().items()}
    write_checkpoint(run.path / "checkpoints", Checkpoint(1, tensors, {}))
    run.record(hides_text=True)
    run.finish({})
    return TrainedRun(run=run, setup=Setup.with_parts(config, tiny_llama, sae, Harmful.load()), policy=policy)


def run_evaluation(entry: TrainedRun, **settings: Any) -> list[dict[str, Any]]:
    """Evaluate; give the rows of items."""
    path = entry.run.path
    config = EvaluateConfig(policy=(path,), control=("random", "prompting"), equal_kl=False, draws=1, **settings)
    evaluate_trained([entry], config)
    return pq.read_table(path / "evaluation_items.parquet").to_pylist()


def test_no_answer_can_be_read_from_the_files(entry: TrainedRun) -> None:
    rows = run_evaluation(entry)
    assert {row["arm"] for row in rows} == {"unsteered", "policy", "random at equal dose", "prompting"}
    assert all(row["text"] is None for row in rows)
    assert {row["answer"] for row in rows} <= {"refusal", "compliance", None}
    assert all(row["reward"] is not None and row["item"].startswith("harmful/") for row in rows)
    trace = Trace.read(entry.run.path)
    assert len(trace.tokens) == 4 * 3
    for name in HIDDEN_COLUMNS:
        assert trace.tokens[name].null_count == len(trace.tokens), name
    for name in ("token_logp", "kl_total", "unsteered_logp", "value", "position"):
        assert trace.tokens[name].null_count == 0, name
    assert set(trace.edits["feature"].to_pylist()) == {5}
    assert all(row["prompt"] == row["forced"] == [] for row in read_record(entry.run.path)["trace"]["rows"])


def test_the_report_of_such_a_run_is_written(entry: TrainedRun) -> None:
    run_evaluation(entry)
    page = write_report(entry.run.path).read_text()
    assert "positions stand in place of texts" in page
    assert "feature 5" in page


def test_such_a_trace_says_why_it_cannot_be_replayed(entry: TrainedRun) -> None:
    run_evaluation(entry)
    with pytest.raises(UserError, match="its trace holds no tokens; evaluate the policy with --keep-texts"):
        replay(entry.run.path)


def test_texts_are_kept_when_asked_for(entry: TrainedRun) -> None:
    rows = run_evaluation(entry, keep_texts=True)
    model = entry.setup.model
    trace = Trace.read(entry.run.path)
    told = [model.decode_ids(ids) for ids in trace.per_row("token_id")]
    assert [row["text"] for row in rows if row["arm"] == "policy"] == told
    assert all(len(text) > 0 for text in told)
    for name in HIDDEN_COLUMNS:
        assert trace.tokens[name].null_count == 0, name
    prompts = [row["prompt"] for row in trace.facts["rows"]]
    assert [model.decode_ids(ids) for ids in prompts] == [item.prompt for item in entry.setup.task.items("test")]


def test_the_numbers_are_the_same(entry: TrainedRun) -> None:
    hidden = run_evaluation(entry)
    first = json.loads((entry.run.path / "evaluation.json").read_text())
    kept = run_evaluation(entry, keep_texts=True)
    again = json.loads((entry.run.path / "evaluation.json").read_text())
    assert [row | {"text": None} for row in kept] == hidden
    assert first["result"] == again["result"]
