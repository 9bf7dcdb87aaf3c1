"""Dictionaries from disk for the locations of cross-sections: which of them make up one contender, and what is missing.

A path is one dictionary (whatever `load_dictionary` takes) or a directory that holds many: a bank's run, or
saved codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trimtab.dictionaries import Dictionary, load_dictionary
from trimtab.dictionaries.files import dictionaries_below
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.lm import LanguageModel

_NOT_IN_A_NAME = ("sae", "saes", "members")
"""Directories that say nothing about what is in them."""


class LoadedDictionaries(NamedTuple):
    """What paths hold for some locations."""

    dictionaries: dict[str, dict[Location, Dictionary]]
    """By contender the dictionary of each location that it has one for."""
    unused: tuple[str, ...]
    """Dictionaries in directories of many that read none of these locations."""

    def missing(self, contender: str, locations: Sequence[Location]) -> tuple[Location, ...]:
        """Locations, of a cross-section, that a contender has no dictionary for."""
        return tuple(place for place in locations if place not in self.dictionaries[contender])


class _Found(NamedTuple):
    path: str
    root: str  # name of the directory that was given
    name: str  # of the contender
    dictionary: Dictionary
    locations: tuple[Location, ...]


def load_dictionaries(
    paths: Sequence[str | Path], model: LanguageModel, locations: Sequence[Location], *, any_model: bool = False
) -> LoadedDictionaries:
    """Load dictionaries and give each the locations that it reads.

    A dictionary reads the locations of its site, at the position that it was fitted on; one that names no position
    reads its site at all of them. A contender is what has one name: directories below a given one (or the one
    dictionary given), less site and position, or else the name of the directory itself. Where two given directories
    have contenders of one name at one location, the directories' names stand before them.

    Args:
        paths: each one dictionary, or a directory of many.
        model: the model that they are of.
        locations: of all cross-sections together.
        any_model: accept dictionaries trained on a model of another name.

    Returns:
        The contenders, in float32 on the CPU, and what was not used.

    Raises:
        UserError: nothing there; a dictionary that cannot be read, says no site, or is of another model or width; one
            that was named itself, or all in a directory, are of other sites; two of one contender are for one location.
    """
    found: list[_Found] = []
    unused: list[str] = []
    for given in paths:
        below = dictionaries_below(given)
        one = not below
        here = [_read(path, given, model, locations, any_model=any_model, one=one) for path in below or [given]]
        if not any(each.locations for each in here):
            first = here[0].dictionary
            what = f"dictionary {given}" if one else f"dictionaries in {given}"
            places = ", ".join(map(str, locations[:3])) + ", …" * (len(locations) > 3)
            also = "" if one or len(here) == 1 else f" (and {len(here) - 1} others)"
            raise UserError(what, f"it reads {reads(first)}{also}", f"give one for {places}")
        found += [each for each in here if each.locations]
        unused += [each.path for each in here if not each.locations]
    roots: dict[tuple[str, Location], set[str]] = {}
    for each in found:
        for place in each.locations:
            roots.setdefault((each.name, place), set()).add(each.root)
    shared = {name for (name, _), of in roots.items() if len(of) > 1}
    contenders: dict[str, dict[Location, Dictionary]] = {}
    for each in found:
        name = f"{each.root}/{each.name}" if each.name in shared and each.root != each.name else each.name
        mine = contenders.setdefault(name, {})
        for place in each.locations:
            if place in mine:
                why = f"{mine[place].name} is for {place} of contender {name}, too"
                raise UserError(f"dictionary {each.path}", why, "give one of them, or rename a directory")
            mine[place] = each.dictionary
    return LoadedDictionaries(contenders, tuple(unused))


def position_of(dictionary: Dictionary) -> str:
    """The position of the tokens that a dictionary was fitted on; empty if it names none."""
    metadata = dictionary.info.metadata
    source = metadata.get("source")
    position = metadata.get("position") or (source.get("position") if isinstance(source, dict) else None)
    return str(position or "")


def reads(dictionary: Dictionary) -> str:
    """Where a dictionary reads, in words."""
    position = position_of(dictionary)
    return dictionary.info.site + (f" at {position}" if position else "")


def _read(
    path: str | Path,
    given: str | Path,
    model: LanguageModel,
    locations: Sequence[Location],
    *,
    any_model: bool,
    one: bool,
) -> _Found:
    """A dictionary with the locations that it reads, once it fits the model."""
    try:
        dictionary = load_dictionary(path, model=model, any_model=any_model)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"dictionary {path}", f"{error.what}: {error.why}", error.hint) from None
    if not dictionary.info.site:
        hint = f"say it: trimtab sae convert {path} NEW --site SITE"
        raise UserError(f"dictionary {path}", "it does not say which site it reads", hint)
    position = position_of(dictionary)
    mine = [r for r in locations if str(r.site) == dictionary.info.site and position in ("", r.position)]
    root = Path(given).resolve()
    parts = [root.name, *Path(path).resolve().relative_to(root).parts] if not one else root.parts[-3:]
    named = [_without_place(part, dictionary) for part in parts if part not in _NOT_IN_A_NAME]
    if one:
        name = next((part for part in reversed(named) if part), str(given))
        top = name
    else:
        top, name = root.name, "/".join(part for part in named[1:] if part) or root.name
    return _Found(str(path), top, name, dictionary, tuple(mine))


def _without_place(name: str, dictionary: Dictionary) -> str:
    """A directory's name less the site and position that it begins with."""
    position = position_of(dictionary).replace("+", "plus")
    for place in (f"{dictionary.info.site}-{position}" if position else "", dictionary.info.site):
        if place and (match := re.fullmatch(rf"{re.escape(place)}(?:-(.+))?", name)):
            return match[1] or ""
    return name
