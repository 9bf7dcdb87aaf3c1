"""Windows to explain a feature by and windows to test the explanation on, as in SAEBench's autointerp.

Where a feature fires is known from a table of examples. That it is silent in some other text is not: windows to test
on are drawn from those of other features, none of them near a place where this feature is known to fire, and where the
model is at hand only those in which it stays silent when the model reads the window by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray

from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.feature_examples import KINDS, FeatureExamples, Window
from trimtab.errors import UserError
from trimtab.interpreting.judge import Exemplars, Passage
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.runs import Meter, check_least

HOW = "trimtab examples --top 12 --weighted 20 --random 2 --window 21"
"""Makes a table with enough windows: some that are drawn by weight stand where a strongest one stands already."""
BATCH = 64
"""Windows per forward pass."""


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Which windows explain a feature, and which test the explanation; defaults are SAEBench's."""

    window: int = 21
    """Tokens of a window, the firing one in the middle where the table's windows allow it."""
    top: int = 10
    """Strongest windows to explain a feature by."""
    weighted: int = 5
    """Windows drawn by activation to explain it by."""
    silent: int = 30
    """Windows in which it is silent, to explain it by; judges that only read explanations may not look at them."""
    test_top: int = 2
    """Strongest windows to test on, after those that explain."""
    test_weighted: int = 2
    """Windows drawn by activation to test on."""
    test_silent: int = 10
    """Windows in which it is silent to test on."""
    pool: int = 300
    """Windows of all features among which silent ones are found."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        check_least(self, 1, "window", "test_silent", "pool")
        check_least(self, 0, "top", "weighted", "silent", "test_top", "test_weighted")
        if not self.top + self.weighted or not self.test_top + self.test_weighted:
            raise UserError("the windows", "none in which a feature fires", "give some to explain by and some to test")

    @property
    def chance(self) -> float:
        """Accuracy of saying that it fires in none of the windows to test on."""
        return self.test_silent / (self.test_silent + self.test_top + self.test_weighted)


class Trial(NamedTuple):
    """One feature's windows."""

    feature: int
    exemplars: Exemplars
    passages: tuple[Passage, ...]
    """To test on, without activations, in an order that says nothing."""
    fires: Bool[ndarray, " W"]
    """Whether the feature fires in each."""


class SilentWindows:
    """Windows of many features, and in which of them each of some features is silent as far as known.

    Args:
        examples: the table.
        features: which may be asked for.
        options: how many windows, and their seed.
        model, dictionary: with both, the model reads each window by itself, and a feature that fires there is not
            silent. What stood before the window in its document is not read.
    """

    def __init__(
        self,
        examples: FeatureExamples,
        features: Sequence[int],
        options: WindowOptions,
        model: LanguageModel | None = None,
        dictionary: Dictionary | None = None,
    ) -> None:
        self._examples, self._width = examples, options.window
        self.windows = _pool(examples, options)
        self.passages = [passage_of(window, options.window, known=False) for window in self.windows]
        self._places = [(window.document, window.position) for window in self.windows]
        self._fires = np.zeros((len(self.windows), len(features)), dtype=bool)
        self._columns = {feature: column for column, feature in enumerate(features)}
        if model is not None and dictionary is not None:
            self._fires = _read_alone(model, dictionary, [one.text for one in self.passages], features)

    def of(self, feature: int) -> list[Passage]:
        """Those in which a feature is silent, in one order for all features."""
        own: dict[str, list[int]] = {}
        for window in self._examples[feature].windows:
            own.setdefault(window.document, []).append(window.position)
        fires = self._fires[:, self._columns[feature]]
        return [
            passage
            for passage, (document, position), loud in zip(self.passages, self._places, fires, strict=True)
            if not loud and all(abs(position - other) > 2 * self._width for other in own.get(document, ()))
        ]


def _pool(examples: FeatureExamples, options: WindowOptions) -> list[Window]:
    """Windows that do not overlap, one of each feature in turn; at first those that were drawn evenly among tokens on
    which the feature fires, which are as near as a table comes to any text."""
    rng = np.random.default_rng([options.seed, 1])
    found: list[Window] = []
    taken: dict[str, list[int]] = {}
    long: dict[int, list[Window]] = {}
    for turn in range(max(np.bincount(examples.feature), default=0)):
        for feature in rng.permutation(examples.live).tolist():
            if (windows := long.get(feature)) is None:
                windows = [one for one in examples[feature].windows if len(one.tokens) >= options.window]
                windows.sort(key=lambda one: one.kind != "random")
                long[feature] = windows
            if turn < len(windows) and _is_free(windows[turn], taken, options.window):
                found.append(windows[turn])
            if len(found) == options.pool:
                return found
    return found


