"""Fields of another library's config, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trimtab.errors import UserError


class Fields(NamedTuple):
    """A config whose fields are checked as they are read."""

    cfg: Mapping[str, Any]
    source: str
    """The file's name, for messages."""
    inside: str = ""
    """The object of the file that `cfg` is, with a dot behind it (`trainer.`)."""

    def error(self, name: str, why: str, mend: str = "") -> UserError:
        what = self.inside + name + (f" = {self.cfg[name]!r}" if name in self.cfg else "")
        return UserError(f"field {what} in {self.source}", why, mend or "correct the file, or use another dictionary")

    def positive_integer(self, name: str) -> int:
        value = self.cfg.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "it must be a positive integer" if name in self.cfg else "it is missing")
        return value

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
