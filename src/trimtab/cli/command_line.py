"""From words to a command's config, and from its result to stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from trimtab import __doc__ as PURPOSE
from trimtab import __version__
from trimtab.cli.commands import COMMANDS
from trimtab.cli.job import Job
from trimtab.errors import UserError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line behind `trimtab`; those of this process by default.

    Returns:
        Exit status: 0; 2 for a user's mistake; 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"trimtab: error: {error.line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntrimtab: stopped; {_after_a_stop(words)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has enough
        return 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(COMMANDS))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"trimtab {__version__}")
        return 0
    command = _find_command(words)
    return _run(command, words[len(command.split()) :]) if command else 0


def _find_command(words: Sequence[str]) -> str:
    """The command that the words begin with; "" if they ask for a group's help, which is then printed."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name
    group = {name: job for name, job in COMMANDS.items() if name.startswith(f"{words[0]} ")}
    asked = [word for word in words[1:] if word not in ("-h", "--help")]
    if group and not asked:
        print(_overview(group, f"{words[0]} "))
        return ""
    first = {name.split()[0]: None for name in COMMANDS}
    known = [name.split()[1] for name in group] or list(first)
    wrong = asked[0] if group else words[0]
    said = " ".join([words[0], wrong] if group else [wrong])
    hint = did_you_mean(wrong, known, "see trimtab --help")
    raise UserError(f"unknown command {said!r}", f"there is {', '.join(known)}", hint)


def _overview(commands: dict[str, Callable[[], Job]], prefix: str = "") -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {(job.__doc__ or '').strip()}" for name, job in commands.items()]
    return "\n".join(
        [
            f"usage: trimtab {prefix}COMMAND [OPTIONS]",
            "",
            *([] if prefix else [str(PURPOSE), ""]),
            *lines,
            "",
            "Each command takes --help, and --json to print its result as one JSON object.",
        ]
    )


def _run(command: str, words: Sequence[str]) -> int:
    job = COMMANDS[command]()
    as_json, config = _parse(command, job, words)
    result = job.run(config)
    if result is None:  # another rank speaks
        return 0
    if as_json:
        from trimtab.runs import json_safe

        plain = result.to_json() if hasattr(result, "to_json") else result
        print(json.dumps(json_safe(plain), ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        shown = result.render()
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
        plain = isinstance(shown, str)  # may quote what a model wrote, so brackets in it are no markup
        Console(highlight=False, soft_wrap=plain, markup=not plain, width=width).print(shown)
    problem: UserError | None = getattr(result, "problem", None)
    if problem is not None:  # part of the work could not be done
        raise problem
    return 0


def _parse(command: str, job: Job, words: Sequence[str]) -> tuple[bool, Any]:
    """The words as the job's config, and whether --json is among them."""
    import tyro

    flag = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Print the result as one JSON object.")]
    usual = {"default": job.defaults(words)} if job.defaults else {}
    config = _with_positional(job.config, job.positional)
    shape = dataclasses.make_dataclass(
        "Arguments",
        [
            ("config", Annotated[config, tyro.conf.arg(name="")], dataclasses.field(**usual)),
            ("json", flag, dataclasses.field(default=False)),
        ],
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                shape,
                prog=f"trimtab {command}",
                description=(job.config.__doc__ or "").strip(),
                args=_prompts_first(words, job),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_without_box(said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    return parsed.json, parsed.config


def _with_positional(config: type[Any], names: Sequence[str]) -> type[Any]:
    """The config with some fields taken by place: their types are marked, all else is inherited."""
    if not names:
        return config
    import tyro

    from trimtab.runs import field_types

    hints = field_types(config)
    marked = []
    for field in dataclasses.fields(config):
        if field.name in names:
            kind = Annotated[tyro.conf.Positional[hints[field.name]], tyro.conf.arg(metavar=field.name.upper())]
            marked.append((field.name, kind, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(config.__name__, marked, bases=(config,), frozen=True, kw_only=True)


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


def _after_a_stop(words: Sequence[str]) -> str:
    resumes = words[:1] in (["demo"], ["harvest"], ["train"]) or words[:2] == ["policy", "train"]
    return f"the same command again {'goes on from here' if resumes else 'starts anew'}"
