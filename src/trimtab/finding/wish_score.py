"""A finished search as what scores other steerings: their effects on its wish, on examples that chose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UserError
from trimtab.finding.command import FindConfig
from trimtab.finding.examples import divide
from trimtab.finding.finding import COMMAND, WRITTEN
from trimtab.finding.options import FindOptions
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.finding.wishes import Contrast, Texts, Want, Wish, Words, WrittenPair
from trimtab.lm import LanguageModel
from trimtab.runs import field_types, paths_of_run, read_json, read_record, read_typed
from trimtab.stats import bootstrap_mean
from trimtab.steering import StaticSource
from trimtab.steering.scored import Score, WishScore


def wish_score(run: Path, model: LanguageModel) -> Score:
    """What scores sources by the wish of a search.

    Args:
        run: a run of `trimtab find` with the model.
        model: the model.

    Raises:
        UserError: there is no such run, it is of another model, or its wish is no longer what it was; while scoring, a
            source does what no wish is scored under.
    """
    record = read_record(run)
    if record["command"] != COMMAND:
        raise UserError(f"run {run}", f"it belongs to `{record['command']}`", "give a run of trimtab find")
    if record["hashes"].get("model") != model.fingerprint:
        raise UserError(f"run {run}", f"it is of another model than {model.name}", "find the wish with this model")
    wish, options = _stated(run, record["config"] | paths_of_run(record, _FILES), model)
    if isinstance(wish, Want):
        wish = replace(wish, written=read_typed(tuple[WrittenPair, ...], read_json(run / WRITTEN), str(run / WRITTEN)))
    examples = divide(wish.examples(model), options.examples)["report"]
    if [one.id for one in examples.examples] != record["splits"].get("report"):
        raise UserError(f"the wish of run {run}", "its examples are no longer what they were", "find it again")

    def score(sources: Sequence[Sequence[StaticSource]]) -> WishScore:
        every = [(source, _edit(source)) for group in sources for source in group]
        exact = scorer(model, examples, list({site: None for source, _ in every for site in source.sites}))
        effects = [exact.effects(source.tables, [edit])[0].numpy() for source, edit in every]
        ends = np.cumsum([0, *map(len, sources)]).tolist()
        means = [np.mean(effects[a:b], axis=0) for a, b in pairwise(ends)]
        return WishScore(unit=examples.unit, effects=tuple(bootstrap_mean(mean, seed=options.seed) for mean in means))

    return score


_FILES = ("model", "sae", "wanted", "unwanted", "contrast", "prompt", "data", "neutral")


def _stated(run: Path, config: dict[str, Any], model: LanguageModel) -> tuple[Wish, FindOptions]:
    """The wish and the options of a search: files and options of the command line, or what Python gave."""
    what = f"run {run}, config"
    if "wish" not in config:
        found = read_typed(FindConfig, config, what)
        return found.wish(model), found
    stated = dict(config["wish"])
    kind = {one.__name__: one for one in (Texts, Contrast, Words, Want)}.get(stated.pop("kind"))
    if kind is None:
        raise UserError(
            f"run {run}",
            "it was made in Python for a task's reward, which is not kept",
            "find it again by trimtab find --task",
        )
    options = {name: value for name, value in config.items() if name in field_types(FindOptions)}
    return read_typed(kind, stated, what), read_typed(FindOptions, options, what)


def _edit(source: StaticSource) -> SteeringEdit:
    """What a source does to all rows alike, as wishes are scored under it."""
    relative = source.operation == "ablate" or (source.operation == "add" and source.unit == "relative")
    if not relative or source.combine != "each" or str(source.where) != "generated":
        why = "wishes are scored under relative doses that are added, or features removed, at generated positions"
        raise UserError(f"the score under {source!r}", why, "leave --score out")
    parts: list[Part] = []
    for site, (feature, dose) in source.choices.items():
        parts += [Part(site, int(i), float(d)) for i, d in zip(feature[0], dose[0], strict=True) if i >= 0]
    return SteeringEdit(tuple(parts), "ablate" if source.operation == "ablate" else "add")
