"""From a config's names to what training, evaluation and analyses work with: model, SAE, task, mask, source."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.dictionaries import SAE, load_dictionary
from trimtab.lm import LanguageModel, PromptCache, Site, load_model
from trimtab.policies.config import PolicyConfig
from trimtab.policies.episodes import Episodes
from trimtab.policies.masks import FeatureMask, PromptFirings, build_mask
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource
from trimtab.policies.task_options import task_options
from trimtab.runs import Meter
from trimtab.selection import rank
from trimtab.selection.ranking import dictionary_site, features_to_rank
from trimtab.steering import DirectionTable
from trimtab.tasks import Task, load_task, read_task


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A policy's surroundings. One prompt cache and one record of prompts' firings serve all rollouts."""

    config: PolicyConfig
    model: LanguageModel
    sae: SAE
    site: Site
    task: Task
    prompt_cache: PromptCache | None
    firings: PromptFirings
    mask_features: tuple[int, ...]
    """Features of the mask `top-confidence`; empty under the others."""

    @classmethod
    def of(cls, config: PolicyConfig) -> Setup:
        """Load what the config names.

        Raises:
            UserError: anything that the user named is wrong; see `load_model`, `load_dictionary`, `load_task`.
        """
        task = read_task(config.task, config.data, **task_options(config))
        model = load_model(config.model, dtype=config.dtype, device=config.device)
        sae = load_dictionary(config.sae, model=model, device=model.device)
        return cls.with_parts(config, model, sae, task)

    @classmethod
    def with_parts(cls, config: PolicyConfig, model: LanguageModel, sae: SAE, task: Task | None = None) -> Setup:
        """The same with a model, an SAE and perhaps a task that are loaded already."""
        site = dictionary_site(model, sae, config.site)
        task = task or load_task(config.task, data=config.data, tokenizer=model.tokenizer, **task_options(config))
        features: tuple[int, ...] = ()
        if config.mask == "top-confidence":
            live = len(features_to_rank(sae))
            with Meter("ranking features", live) as meter:
                table = rank(model, sae, "delta-confidence", site=site, progress=meter.advance)
            features = tuple(int(i) for i in table.top(config.mask_features).feature)
        return cls(
            config=config,
            model=model,
            sae=sae,
            site=site,
            task=task,
            prompt_cache=PromptCache(model, max_bytes=int(config.prompt_cache_gb * 2**30))
            if config.prompt_cache_gb
            else None,
            firings=PromptFirings(model, site, sae),
            mask_features=features,
        )

    def episodes(self, split: str, limit: int | None = None) -> Episodes:
        """Items of a split, at most `limit`, the same ones every time."""
        return Episodes.of(
            self.model,
            self.task,
            self.task.sample(split, limit),
            options_only=self.config.options_only,
            max_new_tokens=self.config.max_new_tokens,
        )

    def mask(self) -> FeatureMask:
        """A fresh mask of the config's kind."""
        return build_mask(self.config.mask, self.sae, prompt_firings=self.firings, features=self.mask_features or None)

    def source(
        self,
        policy: Policy,
        *,
        greedy: bool = False,
        directions: DirectionTable | None = None,
        dose: float | None = None,
    ) -> PolicySource:
        """The policy as a source of interventions.

        Args:
            policy: picks features.
            greedy: take the most likely action.
            directions: what actions index instead of the SAE's rows.
            dose: instead of the config's.
        """
        return PolicySource(
            policy,
            directions or self.sae,
            self.mask(),
            self.config.dose if dose is None else dose,
            self.site,
            unit=self.config.unit,
            greedy=greedy,
        )
