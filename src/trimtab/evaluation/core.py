"""`trimtab evaluate core`: how faithful a dictionary is to a model's activations, and what it costs the model.

Definitions follow SAEBench's core metrics (Karvonen et al., arXiv 2503.09532) where it has them: recovery is (CE of the
ablation − CE spliced) / (CE of the ablation − CE untouched), KL is from the untouched to the spliced distribution.
Deliberate differences: explained variance is one ratio of sums about the mean of all rows, where SAEBench averages each
token's own ratio about its batch's mean; mean ablation, the harder baseline, stands beside SAEBench's zero ablation;
sinks and special tokens are left as they are, and "every position spliced" is what SAEBench measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.activations import (
    Document,
    PackedText,
    TextConfig,
    as_documents,
    read_documents,
    sample_text,
    tokenise,
)
from trimtab.dictionaries import AnyModelConfig, Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.dictionaries.coherence import decoder_coherence
from trimtab.dictionaries.core_metrics import DENSE_RATE
from trimtab.dictionaries.density import FeatureDensity, feature_density
from trimtab.errors import named
from trimtab.evaluation.documents import DocumentSums, PassOptions, pack
from trimtab.evaluation.reconstruction import Reconstruction, reconstruct
from trimtab.evaluation.splicing import Replacement, splice_losses
from trimtab.lm import LanguageModel
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, Run, SourceName, check_least, field_types, json_safe, read_keywords
from trimtab.runs.figures import plot_bars
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.selection.ranking import dictionary_site
from trimtab.stats import Interval, bootstrap_ratio_of_sums, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class CoreOptions(PassOptions):
    """What text is evaluated on and how."""

    seed: int = 0
    """Of the bootstrap."""
    n_resamples: int = 2_000
    """Bootstrap samples of the documents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "n_resamples")


DEFAULT_OPTIONS = CoreOptions()


@dataclass(frozen=True, kw_only=True)
class CoreConfig(CoreOptions, TextConfig, AnyModelConfig):
    """Measure how faithful an SAE is to a model's activations, and what it costs the model when spliced in."""

    needs = ("logit-lens",)

    site: str | None = None
    """Where to splice; by default the site that the SAE names."""
    text: tuple[SourceName, ...] = ()
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT]; by default a sample that ships with trimtab."""
    run: Path | None = None
    """Directory to keep the result in, for `trimtab report`."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of the result."""

    name: str
    label: str
    """What is printed: the name in words, with its unit."""
    value: Interval
    digits: int = 3

    def __str__(self) -> str:
        return number_text(self.value, f".{self.digits}f")