def _is_free(window: Window, taken: dict[str, list[int]], width: int) -> bool:
    """Whether a window overlaps none that is taken; then it is taken, too."""
    near = taken.setdefault(window.document, [])
    first = window.position - window.place + _first(window, width)
    free = all(abs(first - other) >= width for other in near)
    if free:
        near.append(first)
    return free


def _first(window: Window, width: int) -> int:
    """Where in a window its middle of some tokens begins; nearer to an end where the window is cut off there."""
    return max(0, min(window.place - width // 2, len(window.tokens) - width))


def make_trial(
    examples: FeatureExamples, feature: int, silent: SilentWindows, options: WindowOptions
) -> Trial | Unjudged:
    """Windows of a feature, drawn; or which of them are missing."""
    rng = np.random.default_rng([options.seed, 2, feature])
    top, weighted = _apart(examples[feature].windows, options.window)
    quiet = silent.of(feature)
    needed = {
        "strongest": (len(top), options.top + options.test_top),
        "drawn by activation": (len(weighted), options.weighted + options.test_weighted),
        "silent": (len(quiet), options.silent + options.test_silent),
    }
    for kind, (there, wanted) in needed.items():
        if there < wanted:
            return Unjudged(f"{there} windows that are {kind}, where {wanted} are needed")
    weighted = [weighted[i] for i in rng.permutation(len(weighted))]
    quiet = [quiet[i] for i in rng.permutation(len(quiet))[: options.silent + options.test_silent]]
    shown = [*top[: options.top], *weighted[: options.weighted]]
    firing = [
        *top[options.top : options.top + options.test_top],
        *weighted[options.weighted : options.weighted + options.test_weighted],
    ]
    tested = [passage_of(window, options.window, known=False) for window in firing] + quiet[options.silent :]
    order = rng.permutation(len(tested))
    lacks = [Passage(tokens=one.tokens, activations=(0.0,) * len(one.tokens)) for one in quiet[: options.silent]]
    return Trial(
        feature=feature,
        exemplars=Exemplars(
            name=f"feature {feature}",
            has=tuple(passage_of(window, options.window) for window in shown),
            lacks=tuple(lacks),
        ),
        passages=tuple(tested[i] for i in order),
        fires=order < len(firing),
    )


def passage_of(window: Window, width: int, *, known: bool = True) -> Passage:
    """A window's middle, of at most some tokens, with what fires there if that may be known."""
    first = _first(window, width)
    cut = slice(first, first + width)
    return Passage(tokens=window.tokens[cut], activations=window.activations[cut] if known else ())


def check_wide_enough(examples: FeatureExamples, width: int) -> None:
    """Raise a `UserError` if the table's windows are narrower than is asked for."""
    widest = examples.tokens.shape[1]
    if widest < width:
        raise UserError(
            f"windows of {width} tokens", f"those of the examples have {widest}", f"make others ({HOW}), or --window"
        )


def _apart(windows: Sequence[Window], width: int) -> tuple[list[Window], list[Window]]:
    """The strongest windows and those drawn by activation, none of which overlaps another."""
    taken: dict[str, list[int]] = {}
    found: dict[str, list[Window]] = {kind: [] for kind in KINDS}
    for kind in ("top", "weighted"):
        found[kind] += [one for one in windows if one.kind == kind and _is_free(one, taken, width)]
    return found["top"], found["weighted"]


@torch.no_grad()
def _read_alone(
    model: LanguageModel, dictionary: Dictionary, texts: Sequence[str], features: Sequence[int]
) -> Bool[ndarray, "P F"]:
    """Whether each of some features fires anywhere in each of some texts, read by themselves; the first position is
    left out, as in a harvest."""
    site = model.site(dictionary.info.site)
    ids = torch.as_tensor(list(features), device=dictionary.W_dec.device)
    found = np.zeros((len(texts), len(features)), dtype=bool)
    with Meter("reading windows for silence", len(texts)) as meter:
        for start in range(0, len(texts), BATCH):
            rows = [model.encode_text(text) for text in texts[start : start + BATCH]]
            batch = TokenBatch.pad(rows, model.pad_id, model.device)
            x = capture(model, batch, [site])[site]
            for row, ids_read in enumerate(rows):
                own = x[row, x.shape[1] - len(ids_read) + 1 :].to(dictionary.W_dec.device, dictionary.W_dec.dtype)
                codes = dictionary.encode_features(own, ids)
                found[start + row] = (codes > 0).any(dim=0).cpu().numpy()
            meter.advance(len(rows))
    return found
