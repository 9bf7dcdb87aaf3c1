"""A criterion: a score per feature, from what amplifying it does to the next token, exactly or to first order, or from
what is known of the feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.lm.logit_lens import check_token_count, logit_lens
from trimtab.selection.edited_distributions import Reducer
from trimtab.steering.doses import Unit, check_doses, check_unit

Quantity = Callable[[Tensor], Tensor]
"""What is differentiated: a function from log-probabilities `[V]` to a scalar."""
NEUTRAL_PREFIX = "From my experience,"
DOSE = 10.0


class ScoringTarget:
    """What is scored.

    Args:
        model: the model.
        dictionary: whose features are scored.
        features: `[n]` ids of the features to score.
        lens_count: tokens per feature that the logit lens reads at once, the first time it is asked.
    """

    def __init__(
        self, model: LanguageModel, dictionary: Dictionary, features: Int[Tensor, " n"], *, lens_count: int = 1
    ) -> None:
        self.model, self.dictionary, self.features = model, dictionary, features
        self._lens_count = lens_count
        self._lens: Tensor | None = None

    def residual_rows(self) -> Float[Tensor, "n d"]:
        """The features' decoder rows, for the logit lens.

        Raises:
            UserError: they are not in the residual stream, as at an attention head.
        """
        if (width := self.dictionary.d_in) != self.model.d_model:
            why = f"the logit lens reads rows of the residual stream, of width {self.model.d_model}"
            raise UserError(f"features of width {width}", why, "rank them by delta-confidence or kl")
        return self.dictionary.W_dec.detach()[self.features.to(self.dictionary.W_dec.device)]

    def lens_tokens(self, count: int) -> Int[Tensor, "n count"]:
        """The `count` tokens that each feature's decoder row promotes most, by the logit lens, most likely first.

        Raises:
            UserError: see `residual_rows`; or there are fewer tokens.
        """
        rows = self.residual_rows()
        check_token_count(count, self.model.vocab_size)
        if self._lens is None or self._lens.shape[1] < count:
            self._lens = logit_lens(self.model, rows, max(count, self._lens_count)).ids
        return self._lens[:, :count]


class _Labelled:
    """What criteria of both kinds say of themselves."""

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """Whether negative scores are an end of the ranking in their own right."""

    @property
    def label(self) -> str:
        """The name, with every setting that is not the default."""
        assert dataclasses.is_dataclass(self)
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        changed = [f"{name}={_short(value)}" for name, (value, default) in values.items() if value != default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True, kw_only=True)
class PrefixCriterion(_Labelled):
    """What criteria that amplify one feature have in common.

    The amplification adds a dose of v̂_i (`steering.doses`) to the last token of each prefix; by default 10 · m_i, m_i
    the feature's largest activation over the corpus of its statistics, in model units. Scores are averaged over the
    prefixes.
    """

    dose: float = DOSE
    """How strongly the feature is amplified, in `unit`."""
    unit: Unit = "max_activation"
    """What the dose is a multiple of; `relative` and `absolute` need no statistics."""
    prefixes: tuple[str, ...] = (NEUTRAL_PREFIX,)
    """Texts at whose last token the feature is amplified."""

    def __post_init__(self) -> None:
        check_doses(self.dose)
        check_unit(self.unit, has_statistics=True)
        if isinstance(self.prefixes, str):
            raise UserError(f"prefixes {self.prefixes!r}", "they are a single text", "give a tuple of texts")
        if not self.prefixes:
            raise UserError("the prefixes", "there is none", "give at least one text")
        if not all(self.prefixes):
            raise UserError("a prefix", "it is empty", "give some text")
        if len(set(self.prefixes)) < len(self.prefixes):
            raise UserError("the prefixes", "one occurs twice", "give each once")


@dataclass(frozen=True, kw_only=True)
class EffectCriterion(PrefixCriterion):
    """A criterion that reads the next-token distribution while one feature is amplified; subclasses say what of it."""

    def reducer(self, target: ScoringTarget) -> Reducer:
        """A function from a block of R edited distributions to scores `[R]`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GradientCriterion(PrefixCriterion):
    """A criterion that reads how a quantity of the next-token distribution changes to first order: c_i · ⟨∇q, v̂_i⟩.

    c_i is the dose in model units, and ∇q the gradient of the quantity in the activation of the prefix's last token,
    nothing amplified. One backward pass serves all features. Subclasses say which quantity.
    """

    def quantity(self, target: ScoringTarget) -> Quantity:
        """A differentiable function from the next token's log-probabilities `[V]` to a scalar."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StatisticCriterion(_Labelled):
    """A criterion that amplifies nothing: it reads what is known of features, or their decoder rows."""

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        """Scores of the target's features, in their order."""
        raise NotImplementedError


Criterion = EffectCriterion | GradientCriterion | StatisticCriterion


def feature_stats(dictionary: Dictionary, wanted_for: str) -> FeatureStats:
    """The dictionary's statistics.

    Raises:
        UserError: it has none; the message says how to compute them.
    """
    if dictionary.feature_stats is None:
        raise UserError(
            wanted_for,
            "the dictionary comes without feature statistics (feature_stats.parquet), so it is unknown how strongly "
            "and how often its features fire",
            "compute them with `trimtab sae stats SAE --text FILE`, or choose what needs none, such as "
            "delta-confidence with --unit relative --dose 0.4",
        )
    return dictionary.feature_stats


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "|".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
