"""Sentences for circuits: indirect object identification with every attribute known and free to be changed.

The task `ioi` rewards answers; here a prompt is what it is made of, so that its counterfactuals differ from it in one
attribute and in nothing else. All names, places and objects are one token each in the tokenizer at hand, which makes
a prompt and its counterfactuals equally long and says where the names stand (`IO`, `S1`, `S2`, `END`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from trimtab.errors import UserError
from trimtab.runs import split_ids
from trimtab.tasks.ioi_material import GENDERS, NAMES, OBJECTS, PAPER_TEMPLATES, PLACES, TEMPLATES
from trimtab.tasks.task import UnsuitedModelError
from trimtab.tasks.tokens import Tokenizer, encode, token_behind

Pattern = Literal["ABB", "BAB"]
TemplateSet = Literal["paper", "wang", "all"]
ATTRIBUTES = ("IO", "S", "Pos")
TEMPLATE_SETS = {
    "paper": PAPER_TEMPLATES,
    "wang": TEMPLATES,
    "all": tuple(dict.fromkeys((*PAPER_TEMPLATES, *TEMPLATES))),  # one is among both
}
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
HELD_OUT = "held-out-templates"
LEAST_NAMES, MOST_TRIES = 8, 200


@dataclass(frozen=True)
class IOIPrompt:
    """One sentence: two persons, one of whom (or, in `ABC` sentences, a third one) acts at the end."""

    template: str
    first: str
    second: str
    actor: str
    place: str
    object: str

    @property
    def text(self) -> str:
        """The sentence, up to where the name of the indirect object follows."""
        return self.template.format(
            first=self.first, second=self.second, s=self.actor, place=self.place, object=self.object
        )

    @property
    def pattern(self) -> Literal["ABB", "BAB", "ABC"]:
        """`ABB` if the indirect object is named first, `BAB` if second, `ABC` if a third person acts."""
        return "ABB" if self.actor == self.second else "BAB" if self.actor == self.first else "ABC"

    @property
    def attributes(self) -> dict[str, str]:
        """`IO` and `S` (names), `Pos` (the pattern), `IO gender` and `S gender` (F or M, where a name has one).

        Raises:
            ValueError: nobody is named twice.
        """
        if self.pattern == "ABC":
            raise ValueError(f"{self.text!r} has no indirect object: three persons are named")
        io = self.first if self.pattern == "ABB" else self.second
        genders = {f"{role} gender": GENDERS.get(name) for role, name in (("IO", io), ("S", self.actor))}
        return {"IO": io, "S": self.actor, "Pos": self.pattern} | {k: v for k, v in genders.items() if v is not None}

    @property
    def frame(self) -> str:
        """What the attributes leave as it is. Sentences without a place and an object have the names for it."""
        rest = [self.place, self.object] if self.place or self.object else sorted({self.first, self.second, self.actor})
        return "|".join((self.template, *rest))


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as a model reads it."""

    prompt: IOIPrompt
    ids: tuple[int, ...]
    positions: Mapping[str, int]  # of IO, S1, S1+1, S2 and END among the ids
    io_token: int
    s_token: int


