"""Examples that the model itself writes: asked for one concept, for two or for none, checked, balanced, none twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.flags.data.checking import Check, JudgeCheck, WordCheck
from trimtab.flags.data.importing import EXAMPLES, write_examples_file
from trimtab.flags.data.passages import ended
from trimtab.flags.data.requests import NONE, SEVERAL, Request, Requests
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.spec import check_concepts
from trimtab.judges import ConceptJudge, JudgeQuality, RuleJudge
from trimtab.lm import DecodingConfig, LanguageModel, decode
from trimtab.lm.model import check_is_model
from trimtab.runs import (
    Meter,
    Run,
    check_least,
    check_values,
    config_dict,
    field_types,
    json_safe,
    kept_or_temporary,
    read_json,
    read_keywords,
    read_typed,
    write_json,
    write_text,
)
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, SHARE, Column, Table
from trimtab.stats import Interval, number_text, wilson_interval
from trimtab.tasks.near_duplicates import Signature

COMMAND = "flags data"
WRITTEN, REJECTED = "written", "rejected.jsonl"
"""Of a run: what was written, a file for each batch, and what was rejected, with the reason."""


@dataclass(frozen=True, kw_only=True)
class WritingOptions(DecodingConfig):
    """What a model writes examples of, and how they are checked."""

    per_concept: int = 150
    """Examples of each concept alone."""
    several_share: float = 0.1
    """Examples of two concepts, as a share of those of one."""
    none_share: float = 0.15
    """Share of examples that have none of the concepts."""
    neutral_share: float = 0.5
    """Share of examples that are kept under a neutral prompt instead of the one that asked for the concept."""
    attempts: float = 5.0
    """Responses that are written for an example at most, on average."""
    min_characters: int = 40
    """Fewest characters of a response, which is cut after its last whole sentence."""
    chat: bool | None = None
    """Put prompts into the model's chat template; where it has one if this is not given."""
    max_new_tokens: int = 64
    """Tokens of a response at most."""
    temperature: float = 0.7
    """0 decodes greedily; otherwise logits are divided by this."""
    top_p: float = 0.9
    """Sample from the most likely tokens that hold this share of the probability."""
    seed: int = 0
    """Of prompts and of the sampling."""
    batch_size: int = 32
    """Responses written together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "per_concept", "attempts", "min_characters")
        check_values(self, "from 0 to 1", lambda value: 0 <= value <= 1, "several_share", "neutral_share")
        check_values(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "none_share")

    def wanted(self, requests: Requests) -> dict[str, int]:
        """Examples of each group."""
        n = len(requests.concepts)
        found = dict.fromkeys(requests.concepts, self.per_concept)
        if SEVERAL in requests.groups:
            found[SEVERAL] = round(self.several_share * self.per_concept * n)
        found[NONE] = round(sum(found.values()) * self.none_share / (1 - self.none_share))
        return found


@dataclass(frozen=True, kw_only=True)
class GroupYield:
    """What came of the responses that were asked for one concept, several or none."""

    group: str
    wanted: int
    written: int
    accepted: int
    rejected: Interval | None
    """Share of those written; None if there are none."""
    reasons: dict[str, int]
    """Why they were rejected."""
    surplus: int
    """Good ones that were no longer needed."""


@dataclass(frozen=True, kw_only=True)
class WritingResult:
    """What a model wrote, and what was taken."""

    model: str
    check: str
    judge: JudgeQuality | None
    """Of the judge that checked; None if words did."""
    groups: tuple[GroupYield, ...]
    examples: int
    neutral: int
    """Examples under a neutral prompt."""
    seed: int


@dataclass(frozen=True, kw_only=True, repr=False)
class WrittenExamples(Result):
    """Examples that a model wrote."""

    result: WritingResult
    examples: list[Example]
    run: Path | None = None

    def headline(self) -> str:
        r = self.result
        written = sum(one.written for one in r.groups)
        refused = sum(sum(one.reasons.values()) for one in r.groups)
        rejected = number_text(wilson_interval(refused, written), SHARE) if written else "–"
        short = [f"{one.group} {one.accepted} of {one.wanted}" for one in r.groups if one.accepted < one.wanted]
        missing = f"; too few of {', '.join(short)}" if short else ""
        by = "the concepts' words" if r.judge is None else "a judge of labelled texts"
        where = f" in {self.run}" if self.run else ""
        return (
            f"{r.examples:,} examples by {r.model}{where}, {r.neutral:,} of them under neutral prompts; "
            f"{rejected} of {written:,} responses rejected, checked by {by}{missing}"
        )

    def tables(self) -> dict[str, Table]:
        reasons = list(dict.fromkeys(reason for one in self.result.groups for reason in one.reasons))
        columns = [
            Column("asked for", "group", whole=True),
            Column("written", "written", COUNT),
            Column("taken", "accepted", COUNT),
            Column("rejected", "rejected", SHARE),
            *(Column(reason, _count_of(reason), COUNT, spare=1) for reason in reasons),
        ]
        found = {"yield": Table(columns=columns, rows=self.result.groups)}
        if self.result.judge is None:
            return found
        caption = "On labelled texts. How often it is right about those that it selected, such as these, is not known."
        return found | {"judge": replace(self.result.judge.tables()["concepts"], caption=caption)}

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {**json_safe(self.result), "run": None if self.run is None else str(self.run)}


def _count_of(reason: str) -> Any:
    return lambda row: row.reasons.get(reason, 0)


def write_examples(
    model: LanguageModel,
    concepts: Mapping[str, str] | Sequence[str],
    *,
    judge: ConceptJudge | None = None,
    run: Path | str | None = None,
    **options: Any,
) -> WrittenExamples:
    """Let a model write examples of concepts.

    Args:
        model: what writes.
        concepts: names with descriptions, from which it is asked; a description like `the sea, ships and sailors` lists
            topics.
        judge: rejects responses that lack a concept they were asked for, or have another one. Without it the concepts'
            words do; see `WordCheck` for what they cannot see.
        run: directory for `examples.jsonl`, `rejected.jsonl` and all that was written; the same call again goes on from
            there.
        options: fields of `WritingOptions`.

    Raises:
        UserError: an option is not allowed, the judge does not know a concept, or the model cannot be asked.
    """
    check_is_model(model)
    config = WritingOptions(**read_keywords(options, field_types(WritingOptions), write_examples))
    if not isinstance(concepts, Mapping):
        check_concepts(concepts)
        concepts = {name: name for name in concepts}
    check = WordCheck(concepts) if judge is None else JudgeCheck(judge, list(concepts))
    requests = Requests(concepts, config.neutral_share, config.seed)
    described = {"concepts": dict(concepts), "check": check.name, **config_dict(config)}
    with (
        kept_or_temporary(run) as path,
        Run.open(path, COMMAND, described, seeds=[config.seed], device=str(model.device)) as opened,
    ):
        opened.record(hashes={"model": model.fingerprint})
        if not opened.done:
            writing = _Writing(model, requests, config, check, opened)
            writing.run_to_end()
            examples = writing.examples()
            result = WritingResult(
                model=model.name,
                check=check.name,
                judge=None if judge is None else judge.quality,
                groups=writing.yields(),
                examples=len(examples),
                neutral=writing.neutral(),
                seed=config.seed,
            )
            write_examples_file(opened.file(EXAMPLES), examples)
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in writing.rejected]
            write_text(opened.file(REJECTED), "".join(lines))
            opened.finish(result)
        made = opened.file(EXAMPLES)
        return WrittenExamples(
            result=read_typed(WritingResult, opened.results, f"run {path}"),
            examples=read_examples(made, list(concepts)) if made.stat().st_size else [],
            run=None if run is None else Path(path),
        )


@dataclass
class _Group:
    """The state of one group."""

    wanted: int
    written: int = 0
    accepted: list[tuple[Request, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    surplus: int = 0

    def lacking(self, pending: int) -> float:
        """Share of what is wanted that will still be missing if pending responses pass as often as those before."""
        passing = (self.written - self.reasons.total() + 1) / (self.written + 1)
        return (self.wanted - len(self.accepted) - pending * min(passing, 1.0)) / self.wanted


class _Writing:
    """Batches of responses up to where every group has what is wanted, or has been tried often enough.

    What a batch asks for follows from what the ones before it gave, so that a run goes on with the same batches.
    """

    def __init__(
        self, model: LanguageModel, requests: Requests, config: WritingOptions, check: Check, run: Run
    ) -> None:
        self.model, self.requests, self.config, self.check, self.run = model, requests, config, check, run
        self.groups = {name: _Group(number) for name, number in config.wanted(requests).items() if number}
        self.rejected: list[dict[str, Any]] = []
        self.signatures: list[Signature] = []
        """Of all that was accepted, whatever its group."""
        self.chat = bool(model.tokenizer.chat_template) if config.chat is None else config.chat

    def run_to_end(self) -> None:
        """Write and check batch after batch; those in the run's directory are read instead of written."""
        number = 0
        with Meter("writing examples", sum(group.wanted for group in self.groups.values())) as meter:
            while batch := self._next():
                path = self.run.file(WRITTEN) / f"{number:05d}.json"
                kept = read_json(path)
                if kept is None:
                    kept = self._write(batch)
                    write_json(path, kept)
                elif kept["prompts"] != [request.prompt for request in batch]:
                    raise UserError(
                        f"run {self.run.path}", f"{path.name} asks otherwise", "choose another --run directory"
                    )
                before = self._taken()
                pairs = zip(kept["texts"], kept["finish"], strict=True)
                self._judge(batch, [ended(text) if finish == "length" else text.strip() for text, finish in pairs])
                number += 1
                meter.advance(self._taken() - before)
                written = sum(group.written for group in self.groups.values())
                refused = sum(group.reasons.total() for group in self.groups.values())
                meter.describe(f"writing examples ({refused / written:.0%} of {written:,} rejected)")

    def examples(self) -> list[Example]:
        """Those accepted, in a random order."""
        found = [
            Example(prompt=request.kept_prompt, response=text, concepts=request.concepts)
            for group in self.groups.values()
            for request, text in group.accepted
        ]
        order = np.random.default_rng([self.config.seed, 3]).permutation(len(found))
        return [found[i] for i in order]

    def neutral(self) -> int:
        """How many of them are under a neutral prompt that was not what was asked."""
        taken = (request for group in self.groups.values() for request, _ in group.accepted)
        return sum(request.kept_prompt != request.prompt for request in taken)

    def yields(self) -> tuple[GroupYield, ...]:
        """What came of each group."""
        return tuple(
            GroupYield(
                group=name,
                wanted=group.wanted,
                written=group.written,
                accepted=len(group.accepted),
                rejected=wilson_interval(group.reasons.total(), group.written) if group.written else None,
                reasons=dict(group.reasons),
                surplus=group.surplus,
            )
            for name, group in self.groups.items()
        )

    def _taken(self) -> int:
        return sum(len(group.accepted) for group in self.groups.values())

    def _next(self) -> list[Request]:
        """What to write next: of the groups that lack most."""
        pending = Counter[str]()
        found: list[Request] = []
        while len(found) < self.config.batch_size:
            open_ = [
                name
                for name, group in self.groups.items()
                if group.written + pending[name] < self.config.attempts * group.wanted
                and group.lacking(pending[name]) > 0
            ]
            if not open_:
                break
            name = max(open_, key=lambda name: self.groups[name].lacking(pending[name]))
            found.append(self.requests.request(name, self.groups[name].written + pending[name]))
            pending[name] += 1
        return found

    def _write(self, batch: Sequence[Request]) -> dict[str, Any]:
        prompts = [self.model.encode_text(request.prompt, chat=self.chat) for request in batch]
        done = decode(self.model, prompts, self.config.decode_config(), samples=[request.sample for request in batch])
        return {"prompts": [request.prompt for request in batch], "texts": done.texts, "finish": done.finish}

    def _judge(self, batch: Sequence[Request], texts: Sequence[str]) -> None:
        for request, text, has in zip(batch, texts, self.check(texts), strict=True):
            group = self.groups[request.group]
            group.written += 1
            reason = self._reason(request, text, has)
            signature = Signature(text)
            if not reason and any(signature.is_near(other) for other in self.signatures):
                reason = "nearly a copy"
            if not reason and len(group.accepted) >= group.wanted:
                group.surplus += 1
            elif reason:
                group.reasons[reason] += 1
                asked = {"prompt": request.prompt, "response": text, "concepts": request.concepts}
                self.rejected.append({**asked, "reason": reason})
            else:
                group.accepted.append((request, text))
                self.signatures.append(signature)

    def _reason(self, request: Request, text: str, has: NDArray[np.bool_]) -> str:
        """Why a response is rejected; empty if it is not."""
        if len(text) < self.config.min_characters:
            return "too short"
        verdict = RuleJudge().score(request.prompt, text)
        if verdict.gibberish or verdict.refused:
            return "gibberish" if verdict.gibberish else "a refusal"
        for name, value in zip(self.requests.concepts, has, strict=True):
            if value != (name in request.concepts):
                return "has another" if value else "lacks it"
        return ""
