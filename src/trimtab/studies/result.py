"""What the demo found: of features, and of the policy that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.runs.tables import COUNT, INTERVAL, SIGNED, Column, text_table

ARMS = ("unsteered", "random at equal dose", "static", "static at equal dose", "policy")
"""Arms of the policy's part that the summary shows, where they could be had."""


@dataclass(frozen=True, kw_only=True)
class DemoPolicy:
    """What came of the policy."""

    run: Path
    training: dict[str, Any]
    """The results of `trimtab policy train`."""
    result: dict[str, Any]
    """The task's part of `evaluation.json`."""

    def to_json(self) -> dict[str, Any]:
        """Rewards of the arms with intervals, and where the run is."""
        return {
            "run": str(self.run),
            "task": self.result["task"],
            "items": self.result["items"],
            "reward": {arm["label"]: arm["reward"] for arm in self._arms()},
            "policy_minus": {arm["label"]: arm["difference"] for arm in self._arms() if arm["label"] != "policy"},
            "training_seconds": self.training["seconds"],
            "warnings": list(self.training["warnings"]),
        }

    def _arms(self) -> list[dict[str, Any]]:
        arms = {arm["label"]: arm for arm in self.result["arms"]}
        return [arms[label] for label in ARMS if label in arms]

    def render(self) -> str:
        """Mean rewards, the policy's difference to each."""
        found = self.to_json()
        lines = [
            f"a policy that picks one feature per prompt, {found['task']}, {found['items']} test items "
            f"(trained in {found['training_seconds']:.0f} s; 95% intervals over items; one seed):"
        ]
        columns = [
            Column("arm", "label"),
            Column("reward", "reward", INTERVAL),
            Column("policy − this", "difference", SIGNED),
        ]
        lines.append(text_table(columns, self._arms(), indent="  "))
        return "\n".join([*lines, *(f"  {warning}" for warning in found["warnings"]), f"  {self.run}"])


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    run: Path
    resumed: bool
    """Whether the run was done before, and was only read back."""
    results: dict[str, Any]
    """Everything that the report shows of features, as plain values."""
    policy: DemoPolicy | None = None
    policy_left_out: str = ""
    """Why there is no policy, if it was asked for and its task does not suit the model or the SAE."""

    @property
    def verdict(self) -> str:
        return str(self.results["verdict"]["text"])

    @property
    def passed(self) -> bool:
        """Whether the verdict is yes."""
        return bool(self.results["verdict"]["yes"])

    def render(self) -> str:
        """Verdict and table as text, and the policy's table below."""
        columns = [
            Column("arm", "label"),
            Column("score", "score", SIGNED),
            Column("in band", "in_band", INTERVAL),
            Column("NLL", "nll.estimate", ".2f"),
            Column("4-gram rep.", "repetition.estimate", ".3f"),
            Column("‖Δ‖/‖x‖", "relative_dose", ".3f"),
            Column("edits", "n_edits", COUNT),
        ]
        pairs = [Column("differences in score, pair by prompt", "label"), Column("", "interval", SIGNED)]
        tables = text_table(columns, self.results["arms"]), text_table(pairs, self.results["differences"])
        done = " (done before; delete the directory to run it again)" if self.resumed else ""
        policy = self.policy.render() if self.policy else self.policy_left_out
        return "\n\n".join(part for part in (self.verdict, *tables, f"{self.run}{done}", policy) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the policy's under `policy`."""
        policy = self.policy.to_json() if self.policy else None
        own = {"run": str(self.run), "resumed": self.resumed, **self.results}
        return {**own, "policy": policy, "policy_left_out": self.policy_left_out}
