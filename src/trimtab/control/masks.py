"""Which features may be chosen at a token. Leaving the activation alone is always allowed, too.

- `none`: every feature;
- `current`: those that fire at this token;
- `accumulated`: those that have fired so far in this sample, prompt included; our reading of Adaptive Feature Masking
  (arXiv 2602.10437), whose definition is not published;
- `top-confidence`: a fixed list, such as the m features with the largest delta-confidence; our own;
- `found`: a fixed list, of those found for a wish or a task.

Learning needs the masks that a rollout was made with, but not as a table of tokens × features: each mask keeps a
compact record from which its rows are rebuilt bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, LanguageModel, Site, TokenBatch, capture
from trimtab.runs import Meter

MaskKind = Literal["none", "current", "accumulated", "top-confidence", "found"]
MASKS: tuple[str, ...] = get_args(MaskKind)
NEVER = torch.iinfo(torch.int16).max
BATCH = 16
"""Prompts that are fed together, for the features that fire in them."""

MaskRecord = Callable[[Int[Tensor, " R"], Int[Tensor, " R"]], Bool[Tensor, "R n"]]
"""What is left of a rollout's masks: those of some decisions again, by rows and steps."""


class FeatureMask(Protocol):
    """Decides what is allowed while tokens are decoded. It may have `asks_nothing`, as an `InterventionSource` may."""

    n: int

    def start(self, start: DecodeStart) -> None:
        """Called once before decoding."""
        ...

    def allowed(self, x: Float[Tensor, "R d"], row: Int[Tensor, " R"], step: Int[Tensor, " R"]) -> Bool[Tensor, "R n"]:
        """What is allowed at activations x, of rows that are at their decision number `step`."""
        ...

    def record(self) -> MaskRecord:
        """Everything that is needed to rebuild the masks since `start`."""
        ...


class FixedMask:
    """The same features at every token; its own record."""

    asks_nothing = True

    def __init__(self, features: Bool[Tensor, " n"]) -> None:
        if not bool(features.any()):
            raise UserError("the mask", "it allows no feature", "name at least one feature, or choose another mask")
        self.features, self.n = features, len(features)

    def start(self, start: DecodeStart) -> None:
        self.features = self.features.to(start.device)

    def allowed(self, x: Tensor | None, row: Tensor, step: Tensor | None = None) -> Bool[Tensor, "R n"]:
        return self.features.expand(len(row), -1)

    def record(self) -> MaskRecord:
        features = self.features
        return lambda row, step: features.expand(len(row), -1)


class CurrentMask:
    """Features that fire at the token; the record lists them, a few dozen numbers a token."""

    asks_nothing = False

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, self.n = dictionary, dictionary.n_features

    def start(self, start: DecodeStart) -> None:
        self._steps = start.max_new_tokens
        self._keys: list[Tensor] = []
        self._features: list[Tensor] = []

    def allowed(self, x: Float[Tensor, "R d"], row: Int[Tensor, " R"], step: Int[Tensor, " R"]) -> Bool[Tensor, "R n"]:
        fires = self.dictionary.encode(x) > 0
        place, feature = fires.nonzero(as_tuple=True)
        self._keys.append((row * self._steps + step)[place])
        self._features.append(feature)
        return fires

    def record(self) -> MaskRecord:
        keys, features = torch.cat(self._keys), torch.cat(self._features)
        order = keys.argsort(stable=True)
        return partial(_listed, keys[order], features[order].int(), self._steps, self.n)


def _listed(
    keys: Int[Tensor, " m"], features: Int[Tensor, " m"], steps: int, n: int, row: Int[Tensor, " R"], step: Tensor
) -> Bool[Tensor, "R n"]:
    wanted = row * steps + step
    first = torch.searchsorted(keys, wanted)
    count = torch.searchsorted(keys, wanted, right=True) - first
    into = torch.arange(len(wanted), device=wanted.device).repeat_interleave(count)
    start = count.cumsum(0) - count
    entry = torch.arange(len(into), device=wanted.device) - start[into] + first[into]
    allowed = torch.zeros(len(wanted), n, dtype=torch.bool, device=wanted.device)
    allowed[into, features[entry].long()] = True
    return allowed


