"""`trimtab flags steer`: continue prompts with a model's flags free, and as switches set them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.errors import UserError
from trimtab.flags.files import MODEL, NAME, load_flagged, load_flags
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import FlagSource, Switch
from trimtab.lm import DecodingConfig, LanguageModel
from trimtab.runs import Run, read_record
from trimtab.runs.record import RECORD_NAME
from trimtab.steering import SteerOptions, SteerResult
from trimtab.steering.command import steered_in
from trimtab.steering.steered import check_options, plan_steering, steered

COMMAND = "flags steer"
TRAINED_BY = "flags train"
"""The command that finetunes."""


@dataclass(frozen=True, kw_only=True)
class FlagSteerConfig(DecodingConfig):
    """Continue prompts with a model's flags free, and with some of them on, off or at a strength between."""

    model: str
    """Directory of a model with flags, or a finished run of `flags train`."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    on: tuple[str, ...] = ()
    """Concepts to switch on."""
    off: tuple[str, ...] = ()
    """Concepts to switch off."""
    strength: tuple[str, ...] = ()
    """Concepts at a strength, NAME=NUMBER: 0 is off, 1 is on."""
    positions: str = "all"
    """Input positions whose flags are set: all, as in training, or as for `trimtab steer`."""
    chat: bool = False
    """Put each prompt into the model's chat template, as one user turn."""
    samples: int = 1
    """Continuations per prompt; more than one needs a temperature."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    kl: bool = True
    """Measure the switches' effect on the next-token distribution; takes one more pass over the texts."""
    run: Path | None = None
    """Directory to write the trace to."""
    dtype: str = field(default="float32", metadata={"heading": "model"})
    """What the model computes in."""
    device: str = field(default="cpu", metadata={"heading": "model"})
    """Where to compute."""


def run_flag_steer(config: FlagSteerConfig) -> SteerResult:
    """What `trimtab flags steer` does: the result, trace and page of `trimtab steer`, which replays it.

    Raises:
        UserError: there is no such model or run, it has no such concept, or something in the config is not allowed.
    """
    options = SteerOptions(chat=config.chat, samples=config.samples, kl=config.kl)
    decoding = config.decode_config(stop=config.stop)
    check_options(options, len(config.prompt), decoding)
    directory = flagged_directory(config.model)
    flags = load_flags(directory)
    source = FlagSource(flags, switches_of(config, flags), positions=config.positions)
    model, flags = load_flagged(directory, device=config.device, dtype=config.dtype)
    plan = plan_steering(options, model, source, config.prompt, decoding)
    if config.run is None:
        return steered(plan, model)
    kept = replace(config, model=str(directory))  # what a replay loads
    with Run.open(config.run, COMMAND, kept, device=config.device, ignore_fields=("run",)) as run:
        run.record(hashes={"model": model.fingerprint}, axes={"width": flags.d_model, "dims": source.dims})
        return steered_in(run, plan, model)


def flagged_directory(given: str | Path) -> Path:
    """Where the files of a model with flags are.

    Args:
        given: their directory, or a finished run of `flags train`.

    Raises:
        UserError: it is neither.
    """
    path = Path(given).expanduser()
    if (path / NAME).exists():
        return path
    if not (path / RECORD_NAME).exists():
        hint = f"give a run of `{TRAINED_BY}`, or a directory with {NAME}, such as one that save_flags wrote"
        raise UserError(f"model {given}", f"there is no {NAME} in it" if path.is_dir() else "there is none", hint)
    record = read_record(path)
    if record["command"] != TRAINED_BY:
        raise UserError(f"run {given}", f"it belongs to `{record['command']}`", f"give a run of `{TRAINED_BY}`")
    if record["status"] != "done":
        raise UserError(f"run {given}", "its finetuning has not finished", f"run the same `{TRAINED_BY}` again")
    return path / MODEL


def switches_of(config: FlagSteerConfig, flags: FlagSpec) -> dict[str, Switch]:
    """What the options say of each concept.

    Raises:
        UserError: a concept is unknown or set twice, a strength is none, or nothing is set.
    """
    found: dict[str, Switch] = {}
    for name, switch in [*dict.fromkeys(config.on, True).items(), *dict.fromkeys(config.off, False).items()]:
        _set(found, flags, name, switch)
    for name, strength in _strengths(config.strength):
        _set(found, flags, name, strength)
    if not found:
        raise UserError("the switches", "all flags are free", f"set one, such as --on {flags.concepts[0]!r}")
    return found


def _set(found: dict[str, Switch], flags: FlagSpec, name: str, switch: Switch) -> None:
    flags.index(name)
    if name in found:
        raise UserError(f"concept {name!r}", "it is set twice", "give it to one of --on, --off and --strength")
    found[name] = switch


def _strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found.append((name, float(number)))
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"strength {text!r}", "it is not NAME=NUMBER", "write it like sea=0.5")
    return found


def model_of_run(run: Path) -> LanguageModel | None:
    """The model of a run of `flags steer`, which may be an adapter; None for a run of another command."""
    record = read_record(run)
    if record["command"] != COMMAND:
        return None
    config = record["config"]
    return load_flagged(config["model"], device=config["device"], dtype=config["dtype"])[0]
