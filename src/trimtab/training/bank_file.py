"""Bank files: TOML with a table of defaults and a table for each member or product of members.

[defaults]                     # any option of `trimtab train`
text = ["my_texts"]
n_features = 8192
seed = [0, 1]                  # lists multiply

[[member]]                     # 2 × 3 members for each seed
arch = ["topk", "batchtopk"]
l0 = [16, 32, 64]

[[member]]
arch = "relu"
sparsity_weight = 0.5
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError, did_you_mean
from trimtab.runs import field_types, new_name, read_typed, takes_list
from trimtab.training.config import TrainConfig


@dataclass(frozen=True)
class BankFile:
    """What a bank file says, with values of the right types."""

    path: Path
    defaults: dict[str, Any]
    """Values by option; those of which the command line takes several are tuples."""
    members: tuple[dict[str, tuple[Any, ...]], ...]
    """Values to combine, by field, one mapping for each `[[member]]`."""

    def places(self) -> list[tuple[str, Mapping[str, Sequence[Any]]]]:
        """Each member table, with the place that messages name; one empty table if there is none."""
        tables = self.members or ({},)
        return [(f"{self.path}: [[member]] {number}: ", table) for number, table in enumerate(tables, 1)]


def read_bank_file(path: Path, options: type[Any]) -> BankFile:
    """Read a bank file.

    Args:
        path: of the file.
        options: dataclass whose fields `[defaults]` may set.

    Raises:
        UserError: the file cannot be read, is no TOML, or holds a wrong table, key or type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"bank file {path}", f"it cannot be read ({error})", "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"bank file {path}", f"it is not TOML ({error})", "correct it") from error
    for table in content:
        if table not in ("defaults", "member"):
            hint = "did you mean [[member]]?" if table.startswith("mem") else "did you mean [defaults]?"
            raise UserError(f"{path}: {table}", "a bank file holds [defaults] and [[member]]", hint)
    defaults, members = content.get("defaults", {}), content.get("member", [])
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults", "it is no table", "write [defaults]")
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise UserError(f"{path}: member", "it is no list of tables", "write [[member]]")
    of_options = {name: kind for name, kind in field_types(options).items() if name != "bank"}
    of_member = {**field_types(TrainConfig), "site": str}
    return BankFile(
        path,
        read_options(f"{path}: [defaults]", defaults, of_options),
        tuple(
            {key: _values(f"{path}: [[member]] {n}", key, value, of_member, of_options) for key, value in m.items()}
            for n, m in enumerate(members, 1)
        ),
    )


def read_options(
    place: str, table: Mapping[str, Any], kinds: Mapping[str, Any], see: str = "see trimtab train --help"
) -> dict[str, Any]:
    """Values of the right types; one value stands for a list of one.

    Args:
        place: that messages name.
        table: values by option, as TOML has them.
        kinds: types by option.
        see: the hint where no option has a like name.

    Raises:
        UserError: there is no such option, or its value is of another type.
    """
    found = {}
    for key, value in table.items():
        kind = _kind(place, key, kinds, see)
        several = takes_list(kind) and not isinstance(value, list)
        found[key] = read_typed(kind, [value] if several else value, f"{place}: {key}")
    return found


def _values(place: str, key: str, value: Any, kinds: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Any, ...]:
    if key in shared and key not in kinds:
        raise UserError(f"{place}: {key}", "all members share it", "move it to [defaults]")
    kind = _kind(place, key, kinds)
    several = isinstance(value, list)
    if takes_list(kind):
        several = several and all(isinstance(part, list) for part in value)
    if value == []:
        raise UserError(f"{place}: {key}", "the list is empty", "name at least one value")
    return tuple(read_typed(kind, part, f"{place}: {key}") for part in (value if several else [value]))


def _kind(place: str, key: str, kinds: Mapping[str, Any], see: str = "see trimtab train --help") -> Any:
    if key not in kinds:
        new = new_name("train", key)
        hint = f"write {new}" if new else did_you_mean(key, kinds, see)
        raise UserError(f"{place}: {key}", "there is no such option", hint)
    return kinds[key]