@dataclass(frozen=True)
class IOIDistribution:
    """All sentences that a tokenizer can write with one token per name, place and object.

    Splits go by everything but names and their order: train and test share names, never prompts, and the
    counterfactuals of a test prompt are test prompts. (Sentences without place and object go by the names they hold;
    `draw_counterfactual` stays in the split there, too.)
    """

    tokenizer: Tokenizer
    names: tuple[str, ...]
    places: tuple[str, ...]
    objects: tuple[str, ...]
    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    name_token: Mapping[str, int]

    @classmethod
    def load(
        cls,
        tokenizer: Tokenizer,
        templates: str | Sequence[str] = "paper",
        *,
        held_out: Sequence[str] = (),
        names: Sequence[str] = NAMES,
        places: Sequence[str] = PLACES,
        objects: Sequence[str] = OBJECTS,
    ) -> Self:
        """Find what is one token each.

        Args:
            tokenizer: a tokenizer, or a function from text to ids (`model.encode_text`, special tokens included).
            templates: `paper` (the three of Makelov et al. 2024), `wang` (the fifteen of Wang et al. 2022, one of
                them among those three), `all`, or texts with `{first}`, `{second}`, `{s}` and, if they like,
                `{place}` and `{object}`.
            held_out: templates that make up a split of their own.
            names: candidates.
            places: candidates.
            objects: candidates.

        Raises:
            UserError: no such set of templates; a template without its slots; a held-out one that is none of them.
            UnsuitedModelError: too few names, places or objects are one token.
        """
        if isinstance(templates, str):
            if templates not in TEMPLATE_SETS:
                raise UserError(f"templates {templates!r}", f"there are {', '.join(TEMPLATE_SETS)}", "or give texts")
            templates = TEMPLATE_SETS[templates]
        for template in templates:
            missing = [slot for slot in ("first", "second", "s") if template.count(f"{{{slot}}}") != 1]
            if missing:
                raise UserError(f"template {template!r}", f"{{{missing[0]}}} must stand in it once", "write it there")
        unknown = [template for template in held_out if template not in templates]
        if unknown:
            raise UserError(f"held-out template {unknown[0]!r}", "it is none of the templates", "copy its text")
        if len(set(held_out)) == len(set(templates)):
            raise UserError("held-out templates", "all templates are held out", "leave some for the other splits")
        known = _one_token_each(tokenizer, "Then,", names)
        found = {
            "names": tuple(known),
            "places": tuple(_one_token_each(tokenizer, "at the", places)),
            "objects": tuple(_one_token_each(tokenizer, "gave a", objects)),
        }
        for (kind, kept), given in zip(found.items(), (names, places, objects), strict=True):
            least = LEAST_NAMES if kind == "names" else 1
            if len(kept) < least:
                raise UnsuitedModelError(
                    f"IOI {kind}",
                    f"{len(kept)} of {len(given)} are one token for this tokenizer, at least {least} are needed",
                    "give others, or choose another model",
                )
        return cls(tokenizer, **found, templates=tuple(templates), held_out=tuple(held_out), name_token=known)

    def split_of(self, prompt: IOIPrompt) -> str:
        """`train`, `validation`, `test`, or `held-out-templates`."""
        if prompt.template in self.held_out:
            return HELD_OUT
        return next(split for split, ids in split_ids([prompt.frame], SHARES, "ioi-frames").items() if ids)

    def prompts(
        self, n: int, split: str = "train", *, seed: int = 0, patterns: Sequence[Pattern] = ("ABB", "BAB")
    ) -> list[IOIPrompt]:
        """Different prompts of a split, in an order that the seed fixes; fewer are the first of more.

        Args:
            n: how many.
            split: `train`, `validation`, `test` or `held-out-templates`.
            seed: of the draws.
            patterns: taken in turn, so that each makes up the same share.

        Raises:
            UserError: no such split, or it has fewer prompts.
        """
        splits = (*SHARES, *([HELD_OUT] if self.held_out else []))
        if split not in splits:
            raise UserError(f"split {split!r}", f"there are {', '.join(splits)}", "choose one of them")
        rng = random.Random(f"ioi-prompts/{seed}/{split}")
        return self._different(n, split, rng, self.held_out if split == HELD_OUT else self.templates, patterns)

    def three_persons(self, template: str, n: int, *, seed: int = 0) -> list[IOIPrompt]:
        """Different `ABC` sentences of a template, in an order that the seed fixes; fewer are the first of more.

        They are of the train split, or of the held-out one if the template is.

        Args:
            template: one of `templates`.
            n: how many.
            seed: of the draws.

        Raises:
            UserError: there are fewer.
        """
        rng = random.Random(f"ioi-three-persons/{seed}/{template}")
        return self._different(n, HELD_OUT if template in self.held_out else "train", rng, [template], ["ABC"])

    def _different(
        self, n: int, split: str, rng: random.Random, templates: Sequence[str], patterns: Sequence[str]
    ) -> list[IOIPrompt]:
        chosen: dict[IOIPrompt, None] = {}
        draws, missed = self._draws(rng, templates, patterns, chosen), 0
        while len(chosen) < n and missed < MOST_TRIES * max(len(chosen), 10):
            prompt = next(draws)
            new = self.split_of(prompt) == split and prompt not in chosen
            missed = 0 if new else missed + 1
            if new:
                chosen[prompt] = None
        if len(chosen) < n:
            raise UserError(f"{n} prompts", f"split {split} gave {len(chosen)} different ones", "ask for fewer")
        return list(chosen)

    def _draws(
        self,
        rng: random.Random,
        templates: Sequence[str],
        patterns: Sequence[str],
        chosen: Mapping[IOIPrompt, None],
    ) -> Iterator[IOIPrompt]:
        while True:
            first, second = rng.sample(self.names, 2)
            pattern = patterns[len(chosen) % len(patterns)]
            actor = second if pattern == "ABB" else first
            if pattern == "ABC":
                actor = rng.choice([name for name in self.names if name not in (first, second)])
            template, place, thing = rng.choice(templates), rng.choice(self.places), rng.choice(self.objects)
            # A slot that a template lacks holds nothing, or one sentence would be many prompts.
            place, thing = place if "{place}" in template else "", thing if "{object}" in template else ""
            yield IOIPrompt(template, first, second, actor, place, thing)

    def counterfactual(self, prompt: IOIPrompt, changes: Mapping[str, str]) -> IOIPrompt:
        """The prompt that differs in these attributes and in nothing else.

        Args:
            prompt: with an indirect object.
            changes: new values of `IO`, `S` (names) or `Pos` (`ABB`, `BAB`).

        Raises:
            UserError: an attribute that cannot be set, a name that is not one of `names`, or the same one twice.
        """
        old = prompt.attributes
        for attribute, value in changes.items():
            if attribute not in ATTRIBUTES:
                hint = (
                    "change IO or S to a name of that gender" if "gender" in attribute.lower() else "choose one of them"
                )
                raise UserError(f"attribute {attribute!r}", f"{', '.join(ATTRIBUTES)} can be changed", hint)
            if attribute == "Pos" and value not in ("ABB", "BAB"):
                raise UserError(f"Pos {value!r}", "it is ABB (indirect object first) or BAB", "choose one of them")
            if attribute != "Pos" and value not in self.name_token:
                raise UserError(f"{attribute} {value!r}", "it is not a name of one token here", "choose one of `names`")
        new = {attribute: changes.get(attribute, old[attribute]) for attribute in ATTRIBUTES}
        if new["IO"] == new["S"]:
            raise UserError(f"IO and S {new['S']!r}", "two persons have two names", "choose another name")
        first, second = (new["IO"], new["S"]) if new["Pos"] == "ABB" else (new["S"], new["IO"])
        return replace(prompt, first=first, second=second, actor=new["S"])

    def draw_counterfactual(self, prompt: IOIPrompt, attribute: str, *, seed: int = 0) -> IOIPrompt:
        """A counterfactual in one attribute: another name at random, or the other order.

        It is of the prompt's split, unless so few names are known that a sentence without place and object has none.

        Raises:
            UserError: an attribute that cannot be changed.
        """
        if attribute == "Pos":
            return self.counterfactual(prompt, {"Pos": "BAB" if prompt.pattern == "ABB" else "ABB"})
        others = [name for name in self.names if name not in (prompt.first, prompt.second)]
        random.Random(f"ioi-counterfactual/{seed}/{attribute}/{prompt.text}").shuffle(others)
        changed = [self.counterfactual(prompt, {attribute: name}) for name in others]
        return next((one for one in changed if self.split_of(one) == self.split_of(prompt)), changed[0])

    def without_repeat(self, prompt: IOIPrompt, *, seed: int = 0) -> IOIPrompt:
        """The `ABC` sentence: all three persons are others, at random, so that nothing says who receives."""
        others = [name for name in self.names if name not in (prompt.first, prompt.second, prompt.actor)]
        first, second, actor = random.Random(f"ioi-abc/{seed}/{prompt.text}").sample(others, 3)
        return replace(prompt, first=first, second=second, actor=actor)

    def tokenise(self, prompt: IOIPrompt) -> TokenisedPrompt:
        """Token ids, and where the names stand: `S1+1` is behind S1, `END` the last token.

        In an `ABC` sentence IO and S1 are the first and second name.

        Raises:
            UserError: the tokenizer joins a name with what stands beside it.
        """
        ids = tuple(encode(self.tokenizer, prompt.text))
        roles = (prompt.first, prompt.second, prompt.actor)
        io, s = (prompt.second, prompt.first) if prompt.pattern == "BAB" else (prompt.first, prompt.second)
        places = {name: [i for i, token in enumerate(ids) if token == self.name_token[name]] for name in {*roles}}
        if any(len(found) != roles.count(name) for name, found in places.items()):
            raise UserError(f"prompt {prompt.text!r}", "a name in it is not one token by itself", "use other templates")
        first, second = places[s][0], places[prompt.actor][-1]
        positions = {"IO": places[io][0], "S1": first, "S1+1": first + 1, "S2": second, "END": len(ids) - 1}
        return TokenisedPrompt(prompt, ids, positions, self.name_token[io], self.name_token[s])


def _one_token_each(tokenizer: Tokenizer, context: str, words: Sequence[str]) -> dict[str, int]:
    """The words that are one token behind a context, and not the same one, as words are that a tokenizer lacks."""
    tokens = {word: token_behind(tokenizer, context, f" {word}") for word in words}
    times = Counter(tokens.values())
    return {word: token for word, token in tokens.items() if token is not None and times[token] == 1}
