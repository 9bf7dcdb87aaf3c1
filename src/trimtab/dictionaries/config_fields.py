"""A config that another library or trimtab wrote as JSON: its fields are checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import UserError

GET_AGAIN = "get the dictionary again"


class Fields(NamedTuple):
    """The fields of a config."""

    cfg: Mapping[str, Any]
    source: str
    """The file's name, for messages."""
    inside: str = ""
    """The object of the file that `cfg` is, with a dot behind it (`trainer.`)."""

    @classmethod
    def read(cls, path: Path, writers: str) -> Fields:
        """Read a file. Raises a `UserError` that names it, and who writes such directories, unless it is an object."""
        try:
            cfg = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = f"give a directory that {writers} saved"
            raise UserError(f"dictionary {path.parent}", f"it has no {path.name}", hint) from None
        except OSError as error:
            raise UserError(str(path), f"not readable ({error.strerror})", "check the file's permissions") from error
        except ValueError as error:
            raise UserError(str(path), f"not valid JSON ({error})", GET_AGAIN) from error
        if not isinstance(cfg, dict):
            raise UserError(str(path), f"a JSON object was expected, not {type(cfg).__name__}", GET_AGAIN)
        return cls(cfg, str(path))

    def error(self, name: str, why: str, hint: str = "") -> UserError:
        what = self.inside + name + (f" = {self.cfg[name]!r}" if name in self.cfg else "")
        return UserError(f"field {what} in {self.source}", why, hint or "correct the file, or use another dictionary")

    def positive_integer(self, name: str) -> int:
        value = self.cfg.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "it must be a positive integer" if name in self.cfg else "it is missing")
        return value

    def positive_number(self, name: str) -> float:
        value = self.cfg.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, "it must be a positive number" if name in self.cfg else "it is missing")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.cfg.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def part(self, name: str) -> Fields:
        """The fields of an object inside this one."""
        value = self.cfg.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "it must be an object" if name in self.cfg else "it is missing")
        return Fields(value, self.source, f"{self.inside}{name}.")
