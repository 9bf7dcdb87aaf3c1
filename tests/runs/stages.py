"""Stages for the tests of executors: a module of its own, which Ray's workers can import."""

from __future__ import annotations

import os
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UserError
from trimtab.runs import write_text


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Where squares are written."""

    out: Path
    add: int = 0


def square(config: Squares, number: int) -> list[Path]:
    """Write a number's square; a mark for each time that it is begun. Shard 3 kills its worker once, 5 always; 4 is
    the user's mistake."""
    tries = config.out / "tries" / str(number)
    tries.mkdir(parents=True, exist_ok=True)
    (tries / uuid.uuid4().hex).touch()
    if number == 5 or (number == 3 and len(list(tries.iterdir())) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        raise UserError("shard 4", "four is not allowed", "choose another number")
    file = config.out / f"{number}.txt"
    write_text(file, str(number**2 + config.add))
    return [file]


def forgetful(config: Squares, number: int) -> list[Path]:
    """Say that there is a file, which is not there."""
    return [config.out / f"{number}.none"]


def began(config: Squares) -> dict[int, int]:
    """How often each shard was begun."""
    return {int(tries.name): len(list(tries.iterdir())) for tries in sorted((config.out / "tries").iterdir())}
