"""`trimtab policy headroom`: the lines of one task for several SAEs, doses and masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.control.masks import MaskKind, PromptFirings
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, ModelConfig, PromptCache
from trimtab.policies.file_names import HEADROOM_FILE, JUDGE_FILE
from trimtab.policies.headroom.candidates import CandidateRule, NothingAllowedError
from trimtab.policies.headroom.lines import headroom
from trimtab.policies.headroom.result import HeadroomResult
from trimtab.policies.headroom.trials import Trials, try_features
from trimtab.runs import SourceName, check_choices, check_least, write_json
from trimtab.selection.ranking import dictionary_site
from trimtab.steering import Unit, check_doses
from trimtab.tasks import TaskConfig


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig(TaskConfig, ModelConfig):
    """Measure what an edit could gain on a task, by SAE, dose and mask, before any policy is trained."""

    needs = ("decode", "prefix")

    sae: tuple[SourceName, ...] = ("default",)
    """SAEs, of one layer or of several: directories or shipped names."""
    site: str | None = None
    """Where to steer, for SAEs that do not name the site they read."""
    dose: tuple[float, ...] = (0.5, 1.0)
    """Doses of the edit, in `unit`."""
    unit: Unit = "relative"
    """What a dose is a multiple of."""
    mask: tuple[MaskKind, ...] = ("none", "current", "accumulated", "top-confidence")
    """Masks to compare."""
    mask_features: int = 256
    """Features of the mask `top-confidence`."""
    split: str = "train"
    """Split of the task that items are from."""
    items: int = 32
    """Items of the split to try, the same ones every time."""
    n_candidates: int | None = None
    """Features to try for each mask, where answers are longer than one token; 48 unless given, or all if fewer."""
    candidates: CandidateRule = "top-confidence"
    """How those features are chosen among the ones that a mask allows: `top-confidence` for the highest in
    delta-confidence, `random` for a draw among those that ever fired."""
    token_limit: int = 1_000_000
    """Where answers are longer than one token, decode no more tokens than this: what could need more is refused."""
    batch_size: int = 64
    """Rows decoded together, where answers are longer than one token."""
    seed: int = 0
    """Of random directions, candidates, folds and bootstrap."""
    run: Path | None = None
    """Directory to write the result to, as headroom.json, and the replies of a judge behind an endpoint; that of a
    `policy train` shows it on its page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_doses(self.dose)
        check_choices(self)
        enough = {"items": self.items >= 2, "sae": bool(self.sae), "dose": bool(self.dose), "mask": bool(self.mask)}
        for name, ok in enough.items():
            if not ok:
                raise UserError(f"{name} {getattr(self, name)}", "there is too little to compare", "give more")
        if "found" in self.mask:
            why = "headroom is measured before anything is found"
            raise UserError("mask found", why, "leave it out; policy train takes it")
        check_least(self, 1, "mask_features", "n_candidates", "token_limit", "batch_size")

    @property
    def transcript(self) -> Path | None:
        """File of the directory that keeps the replies of a judge behind an endpoint."""
        return None if self.run is None else self.run / JUDGE_FILE


def run_headroom(config: HeadroomConfig) -> HeadroomResult:
    """Load what the config names and try features.

    Raises:
        UserError: anything that the user named is wrong, a mask allows nothing, or too much would be decoded.
    """
    task = config.read_task()
    if task is not None:
        task.sample(config.split, config.items)  # names a wrong split before the model is loaded
    model = config.load_model()
    task = task or config.load_task(model.tokenizer)
    saes = [load_dictionary(name, model=model, device=model.device) for name in config.sae]
    prompts = TaskPrompts.of(
        model, task, task.sample(config.split, config.items), options_only=config.options_only,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    if prompts.max_new_tokens == 1 and config.n_candidates is not None:
        raise UserError(
            f"n_candidates {config.n_candidates}", f"answers of {task.name} are one token, and every feature is tried",
            "leave it out",
        )  # fmt: skip
    cache = PromptCache(model)
    trials = [_trials(model, sae, prompts, config, cache) for sae in saes]
    tables = try_features(trials, config.dose, token_limit=config.token_limit)
    result = HeadroomResult(
        task=task.name, model=model.name, split=config.split, task_option=config.task_option, judge=config.judge,
        lines=tuple(headroom(table, **setting.about, seed=setting.seed) for setting, table in tables),
    )  # fmt: skip
    if config.run is not None:
        write_json(config.run / HEADROOM_FILE, result.to_json())
    return result


def _trials(model: LanguageModel, sae: SAE, prompts: TaskPrompts, config: HeadroomConfig, cache: PromptCache) -> Trials:
    site = dictionary_site(model, sae, config.site)
    setting = Setting(
        model=model, dictionary=sae, site=site, unit=config.unit, firings=PromptFirings(model, site, sae),
        seed=config.seed, batch_size=config.batch_size, prompt_cache=cache,
    )  # fmt: skip
    trials = Trials.of(
        setting, prompts, config.mask, rule=config.candidates, count=config.n_candidates,
        mask_features=config.mask_features,
    )  # fmt: skip
    for mask, allowed in trials.allowed.items():
        if not allowed.any():
            raise NothingAllowedError(mask, site, len(prompts))
    return trials
