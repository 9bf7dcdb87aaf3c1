"""The command line: one thin function per command, each importing what it needs when it is called.

`trimtab --help` must answer at once, so that nothing here imports torch, tyro or rich at the top.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, TypeVar

from trimtab.errors import UserError

Config = TypeVar("Config")


class Usage(Exception):  # noqa: N818 - a way out, not an error
    """The command line could not be parsed, or only help was asked for."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


def parse(config: type[Config], command: str, args: Sequence[str]) -> Config:
    """A config from its flags.

    Raises:
        Usage: help was printed.
        UserError: flags are missing, unknown or malformed.
    """
    import tyro

    said = StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(config, prog=f"trimtab {command}", args=list(args))
    except SystemExit as leaving:
        if not leaving.code:
            raise Usage from None
        raise UserError(f"trimtab {command}", _one_line(said.getvalue()), f"see trimtab {command} --help") from None


def _one_line(box: str) -> str:
    """What tyro prints in a box, without the box."""
    text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─━]+", " ", box)
    text = " ".join(text.split())
    return re.sub(r"^(Unrecognized options|Parsing error|Required options)\s+", r"\1: ", text).split(" For full help")[
        0
    ]


def models(args: Sequence[str]) -> Any:
    action, *rest = args or ["--help"]
    if action == "list":
        from trimtab.lm.catalogue import list_models

        _no_more(rest, "models list")
        return list_models()
    if action == "show":
        from trimtab.lm.describing import show

        return show(_one_name(rest, "models show"))
    if action == "pull":
        from trimtab.lm.fetching import pull

        accept = "--accept-terms" in rest
        name = _one_name([a for a in rest if a != "--accept-terms"], "models pull")
        path = pull(name, accept_terms=accept)
        return Message(f"{name} is at {path}", {"name": name, "path": str(path)})
    if action in ("-h", "--help"):
        print("trimtab models list | show NAME | pull NAME [--accept-terms]")
        raise Usage
    raise UserError(f"trimtab models {action}", "there are list, show and pull", "use one of them")


def harvest(args: Sequence[str]) -> Any:
    from trimtab.activations import HarvestConfig, harvest_text

    result = harvest_text(parse(HarvestConfig, "harvest", args))
    left = ", ".join(f"{count:,} {reason}" for reason, count in result.dropped.items())
    text = (
        f"{result.directory}: {result.train_rows:,} training and {result.holdout_rows:,} held-out rows; left out {left}"
    )
    return Message(text, result._asdict())


def train(args: Sequence[str]) -> Any:
    from trimtab.training import TrainTextConfig, train_text

    return train_text(parse(TrainTextConfig, "train", args))


def rank(args: Sequence[str]) -> Any:
    from trimtab.selection import RankConfig, run_rank

    return run_rank(parse(RankConfig, "rank", args))


def steer(args: Sequence[str]) -> Any:
    from trimtab.steering import SteerConfig, run_steer

    return run_steer(parse(SteerConfig, "steer", args))


def evaluate(args: Sequence[str]) -> Any:
    action, *rest = args or ["--help"]
    if action == "core":
        from trimtab.evaluation import CoreConfig, run_core

        return run_core(parse(CoreConfig, "evaluate core", rest))
    if action in ("-h", "--help"):
        print("trimtab evaluate core [--sae SAE] [--text PATH ...]   (trimtab evaluate core --help)")
        raise Usage
    raise UserError(f"trimtab evaluate {action}", "there is core", "use trimtab evaluate core")


def demo(args: Sequence[str]) -> Any:
    from trimtab.studies import DemoConfig, run_demo

    return run_demo(parse(DemoConfig, "demo", args))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    "models": (models, "list, fetch and describe small real models"),
    "harvest": (harvest, "keep a model's activations on text as shards on disk"),
    "train": (train, "learn a dictionary (SAE) of a model's activations"),
    "rank": (rank, "find which features steer, not only which fire"),
    "steer": (steer, "steer text with features and trace every edit; replay a trace"),
    "evaluate": (evaluate, "evaluate core: what a dictionary explains, and what it costs the model"),
    "demo": (demo, "rank, choose, steer and test on a real model; writes runs/demo/report.html"),
}


class Message:
    """A result that is one line of text and some plain values."""

    def __init__(self, text: str, values: dict[str, Any]) -> None:
        self._text, self._values = text, values

    def render(self) -> str:
        return self._text

    def to_json(self) -> dict[str, Any]:
        return self._values


def help_text() -> str:
    """What `trimtab --help` prints."""
    from trimtab import __version__

    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        (
            f"trimtab {__version__}: find the features that control a language model, use them, prove what they do.",
            "",
            "usage: trimtab COMMAND [options]      (trimtab COMMAND --help lists a command's options)",
            "",
            *lines,
            "",
            "  --json     print the result as one JSON object on stdout; progress goes to stderr",
            "  --version  print the version",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for a user's mistake, told in one line on stderr; 130 if interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    args = [arg for arg in args if arg != "--json"]
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(help_text())
            return 0
        if args[0] == "--version":
            from trimtab import __version__

            print(__version__)
            return 0
        if args[0] not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            mend = f"did you mean {close[0]}?" if close else "see trimtab --help"
            raise UserError(f"trimtab {args[0]}", f"commands are {', '.join(COMMANDS)}", mend)
        _print(COMMANDS[args[0]][0](args[1:]), as_json)
    except Usage:
        return 0
    except UserError as error:
        print(f"trimtab: error: {error.line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trimtab: interrupted; the same command goes on where its last checkpoint is", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone; keep the interpreter from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        from trimtab.runs import json_safe

        print(json.dumps(json_safe(result.to_json()), ensure_ascii=False))
        return
    rendered = result.render()
    if isinstance(rendered, str):
        print(rendered)
    else:
        from rich.console import Console

        Console().print(rendered)


def _one_name(rest: Sequence[str], command: str) -> str:
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"trimtab {command}", f"it takes one name, not {len(rest)}", f"write trimtab {command} NAME")
    return rest[0]


def _no_more(rest: Sequence[str], command: str) -> None:
    if rest:
        raise UserError(f"trimtab {command}", f"it takes no {rest[0]}", "leave it out")


if __name__ == "__main__":
    sys.exit(main())
