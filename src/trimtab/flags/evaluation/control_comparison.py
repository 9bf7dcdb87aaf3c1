"""Flags beside other ways of control for one concept after another: chosen on validation, matched, written, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import Any, NamedTuple

from trimtab.control import Answers, ItemSet, Setting, TaskPrompts
from trimtab.control.answers import mean_kl
from trimtab.control.arms.prompting import instructed
from trimtab.control.dose_search import TRIES, match_kl
from trimtab.flags.evaluation.control_fit import Fitted
from trimtab.flags.evaluation.control_prompts import AGAINST, INSTRUCTIONS
from trimtab.flags.evaluation.control_task import ConceptTask
from trimtab.flags.evaluation.control_texts import (
    ASKED,
    CONFLICT,
    FREE,
    NEUTRAL,
    OFF,
    ON,
    Condition,
    Texts,
    Writer,
    Written,
)
from trimtab.flags.evaluation.control_ways import LEFT, Way, best_direction, best_feature, best_prompting
from trimtab.flags.evaluation.options import ControlOptions
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import SwitchedRows
from trimtab.lm import LanguageModel
from trimtab.runs import Meter

FLAGS_ON, FLAGS_OFF, FLAGS_FREE = "flags on", "flags off", "flags free"
UNSTEERED, FINETUNED, UNASSIGNED = "unsteered", "finetuned", "unassigned dimensions"
MEAN_DIFFERENCE, SAE_FEATURE = "mean difference", "SAE feature"
PROMPTING, FINETUNED_PROMPTING = "prompting", "finetuned, prompting"
STEERED = (MEAN_DIFFERENCE, SAE_FEATURE)
"""Ways that have a dose."""
REFERENCES: Mapping[str, str] = {NEUTRAL: FLAGS_ON, ASKED: FLAGS_OFF, CONFLICT: FLAGS_ON}
"""What others are compared with, by the kind of prompts."""
TOLERANCE = 0.1
"""Relative difference of mean divergences that counts as equal."""


class Key(NamedTuple):
    """Names what one way of control wrote."""

    prompts: str
    """Kind of prompts."""
    way: str
    scale: float | None = None
    """For the frontier: times on, or times its dose."""


class ComparedConcept(NamedTuple):
    """One concept's ways of control."""

    column: int
    """Number of the concept."""
    written: dict[Key, Written]
    chosen: dict[str, Mapping[str, Any]]
    """How each way was chosen, and scaled to equal KL."""
    missing: dict[str, str]


