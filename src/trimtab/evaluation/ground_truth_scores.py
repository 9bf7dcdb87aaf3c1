"""One dictionary scored against rows whose features are known, and the controls that such scores are read beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.activations import LabelledRows, PlantedFeatures
from trimtab.dictionaries import SAE, CoreMetricsAccumulator, JumpReLU, Standard
from trimtab.dictionaries.base import Dictionary
from trimtab.evaluation.ground_truth_absorption import AbsorptionAccumulator
from trimtab.evaluation.ground_truth_metrics import FiringAccumulator, match_features, recovery

BLOCK_ROWS = 2048

Codes = Callable[[LabelledRows], Float[Tensor, "r n"]]
"""What a dictionary's features are on some rows."""


class GroundTruthScores(NamedTuple):
    """A dictionary's scores; see `Recovery`, `FiringScores` and `Absorption` for those that are not said here."""

    f1: float
    precision: float
    recall: float
    recovered: float
    true_to_learned: float
    learned_to_true: float
    matched_cosine: float
    magnitude_correlation: float
    magnitude_ratio: float
    splitting: float
    absorption: float
    missed_with_child: float
    missed_alone: float
    l0: float
    """Mean number of features that fire on a row."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²; that of the true dictionary leaves only the noise."""
    dead_share: float
    """Share of the dictionary's features that fired on no row."""


LABELS: dict[str, str] = {
    "f1": "F1 of firing",
    "precision": "precision of firing",
    "recall": "recall of firing",
    "recovered": "share of true features recovered",
    "true_to_learned": "max cosine, true to learned",
    "learned_to_true": "max cosine, learned to true",
    "matched_cosine": "cosine of matched pairs",
    "magnitude_correlation": "correlation of magnitudes",
    "magnitude_ratio": "magnitude, learned over true",
    "splitting": "learned features per true one",
    "absorption": "absorption rate",
    "missed_with_child": "parent silent with a child",
    "missed_alone": "parent silent alone",
    "l0": "L0",
    "explained_variance": "explained variance",
    "dead_share": "dead features",
}
"""The scores in words."""


@torch.no_grad()
def score(
    dictionary: Dictionary,
    rows: LabelledRows,
    planted: PlantedFeatures,
    *,
    threshold: float,
    codes: Codes | None = None,
) -> GroundTruthScores:
    """Score a dictionary.

    Args:
        dictionary: of the rows' width.
        rows: rows that it was not trained on.
        planted: what the rows are made of.
        threshold: cosine from which a true feature counts as found.
        codes: what its features are, if not what it encodes.

    Raises:
        ValueError: no feature of the dictionary fired.
    """
    encode = codes or (lambda block: dictionary.encode(block.x))
    core = CoreMetricsAccumulator(dictionary.d_in, dictionary.n_features)
    for block in rows.blocks(BLOCK_ROWS):
        f = encode(block)
        core.update(block.x, dictionary.decode(f), f, torch.zeros(len(f), dtype=torch.long))
    live = torch.from_numpy(np.flatnonzero(core.totals().firings))
    if not len(live):
        raise ValueError("no feature of the dictionary fired")
    learned, norms = dictionary.directions[live], dictionary.decoder_norms[live]
    matching = match_features(learned, planted.directions)
    matched, found = torch.from_numpy(matching.learned).clamp_min(0), torch.from_numpy(matching.learned >= 0)
    firing = FiringAccumulator(len(planted.directions))
    families = AbsorptionAccumulator(learned, planted.directions, planted.parent, matching, threshold)
    for block in rows.blocks(BLOCK_ROWS):
        f, a = encode(block)[:, live] * norms, block.codes
        firing.update(f[:, matched] * found, a)
        families.update(f, a)
    absorption, metrics = families.result(), core.metrics()
    return GroundTruthScores(
        **firing.result()._asdict(),
        **recovery(learned, planted.directions, matching, threshold)._asdict(),
        absorption=absorption.rate,
        missed_with_child=absorption.missed_with_child,
        missed_alone=absorption.missed_alone,
        l0=metrics.l0,
        explained_variance=metrics.explained_variance,
        dead_share=metrics.dead_share,
    )


class Control(NamedTuple):
    """A dictionary that was not trained."""

    dictionary: SAE
    codes: Codes | None = None


TRUE, TRUE_ENCODED, RANDOM, PRINCIPAL = (
    "true features, true codes",
    "true features, linear encoder",
    "random directions",
    "principal axes",
)


def controls(planted: PlantedFeatures, sample: Float[Tensor, "m d"], n_features: int, l0: float) -> dict[str, Control]:
    """What trained dictionaries are read beside.

    The true features with their true codes are the ceiling. The true features behind a linear encoder with the same
    rows and one threshold say what is lost by encoding in one step, whatever the training. Random directions and the
    principal axes (each with both signs), encoded likewise, are what needs no learning of features.

    Args:
        planted: the truth.
        sample: rows, for mean, principal axes and thresholds.
        n_features: random directions.
        l0: features that are active on a row of the sample, on average.
    """
    mean = sample.mean(0)
    generator = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(n_features, len(mean), generator=generator), dim=1)
    axes = torch.linalg.svd(sample - mean, full_matrices=False).Vh
    true = planted.directions
    oracle = Standard(true.T.contiguous(), torch.zeros(len(true)), true.clone(), planted.offset.clone())
    return {
        TRUE: Control(oracle, lambda block: block.codes),
        TRUE_ENCODED: Control(_tied(true, planted.offset, sample, l0)),
        RANDOM: Control(_tied(random, mean, sample, l0)),
        PRINCIPAL: Control(_tied(torch.cat([axes, -axes]), mean, sample, l0)),
    }


def _tied(rows: Float[Tensor, "n d"], bias: Float[Tensor, " d"], sample: Float[Tensor, "m d"], l0: float) -> JumpReLU:
    """Unit rows as encoder and decoder, with the threshold that leaves so many active."""
    codes = ((sample - bias) @ rows.T).flatten()
    active = min(max(1, round(l0 * len(sample))), len(codes) - 1)
    threshold = codes.kthvalue(len(codes) - active).values.clamp_min(0)
    return JumpReLU(
        rows.T.contiguous(),
        torch.zeros(len(rows)),
        rows.clone(),
        bias.clone(),
        threshold=threshold.expand(len(rows)).clone(),
    )
