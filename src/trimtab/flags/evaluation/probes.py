"""Probes: whether concepts can be read from activations, by logistic regression and by a small network.

Dimensions are standardised by the prompts that are fitted on, and rotated onto their principal components, which a
penalised linear probe does not notice and which leaves no more columns than there are prompts.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

ProbeKind = Literal["linear", "nonlinear"]
PROBES: tuple[ProbeKind, ...] = get_args(ProbeKind)
STRENGTH = 0.03
"""Inverse of the L2 penalty of logistic regressions."""
HIDDEN, PENALTY, ITERATIONS = 32, 3.0, 100
"""Hidden units of the network, its L2 penalty, and steps of L-BFGS."""


def fit_probes(
    fitted: Float[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n C"],
    reported: Float[np.ndarray, "N d"],
    seed: int = 0,
) -> dict[ProbeKind, Float[np.ndarray, "N C"]]:
    """Fit probes of each concept on some examples, and score others.

    Args:
        fitted: activations that probes are fitted on.
        labels: which of them have which concepts; each has and lacks some.
        reported: activations to score.
        seed: of the network's first weights.

    Returns:
        Scores of `linear`, a logistic regression for each concept, and `nonlinear`, one network with an output for
        each; larger where a concept is likelier. Only their order means something.
    """
    x, y = principal_components(fitted, reported)
    if not x.shape[1]:  # nothing varies
        return dict.fromkeys(PROBES, np.zeros((len(reported), labels.shape[1])))
    linear = [
        LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=300).fit(x, on).decision_function(y)
        for on in labels.T
    ]
    network = MLPClassifier(
        (HIDDEN,), activation="tanh", solver="lbfgs", alpha=PENALTY, max_iter=ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many steps are the recipe
        network.fit(x, labels if labels.shape[1] > 1 else labels[:, 0])
    chances = np.asarray(network.predict_proba(y), dtype=np.float64)
    return {
        "linear": np.stack(linear, axis=-1).astype(np.float64),
        "nonlinear": chances if labels.shape[1] > 1 else chances[:, 1:],
    }


def principal_components(
    fitted: Float[np.ndarray, "n d"], others: Float[NDArray[np.floating], "N d"]
) -> tuple[Float[np.ndarray, "n k"], Float[NDArray[np.float64], "N k"]]:
    """Both standardised by the first and rotated onto its principal components; dimensions that are constant count
    as 0."""
    x, y = np.asarray(fitted, dtype=np.float64), np.asarray(others, dtype=np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    varies = scale > 1e-6 * max(float(np.abs(mean).max(initial=0)), 1e-12)
    x, y = (np.where(varies, (each - mean) / np.where(varies, scale, 1), 0) for each in (x, y))
    _, sizes, axes = np.linalg.svd(x, full_matrices=False)
    kept = axes[sizes > 1e-9 * max(float(sizes.max(initial=0)), 1e-12)].T
    return x @ kept, y @ kept
