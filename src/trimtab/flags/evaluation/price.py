"""The price of flags: perplexity on general text, the divergence from the original model there, and an unrelated task.

Nothing is forced or switched: this is what everyone pays who loads the model and leaves its flags alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.activations import PackedText
from trimtab.control.task_prompts import TaskPrompts
from trimtab.evaluation.documents import DocumentSums, EvaluationBatch, batches
from trimtab.flags.evaluation.measured import MOMENT, Measured, Moment, Part, Series, curves
from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.lm.token_statistics import kl_divergence
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import input_site
from trimtab.runs.figures import plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, Column, Table
from trimtab.stats import Interval, Resamples, bootstrap_difference, bootstrap_mean, number_text
from trimtab.stats.resamples import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK_BYTES = 64 << 20
"""Of the logits that are held at once, per model."""


class GeneralText:
    """Some sequences of text, and what the original model makes of them, computed when it is first needed.

    Args:
        original: the model before it was finetuned.
        packed: the text.
        tokens: about so many are read, evenly spaced over the text.
        batch_size: sequences of a pass.
    """

    def __init__(self, original: LanguageModel, packed: PackedText, tokens: int, batch_size: int) -> None:
        self.original, self.documents = original, len(packed.corpus.ids)
        n = min(len(packed), max(1, tokens // packed.context))
        self.which = np.linspace(0, len(packed) - 1, n).round().astype(np.int64)
        self._packed, self._batch_size = packed, batch_size

    def __len__(self) -> int:
        return len(self.which)

    def batches(self, model: LanguageModel) -> Iterator[EvaluationBatch]:
        """The sequences on a model's device."""
        return batches(self._packed, self._batch_size, [], model.device, self.which)

    @cached_property
    def hidden(self) -> list[Float[Tensor, "R d"]]:
        """What the original's last layer gives at the places that are predicted from, batch by batch."""
        return [final_rows(self.original, batch) for batch in self.batches(self.original)]


@torch.no_grad()
def final_rows(model: LanguageModel, batch: EvaluationBatch) -> Float[Tensor, "R d"]:
    """What the last layer gives at the places that are predicted from."""
    end = input_site(model.n_layers)
    return capture(model, batch.tokens, [end])[end][batch.target]


@torch.no_grad()
def price_values(
    model: LanguageModel,
    text: GeneralText,
    task: TaskPrompts | None,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Cross-entropy and KL(original ‖ model), in nats summed over each document, and the rewards of a task's items.

    Args:
        model: the model.
        text: general text.
        task: items of an unrelated task; None for none.
        batch_size: items answered together.
        progress: told of the sequences done.
    """
    sums = DocumentSums(text.documents)
    heads = [Unembedding(each) for each in (text.original, model)]
    rows = max(1, _BLOCK_BYTES // (4 * heads[0].vocab_size))
    checked = False
    for batch, before in zip(text.batches(model), text.hidden, strict=True):
        after = before if model is text.original else final_rows(model, batch)
        at, time = batch.target.nonzero(as_tuple=True)
        document, target = batch.document[at, time], batch.tokens.ids[at, time + 1]
        if not checked:
            _check_head(model, heads[1], batch)
            checked = True
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            p, q = (
                head.logits(hidden[part].to(model.device)) for head, hidden in zip(heads, (before, after), strict=True)
            )
            losses = torch.nn.functional.cross_entropy(q, target[part], reduction="none")
            sums.add("targets", document[part], torch.ones(len(losses)))
            sums.add("cross_entropy", document[part], losses)
            sums.add("kl", document[part], kl_divergence(p, q))
        if progress:
            progress(len(batch.document))
    used = sums["targets"] > 0
    found = [Measured({"what": name}, sums[name][used]) for name in ("targets", "cross_entropy", "kl")]
    if task is not None:
        outcomes = task.outcomes(task.decode(model, batch_size=batch_size))
        found.append(Measured({"what": "task"}, np.array([one.reward for one in outcomes], dtype=np.float64)))
    return found


def _check_head(model: LanguageModel, head: Unembedding, batch: EvaluationBatch) -> None:
    """Raise a `UserError` if the model's logits are not final norm and head of its last layer."""
    one, end = TokenBatch.full(batch.tokens.ids[:1]), input_site(model.n_layers)
    head.check(capture(model, one, [end])[end][0, -1], model.forward(one, last=1)[0, -1])


@dataclass(frozen=True, kw_only=True)
class ModelPrice:
    """What one model is like with its flags left alone."""

    moment: Moment
    perplexity: Interval
    """On general text."""
    increase: Interval | None
    """Over the original's, as a share."""
    kl: Interval | None
    """KL(original ‖ model) of the next-token distributions there, in nats per token."""
    task: Interval | None
    """Mean reward on the unrelated task."""
    task_change: Interval | None
    """Above the original's."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Price(Result):
    """What flags cost; 95% intervals over documents and items."""

    task: str
    """The unrelated task; empty where there is none."""
    models: tuple[ModelPrice, ...]

    def headline(self) -> str:
        last = {row.moment.run: row for row in self.models}
        said = [
            f"{run} {number_text(row.increase, '+.1%')}, KL {number_text(row.kl, NUMBER)} nats"
            for run, row in last.items()
        ]
        return f"perplexity on general text: {'; '.join(said)}"

    def tables(self) -> dict[str, Table]:
        columns = [
            *MOMENT, Column("perplexity", "perplexity", ".2f"), Column("increase", "increase", "+.1%"),
            Column("KL to the original", "kl", NUMBER, note="nats per token"),
        ]  # fmt: skip
        if self.task:
            columns += [
                Column(self.task, "task", ".1%", spare=1), Column("change", "task_change", "+.1%", spare=1),
            ]  # fmt: skip
        caption = "Flags left alone. 95% intervals over documents, for the task over items; paired with the original."
        return {"price": Table(columns=columns, rows=self.models, caption=caption)}

    def draw(self, ax: Axes) -> None:
        """Perplexity over steps, a curve for each run."""
        plot_curves(ax, curves(self.models, "perplexity"), "perplexity", steps="step")


def price_result(series: Sequence[Series], task: str, *, n_resamples: int = 1000, seed: int = 0) -> Price:
    """Intervals of what `price_values` measured.

    Args:
        series: of each run.
        task: name of the unrelated task; empty for none.
        n_resamples, seed: of the bootstrap over documents.
    """
    found: list[ModelPrice] = []
    for one in series:
        first = one.parts[0]
        resamples = Resamples(np.arange(len(first.of(what="targets"))), n_resamples=n_resamples, seed=seed)
        for moment, part in zip(one.moments, one.parts, strict=True):
            later = moment.step > 0
            rise = part.of(what="cross_entropy") - first.of(what="cross_entropy")
            rewards = [each.of(what="task") for each in (part, first)] if task else None
            found.append(
                ModelPrice(
                    moment=moment,
                    perplexity=_per_token(part, part.of(what="cross_entropy"), resamples, np.exp),
                    increase=_per_token(part, rise, resamples, np.expm1) if later else None,
                    kl=_per_token(part, part.of(what="kl"), resamples) if later else None,
                    task=bootstrap_mean(rewards[0], seed=seed) if rewards else None,
                    task_change=bootstrap_difference(*rewards, seed=seed) if rewards and later else None,
                )
            )
    return Price(task=task, models=tuple(found))


def _per_token(
    part: Part,
    sums: NDArray[np.float64],
    resamples: Resamples,
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda x: x,
) -> Interval:
    return resamples.of(lambda w: transform(ratio(sums, part.of(what="targets"), w))).interval
