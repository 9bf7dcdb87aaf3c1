"""The command line: one thin function per command, which names its config and what runs it, and imports only then.

`trimtab --help` therefore loads no torch. Results go to stdout (with --json as one JSON object), progress to stderr; a
user's mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from trimtab import __doc__ as PURPOSE
from trimtab import __version__
from trimtab.errors import UserError


@dataclass(frozen=True)
class Job:
    """A command's config, what runs it, and which fields are given without an option's name."""

    config: type[Any]
    run: Callable[[Any], Any]
    positional: tuple[str, ...] = ()
    defaults: Callable[[Sequence[str]], Any] | None = None
    """Gives the config that holds unless the words say otherwise, where they name a file that does."""


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the models of the catalogue."""


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Fetch a model of the catalogue into the cache, so that no network is needed afterwards."""

    name: str
    """Name in the catalogue (`trimtab models list`)."""
    accept_terms: bool = False
    """Agree to the model's terms, where it has any."""
    again: bool = False
    """Fetch it anew, in place of what is cached."""
    path: Path | None = None
    """The model file, for a model that is converted from a local file."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Describe a model: sizes, sites, licence, chat template, shipped SAEs."""

    name: str
    """Catalogue name, directory, or hub id in the hub's local cache."""


@dataclass(frozen=True, kw_only=True)
class PolicyReportConfig:
    """Write report.html of a policy's run from what the run holds."""

    run: Path
    """Directory of `policy train`, or of `policy evaluate --out`."""


@dataclass(frozen=True)
class Printed:
    """A result made of its JSON form and its text."""

    fields: dict[str, Any]
    text: str

    def to_json(self) -> dict[str, Any]:
        return self.fields

    def render(self) -> str:
        return self.text


def models_list() -> Job:
    """list the catalogue's models"""
    from trimtab.lm import list_models

    return Job(ListConfig, lambda _config: list_models())


def models_pull() -> Job:
    """fetch a model into the cache"""
    from trimtab.lm import pull

    def run(config: PullConfig) -> Printed:
        place = pull(config.name, path=config.path, accept_terms=config.accept_terms, again=config.again)
        return Printed({"name": config.name, "path": str(place)}, str(place))

    return Job(PullConfig, run, ("name",))


def models_show() -> Job:
    """describe a model"""
    from trimtab.dictionaries import shipped_names
    from trimtab.lm import show

    def run(config: ShowConfig) -> Printed:
        details = show(config.name)
        saes = [name for name in shipped_names() if name.rpartition("/")[0] == config.name]
        text = details.render() + f"\n{'shipped SAEs':14} {', '.join(saes) or 'none'}"
        return Printed(details.to_json() | {"saes": saes}, text)

    return Job(ShowConfig, run, ("name",))


def harvest() -> Job:
    """write a model's activations over text to disk"""
    from trimtab.activations import HarvestConfig, run_harvest
    from trimtab.runs import json_safe

    def run(config: HarvestConfig) -> Printed | None:
        result = run_harvest(config)
        if result is None:
            return None
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in result.dropped.items())
        rows = f"{result.train_rows:,} training and {result.holdout_rows:,} held-out rows"
        return Printed(json_safe(result._asdict()), f"{rows} in {result.directory}; left out: {dropped}")

    return Job(HarvestConfig, run)


def train() -> Job:
    """train an SAE, or a bank of them, on a model's activations"""
    from trimtab.training import TrainCommand, command_defaults, run_train

    return Job(TrainCommand, run_train, defaults=command_defaults)


def rank() -> Job:
    """rank an SAE's features by what amplifying them does"""
    from trimtab.selection import RankConfig, run_rank

    return Job(RankConfig, run_rank)


def steer() -> Job:
    """steer generation with features, or replay a steered run"""
    from trimtab.steering import SteerConfig, run_steer

    return Job(SteerConfig, run_steer, ("prompt",))


def evaluate_core() -> Job:
    """measure how faithful an SAE is, and what it costs the model"""
    from trimtab.evaluation import CoreConfig, run_core

    return Job(CoreConfig, run_core)


def evaluate_ground_truth() -> Job:
    """rank SAE architectures on data whose features are known"""
    from trimtab.evaluation import GroundTruthConfig, run_ground_truth

    return Job(GroundTruthConfig, run_ground_truth)


def sae_info() -> Job:
    """describe an SAE, whoever trained it"""
    from trimtab.dictionaries.describing import SAEInfoConfig, describe_sae

    return Job(SAEInfoConfig, describe_sae, ("sae",))


