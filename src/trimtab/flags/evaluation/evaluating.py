"""Evaluate finetunings with flags: every part of every moment is measured once, kept, and compared at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.activations import Document, as_documents, read_documents, sample_text, tokenise
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Dictionary
from trimtab.evaluation.documents import pack
from trimtab.flags.config import FlagTraining
from trimtab.flags.dividing import Divided
from trimtab.flags.evaluation.control import OTHER_WAYS, measure_control
from trimtab.flags.evaluation.control_judging import JudgesConcepts, TextReader
from trimtab.flags.evaluation.control_result import FlagControl
from trimtab.flags.evaluation.effects import effects_result
from trimtab.flags.evaluation.erosion import check_layer, erosion_result, probed_layers
from trimtab.flags.evaluation.evaluated_runs import PLAIN, EvaluatedRun, State, check_alike, plain_of, unlike_plain
from trimtab.flags.evaluation.measured import Moment, Part, Series, read_part, write_part
from trimtab.flags.evaluation.measured_model import MeasuredModel, MeasuredOn
from trimtab.flags.evaluation.options import FlagEvaluationOptions, MomentPart, PartName, without_judge
from trimtab.flags.evaluation.price import GeneralText, price_result
from trimtab.flags.evaluation.reading import reading_result
from trimtab.flags.evaluation.reliance import reliance_result
from trimtab.flags.evaluation.result import FlagEvaluation, PartSeconds, RunControl
from trimtab.flags.evaluation.texts import evaluation_texts
from trimtab.flags.examples import Example
from trimtab.flags.result import TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.lm import LanguageModel
from trimtab.lm.model import check_is_model
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
)
from trimtab.runs.shown import write_shown
from trimtab.stats import Resamples
from trimtab.tasks import Task, load_task
from trimtab.tasks.task import UnsuitedModelError

COMMAND = "flags evaluate"
PARTS_DIRECTORY = "parts"
TASK = "ioi"
"""The unrelated task."""
MEASURED = {"reliance": 2, OTHER_WAYS: 2}
"""Version of what a part measures, 1 elsewhere: what was measured by an earlier one is measured anew."""
MAY_CHANGE = ("part", "batch_size")
"""Options that change no number: what was measured stays."""


def evaluate_flags(
    original: LanguageModel,
    trained: TrainedFlags | Sequence[TrainedFlags] | Mapping[str, TrainedFlags],
    examples: Sequence[Example],
    *,
    trained_on: Sequence[Example] = (),
    texts: Iterable[str | Document] | None = None,
    task: str | Task | None = TASK,
    judge: JudgesConcepts | None = None,
    dictionary: Dictionary | None = None,
    descriptions: Mapping[str, str] | None = None,
    chat: bool | None = None,
    run: Path | str | None = None,
    **options: Any,
) -> FlagEvaluation:
    """What finetunings with flags did: what their flags say, what else still says it, what is lost without, the price.

    Args:
        original: the model before it was finetuned.
        trained: finetunings of it with flags for the same concepts; a dict gives them names.
        examples: labelled ones that none of them was trained on. A third of their documents or prompts is reported, and
            probes are fitted on the others.
        trained_on: those that they were trained on, for other ways of control, which are left out without them.
        texts: general text for the price; by default a sample that ships with trimtab.
        task: an unrelated task for the price, or its name; None for none.
        judge: finds concepts in texts, for control. It must not know texts that a model was trained on.
        dictionary: an SAE of the original, for control.
        descriptions: what each concept is in words, for prompts that ask for it.
        chat: as in `FlagTraining`; as in the first finetuning by default.
        run: directory that keeps what was measured; the same call again goes on from there, and measures anew what is
            made from something else.
        options: fields of `FlagEvaluationOptions`.

    Raises:
        UserError: the finetunings are of different concepts or widths, too few examples have or lack a concept, or
            control is asked for without a judge.
    """
    check_is_model(original)
    chosen = FlagEvaluationOptions(**read_keywords(options, field_types(FlagEvaluationOptions), evaluate_flags))
    if not isinstance(trained, Mapping):
        several = [trained] if isinstance(trained, TrainedFlags) else list(trained)
        pairs = [(f"{one.result.curriculum}, seed {one.result.seed}", one) for one in several]
    else:
        pairs = list(trained.items())
    runs = [EvaluatedRun.of(one, name, trained_on) for name, one in pairs]
    chat = any(one.result.chat for _, one in pairs[:1]) if chat is None else chat
    config = {**config_dict(chosen), "chat": chat, "runs": [name for name, _ in pairs]}
    with (
        kept_or_temporary(run) as path,
        Run.open(path, COMMAND, config, device=str(original.device), ignore_fields=(*MAY_CHANGE, "runs")) as opened,
    ):
        evaluator = Evaluator(
            original, runs, examples, chosen, opened, texts=texts, task=task, chat=chat,
            judge=judge, dictionary=dictionary, descriptions=descriptions,
        )  # fmt: skip
        return evaluator.finish()


class Evaluator:
    """Measures runs, keeping each part of each moment in a run of its own, and compares them.

    Args:
        original: the model before it was finetuned.
        runs: finetunings of it.
        examples: that none was trained on.
        options: what to measure.
        run: keeps what was measured.
        texts, task, judge, dictionary, descriptions, chat: as in `evaluate_flags`.
        max_tokens: of an example, unless options say.
        labels_known: whether the examples' labels say how good the judge is; not where a judge or rule made them.

    Raises:
        UserError: as `evaluate_flags` says.
    """

    def __init__(
        self,
        original: LanguageModel,
        runs: Sequence[EvaluatedRun],
        examples: Sequence[Example],
        options: FlagEvaluationOptions,
        run: Run,
        *,
        texts: Iterable[str | Document] | None = None,
        task: str | Task | None = TASK,
        judge: JudgesConcepts | None = None,
        dictionary: Dictionary | None = None,
        descriptions: Mapping[str, str] | None = None,
        chat: bool = False,
        max_tokens: int = FlagTraining.max_tokens,
        labels_known: bool = True,
    ) -> None:
        check_alike(runs)
        self.original, self.runs, self.options, self.run = original, runs, options, run
        self.notes = unlike_plain(runs)
        self.judge, self.dictionary, self.descriptions, self.chat = judge, dictionary, descriptions, chat
        self.parts: tuple[MomentPart, ...] = tuple(part for part in options.part if part != "control")
        if "control" in options.part and judge is None:
            self.notes.append(without_judge(options.part))
        self._seconds: list[PartSeconds] = []
        flags, self.max_tokens = runs[0].flags, options.max_tokens or max_tokens
        self.first_layer = max(one.flags.first_layer for one in runs)
        for one in runs:
            one.flags.check_fits(original.layout, original.d_model, original.name)
        divided = evaluation_texts(
            original, flags, examples, fit_items=options.fit_items, items=options.items, chat=chat,
            max_tokens=self.max_tokens,
        )  # fmt: skip
        self._judged_on = [*divided.fitted.examples, *divided.reported.examples] if labels_known else []
        text, prompts, read = None, None, list[str]()
        if "price" in options.part:
            documents = list(read_documents([sample_text()]) if texts is None else as_documents(texts))
            packed = pack(tokenise(documents, original.tokenizer), "all", 0.0, options.context, original)
            text = GeneralText(original, packed, options.text_tokens, options.batch_size)
            prompts = self._task_prompts(task)
            read = [text_id("\0".join(one.text for one in documents)), prompts.digest() if prompts else ""]
        given = options.effect_layer
        self.on = MeasuredOn(
            texts=divided, text=text, task=prompts, layers=probed_layers(original, self.first_layer, options.layer),
            effect_layer=check_layer(original, original.n_layers // 2 if given is None else given), options=options,
            original=original, first_layer=self.first_layer,
        )  # fmt: skip
        self._made_from = {part: [_hash(examples), chat, self.max_tokens, self.first_layer] for part in self.parts}
        self._made_from |= {"price": read}
        run.record(hashes={"model": original.fingerprint, "data": _hash(examples)})

    def _task_prompts(self, given: str | Task | None) -> TaskPrompts | None:
        if given is None:
            return None
        try:
            found = load_task(given, tokenizer=self.original.tokenizer) if isinstance(given, str) else given
        except UnsuitedModelError as error:
            self.notes.append(f"the unrelated task is left out: {error.line}")
            return None
        items = found.sample("test", self.options.task_items)
        return TaskPrompts.of(self.original, found, items, options_only=found.options_only)

    def finish(self) -> FlagEvaluation:
        """Measure what is left, compare, and close the run with its page's sections."""
        found = self.result()
        write_shown(self.run, found.shown())
        self.run.finish(found)
        return found

    def result(self) -> FlagEvaluation:
        """Measure what is left to measure, and compare."""
        options, on = self.options, self.on
        measured: dict[tuple[str, int], dict[MomentPart, Part]] = {}
        specs = {_spec_id(one.flags): one.flags for one in self.runs}
        models = len(specs) + sum(len(one.states) for one in self.runs)
        with Meter("evaluating", models * (1 + len(self.parts))) as meter:
            for id_, flags in specs.items():
                moment = Moment(run="original", curriculum="", seed=0, step=0, tokens=0)
                state = State(0, 0, self.original.fingerprint, lambda: self.original)
                measured[id_, 0] = self._parts(f"original-{id_}", moment, flags, state, meter)
            for one in self.runs:
                measured[one.label, 0] = measured[_spec_id(one.flags), 0]
                for state in one.states:
                    measured[one.label, state.step] = self._parts(one.label, one.moment(state), one.flags, state, meter)

        def series(part: MomentPart) -> list[Series]:
            found: list[Series] = []
            for one in self.runs:
                plain = plain_of(one, self.runs)
                beside = {} if plain is None else {s.step: measured[plain.label, s.step][part] for s in plain.states}
                parts = [measured[one.label, step][part] for step in (0, *(state.step for state in one.states))]
                found.append(Series([one.beginning, *map(one.moment, one.states)], parts, beside))
            return found

        reported = on.texts.reported
        resamples = _resamples(reported.unit, options)
        few = _resamples(reported.first(options.reliance_items).unit, options)
        flags = {one.label: one.flags for one in self.runs}
        task = on.task.task.name if on.task else ""
        of: dict[MomentPart, Callable[[list[Series]], Any]] = {
            "reading": lambda found: reading_result(found, reported, flags, resamples, self.descriptions),
            "erosion": lambda found: erosion_result(found, reported, resamples, self.first_layer),
            "effects": lambda found: effects_result(
                found, reported, resamples, layer=on.effect_layer, dose=options.dose
            ),
            "reliance": lambda found: reliance_result(found, few),
            "price": lambda found: price_result(found, task, n_resamples=options.n_resamples, seed=options.seed),
        }
        return FlagEvaluation(
            model=self.original.name,
            concepts=self.runs[0].flags.concepts,
            runs=tuple(one.label for one in self.runs),
            fitted=len(on.texts.fitted),
            reported=len(reported),
            unit=on.texts.unit,
            **{part: result(series(part)) if part in self.parts else None for part, result in of.items()},
            controls=self._controls(),
            seconds=tuple(self._seconds),
            notes=tuple(self.notes),
        )  # fmt: skip

    def _controls(self) -> tuple[RunControl, ...]:
        """What switches decide at the end of each run, read back or measured."""
        if self.judge is None or "control" not in self.options.part:
            return ()
        reader = TextReader(self.judge, self.runs[0].flags.concepts)
        on = self.on.texts
        common = [
            reader.identity([*on.fitted.examples, *on.reported.examples]), _hash(self._judged_on),
            json_safe(self.descriptions), None if self.dictionary is None else self.dictionary.fingerprint,
            self.chat, self.max_tokens,
        ]  # fmt: skip
        found: list[RunControl] = []
        for one in self.runs:
            state, compared = one.states[-1], self.options.compared if one.curriculum != PLAIN else 0
            plain = plain_of(one, self.runs) if compared else None
            beside = None if plain is None else plain.states[-1]
            made_from = [*common, beside and beside.identity, _hash(one.examples)]
            made_from += [MEASURED[OTHER_WAYS]] if compared else []
            file = self._file(one.label, state, "control", "json", one.flags, made_from)
            kept = read_json(file)
            if kept is None:
                began = time.perf_counter()
                control = self._control(one, compared, state.load(), None if beside is None else beside.load())
                kept = json_safe({"seconds": time.perf_counter() - began, "result": control})
                write_json(file, kept)
            found.append(RunControl(run=one.label, control=read_typed(FlagControl, kept["result"], f"file {file}")))
            self._seconds.append(PartSeconds(moment=one.moment(state), part="control", seconds=kept["seconds"]))
        return tuple(found)

    def _control(
        self, one: EvaluatedRun, compared: int, model: LanguageModel, plain: LanguageModel | None
    ) -> FlagControl:
        """The switchboard, beside other ways of control unless the run is a plain one."""
        options = self.options
        assert self.judge is not None
        found = measure_control(
            model, one.flags, self.judge, original=self.original, examples=one.examples, plain=plain,
            dictionary=self.dictionary, heldout=self._judged_on, descriptions=self.descriptions,
            samples=options.samples, max_new_tokens=options.text_length, max_tokens=self.max_tokens, chat=self.chat,
            seed=options.seed, compared=compared,
        )  # fmt: skip
        if one.curriculum == PLAIN:
            found = replace(found, missing={OTHER_WAYS: "a plain run has no flags to compare them with"})
        return found

    def _file(
        self, label: str, state: State, part: PartName, suffix: str, flags: FlagSpec, made_from: Sequence[Any]
    ) -> Path:
        """What a part of one model is kept in; its name has a digest of what is measured and of all that it is made
        from, options aside, which are the run's."""
        facts = [label, state.identity, flags, MEASURED.get(part, 1), *made_from]
        digest = text_id(json.dumps(json_safe(facts), sort_keys=True))
        place = self.run.file(PARTS_DIRECTORY) / label.replace("/", "-")
        file = place / f"{state.step}-{part}-{digest}.{suffix}"
        if not file.exists() and any(place.glob(f"{state.step}-{part}-*")):
            changed = (
                "model, examples, judge, descriptions, plain run, SAE, text or task, or by another version of trimtab"
            )
            self.notes.append(f"{part} of {label}, step {state.step:,}, is measured anew: it was of another {changed}")
        return file

    def _parts(self, name: str, moment: Moment, flags: FlagSpec, state: State, meter: Meter) -> dict[MomentPart, Part]:
        """Every part of one model, read back or measured."""
        found: dict[MomentPart, Part] = {}
        measured: MeasuredModel | None = None
        for part in self.parts:
            file = self._file(name, state, part, "parquet", flags, self._made_from[part])
            kept = read_part(file)
            if kept is None:
                if measured is None:
                    meter.describe(f"loading {moment.run}, step {moment.step:,}")
                    measured = MeasuredModel(state.load(), flags, self.on, meter)
                meter.describe(f"{moment.run}, step {moment.step:,}: {part}")
                began = time.perf_counter()
                rows = measured.measure(part)
                kept = Part(rows, time.perf_counter() - began)
                write_part(file, kept)
            else:
                meter.advance(1)
            found[part] = kept
            self._seconds.append(PartSeconds(moment=moment, part=part, seconds=kept.seconds))
        return found


def _resamples(unit: NDArray[np.str_], options: FlagEvaluationOptions) -> Resamples:
    return Resamples(unit, n_resamples=options.n_resamples, seed=options.seed)


def _spec_id(flags: FlagSpec) -> str:
    return text_id(json.dumps(json_safe(flags), sort_keys=True))[:6]


def _hash(examples: Sequence[Example]) -> str:
    """Of texts, labels, and what they are divided by."""
    return text_id(json.dumps([Divided(list(examples), []).hash, [one.unit for one in examples]]))
