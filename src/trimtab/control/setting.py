"""What all arms of a comparison have in common: the model, and how and where it is steered and decoded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from trimtab.control.masks import FeatureMask, MaskKind, PromptFirings, build_mask
from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, PromptCache, Site, site_width
from trimtab.runs import Meter, check_choices
from trimtab.steering import StaticSource, Unit, check_doses

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One ground for arms. What an arm needs and the setting lacks makes the arm missing, not the setting wrong.

    Raises:
        UserError: the dose is not finite, there is no such unit or mask, or the dictionary reads another site.
    """

    model: LanguageModel
    dictionary: Dictionary | None
    """Whose features arms choose from; None if all arms do without."""
    site: Site | None
    """Where they steer, a name will do; None if none does."""
    dose: float = 0.5
    """How strongly, in `unit`."""
    unit: Unit = "relative"
    """What the dose is a multiple of."""
    mask: MaskKind = "none"
    """Which features may be chosen at a token."""
    mask_features: tuple[int, ...] = ()
    """Features of the masks `top-confidence` and `found`."""
    firings: PromptFirings | None = field(default=None, repr=False)
    """For the mask `accumulated`: counts the features that fire in prompts, too."""
    seed: int = 0
    """Of all draws."""
    temperature: float = 0.0
    """Of tokens."""
    batch_size: int = 64
    """Rows decoded together."""
    prompt_cache: PromptCache | None = field(default=None, repr=False)
    """Keeps prompts' keys and values between arms."""
    meter: Meter = field(default_factory=lambda: Meter("answering"), compare=False, repr=False)
    """Told of every answer, and what it is for; shown by whoever opens it."""

    def __post_init__(self) -> None:
        if isinstance(self.site, str):
            object.__setattr__(self, "site", self.model.site(self.site))
        if self.dictionary is not None:
            check_is_dictionary(self.dictionary)
        check_choices(self)
        check_doses(self.dose)
        if self.dictionary is not None and self.site is not None:
            self.dictionary.check_model(site_width(self.model, self.site), self.model.name, str(self.site))

    @property
    def about(self) -> dict[str, Any]:
        """What is said of it beside results."""
        return {"site": str(self.site), "dose": self.dose, "unit": self.unit, "mask": self.mask}

    def with_own_caches(self) -> Self:
        """The same, leaving nothing in the caches that a training decodes with, whose bits may depend on them."""
        firings = self.firings and PromptFirings(self.model, self.needed_site(), self.needed_dictionary())
        return replace(self, firings=firings, prompt_cache=None, meter=Meter("answering"))

    def needed_dictionary(self) -> Dictionary:
        """The dictionary; a `UserError` if there is none."""
        return _needed(self.dictionary, "dictionary")

    def needed_site(self) -> Site:
        """The site; a `UserError` if there is none."""
        return _needed(self.site, "site")

    def static_source(self, feature: Any, dose: Any, unit: Unit | None = None) -> StaticSource:
        """Features of the dictionary at the site, as `StaticSource` takes them; in the setting's unit by default."""
        return StaticSource(self.needed_dictionary(), feature, dose, self.needed_site(), unit=unit or self.unit)

    def fresh_mask(self) -> FeatureMask:
        """A mask of the setting's kind, for one decode call after another."""
        return build_mask(
            self.mask,
            self.needed_dictionary(),
            prompt_firings=self.firings,
            features=self.mask_features or None,
        )


def _needed(value: _T | None, name: str) -> _T:
    if value is None:
        raise UserError("this arm", f"it needs a {name}, and the setting has none", "give the setting one")
    return value
