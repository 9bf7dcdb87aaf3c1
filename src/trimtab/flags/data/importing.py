"""Examples out of labelled text: cut into passages, labels read as concepts, balanced, none twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.flags.data.labelled_text import LabelledFiles
from trimtab.flags.data.labels import NONE, Labels, Others
from trimtab.flags.data.passages import Cleaning, cleaned, ended, passages
from trimtab.flags.data.selecting import Candidate, as_examples, rarest, select, without_copies
from trimtab.flags.dividing import HOLDOUT, side_of
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.spec import check_concepts
from trimtab.runs import (
    Meter,
    Run,
    check_choices,
    check_least,
    check_values,
    config_dict,
    field_types,
    json_safe,
    part_of,
    read_keywords,
    read_typed,
    sha256_file,
    split_ids,
    text_id,
    write_text,
)
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, Column, Table
from trimtab.tasks.near_duplicates import first_of_each

COMMAND = "flags import"
EXAMPLES, JUDGE = "examples.jsonl", "judge.jsonl"
"""Files of a run: examples to train on, and labelled texts for a judge."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions(LabelledFiles):
    """How labelled texts become examples."""

    rename: tuple[str, ...] = ()
    """What labels mean that are no names or descriptions of concepts: LABEL=CONCEPT, or LABEL=none."""
    others: Others = "refuse"
    """What becomes of texts whose labels are all no concepts: `none` says that they have none of them, `drop` leaves
    them out."""
    cleaning: Cleaning = "none"
    """`wikitext` undoes the tokenisation of the WikiText corpora, which film reviews of NLTK share; `html` undoes
    entities, tags and backslashes."""
    min_characters: int = 40
    """Fewest characters of a passage."""
    max_characters: int = 280
    """Most characters of a passage, which ends where a sentence does, and of a text that answers a prompt."""
    per_concept: int | None = None
    """Examples of each concept; as many as the rarest has if it is not given."""
    none_share: float = 0.15
    """Share of examples that have none of the concepts."""
    judge_share: float = 0.0
    """Share of the texts that is kept for a judge, in a file of its own; passages of one document are never in both."""
    holdout: float = HOLDOUT
    """Share of the documents whose passages get prompts that `flags train` holds out at the same share."""
    seed: int = 0
    """Of which texts are taken, their order and their prompts."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "min_characters", "per_concept")
        least = self.min_characters
        check_values(self, f"at least min_characters ({least})", lambda most: most >= least, "max_characters")
        shares = ("none_share", "judge_share", "holdout")
        check_values(self, "at least 0 and below 1", lambda value: 0 <= value < 1, *shares)


@dataclass(frozen=True, kw_only=True)
class ConceptCount:
    """Passages of one concept."""

    concept: str
    """`none` for those that have none."""
    read: int
    examples: int
    heldout: int
    """Examples that `flags train` holds out at the same `holdout`."""
    judge: int


@dataclass(frozen=True, kw_only=True)
class ImportCounts:
    """What an import read, dropped and kept."""

    texts: int
    """Rows of tables, or documents."""
    passages: int
    """They were cut into."""
    dropped: dict[str, int]
    """Texts and passages by reason."""
    concepts: tuple[ConceptCount, ...]
    examples: int
    judge: int
    seed: int


@dataclass(frozen=True, kw_only=True, repr=False)
class ImportedExamples(Result):
    """Examples made of labelled text."""

    counts: ImportCounts
    examples: list[Example]
    judge: list[Example]
    """Labelled texts for a judge, of other documents."""
    run: Path | None = None

    def headline(self) -> str:
        c = self.counts
        kept = f"{c.examples:,} examples" + (f" and {c.judge:,} texts for a judge" if c.judge else "")
        where = f" in {self.run}" if self.run else ""
        missing = [one.concept for one in c.concepts if not one.examples and one.concept != NONE]
        without = f"; no example of {', '.join(missing)}" if missing else ""
        return f"{kept}{where}, of {c.texts:,} texts in {c.passages:,} passages{without}"

    def tables(self) -> dict[str, Table]:
        counts = [
            Column("passages", "read", COUNT),
            Column("examples", "examples", COUNT),
            Column("of them held out", "heldout", COUNT),
        ]
        if self.counts.judge:
            counts.append(Column("for a judge", "judge", COUNT))
        dropped = [{"reason": reason, "number": number} for reason, number in self.counts.dropped.items() if number]
        concepts = Table(columns=[Column("concept", "concept", whole=True), *counts], rows=self.counts.concepts)
        columns = [Column("left out", "reason"), Column("number", "number", COUNT)]
        return {"concepts": concepts} | ({"dropped": Table(columns=columns, rows=dropped)} if dropped else {})

    def to_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {**json_safe(self.counts), "run": None if self.run is None else str(self.run)}


def import_examples(
    text: Sequence[str | Path],
    concepts: Mapping[str, str] | Sequence[str],
    *,
    run: Path | str | None = None,
    **options: Any,
) -> ImportedExamples:
    """Make examples of labelled text.

    Args:
        text: tables, directories, `.zip` files; see `LabelledFiles`.
        concepts: names, with descriptions as `read_concepts` gives them, or without.
        run: directory for `examples.jsonl`, `judge.jsonl` and the counts.
        options: fields of `ImportOptions`.

    Raises:
        UserError: a file, label or option is wrong; the message says which. No text is left.
    """
    config = ImportOptions(**read_keywords(options, field_types(ImportOptions), import_examples))
    if not isinstance(concepts, Mapping):
        check_concepts(concepts)
        concepts = {name: name for name in concepts}
    text = [text] if isinstance(text, str | Path) else list(text)
    if run is None:
        return _imported(text, concepts, config)
    described = {"text": [str(path) for path in text], "concepts": dict(concepts), **config_dict(config)}
    read = [*text, *([config.label_names] if config.label_names else [])]
    with Run.open(run, COMMAND, described, seeds=[config.seed], inputs=[Path(path) for path in read]) as opened:
        found = None if opened.done else _imported(text, concepts, config)
        opened.record(hashes=_hashes(read))
        if found is not None:
            write_examples_file(opened.file(EXAMPLES), found.examples)
            if config.judge_share:
                write_examples_file(opened.file(JUDGE), found.judge)
            opened.finish(found.counts)
        kept = {name: opened.file(name) for name in (EXAMPLES, JUDGE)}
        return ImportedExamples(
            counts=read_typed(ImportCounts, opened.results, f"run {run}"),
            examples=read_examples(kept[EXAMPLES], list(concepts)),
            judge=read_examples(kept[JUDGE], list(concepts)) if kept[JUDGE].exists() else [],
            run=Path(run),
        )


def write_examples_file(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as `read_examples` reads them."""
    known = [{name: value for name, value in asdict(example).items() if value is not None} for example in examples]
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in known]
    write_text(path, "".join(lines))


