"""The part of a command's config that names a model, inherited by every command that loads one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trimtab.lm.loading import load_model
from trimtab.lm.model import LanguageModel
from trimtab.runs import LEFT_OUT_AT_DEFAULT, SourceName

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
    allow: tuple[str, ...] = field(default=(), metadata=LEFT_OUT_AT_DEFAULT)
    """Use these although the model's check of itself finds a difference there (decode, attn_q: `trimtab models show`
    lists what it finds)."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the command cannot do without, of `trimtab.lm.CAPABILITIES`."""

    def needed(self) -> tuple[str, ...]:
        """`needs`, or what these settings need."""
        return self.needs

    def load_model(self, device: str | None = None) -> LanguageModel:
        """The model. Raises a `UserError` as `trimtab.lm.load_model` does, or if it fails what the command needs.

        Args:
            device: instead of the config's.
        """
        model = load_model(self.model, dtype=self.dtype, device=device or self.device, allow=self.allow)
        model.require(*self.needed())
        return model
