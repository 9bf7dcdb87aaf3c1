"""A hand-made run directory of a policy, as training, evaluation and analyses write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EVIL = "<script>alert('x')</script>&\""
SECRET = "how to brew the forbidden potion"


def interval(estimate: float, half: float = 0.02) -> dict[str, Any]:
    return {
        "estimate": estimate, "low": estimate - half, "high": estimate + half, "n": 40, "level": 0.95,
        "method": "bootstrap",
    }  # fmt: skip


def write_run(path: Path, *, task: str = "ioi-mixture", **changes: Any) -> Path:
    """`run.json` of a finished training."""
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "command": "policy train",
        "status": "done",
        "config": {
            "task": task, "data": None, "model": "a-model", "sae": "an-sae", "site": None, "mask": "accumulated",
            "dose": 0.5, "unit": "relative", "options_only": True, "seed": 0, "ppo": {"type": "PPOConfig", "clip": 0.2},
        },
        "versions": {"trimtab": "0.1.0"},
        "updated": "2026-01-02T03:04:05Z",
        "seeds": [0],
        "hides_text": False,
        "hashes": {"model": "abc", "dictionary": "def"},
        "resumptions": [],
        "splits": {"train": ["t1"], "test": [f"item-{i}" for i in range(100)]},
        "test_split_openings": [{"split": "test", "time": "2026-01-02T03:00:00Z"}],
        "results": {
            "best_iteration": 20, "best_validation_reward": 0.731, "unsteered_validation_reward": 0.512,
            "iterations": 40, "rollouts": 10240, "seconds": 12.0, "warnings": [f"beware {EVIL}"],
        },
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(record | changes))
    return path


def add_metrics(path: Path) -> None:
    lines = [{"step": 0, "validation/reward": 0.512}]
    for step in range(1, 41):
        line = {"step": step, "charts/episodic_return": 0.4 + step / 100, "policy/effective_features": 900.0 - step}
        line |= {"losses/explained_variance": -0.25 + step / 80, "policy/kl_unsteered": None}
        lines.append(line)
    lines.append({"step": 40, "validation/reward": 0.731})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


HEADROOM = {
    "unsteered": 0.511, "most_active": 0.521, "static": 0.613, "readout": 0.687, "random_ceiling": 0.702,
    "ceiling": 0.954,
}  # fmt: skip


def add_headroom(path: Path, *, dose: float = 0.5) -> None:
    line = {
        "site": "resid_post.15",
        "dose": dose,
        "unit": "relative",
        "mask": "accumulated",
        "items": 32,
        "features": 64,
    }
    line |= {name: interval(value) for name, value in HEADROOM.items()}
    line |= {"over_static": 0.341, "warnings": [f"nothing to learn {EVIL}"], "flipped_by_static": interval(0.2)}
    other = line | {"dose": 9.0, "warnings": [], "ceiling": interval(0.111)}
    content = {"task": "ioi-mixture", "model": "a-model", "split": "validation", "lines": [other, line]}
    (path / "headroom.json").write_text(json.dumps(content))


def arm(name: str, label: str, reward: float, difference: float | None, **changes: Any) -> dict[str, Any]:
    dose = {"n_edits": 4321, "n_tokens": 5000, "relative": 0.473, "relative_min": 0.4, "relative_max": 0.5}
    values = {
        "name": name, "label": label, "match": "own", "reward": interval(reward), "by_seed": [reward, reward],
        "accuracy": interval(reward + 0.003), "accuracy_well_formed": interval(reward + 0.011),
        "malformed": interval(0.077), "difference": None if difference is None else interval(difference),
        "kl": 0.0345, "dose": dose | {"absolute": 3.0}, "equal_dose": None, "dose_note": "", "kl_matches": [],
        "chosen": [{"feature": 7}], "metrics": {"accuracy": reward},
    }  # fmt: skip
    return values | changes


def add_evaluation(path: Path, *, gain: float = 0.222, static: float = 0.123) -> None:
    result = {
        "task": "ioi-mixture",
        "split": "test",
        "metric": "accuracy",
        "items": 1234,
        "arms": [
            arm("unsteered", "unsteered", 0.508, gain, dose=None, kl=None),
            arm("policy", "policy", 0.73, None),
            arm("static", f"static {EVIL}", 0.607, static, equal_dose=False, dose_note="0.473 against 0.9",
                chosen=[{"instruction": SECRET}]),
        ],
        "gain": {"total": interval(gain), "format": interval(0.2), "answer": interval(0.01)},
        "why": "",
    }  # fmt: skip
    beside = result | {"task": "other-task", "split": "all", "items": 77, "why": f"because {EVIL}"}
    evaluation = {
        "result": result, "companions": [beside], "runs": [str(path)], "seeds": [0, 1, 2],
        "setting": {"site": "resid_post.15", "dose": 0.5, "unit": "relative", "mask": "accumulated"},
        "settings_compared": [
            {"site": "resid_post.15", "dose": 0.5, "seeds": [0, 1, 2], "validation_reward": 0.731},
            {"site": "resid_post.9", "dose": 0.5, "seeds": [0], "validation_reward": 0.642},
        ],
        "missing": {"lora": "no room"}, "warnings": ["the test split was opened before"], "seconds": 3.0,
    }  # fmt: skip
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [
        {"task": task, "arm": name, "group": group, "reward": reward, "malformed": False, "text": SECRET}
        for task, shift in (("ioi-mixture", 0.0), ("other-task", 0.5))
        for name, group, reward in (
            ("unsteered", "left", 0.25 + shift), ("unsteered", "right", 0.5), ("policy", "left", 0.25),
            ("policy", "left", 1.0), ("policy", "right", 0.5), ("static", "left", 0.0),
        )
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path / "evaluation_items.parquet")


def add_trace(path: Path, *, answers: int = 3, tokens: int = 2) -> None:
    """Answers of which the first token at 10 follows an edit of feature 5 at 9, and the second an unedited one."""
    top = [{"token_id": 1, "text": f" {SECRET}", "logp": -0.105360516}, {"token_id": 2, "text": "<b>", "logp": -3.0}]
    rows, edits = [], []
    for sample in range(answers):
        for i in range(tokens):
            rows.append(
                {
                    "run": "r", "sample": sample, "branch": 0, "parent_branch": None, "position": 10 + i,
                    "token_id": 3, "text": f" word{sample}-{i}{EVIL}", "token_logp": -0.5, "entropy": 1.0,
                    "value": 0.625 if i == 0 else None, "reward": 0.875 if i == tokens - 1 else None,
                    "kl_local": 0.0456 if i == 0 else 0.0, "kl_total": 1.25, "unsteered_logp": -1.0, "top_with": top,
                    "top_without": top,
                }
            )  # fmt: skip
        shared = {
            "run": "r", "sample": sample, "branch": 0, "site": "resid_post.15", "slot": 0, "operation": "add",
            "unit": "relative", "x_norm": 10.0, "delta_norm": 4.7, "value": 0.625, "dictionary_hash": "def",
        }  # fmt: skip
        edits.append(
            shared | {"position": 9, "feature": 1705, "requested_dose": 0.5, "applied_dose": 4.7, "relative_dose": 0.47,
                      "action_logp": -1.386294361, "n_allowed": 1234}
        )  # fmt: skip
        edits.append(
            shared | {"position": 10, "feature": -1, "requested_dose": 0.0, "applied_dose": 0.0, "relative_dose": 0.0,
                      "action_logp": -0.693147181, "n_allowed": 77}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path / "tokens.parquet")
    pq.write_table(pa.Table.from_pylist(edits), path / "edits.parquet")


def add_analysis(path: Path) -> None:
    token = {
        "item": "item-1", "step": 0, "position": 9, "token": f" {SECRET}{EVIL}", "feature": 1705, "reward": 0.75,
        "tried": 8, "unmatched": 0, "flips": 7, "random_flips": 1, "flips_without": True, "p_value": 0.0051,
        "q_value": 0.0102, "branch_point": True, "excess": 0.75,
    }  # fmt: skip
    verdict = {"group": "unsteered wrong", "label": "policy_limited", "reason": "the critic knows, and no action helps"}
    separation = {"group": "unsteered wrong", "step": -1, "n": 60, "n_right": 22, "critic": interval(0.811),
                  "probe": interval(0.862), "difference": interval(0.051)}  # fmt: skip
    layer = {
        "run": "r", "site": "resid_post.15", "unit": "relative", "trained_dose": 0.5, "unsteered": interval(0.5),
        "doses": [{"dose": 0.5, "reward": interval(0.733), "difference": interval(0.233), "kl": interval(0.341),
                   "malformed": 0.019}],
        "tolerated": 0.5, "chosen_features": 12, "rows": 100, "note": "",
        "kinds": [{"factor": "previous token", "chosen": interval(0.414), "by_use": 0.399, "live": interval(0.313),
                   "difference": interval(0.101)}],
    }  # fmt: skip
    context = {"item": "item-1", "step": 0, "position": 9, "before": f"{SECRET} ", "token": "<i>", "after": " end",
               "kl_local": 0.046}  # fmt: skip
    entry = {
        "feature": 1705, "uses": 321, "share": 0.283, "items": 54, "first_step": 0, "median_step": 1.5, "last_step": 3,
        "tokens": [{"token": f" {SECRET}", "count": 17}], "kl_local": interval(0.0467),
        "reward_difference": interval(0.154), "contexts": [context],
    }  # fmt: skip
    analysis = {
        "run": "r", "task": "ioi-mixture", "split": "test", "items": 100, "site": "resid_post.15", "greedy": True,
        "warnings": [], "seconds": 1.0,
        "branch_points": {
            "items": 8, "excess": interval(0.311), "rescued": interval(0.271), "false_discovery_rate": 0.05,
            "not_repeated": 0, "warnings": ["3 candidates were left out"],
            "tokens": [token, token | {"item": "item-2", "branch_point": False, "q_value": 0.5, "excess": 0.0}],
        },
        "critic": {
            "counts": {"correct": 40, "corrected": 22, "misguided": 3, "incorrect": 35},
            "curve": [{"group": g, "step": s, "n": 20, "mean": m, "sd": 0.1} for g, s, m in
                      (("correct", 0, 0.671), ("correct", 3, 0.9), ("incorrect", 0, 0.3), ("incorrect", 3, 0.1))],
            "separations": [separation], "verdicts": [verdict],
            "helped": {"share": interval(0.231), "random": interval(0.191), "how": "every feature"},
        },
        "layers": [layer],
        "ledger": {"decisions": 1134, "no_edit": 99, "items": 100, "entries": [entry]},
    }  # fmt: skip
    (path / "analysis").mkdir()
    (path / "analysis/analysis.json").write_text(json.dumps(analysis))
    fork = {"item": "item-1", "step": 0, "kind": "random", "pair": 0, "feature": 2048, "dose": 0.777,
            "kl_local": 0.0444, "reward": 0.25, "flip": True}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([fork]), path / "analysis/branch_forks.parquet")


def whole_run(path: Path, **changes: Any) -> Path:
    """A run with every part."""
    write_run(path, **changes)
    for add in (add_metrics, add_headroom, add_evaluation, add_trace, add_analysis):
        add(path)
    return path
