"""All about one feature: where it fires, what it promotes, its neighbours, and what a dose of it does to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, overload

import torch

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.dictionaries.feature_examples import FeatureExamples, FeatureWindows, Window
from trimtab.dictionaries.meanings import TOKENS, FeatureWords, describe_features
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel
from trimtab.lm.logit_lens import logit_lens, token_texts
from trimtab.lm.model import check_is_model
from trimtab.runs import check_least, field_types, known_arguments, read_keywords, whole_numbers
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, SHARE, Column, Table
from trimtab.selection.criterion import NEUTRAL_PREFIX
from trimtab.selection.ranking import dictionary_site
from trimtab.steering import steer
from trimtab.steering.doses import DEFAULT_DOSE

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPTS = (NEUTRAL_PREFIX, "Yesterday I went to the", "The most important thing is")
"""What is continued unless prompts are given: texts that say little of what comes."""


@known_arguments
@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What is looked at of a feature."""

    prompt: tuple[str, ...] = PROMPTS
    """Texts to continue with the feature and without."""
    dose: tuple[float, ...] = (DEFAULT_DOSE / 2, DEFAULT_DOSE)
    """Doses to continue them at, relative to the activation's norm; below 0 against the feature."""
    tokens: int = 10
    """Tokens promoted and suppressed."""
    neighbours: int = 8
    """Features with the nearest decoder rows."""

    def __post_init__(self) -> None:
        check_least(self, 1, "tokens")
        check_least(self, 0, "neighbours")