@dataclass(frozen=True, kw_only=True, repr=False)
class CoreResult(Result):
    """Core metrics of one dictionary on one text, with 95% intervals bootstrapped over documents."""

    model: str
    model_fingerprint: str
    sae: str
    """The dictionary's name: what it was loaded by."""
    dictionary_fingerprint: str
    site: str
    architecture: str
    n_features: int
    documents: int
    tokens: int
    """Rows that were spliced."""
    predicted: int
    """Next tokens whose cross-entropy was measured."""
    excluded: dict[str, int]
    """Tokens left untouched, by reason."""
    norm_limit: float
    corpus_hash: str
    convention: str
    metrics: tuple[Metric, ...]
    density: FeatureDensity
    """Distribution of the features' firing rates on this text."""

    def __getitem__(self, name: str) -> Interval:
        return named({m.name: m.value for m in self.metrics}, name, "metric")

    def headline(self) -> str:
        return f"{self.sae} ({self.architecture}, {self.n_features:,} features) at {self.site} of {self.model}"

    def tables(self) -> dict[str, Table]:
        columns = [Column("measure", "label"), Column("value", "value", ".3f")]
        caption = f"{self.tokens:,} tokens of {self.documents:,} documents; 95% intervals over documents"
        return {"metrics": Table(columns=columns, rows=self.metrics, caption=caption)}

    def draw(self, ax: Axes) -> None:
        """Features by how often they fire."""
        plot_bars(ax, self.density.log10_edges, self.density.counts, "log10 of the firing rate")

    def render(self) -> str:
        """The result as a table of text."""
        width = max(len(m.label) for m in self.metrics)
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.excluded.items())
        lines = [
            self.headline(),
            f"{self.tokens:,} tokens of {self.documents:,} documents; left untouched: {left}",
            "",
            *(f"  {m.label:<{width}}  {m}" for m in self.metrics),
            f"  {'log10 firing rate':<{width}}  {self.density.render()}",
            "",
            self.convention,
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as plain values: everything above, metrics by name."""
        return json_safe(self) | {"metrics": {m.name: m.value.to_dict() for m in self.metrics}}


def run_core(config: CoreConfig) -> CoreResult:
    """Load what the config names and evaluate it.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `load_dictionary`, `read_documents`.
    """
    model, dictionary = config.load()
    corpus = config.corpus(config.text or (sample_text(),), model.tokenizer)
    packed = pack(corpus, config.split, config.holdout, config.context, model)
    with ExitStack() as stack:
        run = None
        if config.run is not None:
            ignored = ("run", "any_model")
            run = Run.open(config.run, "evaluate core", config, device=config.device, ignore_fields=ignored)
            stack.enter_context(run)
            run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint, "text": corpus.hash})
        meter = stack.enter_context(Meter("evaluating", 2 * len(packed)))
        result, _ = evaluate_core(model, dictionary, packed, config, site=config.site, progress=meter.advance)
        if run is not None:
            run.finish(result)
    return result


def evaluate(
    model: LanguageModel,
    dictionary: Dictionary,
    texts: Iterable[str | Document] | None = None,
    *,
    site: str | None = None,
    **options: Any,
) -> CoreResult:
    """How faithful a dictionary is to a model's activations over texts, and what splicing it in costs the model.

    Args:
        model: the model.
        dictionary: any; `load_dictionary` also takes SAE objects of other libraries.
        texts: each is a document, which intervals resample as a whole; by default a sample that ships with trimtab.
        site: where to splice; by default the site that the dictionary names.
        options: fields of `CoreOptions`, such as `context`, `batch_size` and `n_resamples`.

    Raises:
        UserError: the dictionary does not fit the model or the site, or there is too little text.
    """
    check_is_model(model)
    check_is_dictionary(dictionary)
    chosen = CoreOptions(**read_keywords(options, field_types(CoreOptions), evaluate))
    documents = read_documents([sample_text()]) if texts is None else as_documents(texts)
    packed = pack(tokenise(documents, model.tokenizer), chosen.split, chosen.holdout, chosen.context, model)
    with Meter("evaluating", 2 * len(packed)) as meter:
        return evaluate_core(model, dictionary, packed, chosen, site=site, progress=meter.advance)[0]


def evaluate_core(
    model: LanguageModel,
    dictionary: Dictionary,
    packed: PackedText,
    options: CoreOptions = DEFAULT_OPTIONS,
    *,
    site: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[CoreResult, Reconstruction]:
    """Evaluate a dictionary on packed text.

    Args:
        site: where to splice; by default the site that the dictionary names.
        progress: called with the number of sequences done; each is done twice.

    Returns:
        The metrics, and the sums from the reconstruction pass (features' counts and maxima among them).

    Raises:
        UserError: the dictionary does not fit the model or the site.
    """
    where = dictionary_site(model, dictionary, site)
    rebuilt = reconstruct(model, dictionary, where, packed, options, progress)
    mean = rebuilt.mean
    variants: dict[str, tuple[Replacement, bool]] = {
        "spliced": (lambda x: dictionary(x), False),
        "everywhere": (lambda x: dictionary(x), True),
        "mean": (lambda x: mean.expand_as(x), False),
        "zero": (lambda x: x * 0, False),
    }
    losses = splice_losses(model, where, packed, variants, options, rebuilt.norm_limit, progress)
    totals = rebuilt.totals
    result = CoreResult(
        model=model.name,
        model_fingerprint=model.fingerprint,
        sae=dictionary.name or f"unnamed dictionary {dictionary.fingerprint}",
        dictionary_fingerprint=dictionary.fingerprint,
        site=str(where),
        architecture=dictionary.info.architecture,
        n_features=dictionary.n_features,
        documents=len(totals.document),
        tokens=int(totals.rows.sum()),
        predicted=int(losses["targets"].sum()),
        excluded=rebuilt.excluded,
        norm_limit=rebuilt.norm_limit,
        corpus_hash=packed.corpus.hash,
        convention=_convention(packed.context, rebuilt.norm_limit, options),
        metrics=_metrics(dictionary, rebuilt, losses, options),
        density=feature_density(rebuilt.stats.firing_rate, rebuilt.stats.n_tokens),
    )
    return result, rebuilt


def _convention(context: int, norm_limit: float, options: CoreOptions) -> str:
    special = ", special tokens" if options.drop_special else ""
    return (
        f"Spliced: every token but position 0 of each {context}-token sequence{special} and rows of norm above "
        f"{norm_limit:.4g} ({options.outlier_norm:g} × median), which stay as they are. Cross-entropy is over every "
        "next token within its document. Firing rates, dead and dense are counts on the spliced tokens; coherence is "
        "|cos| between different decoder rows. Intervals: 95%, bootstrap over documents."
    )


def _metrics(
    dictionary: Dictionary, rebuilt: Reconstruction, losses: DocumentSums, options: CoreOptions
) -> tuple[Metric, ...]:
    def ratio(
        top: np.ndarray, bottom: np.ndarray, transform: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Interval:
        used = (top != 0) | (bottom != 0)
        if not bottom[used].sum():
            return _counted(float("nan"), int(used.sum()))
        return bootstrap_ratio_of_sums(
            top[used], bottom[used], transform=transform, n_resamples=options.n_resamples, seed=options.seed
        )

    r, n = rebuilt.totals, losses["targets"]
    ce = losses["ce"]
    rise = {name: losses[f"ce.{name}"] - ce for name in ("spliced", "everywhere", "mean", "zero")}
    kl, kl_zero = losses["kl.spliced"], losses["kl.zero"]
    rate = rebuilt.stats.firing_rate
    dead, dense = (_counted(float(share.mean()), len(r.document)) for share in (rate == 0, rate > DENSE_RATE))
    found = [
        ("l0", "L0 (features per token)", ratio(r.active, r.rows), 2),
        ("explained_variance", "explained variance", ratio(r.residual, r.variance, lambda q: 1 - q), 4),
        ("normalised_mse", "normalised MSE, Σ‖x−x̂‖²/Σ‖x‖²", ratio(r.residual, r.energy), 4),
        ("cosine", "cosine of x and x̂", ratio(r.cosine, r.rows), 4),
        ("ce", "cross-entropy, untouched (nats)", ratio(ce, n), 4),
        ("ce_increase", "cross-entropy increase, spliced (nats)", ratio(rise["spliced"], n), 4),
        ("kl", "KL(untouched ‖ spliced) (nats)", ratio(kl, n), 4),
        ("kl_recovered_zero", "  share of zero ablation's KL avoided", ratio(kl_zero - kl, kl_zero), 4),
        ("ce_increase_mean", "  increase, mean ablation", ratio(rise["mean"], n), 4),
        ("ce_increase_zero", "  increase, zero ablation", ratio(rise["zero"], n), 4),
        ("recovered_mean", "recovered against mean ablation", ratio(rise["mean"] - rise["spliced"], rise["mean"]), 4),
        ("recovered_zero", "recovered against zero ablation", ratio(rise["zero"] - rise["spliced"], rise["zero"]), 4),
        ("ce_increase_everywhere", "increase, every position spliced", ratio(rise["everywhere"], n), 4),
        ("dead_share", "features that never fired", dead, 4),
        ("dense_share", f"features on > {DENSE_RATE:.0%} of tokens", dense, 4),
    ]
    if (n_features := dictionary.n_features) > 1:
        alike = decoder_coherence(dictionary.directions)
        found += [
            ("coherence_mean", "coherence: nearest feature, mean", _counted(alike.mean, n_features), 4),
            ("coherence_max", "coherence: nearest pair", _counted(alike.max, n_features), 4),
        ]
    return tuple(Metric(name=name, label=label, value=value, digits=digits) for name, label, value, digits in found)


def _counted(value: float, n: int) -> Interval:
    nan = float("nan")
    return Interval(estimate=value, low=nan, high=nan, n=n, method="count")
