"""`trimtab demo`: three wishes found, proven and shown side by side, and a small policy, on one page.

Each wish is stated by pairs of short texts behind the same openings (`assets/demo_wishes.jsonl`, written for this):
texts about the sea, about food, about sport, each beside a plain one. `find` looks for features that make the former
likelier, chooses on some pairs, and proves on others and on neutral prompts that no wish was stated with. Sizes are
such that all of it takes a few minutes on two cores; the page says which are smaller than `trimtab find` has them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.dictionaries import DictionaryConfig
from trimtab.finding import FindOptions, Found, Texts, find
from trimtab.finding.result import FOUND
from trimtab.judges import ConceptJudge
from trimtab.policies.config import PolicyConfig
from trimtab.runs import ASSETS, Run, part_of, read_typed
from trimtab.runs.shown import Shown, ShownTable, write_shown
from trimtab.runs.user_files import json_lines
from trimtab.studies.demo_policy import POLICY, POLICY_SIZES, TEST_ITEMS, run_demo_policy
from trimtab.studies.demo_result import DemoResult, DemoWish, Trimmed, best_alternative
from trimtab.studies.marking import UNSTEERED, mark

COMMAND = "demo"
PLAIN = "plain"
TOPICS = {"sea": "the sea, ships and sailors", "food": "food and cooking", "sport": "sports and games"}
"""By the field of a line of the file: what a wish is called on the page, and in the instruction of prompting."""
INSTRUCTION = "Write about {}."
SIZES: dict[str, Any] = {
    "shortlist": 4,
    "set_size": 1,
    "tried": 2,
    "way": ("activation-difference", "delta-confidence", "mean-difference", "prompting"),
    "examples": (32, 12, 24),
    "n_neutral": (4, 6),
    "max_new_tokens": 40,
}
"""Options of `find` that are other than where nobody asks for them."""
SHOWN_PROMPTS = 3
"""Prompts whose texts the page shows, the first ones."""
TABLES = ("ways", "found")
"""Of a search, that the page shows."""
TRIMMED = "All of it is to take a few minutes on two cores, so some sizes are other than where nobody asks for them"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DictionaryConfig):
    """Find the features that bring three wishes about, prove it beside the alternatives, and train a small policy."""

    needs = ("decode", "prefix")

    run: Path = Path("runs/demo")
    """Directory to write."""
    seed: int = 0
    """Of random features, texts, the policy and intervals."""
    policy: bool = True
    """Train a small policy and show it beside its controls, too."""


def shipped_wishes() -> dict[str, Texts]:
    """By their titles, the wishes that the demo is about."""
    text = (ASSETS / "demo_wishes.jsonl").read_text(encoding="utf-8")
    rows = [row for _, row in json_lines(text, "demo_wishes.jsonl")]
    return {
        title: Texts(
            wanted=tuple(row[name] for row in rows),
            unwanted=tuple(row[PLAIN] for row in rows),
            prompts=tuple(row["opening"] for row in rows),
            instruction=(INSTRUCTION.format(title),),
        )
        for name, title in TOPICS.items()
    }


def run_demo(
    config: DemoConfig,
    wishes: Mapping[str, Texts] | None = None,
    sizes: Mapping[str, Any] | None = None,
    policy: PolicyConfig = POLICY,
    test_items: int = TEST_ITEMS,
) -> DemoResult:
    """Run the demo, or what is left of it; a run that is done is read back.

    Args:
        config: of the demo.
        wishes: by their titles; those that ship by default.
        sizes: options of `find`; `SIZES` by default.
        policy: how the policy is trained.
        test_items: items that it is evaluated on.

    Raises:
        UserError: anything that the user named is wrong; see `find`, `run_policy_train` and `evaluate_policy`. The
            policy's part alone is left out where its task cannot be had with the model, or no feature of the SAE may be
            chosen on it.
    """
    began = time.perf_counter()
    chosen = {**(SIZES if sizes is None else sizes), "seed": config.seed}
    with Run.open(
        config.run, COMMAND, config, seeds=[config.seed], device=config.device, ignore_fields=("run",)
    ) as run:
        if run.done and run.results:
            return read_typed(DemoResult, run.results, f"run {run.path}")
        model, sae = config.load()
        run.record(hashes={"model": model.fingerprint, "dictionary": sae.fingerprint})
        wished = shipped_wishes() if wishes is None else wishes
        judge: ConceptJudge | None = None
        granted: list[DemoWish] = []
        sections: list[Shown] = []
        for number, (title, wish) in enumerate(wished.items(), 1):
            found = find(model, sae, wish, run=run.file(f"wish-{number}"), **chosen)
            best, judge = best_alternative(found).name, judge or _judge(wished, config.seed)
            marks = mark(judge, title, found.texts, (FOUND, best), seed=config.seed)
            granted.append(DemoWish.of(title, found, marks, best))
            sections.append(_section(granted[-1], found, f"wish-{number}"))
        name = model.name
        del model, sae  # the policy's part loads its own
        trained, left_out = None, ""
        if config.policy:
            own = replace(policy, **part_of(config, DictionaryConfig), seed=config.seed, run=run.file("policy"))
            trained, left_out = run_demo_policy(own, test_items)
        smaller = {name: getattr(policy, name) for name in POLICY_SIZES}
        result = DemoResult(
            model=name,
            run=str(run.path),
            wishes=tuple(granted),
            trimmed=(*_trimmed(chosen, FindOptions()), *_trimmed(smaller, PolicyConfig(task=policy.task), "policy ")),
            policy=trained,
            policy_left_out=left_out,
            seconds=time.perf_counter() - began,
        )
        sections.insert(0, Shown.of("In short", result, leave_out=("trimmed", "policy")))
        if trained is not None:
            sections.append(Shown.of("A policy that picks one feature for each prompt", trained))
        trimmed = ShownTable.of(result.tables()["trimmed"], "sizes")
        sections.append(Shown(title="What was trimmed", headline=TRIMMED, tables=(trimmed,)))
        write_shown(run, sections)
        run.finish(result)
        return result


def _judge(wishes: Mapping[str, Texts], seed: int) -> ConceptJudge:
    """A classifier fitted on all texts that state wishes, by which words are marked; it decides nothing."""
    labelled = {text: [title] for title, wish in wishes.items() for text in wish.wanted}
    labelled |= {text: [] for wish in wishes.values() for text in wish.unwanted}
    return ConceptJudge.fit(list(labelled), list(labelled.values()), tuple(wishes), seed)


def _section(wish: DemoWish, found: Found, run: str) -> Shown:
    """A wish on the page: the answer, texts with marked words, effect against price, all ways, the features."""
    called = {
        UNSTEERED: "unsteered",
        FOUND: f"found: {found.found.label}",
        wish.best: f"best alternative, {wish.best}: {found[wish.best].label}",
    }
    prompts = list(dict.fromkeys(text.prompt for text in wish.marks.texts))[:SHOWN_PROMPTS]
    texts = [
        text.shown(f"{text.prompt} … ({called[text.way]})", wish.marks.largest)
        for text in wish.marks.texts
        if text.prompt in prompts
    ]
    others = [name for name in found.tables() if name not in TABLES]
    shown = Shown.of(wish.title, found, {"Effect against price": found.draw}, texts=texts, leave_out=others, height=3.8)
    said = (
        f"Stated by {wish.stated}; all about it stands in {run}/report.html. Marked: words that add more than "
        f"{wish.marks.threshold:.2g} nats to the log-odds of a classifier of wishes' texts"
    )
    return replace(shown, headline=f"{shown.headline}. {said}")


def _trimmed(here: Mapping[str, Any], otherwise: object, of: str = "") -> list[Trimmed]:
    """Options that are other than by default."""

    def said(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    pairs = {name: (said(value), said(getattr(otherwise, name))) for name, value in here.items() if name != "seed"}
    return [Trimmed(option=f"{of}{name}", here=a, otherwise=b) for name, (a, b) in pairs.items() if a != b]
