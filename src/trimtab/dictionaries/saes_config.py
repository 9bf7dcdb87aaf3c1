"""The part of a command's config that names a model and one or several dictionaries of its activations."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.dictionaries.files import load_dictionary
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, ModelConfig
from trimtab.runs import SourceName


@dataclass(frozen=True, kw_only=True)
class SAEsConfig(ModelConfig):
    """A model, and SAEs that read it."""

    sae: tuple[SourceName, ...] = ("default",)
    """Directories of SAEs in any known format, shipped ones' names, or saelens:RELEASE/SAE_ID; several must read
    different sites."""
    any_model: bool = field(default=False, metadata={"heading": "model"})
    """Use SAEs on another model than the one that they were trained on, if the widths agree."""
    site: str | None = None
    """Where the SAE reads, if it does not say so itself."""

    def load_saes(self, model: LanguageModel | None = None) -> list[SAE]:
        """The SAEs, for a model if there is one.

        Raises:
            UserError: one cannot be loaded or does not fit the model, or two read the same site.
        """
        device = self.device if model is None else model.device
        found = [
            load_dictionary(name, model=model, site=self.site or "", any_model=self.any_model, device=device)
            for name in self.sae
        ]
        sites = [sae.info.site for sae in found]
        if not found or len(set(sites)) < len(sites):
            said = ", ".join(self.sae) or "(none)"
            raise UserError(f"sae {said}", "each must be of a site of its own", "name one SAE for each site")
        return found