class AccumulatedMask:
    """Features that have fired in the sample so far; the record is the decision at which each fired first.

    Args:
        dictionary: reads the activations.
        prompt_firings: per prompt, which features fire at its tokens before the last. Without it only the tokens at
            which a decision is made count.
    """

    asks_nothing = True

    def __init__(
        self,
        dictionary: Dictionary,
        prompt_firings: Callable[[Sequence[Sequence[int]]], Bool[Tensor, "N n"]] | None = None,
    ) -> None:
        self.dictionary, self.n, self.prompt_firings = dictionary, dictionary.n_features, prompt_firings

    def start(self, start: DecodeStart) -> None:
        self._first = torch.full((len(start.prompts), self.n), NEVER, dtype=torch.int16, device=start.device)
        if self.prompt_firings is not None:
            self._first.masked_fill_(self.prompt_firings(start.prompts).to(start.device), 0)

    def allowed(self, x: Float[Tensor, "R d"], row: Int[Tensor, " R"], step: Int[Tensor, " R"]) -> Bool[Tensor, "R n"]:
        now = step.to(torch.int16)[:, None]
        fires = (self.dictionary.encode(x) > 0).to(torch.int16)
        # `now` where a feature fires and NEVER elsewhere, by operations that are fast for int16, which `where` is not.
        fired = fires.sub_(1).bitwise_and_(NEVER).bitwise_or_(now)
        first = torch.minimum(self._first[row], fired)
        self._first[row] = first
        return first <= now

    def record(self) -> MaskRecord:
        first = self._first
        return lambda row, step: first[row] <= step.to(torch.int16)[:, None]


class PromptFirings:
    """Which features fire at a prompt's tokens before the last, computed once per prompt and kept as bits.

    The first token and special tokens don't count: activations there are of another kind (attention sinks), and SAEs
    are trained without them.
    """

    def __init__(self, model: LanguageModel, site: Site | str, dictionary: Dictionary) -> None:
        self.model, self.site, self.dictionary = model, model.site(site), dictionary
        self._special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.long)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Bool[Tensor, "N n"]:
        keys = [tuple(prompt) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        if missing:
            with Meter("finding the features that fire in prompts", len(missing)) as meter:
                for start in range(0, len(missing), BATCH):
                    few = missing[start : start + BATCH]
                    self._compute(few)
                    meter.advance(len(few))
        bits = np.stack([self._known[key] for key in keys])
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=self.dictionary.n_features).astype(bool))

    @torch.no_grad()
    def _compute(self, prompts: Sequence[tuple[int, ...]]) -> None:
        model = self.model
        batch = TokenBatch.pad([list(prompt) for prompt in prompts], model.pad_id, model.device)
        x = capture(model, batch, [self.site])[self.site].flatten(2)
        last = batch.position_ids == batch.lengths[:, None] - 1
        counts = batch.real & (batch.position_ids > 0) & ~last & ~torch.isin(batch.ids, self._special.to(x.device))
        for prompt, rows, keep in zip(prompts, x, counts, strict=True):
            fires = (self.dictionary.encode(rows[keep]) > 0).any(0)
            self._known[prompt] = np.packbits(fires.cpu().numpy())


def build_mask(
    kind: MaskKind,
    dictionary: Dictionary,
    *,
    prompt_firings: PromptFirings | None = None,
    features: Sequence[int] | None = None,
) -> FeatureMask:
    """A mask by its name.

    Args:
        kind: `none`, `current`, `accumulated`, `top-confidence` or `found`.
        dictionary: whose features are chosen.
        prompt_firings: for `accumulated`: counts the prompt's tokens too.
        features: for `top-confidence` and `found`: the list.

    Raises:
        UserError: there is no mask of that name, or the list is missing, empty or names an unknown feature.
    """
    if kind not in MASKS:
        raise UserError(f"mask {kind!r}", f"allowed are {', '.join(MASKS)}", "choose one of them")
    if kind == "current":
        return CurrentMask(dictionary)
    if kind == "accumulated":
        return AccumulatedMask(dictionary, prompt_firings)
    allowed = torch.zeros(dictionary.n_features, dtype=torch.bool)
    if kind == "none":
        return FixedMask(~allowed)
    dictionary.check_features(list(features or ()))
    allowed[torch.tensor(list(features or ()), dtype=torch.long)] = True
    return FixedMask(allowed)
