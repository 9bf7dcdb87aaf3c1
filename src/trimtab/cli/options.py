"""A config's fields as options: what everybody needs first, the rest under the names of the parts that state them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from trimtab.cli.job import Job
from trimtab.errors import UserError

FIRST = (
    "task", "model", "sae", "circuit", "cross_section",
    "text", "activations", "site", "arch", "n_features", "l0", "k", "rows", "criterion",
    "feature", "steering", "mask", "dose", "unit", "items", "iterations", "control", "part", "quick",
    "run",
)  # fmt: skip
"""Options that stand first in the help of every command that has them, in this order."""


def parse(command: str, job: Job, words: Sequence[str]) -> tuple[bool, Any]:
    """The words as the job's config, and whether --json is among them.

    Raises:
        UserError: the words are no such config.
    """
    import tyro

    from trimtab.runs import command_now, new_name

    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        new = None if name in job.config.__dataclass_fields__ else new_name(command, name)
        if new is not None:
            raise UserError(word.partition("=")[0], "it has another name now", f"write --{new.replace('_', '-')}")
        if (other := command_now(command, name.removeprefix("no_"))) is not None:
            raise UserError(word.partition("=")[0], "a command of its own does that now", f"run {other}")
    _check_given(job, words)
    about = " ".join((job.config.__doc__ or "").split())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                _options(job, words),
                prog=f"trimtab {command}",
                description=f"{about}\n\nExample:\n  trimtab {command} {job.example}".rstrip(),
                args=_prompts_first(words, job),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_without_box(said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    values = {name: value for part in (parsed, *vars(parsed).values()) for name, value in _values(part)}
    return values.pop("json"), job.config(**values)


def _check_given(job: Job, words: Sequence[str]) -> None:
    """Raise a `UserError` at a list option without a value where that would mean its default."""
    every = dataclasses.fields(job.config)
    empty = {field.metadata.get("option", field.name) for field in every if _usual(field) == ()}
    for word, following in pairwise([*words, "--"]):
        if word.startswith("--") and following.startswith("--") and word[2:].replace("-", "_") in empty:
            raise UserError(word, "no value follows it", "give one or more, or leave it out")


class _Group:
    """Options that share a heading."""


def _values(part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, _Group):
        yield from ((name, value) for name, value in vars(part).items() if not isinstance(value, _Group))


def _options(job: Job, words: Sequence[str]) -> type[Any]:
    """What tyro reads the words into: the first options and those given by place, then a group for each heading."""
    import tyro

    from trimtab.runs import field_docs, field_types

    known = _known(job, words)
    kinds, docs = field_types(job.config), field_docs(job.config)
    fields = {field.name: field for field in dataclasses.fields(job.config)}
    groups: dict[str, list[Any]] = {"": []}
    nested: list[Any] = []
    for name, heading in _headings(job.config, job.positional).items():
        usual = known.get(name, _usual(fields[name]))
        place = name.upper() if name in job.positional else ""
        kind = _shown(kinds[name], usual, docs.get(name, ""), place, fields[name].metadata.get("option"))
        group = nested if dataclasses.is_dataclass(kinds[name]) else groups.setdefault(heading, [])
        group.append((name, kind, dataclasses.field(default=usual)))
    flag = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Print the result as one JSON object.")]
    first = [*groups.pop(""), ("json", flag, dataclasses.field(default=False))]
    rest = [
        (
            f"{heading.replace('-', '_')}_group",
            Annotated[tyro.conf.OmitArgPrefixes[_group(options)], tyro.conf.arg(name=heading, help="")],
        )
        for heading, options in groups.items()
    ]
    return _group([*first, *rest, *nested])


def _known(job: Job, words: Sequence[str]) -> Mapping[str, Any]:
    """Values of fields that the files among the words say: an SAE names its model."""
    given: dict[str, list[str]] = {}
    option = "".join(job.positional[:1])
    for word in words:
        if word.startswith("--"):
            name, is_given, value = word[2:].partition("=")
            option = name.replace("-", "_")
            given[option] = [value] if is_given else []
        else:
            given.setdefault(option, []).append(word)
    if job.defaults and (found := job.defaults(given)):
        return found
    if (
        {"model", "sae"} <= job.config.__dataclass_fields__.keys()
        and given.get("sae")
        and not {"model", "replay"} & given.keys()
    ):
        from trimtab.dictionaries.files import trained_on

        model = trained_on(given["sae"][0])
        return {"model": model} if model else {}
    return {}


def _group(options: list[Any]) -> type[Any]:
    return dataclasses.make_dataclass("Options", options, bases=(_Group,), frozen=True, kw_only=True)


def _headings(config: type[Any], leading: Sequence[str]) -> dict[str, str]:
    """The heading of every field in the help's order: "" for leading ones and the first, what their metadata names for
    some, at the end, and what the part that states them is called for all others: `text` for `TextConfig`."""
    from trimtab.runs import field_types

    kinds, parts = field_types(config), config.__mro__
    found = dict.fromkeys([*leading, *(name for name in FIRST if name in kinds)], "")
    named = {
        field.name: field.metadata["heading"] for field in dataclasses.fields(config) if "heading" in field.metadata
    }
    stated = {name: part for part in parts for name in vars(part).get("__annotations__", ()) if name in kinds}
    for name, part in sorted(stated.items(), key=lambda item: parts.index(item[1])):
        if name not in found and name not in named:
            kind = re.sub("(Config|Options|Command)$", "", part.__name__)
            found[name] = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", kind).lower()
    return found | {name: heading for name, heading in named.items() if name not in found}


def _usual(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(kind: Any, usual: Any, doc: str, place: str, option: str | None) -> Any:
    """A field's type with what the help says of it.

    Args:
        kind: the field's type.
        usual: its default.
        doc: what it means.
        place: what stands for it where it is given without a name.
        option: what it is called, if not by the field's name.
    """
    import tyro

    unset = usual is None or usual == ()
    about: dict[str, Any] = {"help": doc, "name": option} if option else {"help": doc}
    if unset:
        about["help_behavior_hint"] = "(not set)"
        kind = tyro.conf.DisallowNone[kind]
    elif types.NoneType in typing.get_args(kind):
        (inner,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        about["metavar"] = f"{inner.__name__.upper()}|None"
    if place:
        kind, about["metavar"] = tyro.conf.Positional[kind], place
    return Annotated[kind, tyro.conf.arg(**about)]


def _prompts_first(words: Sequence[str], job: Job) -> list[str]:
    """The words, with texts that follow the numbers of an option moved to the front: `--feature 3 14 "Once upon"`."""
    from trimtab.runs import field_types

    hints = field_types(job.config) if job.positional else {}
    of_numbers = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if hint in _NUMBERS}
    texts: list[str] = []
    rest: list[str] = []
    option, numbers = "", 0
    for word in words:
        if word.startswith("--"):
            option, numbers = word, 0
        elif _is_number(word):
            numbers += 1
        elif option in of_numbers and numbers:
            texts.append(word)
            continue
        rest.append(word)
    return [*texts, *rest]


_NUMBERS = (tuple[int, ...], tuple[float, ...])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _without_box(text: str) -> str:
    """What the parser says in a box of several lines, as one line; help texts are left to --help."""
    text = re.sub(r"\A[^\n]*\n *-{3}[^\n]*\n", "", text)  # a title, where the terminal cannot draw boxes
    lines = [re.sub(r"^[│|]|[│|]$", "", line.strip()).strip() for line in text.splitlines()]
    joined = " ".join(line for line in lines if line and not re.match(r"^([─╭╰┌└+]|-{3})", line))
    return re.sub(r" Argument helptext:.*?(?= For full helptext|$)", "", joined).replace(" For full", "; for full")
