"""What a saved steering says of itself: its model, what is done at each site, where it comes from, and the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.lm import LanguageModel
from trimtab.lm.weight_hashes import weight_hashes
from trimtab.runs import known_arguments
from trimtab.stats import Interval


@dataclass(frozen=True, kw_only=True)
class SteeredModel:
    """The model that a steering is for."""

    name: str
    """What it was loaded by."""
    architecture: str
    """As `transformers` and GGUF files call it (`llama`)."""
    d_model: int
    fingerprint: Mapping[str, str]
    """Hash of its weights in each precision that they may be loaded in (`lm.weight_hashes`)."""

    @classmethod
    def of(cls, model: LanguageModel) -> SteeredModel:
        """What is kept of a model."""
        return cls(
            name=model.name,
            architecture=str(model.hf.config.model_type),
            d_model=model.d_model,
            fingerprint=weight_hashes(model.hf.state_dict()),
        )


@dataclass(frozen=True, kw_only=True)
class SteeringPart:
    """What is done at one site."""

    site: str
    dose: tuple[float, ...]
    """Of each direction, in the steering's unit."""
    feature: tuple[int, ...] = ()
    """The directions' numbers in the SAE; none if they are of no SAE."""
    sae: str = ""
    """What the SAE was loaded by."""
    sae_hash: str = ""
    words: tuple[str, ...] = ()
    """What is said of each feature beside its number: what it fires on and what it promotes."""
    norm: float | None = None
    """Typical ‖x‖ of the activations that are edited here, in model units; what a relative dose is a multiple of."""


@known_arguments
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A number that speaks for a steering, or against it."""

    name: str
    """What was measured."""
    value: Interval | float
    unit: str = ""
    note: str = ""
    """On what, and beside what."""


@dataclass(frozen=True, kw_only=True)
class SteeringFacts:
    """What `steering.json` holds."""

    model: SteeredModel
    parts: tuple[SteeringPart, ...]
    """One for each site."""
    operation: str = "add"
    unit: str = "relative"
    combine: str = "each"
    positions: str = "generated"
    about: str = ""
    """What it is for, in words."""
    made_by: str = ""
    evidence: tuple[Evidence, ...] = ()
