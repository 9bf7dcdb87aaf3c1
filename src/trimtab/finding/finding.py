"""`find`: from a model, its SAEs and a wish to the features that bring it about, with the proof."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.dictionaries.meanings import FeatureWords
from trimtab.errors import UserError
from trimtab.finding.examples import Examples, divide
from trimtab.finding.ground import Ground
from trimtab.finding.neutral import read_neutral_prompts
from trimtab.finding.options import FindOptions
from trimtab.finding.result import FOUND, RANDOM, Found, FoundFacts
from trimtab.finding.search import Search
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.finding.taken_away import steering_of
from trimtab.finding.wishes import Want, Wish, WrittenPair
from trimtab.lm import LanguageModel, Site
from trimtab.lm.model import check_is_model
from trimtab.lm.quick import quick_copy
from trimtab.lm.sites import site_order
from trimtab.runs import (
    Meter,
    Run,
    config_dict,
    field_types,
    json_safe,
    kept_or_temporary,
    read_json,
    read_keywords,
    read_typed,
    text_id,
    write_json,
)  # fmt: skip
from trimtab.runs.shown import SHOWN_FILE, Shown, write_shown
from trimtab.selection.ranking import dictionary_site
from trimtab.steering import DirectionTable
from trimtab.steering.saved_steering import WITHIN

COMMAND = "find"
WRITTEN = "written.json"
"""Of a run: texts that the model wrote for a wish."""
SCREEN = 10
"""Examples, of those to choose on, that all candidates are screened on."""
FEW = 24
"""Examples to take gradients on below which their ranking is mostly noise, which is said."""
Saes = Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary]


def find(
    model: LanguageModel,
    sae: Saes,
    wish: Wish | str,
    *,
    neutral: Path | str | None = None,
    run: Path | str | None = None,
    **options: Any,
) -> Found:
    """Find the features that bring a wish about, and prove it on what chose nothing.

    Args:
        model: the model.
        sae: where features are looked for, all at once: one SAE, several that name their sites, or several by site.
        wish: `Texts`, `Contrast`, `Words`, `TaskReward` or `Want`; a text is a `Want`.
        neutral: JSON with neutral prompts, `validation` to choose on and `held_out` to report on.
        run: directory that keeps everything; the same call again goes on from there.
        options: fields of `FindOptions`, such as `budget="KL=0.3"` or `set_size=3`.

    Returns:
        What was found, with its effect, its price, and the alternatives beside it.

    Raises:
        UserError: something of the wish or the options is not allowed, does not fit the model, or there are too few
            examples.
    """
    check_is_model(model)
    chosen = FindOptions(**read_keywords(options, field_types(FindOptions), find))
    wished = Want(text=wish) if isinstance(wish, str) else wish
    if not isinstance(wished, Wish):
        raise UserError(f"the {type(wish).__name__} that is wished for", "it is no wish", "give a text, or Texts(…)")
    saes, prompts = by_site(model, sae), read_neutral_prompts(None if neutral is None else Path(neutral))
    about = {"wish": described(wished), "neutral_prompts": prompts, **config_dict(chosen)}
    with (
        kept_or_temporary(run) as path,
        Run.open(path, COMMAND, about, seeds=[chosen.seed], device=str(model.device)) as opened,
    ):
        found = find_in(opened, model, saes, wished, prompts, chosen, opens_later=run is not None)
    return replace(found, run=None if run is None else Path(path))


def find_in(
    run: Run,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    wish: Wish,
    prompts: Mapping[str, Sequence[str]],
    options: FindOptions,
    *,
    opens_later: bool = True,
) -> Found:
    """`find` in a run that is open, or what it came to if it is done.

    What is for others is written only if somebody `opens_later`: the steering, and what the page shows.
    """
    neutral = {"choice": prompts["validation"], "report": prompts["held_out"]}
    for (name, texts), n in zip(neutral.items(), options.n_neutral, strict=True):
        if len(texts) < n:
            raise UserError(f"n_neutral {n}", f"there are {len(texts)} neutral prompts for the {name}", "lower it")
    hashes = {"model": model.fingerprint, **{f"sae {site}": sae.fingerprint for site, sae in saes.items()}}
    run.record(hashes=hashes, dtype=str(model.dtype).removeprefix("torch."))
    with Meter("finding") as meter, ExitStack() as stack:
        began = time.perf_counter()
        quick = model if run.done else quick_copy(model)
        for one in () if run.done else (model, quick):
            stack.enter_context(one.products.kept())
        if isinstance(wish, Want):
            wish = replace(wish, written=_written(run, wish, quick, meter))
        examples = wish.examples(model)
        splits = divide(_noted(examples, options), options.examples)
        ids = {name: [one.id for one in split.examples] for name, split in splits.items()}
        run.record(hashes={"examples": text_id(" ".join(id_ for split in ids.values() for id_ in split))})
        if not run.done:
            splits["screening"] = splits["choice"].take(range(min(SCREEN, len(splits["choice"]))))
            ground = Ground(
                model=model, quick_model=quick, saes=saes, splits=splits, options=options, meter=meter,
                neutral_prompts={name: neutral[name][:n] for name, n in zip(neutral, options.n_neutral, strict=True)},
            )  # fmt: skip
            run.record(splits=ids, chosen_in=str(quick.dtype).removeprefix("torch."))
            search = Search(ground=ground, seconds={"examples": round(time.perf_counter() - began, 2)})
            choices = search.choices()
            run.open_split("report", ids["report"])
            facts = replace(search.report(choices), about=wish.about)
            vars(ground).pop("quick", None)  # the two hold each other, and it the copy
            named = dict(_named(facts, len(saes)))
            run.record(
                features={one: list(words.promotes) for one, words in named.items()},
                fires_on={one: list(words.fires_on) for one, words in named.items() if words.fires_on},
            )
            run.finish(facts)
    facts = read_typed(FoundFacts, run.results, f"run {run.path}")
    source = _edit_of(facts).source({site: DirectionTable.of(sae) for site, sae in saes.items()})
    found = Found(**{f.name: getattr(facts, f.name) for f in fields(FoundFacts)}, source=source)
    if opens_later and not run.file(WITHIN).exists():
        try:
            steering_of(found, model, prompts["held_out"]).save(run.file(WITHIN))
        except UserError as error:  # removals by an SAE whose codes depend on each other
            run.record(without_steering=error.line)
    if opens_later and not run.file(SHOWN_FILE).exists():
        shown = Shown.of("What was found", found, {"Effect against price": found.draw}, height=3.8)
        write_shown(run, [shown])
    return replace(found, run=run.path)


def _written(run: Run, wish: Want, model: LanguageModel, meter: Meter) -> tuple[WrittenPair, ...]:
    """Texts of a wish in words, which a run keeps."""
    file = run.file(WRITTEN)
    if not file.exists():
        meter.describe("writing texts for the wish")
        write_json(file, json_safe(wish.pairs_by(model, meter.advance)))
    return read_typed(tuple[WrittenPair, ...], read_json(file), str(file))


def _edit_of(facts: FoundFacts) -> SteeringEdit:
    """What was found, as an edit by features."""
    (found,) = [way for way in facts.ways if way.name == FOUND]
    parts = tuple(Part(Site.parse(part.site), part.feature or 0, part.dose) for part in found.parts)
    return SteeringEdit(parts, "ablate" if found.operation == "ablate" else "add")


def _noted(examples: Examples, options: FindOptions) -> Examples:
    """Examples that say how many of them are used, if not all are, and whether they are few."""
    used, notes = sum(options.examples), list(examples.notes)
    if len(examples) > used:
        notes.append(f"{used} of {len(examples)} examples are used at most, which the option examples raises")
    candidates = min(options.examples[0], round(len(examples) * options.examples[0] / used))
    if candidates < FEW:
        notes.append(f"gradients are of {candidates} examples; below {FEW} their ranking is mostly noise")
    return replace(examples, notes=tuple(notes))


def described(wish: Wish) -> dict[str, Any]:
    """A wish as a run records it."""
    facts = {f.name: getattr(wish, f.name) for f in fields(wish) if f.name not in ("written", "task")}
    if hasattr(wish, "task"):
        facts["task"] = wish.task.name  # type: ignore[attr-defined]
    return {"kind": type(wish).__name__, **json_safe(facts)}


def by_site(model: LanguageModel, sae: Saes) -> dict[Site, Dictionary]:
    """SAEs by their sites, lowest first.

    Raises:
        UserError: something is no dictionary, names no site or another than it is given for, does not fit the model, or
            two are of one site.
    """
    pairs: list[tuple[str | None, Dictionary]]
    if isinstance(sae, Mapping):
        pairs = list(sae.items())
    else:
        pairs = [(None, one) for one in (sae if isinstance(sae, Sequence) else [sae])]
    if not pairs:
        raise UserError("the SAEs", "there is none", "give at least one")
    found: dict[Site, Dictionary] = {}
    for name, one in pairs:
        check_is_dictionary(one)
        site = dictionary_site(model, one, name)
        if site in found:
            raise UserError(f"site {site}", "two SAEs are given for it", "give one")
        found[site] = one
    return {site: found[site] for site in sorted(found, key=site_order)}


def _named(facts: FoundFacts, saes: int) -> Iterator[tuple[str, FeatureWords]]:
    """Features that ways steer with, but for random ones, as `trimtab feature --of RUN` reads them: with their sites,
    if there are several SAEs."""
    for way in (way for way in facts.ways if way.name != RANDOM):
        for part in way.parts:
            if part.feature is not None and part.words is not None:
                yield (f"{part.site}:{part.feature}" if saes > 1 else str(part.feature)), part.words
