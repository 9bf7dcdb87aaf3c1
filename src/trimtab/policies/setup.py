"""From a config's names to what training, evaluation and analyses work with: the setting, and the task in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.control.masks import PromptFirings
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import SAE
from trimtab.lm import LanguageModel, PromptCache, Site
from trimtab.policies.config import PolicyConfig
from trimtab.policies.found_features import found_features
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource
from trimtab.runs import Meter
from trimtab.selection import rank
from trimtab.selection.ranking import dictionary_site, features_to_rank
from trimtab.steering import DirectionTable
from trimtab.tasks import Item, Task


@dataclass(frozen=True, kw_only=True)
class Setup(Setting):
    """The setting of a policy. One prompt cache and one record of prompts' firings serve all rollouts."""

    config: PolicyConfig
    dictionary: SAE
    site: Site
    task: Task

    @classmethod
    def of(cls, config: PolicyConfig) -> Setup:
        """Load what the config names.

        Raises:
            UserError: anything that the user named is wrong; see `load_model`, `load_dictionary`, `load_task`.
        """
        task = config.read_task()
        return cls.with_parts(config, *config.load(), task)

    @classmethod
    def with_parts(cls, config: PolicyConfig, model: LanguageModel, sae: SAE, task: Task | None = None) -> Setup:
        """The same with a model, an SAE and perhaps a task that are loaded already."""
        site = dictionary_site(model, sae, config.site)
        task = task or config.load_task(model.tokenizer)
        features: tuple[int, ...] = ()
        if config.mask == "top-confidence":
            live = len(features_to_rank(sae))
            with Meter("ranking features", live) as meter:
                table = rank(model, sae, "delta-confidence", site=site, progress=meter.advance)
            features = tuple(int(i) for i in table.top(config.mask_features).feature)
        cache = PromptCache(model, max_bytes=int(config.prompt_cache_gb * 2**30)) if config.prompt_cache_gb else None
        if config.mask == "found":
            features = found_features(config, model, sae, site, task)
        return cls(
            config=config,
            model=model,
            dictionary=sae,
            site=site,
            task=task,
            dose=config.dose,
            unit=config.unit,
            mask=config.mask,
            mask_features=features,
            firings=PromptFirings(model, site, sae),
            seed=config.seed,
            temperature=config.temperature,
            batch_size=config.batch_size,
            prompt_cache=cache,
        )

    def prompts(self, split: str, limit: int | None = None) -> TaskPrompts:
        """Items of a split, at most `limit`, the same ones every time."""
        return self.prompts_of(self.task.sample(split, limit))

    def prompts_of(self, items: Sequence[Item]) -> TaskPrompts:
        """Items of the task, as the config has them answered."""
        return TaskPrompts.of(
            self.model,
            self.task,
            items,
            options_only=self.config.options_only,
            max_new_tokens=self.config.max_new_tokens,
        )

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
            dose: instead of the setting's.
        """
        return PolicySource(
            policy,
            directions or self.dictionary,
            self.fresh_mask(),
            self.dose if dose is None else dose,
            self.site,
            unit=self.unit,
            greedy=greedy,
        )