def sae_convert() -> Job:
    """save an SAE of another library in trimtab's and SAELens's layout"""
    from trimtab.dictionaries.converting import ConvertConfig, convert_sae

    return Job(ConvertConfig, convert_sae, ("source", "destination"))


def policy_headroom() -> Job:
    """measure what one edit could gain on a task, before training a policy"""
    from trimtab.policies.headroom_command import HeadroomConfig, run_headroom

    return Job(HeadroomConfig, run_headroom)


def policy_train() -> Job:
    """train a policy that picks a feature at each token"""
    from trimtab.policies.config import PolicyConfig
    from trimtab.policies.train import TrainingSummary, train_policy
    from trimtab.report import write_policy_report

    def run(config: PolicyConfig) -> TrainingSummary:
        summary = train_policy(config)
        write_policy_report(summary.run)
        return summary

    return Job(PolicyConfig, run)


def policy_evaluate() -> Job:
    """show trained policies beside their controls, on items that chose nothing"""
    from trimtab.policies.evaluate import evaluate_policy
    from trimtab.policies.evaluate_config import EvaluateConfig
    from trimtab.policies.evaluation import PolicyEvaluation
    from trimtab.report import write_policy_report

    def run(config: EvaluateConfig) -> PolicyEvaluation:
        evaluation = evaluate_policy(config)
        for path in config.run if config.out is None else (*config.run, config.out):
            write_policy_report(path)
        return evaluation

    return Job(EvaluateConfig, run, ("run",))


def policy_analyze() -> Job:
    """find where a policy's choices mattered, and what its critic knows"""
    from trimtab.policies.analyses.command import AnalyzeConfig, PolicyAnalysis, analyze_policy
    from trimtab.report import write_policy_report

    def run(config: AnalyzeConfig) -> PolicyAnalysis:
        analysis = analyze_policy(config)
        write_policy_report(config.run[0])
        return analysis

    return Job(AnalyzeConfig, run, ("run",))


def policy_report() -> Job:
    """write the HTML report of a policy's run anew"""
    from trimtab.report import write_policy_report

    def run(config: PolicyReportConfig) -> Printed:
        page = write_policy_report(config.run)
        return Printed({"report": str(page)}, str(page))

    return Job(PolicyReportConfig, run, ("run",))


def demo() -> Job:
    """find, choose and test steering features of the default model, with a report"""
    from trimtab.report import write_demo_report
    from trimtab.studies import DemoConfig, DemoResult, run_demo

    def run(config: DemoConfig) -> DemoResult:
        result = run_demo(config)
        write_demo_report(result.run)
        return result

    return Job(DemoConfig, run)


COMMANDS: dict[str, Callable[[], Job]] = {
    "demo": demo,
    "models list": models_list,
    "models pull": models_pull,
    "models show": models_show,
    "harvest": harvest,
    "train": train,
    "rank": rank,
    "steer": steer,
    "evaluate core": evaluate_core,
    "evaluate ground-truth": evaluate_ground_truth,
    "sae info": sae_info,
    "sae convert": sae_convert,
    "policy headroom": policy_headroom,
    "policy train": policy_train,
    "policy evaluate": policy_evaluate,
    "policy analyze": policy_analyze,
    "policy report": policy_report,
}


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
    close = difflib.get_close_matches(wrong, known, n=1)
    raise UserError(
        f"unknown command {' '.join([words[0], wrong] if group else [wrong])!r}",
        f"there is {', '.join(known)}",
        f"did you mean {close[0]}?" if close else "see trimtab --help",
    )


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

        print(json.dumps(json_safe(result.to_json()), ensure_ascii=False, allow_nan=False))
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

    flag = Annotated[bool, tyro.conf.arg(help="Print the result as one JSON object.")]
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
                config=(tyro.conf.FlagCreatePairsOff,),
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

    hints = typing.get_type_hints(config)
    marked = []
    for field in dataclasses.fields(config):
        if field.name in names:
            kind = Annotated[tyro.conf.Positional[hints[field.name]], tyro.conf.arg(metavar=field.name.upper())]
            marked.append((field.name, kind, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(config.__name__, marked, bases=(config,), frozen=True, kw_only=True)


def _prompts_first(words: Sequence[str], job: Job) -> list[str]:
    """The words, with texts that follow the numbers of an option moved to the front: `--feature 3 14 "Once upon"`."""
    hints = typing.get_type_hints(job.config) if job.positional else {}
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


if __name__ == "__main__":
    sys.exit(main())
