"""The part of a command's config that names a model and a dictionary of its activations."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.dictionaries.files import load_dictionary
from trimtab.dictionaries.sae import SAE
from trimtab.lm import LanguageModel, ModelConfig
from trimtab.runs import SourceName


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(ModelConfig):
    """A model, and an SAE that reads it."""

    sae: SourceName = "default"
    """Directory of the SAE in any known format, a shipped one's name, or saelens:RELEASE/SAE_ID."""

    def load(self) -> tuple[LanguageModel, SAE]:
        """Both. Raises a `UserError` as `load_model` and `load_dictionary` do."""
        model = self.load_model()
        return model, self.load_dictionary(model)

    def load_dictionary(self, model: LanguageModel) -> SAE:
        """The SAE alone, for a model that is loaded already."""
        return load_dictionary(self.sae, model=model, device=model.device)


@dataclass(frozen=True, kw_only=True)
class AnyModelConfig(DictionaryConfig):
    """The same where the SAE may be another model's."""

    any_model: bool = field(default=False, metadata={"heading": "model"})
    """Use the SAE, or a saved steering, on another model than its own, if the widths agree (a fine-tune, say)."""

    def load_dictionary(self, model: LanguageModel) -> SAE:
        return load_dictionary(self.sae, model=model, any_model=self.any_model, device=model.device)