class Comparing(NamedTuple):
    """What all concepts' comparisons share."""

    model: LanguageModel
    """With flags."""
    flags: FlagSpec
    plain: LanguageModel | None
    """Finetuned on the same examples without flags."""
    elsewhere: Sequence[FlagSpec]
    """Dimensions that are no flag's, in several draws."""
    setting: Setting
    """Of the original model."""
    fitted: Fitted
    writer: Writer
    board: Texts
    """Of the model with flags."""
    words: Mapping[str, str]
    """What the concepts are in words."""
    validation: Sequence[str]
    test: Sequence[str]
    asking: Mapping[str, Sequence[str]]
    """Prompts that ask for each concept."""
    options: ControlOptions

    def compare(self, concepts: Sequence[str]) -> dict[str, ComparedConcept]:
        """Compare all ways of control for each of some concepts."""
        chosen = len(self.options.dose) * len(self.fitted.directions[concepts[0]]) // 3 + 2 * LEFT + TRIES + 4
        reported = len(self.elsewhere) + 4 + 2 * len(self.options.strength)
        most = len(self.validation) * chosen + len(self.test) * reported
        with Meter("comparing ways of control", most * len(concepts)) as meter:
            every = self._replace(
                setting=replace(self.setting, meter=meter), writer=self.writer._replace(progress=meter.advance)
            )
            asked = list(dict.fromkeys(name for concept in concepts for name in (concept, self.other(concept))))
            others = {UNSTEERED: every.left_alone(self.setting.model, asked)}
            if self.plain is not None:
                others[FINETUNED] = every.left_alone(self.plain, asked)
            return {concept: every.compare_for(concept, others) for concept in concepts}

    def left_alone(self, model: LanguageModel, asked: Sequence[str]) -> Texts:
        """What a model writes on neutral prompts and on those that ask for some concepts."""
        near = [Condition(NEUTRAL, "", FREE, {}, self.test)]
        far = [Condition(ASKED, concept, FREE, {}, self.asking[concept]) for concept in asked]
        found = self.writer.write(model, self.flags, near, kl_to=self.setting.model)
        return found | self.writer.write(model, self.flags, far)

    def other(self, concept: str) -> str:
        """The concept that conflicting prompts ask for while this one is wanted; itself where there is no other."""
        return self.flags.concepts[self.flags.index(concept) - 1]

    def items(self, concept: str, texts: Sequence[str]) -> ItemSet:
        """Texts as prompts of the task to write about a concept."""
        task = ConceptTask(
            {"test": texts}, concept, self.writer.reader, chat=self.options.chat,
            max_new_tokens=self.options.max_new_tokens,
            instructions=[text.format(self.words[concept]) for text in INSTRUCTIONS],
        )  # fmt: skip
        return ItemSet.of(self.setting, TaskPrompts.of(self.setting.model, task, task.items("test")))

    def compare_for(self, concept: str, others: Mapping[str, Texts]) -> ComparedConcept:
        """Choose on validation, match flags' divergence there, and write on the prompts that are reported.

        Args:
            concept: which.
            others: texts of models that are left alone, by label.
        """
        items, test, reader = self.items(concept, self.validation), self.items(concept, self.test), self.writer.reader
        ways = self._ways(concept, items)
        written = self._left_alone(concept, others)
        written |= {Key(NEUTRAL, name): Written.of(reader, [way.answer(test, 1.0)]) for name, way in ways.items()}
        written[Key(NEUTRAL, UNASSIGNED)] = self._elsewhere(concept, test)
        chosen, missing = {name: way.chosen for name, way in ways.items()}, dict[str, str]()
        target = mean_kl([self._flags_at(items, concept, 1.0)]) if self.options.equal_kl else 0.0
        for name in (name for name in STEERED if name in ways and self.options.equal_kl):
            label, answer = f"{name} at equal kl", ways[name].answer
            if target > 0:
                found = match_kl(lambda scale: mean_kl([answer(items, scale)]), target, tolerance=TOLERANCE)  # noqa: B023
                chosen[label] = {**ways[name].chosen, **asdict(found)}
                written[Key(NEUTRAL, label)] = Written.of(reader, [answer(test, found.scale)])
            else:
                missing[label] = "flags on change no distribution on validation"
        written |= self._asked(concept, ways) | self._frontier(concept, test, ways, written)
        return ComparedConcept(self.flags.index(concept), written, chosen, missing)

    def _ways(self, concept: str, items: ItemSet) -> dict[str, Way]:
        """Every way of control that is chosen for a concept."""
        found = {MEAN_DIFFERENCE: best_direction(items, self.fitted.directions[concept], self.options.dose)}
        if self.setting.dictionary is not None:
            found[SAE_FEATURE] = best_feature(items, {"correlated with the label": self.fitted.features[concept]})
        found[PROMPTING] = best_prompting(items)
        if self.plain is not None:
            found[FINETUNED_PROMPTING] = best_prompting(items, self.plain)
        return found

    def _flags_at(self, items: ItemSet, concept: str, strength: float) -> Answers:
        return items.answer(SwitchedRows(self.flags, [{concept: strength}]), model=self.model, kl=True)

    def _elsewhere(self, concept: str, test: ItemSet) -> Written:
        """As many dimensions that are no flag's, set as on sets flags; other ones in each draw."""
        sources = [SwitchedRows(dims, [{concept: True}]) for dims in self.elsewhere]
        answers = [test.answer(source, model=self.model, kl=True) for source in sources]
        return Written.of(self.writer.reader, answers, mean(source.relative_dose() for source in sources))

    def _left_alone(self, concept: str, others: Mapping[str, Texts]) -> dict[Key, Written]:
        """What the switchboard and the models that are left alone have for a concept."""
        board, other, alone = self.board, self.other(concept), {FLAGS_FREE: self.board, **others}
        found = {
            Key(NEUTRAL, FLAGS_ON): board[NEUTRAL, concept, ON],
            Key(NEUTRAL, FLAGS_OFF): board[NEUTRAL, concept, OFF],
            Key(ASKED, FLAGS_OFF): board[ASKED, concept, OFF],
        }
        found |= {Key(NEUTRAL, label): texts[NEUTRAL, "", FREE] for label, texts in alone.items()}
        found |= {Key(ASKED, label): texts[ASKED, concept, FREE] for label, texts in alone.items()}
        if other != concept:
            found[Key(CONFLICT, FLAGS_ON)] = board[CONFLICT, other, OFF]
            found |= {Key(CONFLICT, label): texts[ASKED, other, FREE] for label, texts in alone.items()}
        return found

    def _asked(self, concept: str, ways: Mapping[str, Way]) -> dict[Key, Written]:
        """What each way writes that is to keep a concept away that is asked for, or to bring it about while another one
        is."""
        items, other = self.items(concept, self.asking[concept]), self.other(concept)
        against = instructed(items, AGAINST.format(self.words[concept]))
        answers = {
            Key(ASKED, f"{name}, subtracted"): way.answer(items, -1.0) for name, way in ways.items() if name in STEERED
        }
        answers[Key(ASKED, PROMPTING)] = items.answer(prompts=against)
        if self.plain is not None:
            answers[Key(ASKED, FINETUNED_PROMPTING)] = items.answer(prompts=against, model=self.plain)
        if other != concept:
            items = self.items(concept, self.asking[other])
            answers |= {Key(CONFLICT, name): way.answer(items, 1.0) for name, way in ways.items()}
        return {key: Written.of(self.writer.reader, [one]) for key, one in answers.items()}

    def _frontier(
        self, concept: str, test: ItemSet, ways: Mapping[str, Way], written: Mapping[Key, Written]
    ) -> dict[Key, Written]:
        """Flags and ways that have a dose at several strengths."""
        found: dict[Key, Written] = {}
        for name, nothing in ((FLAGS_ON, FLAGS_OFF), *((name, UNSTEERED) for name in STEERED if name in ways)):
            known = {0.0: written[Key(NEUTRAL, nothing)], 1.0: written[Key(NEUTRAL, name)]}
            for scale in self.options.strength:
                if scale not in known:
                    at = self._flags_at(test, concept, scale) if name == FLAGS_ON else ways[name].answer(test, scale)
                    known[scale] = Written.of(self.writer.reader, [at])
                found[Key(NEUTRAL, name, scale)] = known[scale]
        return found