@dataclass(frozen=True, kw_only=True)
class LensToken:
    """A token that a direction stands for."""

    token: str
    probability: float
    """In softmax(head(final norm(direction)))."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A feature with a decoder row in nearly the same direction."""

    feature: int
    cosine: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A text with and without the feature, by the same draws."""

    prompt: str
    dose: float
    unsteered: str
    steered: str
    kl: float | None
    """Mean over the steered text's tokens of KL(steered ‖ unsteered), in nats; None where there is no token."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureProfile(Result):
    """One feature."""

    feature: int
    sae: str
    model: str
    site: str
    words: FeatureWords
    firing_rate: float | None
    """Share of the statistics' tokens; None without statistics."""
    max_activation: float | None
    """Largest activation over them, f·‖W_dec‖."""
    stats_tokens: int
    """Tokens of the statistics; 0 without."""
    n_tokens: int
    """Tokens of the examples; 0 without."""
    windows: tuple[Window, ...]
    """Where it fires."""
    promoted: tuple[LensToken, ...]
    """Tokens that the logit lens reads in its direction; none outside of the residual stream."""
    suppressed: tuple[LensToken, ...]
    """Those that it reads in the opposite direction."""
    neighbours: tuple[Neighbour, ...]
    effects: tuple[Effect, ...]

    @property
    def firing(self) -> str:
        """How often it fires, in words."""
        rate, tokens = self.firing_rate, self.stats_tokens
        if rate is None:
            known = "no statistics (trimtab sae stats makes them)"
        elif rate:
            known = (
                f"fires on {rate:.3%} of {tokens:,} tokens of the statistics, at most {self.max_activation:.3g} there"
            )
        else:
            known = f"never fired on the {tokens:,} tokens of the statistics"
        if not self.n_tokens:
            return f"{known}; no examples (trimtab examples makes them)"
        return known if self.windows else f"{known}; never fired on the {self.n_tokens:,} tokens of the examples"

    def headline(self) -> str:
        words = f": {self.words}" if str(self.words) else ""
        return f"feature {self.feature} of {self.sae} at {self.site} of {self.model}{words}; {self.firing}"

    def tables(self) -> dict[str, Table]:
        """Where it fires, the tokens that it stands for, neighbours, texts."""
        windows = FeatureWindows(feature=self.feature, n_tokens=self.n_tokens, windows=self.windows).tables()["windows"]
        lens = [
            {"promoted": more.token, "p": more.probability, "suppressed": less.token, "q": less.probability}
            for more, less in zip(self.promoted, self.suppressed, strict=True)
        ]
        tokens = [
            Column("promoted", "promoted"),
            Column("probability", "p", SHARE),
            Column("suppressed", "suppressed"),
            Column("probability", "q", SHARE),
        ]
        neighbours = [Column("feature", "feature", "d"), Column("cosine", "cosine", "+.3f"), Column("words", "words")]
        effects = [
            Column("prompt", "prompt"),
            Column("unsteered", "unsteered"),
            Column("dose", "dose", "g"),
            Column("steered", "steered"),
            Column("KL", "kl", ".2f", note="nats per token"),
        ]
        found = {
            "windows": replace(windows, title="where it fires"),
            "tokens": Table(columns=tokens, rows=lens, title="tokens it stands for"),
            "neighbours": Table(columns=neighbours, rows=self.neighbours, title="nearest decoder rows"),
            "effects": Table(columns=effects, rows=self.effects, title="what a dose does"),
        }
        return {name: table for name, table in found.items() if table.rows}


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureProfiles(Result):
    """Some features, of one SAE or several."""

    model: str
    profiles: tuple[FeatureProfile, ...]
    run: str = ""
    """Directory of the run, where one was written."""

    def __getitem__(self, place: int) -> FeatureProfile:
        return self.profiles[place]

    def headline(self) -> str:
        return f"{len(self.profiles)} features of {self.model}"

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("site", "site", whole=True),
            Column("feature", "feature", "d"),
            Column("words", lambda one: str(one.words)),
            Column("fires on", "firing_rate", ".3%"),
            Column("largest", "max_activation", NUMBER),
        ]
        return {"features": Table(columns=columns, rows=self.profiles)}

    def render(self) -> RenderableType:
        """Each feature, and where its page is."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [part for one in self.profiles for part in (one, Text())]
        return Group(*parts, *[Text(f"run {self.run}", style="dim")] * bool(self.run))


@overload
def feature(
    model: LanguageModel,
    dictionary: Dictionary,
    features: int,
    *,
    examples: FeatureExamples | None = None,
    **options: Any,
) -> FeatureProfile: ...
@overload
def feature(
    model: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    examples: FeatureExamples | None = None,
    **options: Any,
) -> FeatureProfiles: ...
def feature(
    model: LanguageModel,
    dictionary: Dictionary,
    features: Any,
    *,
    examples: FeatureExamples | None = None,
    **options: Any,
) -> FeatureProfile | FeatureProfiles:
    """All about a feature, or several.

    Args:
        model: the model.
        dictionary: whose feature.
        features: an id, or several.
        examples: where its features fire; by default what lies beside the dictionary, if anything does.
        options: fields of `ProfileOptions` (`prompt`, `dose`, `tokens`, `neighbours`), and of `DecodeConfig`, such as
            `max_new_tokens`, `temperature` and `seed`.

    Raises:
        UserError: a feature does not exist, the dictionary does not fit the model, or an option is wrong.
    """
    check_is_model(model)
    check_is_dictionary(dictionary)
    ids = whole_numbers(features, "feature")
    if not ids:
        raise UserError("the features", "there is none", "give some ids")
    if examples is not None and not isinstance(examples, FeatureExamples):
        hint = "give what trimtab.examples returns, or FeatureExamples.read(path)"
        raise UserError(f"the {type(examples).__name__} that is given as the examples", "they are none", hint)
    known = {**field_types(ProfileOptions), **field_types(DecodeConfig)}
    given = read_keywords(options, known, feature)
    decoding = {name: given.pop(name) for name in field_types(DecodeConfig) if name in given}
    found = profile_features(
        model, dictionary, ids, ProfileOptions(**given), DecodeConfig(**{"max_new_tokens": 30, **decoding}), examples
    )
    one = isinstance(features, int) or getattr(features, "ndim", 1) == 0
    return found[0] if one else FeatureProfiles(model=model.name, profiles=tuple(found))


@torch.no_grad()
def profile_features(
    model: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    options: ProfileOptions,
    decoding: DecodeConfig,
    examples: FeatureExamples | None = None,
) -> list[FeatureProfile]:
    """What `feature` finds, with checked options.

    Raises:
        UserError: as `feature`.
    """
    site = str(dictionary_site(model, dictionary, None))
    dictionary.check_features(list(features))
    examples = examples or dictionary.feature_examples
    if examples is not None and examples.n_features != dictionary.n_features:
        what = f"examples of {examples.n_features} features"
        raise UserError(what, f"the dictionary has {dictionary.n_features}", "give those of this dictionary")
    found: list[FeatureProfile] = []
    stats = dictionary.feature_stats
    for one in features:
        windows = None if examples is None else examples[one]
        promoted, suppressed = (
            _lens(model, dictionary, sign * dictionary.W_dec[one], options.tokens) for sign in (1, -1)
        )
        (words,) = describe_features(model, dictionary, [one])
        found.append(
            FeatureProfile(
                feature=one,
                sae=dictionary.name or type(dictionary).__name__,
                model=model.name,
                site=site,
                words=words if examples is None else replace(words, fires_on=examples.fires_on(one, TOKENS)),
                firing_rate=None if stats is None else float(stats.firing_rate[one]),
                max_activation=None if stats is None else float(stats.max_activation[one]),
                stats_tokens=0 if stats is None else stats.n_tokens,
                n_tokens=0 if windows is None else windows.n_tokens,
                windows=() if windows is None else windows.windows,
                promoted=promoted,
                suppressed=suppressed,
                neighbours=_neighbours(model, dictionary, one, options.neighbours),
                effects=_effects(model, dictionary, one, options, decoding),
            )
        )
    return found


def _lens(model: LanguageModel, dictionary: Dictionary, row: torch.Tensor, count: int) -> tuple[LensToken, ...]:
    if dictionary.d_in != model.d_model or "logit-lens" not in model.capabilities:
        return ()
    found = logit_lens(model, row[None], count)
    (texts,) = token_texts(model, found.ids)
    pairs = zip(texts, found.probs[0].tolist(), strict=True)
    return tuple(LensToken(token=token, probability=probability) for token, probability in pairs)


def _neighbours(model: LanguageModel, dictionary: Dictionary, one: int, count: int) -> tuple[Neighbour, ...]:
    cosine = dictionary.directions @ dictionary.directions[one]
    cosine[one] = -2.0
    best = cosine.topk(min(count, dictionary.n_features - 1))
    ids = best.indices.tolist()
    words = {words.feature: str(words) for words in describe_features(model, dictionary, ids, 3)}
    pairs = zip(ids, best.values.tolist(), strict=True)
    return tuple(Neighbour(feature=i, cosine=value, words=words[i]) for i, value in pairs)


def _effects(
    model: LanguageModel, dictionary: Dictionary, one: int, options: ProfileOptions, decoding: DecodeConfig
) -> tuple[Effect, ...]:
    if not options.prompt or not options.dose:
        return ()
    result = steer(model, dictionary, options.prompt, one, sweep=list(options.dose), unit="relative", decoding=decoding)
    assert result.trace is not None
    kl = iter(result.trace.per_row("kl_total"))  # prompt after prompt, the unsteered text first
    found: list[Effect] = []
    for prompt, texts in zip(
        options.prompt, zip(*(arm.continuations for arm in result.arms), strict=True), strict=True
    ):
        next(kl)
        for dose, text in zip(options.dose, texts[1:], strict=True):
            of_tokens = next(kl)
            found.append(
                Effect(
                    prompt=prompt, dose=dose, unsteered=texts[0].text, steered=text.text,
                    kl=mean(of_tokens) if of_tokens else None,
                )
            )  # fmt: skip
    return tuple(found)