def _imported(text: Sequence[str | Path], concepts: Mapping[str, str], config: ImportOptions) -> ImportedExamples:
    labels = Labels(concepts, config.rename, config.others)
    dropped = Counter[str]()
    candidates: list[Candidate] = []
    texts = 0
    with Meter("reading labelled text") as meter:
        for one in LabelledFiles(**part_of(config, LabelledFiles)).read(text):
            texts += 1
            meter.advance()
            having = labels.concepts_of(one.labels, one.where)
            if isinstance(having, str):
                dropped[having] += 1
                continue
            plain = one.text.strip() if one.whole else cleaned(one.text, config.cleaning).strip()
            if not plain:
                dropped["empty"] += 1
            elif one.whole:
                candidates.append(Candidate(plain, having, one.unit or one.where, one.prompt, one.unit))
            elif one.prompt:
                cut = plain if len(plain) <= config.max_characters else ended(plain[: config.max_characters])
                if len(cut) < config.min_characters:
                    dropped["too short"] += 1
                else:
                    candidates.append(Candidate(cut, having, one.where, one.prompt))
            else:
                parts = passages(plain, config.min_characters, config.max_characters, dropped)
                candidates += [Candidate(part, having, one.where, unit=one.where) for part in parts]
    labels.check()
    if not candidates:
        reasons = [f"{number} {reason}" for reason, number in dropped.most_common()]
        why = f"left out: {', '.join(reasons)}" if reasons else "give files with text"
        raise UserError("the labelled text", f"none of its {texts} texts is left", why)
    read = Counter(name for one in candidates for name in one.concepts or (NONE,))
    found = without_copies(candidates, dropped)
    shares = {"examples": 1 - config.judge_share, "judge": config.judge_share}
    judged = set(split_ids(dict.fromkeys(one.source for one in found), shares, f"judge {config.seed}")["judge"])
    parts = {name: [one for one in found if (one.source in judged) == (name == "judge")] for name in shares}
    chosen: dict[str, list[Candidate]] = {}
    for name, members in parts.items():
        each = config.per_concept or rarest(members, list(concepts)) or len(members)
        if name == "judge" and config.per_concept:
            each = max(1, round(each * config.judge_share / (1 - config.judge_share)))
        chosen[name] = select(
            members, list(concepts), each=each, none_share=config.none_share, seed=config.seed, dropped=dropped
        )
    whole = [one.text for members in chosen.values() for one in members]
    apart = first_of_each(whole)[len(chosen["examples"]) :]
    dropped["nearly a copy"] += apart.count(False)
    chosen["judge"] = [one for one, alone in zip(chosen["judge"], apart, strict=True) if alone]
    made = {name: as_examples(members, concepts, config.holdout, config.seed) for name, members in chosen.items()}
    groups = {**made, "heldout": [one for one in made["examples"] if side_of(one, config.holdout)]}
    numbers = {name: Counter(c for one in members for c in one.concepts or (NONE,)) for name, members in groups.items()}
    counts = ImportCounts(
        texts=texts,
        passages=len(candidates),
        dropped=dict(dropped),
        concepts=tuple(
            ConceptCount(concept=name, read=read[name], **{side: each[name] for side, each in numbers.items()})
            for name in (*concepts, NONE)
        ),
        examples=len(made["examples"]),
        judge=len(made["judge"]),
        seed=config.seed,
    )
    return ImportedExamples(counts=counts, examples=made["examples"], judge=made["judge"])


def _hashes(text: Sequence[str | Path]) -> dict[str, str]:
    """Of all files together, so that a run is not taken for that of other ones."""
    paths = [Path(path).expanduser() for path in text if not str(path).startswith("hub:")]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {"text": text_id("\n".join(f"{file} {sha256_file(file)}" for file in files if file.is_file()))}
