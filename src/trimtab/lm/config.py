"""The part of a command's config that names a model, inherited by every command that loads one."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.lm.loading import load_model
from trimtab.lm.model import LanguageModel
from trimtab.runs import SourceName

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model, and how it computes."""

    model: SourceName = DEFAULT_MODEL
    """Hub id, directory, GGUF file or catalogue name."""
    dtype: str = "float32"
    """What the model computes in."""
    device: str = "cpu"
    """Where to compute."""

    def load_model(self, device: str | None = None) -> LanguageModel:
        """The model. Raises a `UserError` as `trimtab.lm.load_model` does.

        Args:
            device: instead of the config's.
        """
        return load_model(self.model, dtype=self.dtype, device=device or self.device)
