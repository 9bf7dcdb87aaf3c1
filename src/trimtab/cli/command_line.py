"""From words to a command's config, and from its result to stdout."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence

from trimtab import __doc__ as PURPOSE
from trimtab import __version__
from trimtab.cli.commands import COMMANDS
from trimtab.cli.job import Job
from trimtab.cli.options import parse
from trimtab.errors import UserError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line behind `trimtab`; those of this process by default.

    Returns:
        Exit status: 0; 2 for a user's mistake; 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # what it cannot write, such as an emoji in cp1252, is written \U0001f355
        sys.stdout.reconfigure(errors="backslashreplace")
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
    except Exception as error:
        if not _is_for_want_of_memory(error):
            raise
        said = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        hint = "lower --batch-size, use a lower precision (--dtype bfloat16) or another --device"
        print(f"trimtab: error: memory is full: {said or 'no more can be had'}; {hint}", file=sys.stderr)
        return 2


def _is_for_want_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # which is not loaded for this
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


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
    other = f"did you mean trimtab {wrong}?" if wrong in COMMANDS else "see trimtab --help"
    hint = did_you_mean(wrong, known, other)
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
    as_json, config = parse(command, job, words)
    result = job.run(config)
    if result is None:  # another rank speaks
        return 0
    if job.pages is not None:
        from trimtab.report import write_report

        for run in job.pages(config, result):
            write_report(run)
    if as_json:
        from trimtab.runs import json_safe

        plain = result.to_json() if hasattr(result, "to_json") else result
        is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
        print(json.dumps(json_safe(plain), ensure_ascii=not is_unicode, allow_nan=False))
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


def _after_a_stop(words: Sequence[str]) -> str:
    resumes = words[:1] in (["demo"], ["examples"], ["harvest"], ["train"]) or words[:2] in (
        ["policy", "train"],
        ["flags", "data"],
        ["flags", "train"],
        ["flags", "evaluate"],
    )
    return f"the same command again {'goes on from here' if resumes else 'starts anew'}"
