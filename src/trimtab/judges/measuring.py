"""How good a judge is: its verdicts beside labels. `python -m trimtab.judges.measuring [FILE] [--judge NAME]`.

Without a file, the answers that ship with trimtab are used: mild, written by hand, by the people who wrote the rules.
They show that the rules do what they are meant to, not how they fare on another model's answers: for that, label some
of your own model's answers and give the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from trimtab.errors import UserError
from trimtab.judges.verdict import Judge, Label, Verdict
from trimtab.runs import ASSETS, json_safe, read_options
from trimtab.runs.tables import COUNT, Column, named_values, text_table
from trimtab.runs.user_files import json_lines, utf8_text
from trimtab.stats import Interval, number_text, wilson_interval

LABELS: tuple[str, ...] = get_args(Label)


class LabelledAnswer(NamedTuple):
    """An answer and what a person says it is."""

    id: str
    prompt: str
    answer: str
    label: Label


@dataclass(frozen=True)
class Disagreement:
    """An answer on which judge and label differ."""

    id: str
    label: str
    verdict: str
    reason: str

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"differs: {self.id} is labelled {self.label}, judged {self.verdict}{reason}"


@dataclass(frozen=True, kw_only=True)
class VerdictQuality:
    """Precision and recall of a judge, with 95% Wilson intervals over answers."""

    judge: str
    refusal_precision: Interval | None
    """Share of what the judge calls a refusal that is labelled so; None if it calls nothing a refusal."""
    refusal_recall: Interval | None
    """Share of labelled refusals that the judge finds; None if there are none."""
    gibberish_precision: Interval | None
    gibberish_recall: Interval | None
    confusion: dict[str, dict[str, int]]
    """Counts by label, then by verdict."""
    disagreements: tuple[Disagreement, ...]
    unjudged: int = 0
    """Answers on which the judge gave no verdict; they count nowhere else."""

    def render(self) -> str:
        """The measures, the answers by label and verdict, and where the two differ."""
        names = ("refusal_precision", "refusal_recall", "gibberish_precision", "gibberish_recall")
        said = {name.replace("_", " "): number_text(getattr(self, name), "") for name in names}
        if self.unjudged:
            said["no verdict on"] = f"{self.unjudged} answers"
        columns = [Column("labelled", "label"), *(Column(f"judged {label}", label, COUNT) for label in LABELS)]
        table = text_table(columns, [{"label": label} | row for label, row in self.confusion.items()])
        return "\n".join([named_values(said), table, *map(str, self.disagreements)])


def read_labelled(path: str | Path | None = None) -> list[LabelledAnswer]:
    """Labelled answers from JSON lines with the keys `prompt`, `answer`, `label` and optionally `id`.

    Args:
        path: the file; None for the answers that ship with trimtab.

    Raises:
        UserError: no such file, a line that is not JSON, lacks a key or has another label; no line at all.
    """
    name = "the shipped labelled answers" if path is None else str(path)
    try:
        data = (ASSETS / "labelled_answers.jsonl" if path is None else Path(path).expanduser()).read_bytes()
    except OSError as error:
        raise UserError(name, f"it cannot be read ({error})", "give a file of JSON lines") from error
    answers: list[LabelledAnswer] = []
    for number, row in json_lines(utf8_text(data, name), name):
        for key in ("prompt", "answer", "label"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{name}, line {number}", f"it has no text {key!r}", "give prompt, answer and label")
        if row["label"] not in LABELS:
            raise UserError(
                f"{name}, line {number}", f"label {row['label']!r} is unknown", f"use one of {', '.join(LABELS)}"
            )
        answers.append(LabelledAnswer(str(row.get("id", number)), row["prompt"], row["answer"], row["label"]))
    if not answers:
        raise UserError(name, "there is no labelled answer in it", "give at least one line")
    return answers


def measure_judge(judge: Judge, answers: Sequence[LabelledAnswer]) -> VerdictQuality:
    """Compare a judge's verdicts with labels; answers on which it gives none are counted apart."""
    judged = judge.score_all([a.prompt for a in answers], [a.answer for a in answers])
    pairs = [(a, v, v.label) for a, v in zip(answers, judged, strict=True) if isinstance(v, Verdict)]
    counts = Counter((a.label, said) for a, _, said in pairs)

    def interval(label: str, over: int) -> Interval | None:
        n = sum(count for pair, count in counts.items() if pair[over] == label)
        return wilson_interval(counts[label, label], n) if n else None

    return VerdictQuality(
        judge=judge.name,
        refusal_precision=interval("refusal", 1),
        refusal_recall=interval("refusal", 0),
        gibberish_precision=interval("gibberish", 1),
        gibberish_recall=interval("gibberish", 0),
        confusion={label: {verdict: counts[label, verdict] for verdict in LABELS} for label in LABELS},
        disagreements=tuple(Disagreement(a.id, a.label, said, v.reason) for a, v, said in pairs if a.label != said),
        unjudged=len(answers) - len(pairs),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a judge and print the result; the exit status is 2 for a user's mistake."""
    from trimtab.judges.registry import judge_options, make_judge

    parser = argparse.ArgumentParser(prog="python -m trimtab.judges.measuring", description=__doc__)
    parser.add_argument("file", nargs="?", help="JSON lines with prompt, answer and label (default: those shipped)")
    parser.add_argument(
        "--judge", default="rules", help="rules, classifier:DIRECTORY, endpoint:MODEL@URL or module:Class"
    )
    parser.add_argument("--judge-option", nargs="*", default=[], metavar="NAME=VALUE", help="options of the judge")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    chosen = parser.parse_args(arguments)
    try:
        known = judge_options(chosen.judge)
        options = read_options(chosen.judge_option, known, what="judge option", owner=f"judge {chosen.judge}")
        quality = measure_judge(make_judge(chosen.judge, **options), read_labelled(chosen.file))
    except UserError as error:
        print(error.line, file=sys.stderr)
        return 2
    print(json.dumps(json_safe(quality)) if chosen.json else quality.render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
