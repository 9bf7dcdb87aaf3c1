"""Supervised codes as dictionaries, one for each location, which every command takes once they are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo, FeatureStatsAccumulator, Supervised, save_dictionary
from trimtab.dictionaries.base import FEATURE_NAMES
from trimtab.dictionaries.describing import READ_ACCURACY
from trimtab.errors import check_one_of
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.codes import FACTORS, FITS, Codes, Factors, Parametrisation
from trimtab.evaluation.supervised.reading import discriminant_scores, leftover_scores, read_accuracy
from trimtab.lm import LanguageModel
from trimtab.runs import text_id
from trimtab.tasks.ioi_prompts import IOIPrompt


def directory_name(location: Location) -> str:
    """What a location's files are called: `attn_z.23.0-END`."""
    return f"{location.site}-{location.position.replace('+', 'plus')}"


@torch.no_grad()
def dictionary_of(
    x: Float[Tensor, "P w"],
    factors: Factors,
    rows: Tensor,
    codes: Codes,
    info: DictionaryInfo | None = None,
) -> Supervised:
    """Codes with an encoder that reads their values, and statistics of its features on the same prompts.

    Args:
        x: activations of the P prompts that the codes were fitted on.
        factors: the values that have a code.
        rows: of these prompts.
        codes: of a fit.
        info: where they come from; what features mean is added.
    """
    scores, left = discriminant_scores(x, codes.mean, factors, rows), leftover_scores(x, codes, rows)
    vectors = codes.vectors.double()
    size = vectors.norm(dim=1)
    info = info or DictionaryInfo(architecture=Supervised.architecture)
    info.metadata[FEATURE_NAMES] = factors.names
    found = Supervised(
        W_enc=scores.W.float(),
        b_enc=scores.b.float(),
        W_dec=(vectors / torch.where(size > 0, size, 1.0)[:, None]).float(),
        b_dec=codes.mean.float(),
        size=size.float(),
        W_left=left.W.float(),
        b_left=left.b.float(),
        factors=[len(values) for values in factors.values],
        info=info,
    )
    stats = FeatureStatsAccumulator(found.decoder_norms)
    stats.update(found.encode_sparse(x.float()))
    found.feature_stats = stats.result(corpus_hash=str(info.metadata.get("prompts_hash", "")))
    return found


def build_codes(
    model: LanguageModel,
    activations: Mapping[Location, Float[Tensor, "P width"]],
    prompts: Sequence[IOIPrompt],
    heldout: Mapping[Location, Float[Tensor, "Q width"]],
    heldout_prompts: Sequence[IOIPrompt],
    *,
    fit: str = "mse",
    parametrisation: Parametrisation = "independent",
    progress: Callable[[int], None] | None = None,
) -> dict[Location, Supervised]:
    """Fit supervised codes at each location, and scores that read their values from activations.

    A dictionary is given activations alone. It therefore reads the values, and is wrong where they cannot be read: how
    often is measured on the held-out prompts, and stands in its metadata (`read_accuracy`). Codes that are told the
    values are `FITS[fit]`.

    Args:
        model: what the activations are of.
        activations: of the prompts that codes are fitted on, by location.
        prompts: these P prompts.
        heldout: activations of other prompts, at the same locations.
        heldout_prompts: these Q prompts.
        fit: `mean` or `mse`.
        parametrisation: `independent`, `coupled` or `names`.
        progress: called with 1 whenever a location is done.

    Returns:
        One dictionary for each location. `info.metadata` holds its position, fit, parametrisation and read accuracy.

    Raises:
        UserError: no such fit or parametrisation, or a value of a held-out prompt that no fitted prompt had.
    """
    check_one_of("fit", fit, FITS)
    check_one_of("parametrisation", parametrisation, FACTORS)
    factors = Factors.of(prompts, parametrisation)
    rows, others = factors.rows(prompts), factors.rows(heldout_prompts)
    digest = text_id("\n".join(prompt.text for prompt in prompts))
    found = {}
    for location, x in activations.items():
        info = DictionaryInfo(
            architecture=Supervised.architecture,
            model=model.name,
            site=str(location.site),
            metadata={
                "position": location.position,
                "fit": fit,
                "parametrisation": parametrisation,
                "prompts": len(prompts),
                "prompts_hash": digest,
                "model_fingerprint": model.fingerprint,
            },
        )
        sae = dictionary_of(x, factors, rows, FITS[fit](x, factors, rows), info)
        accuracy = read_accuracy(sae.read(heldout[location]), others, factors)
        info.metadata[READ_ACCURACY] = {factor: value.to_dict() for factor, value in accuracy.items()}
        found[location] = sae
        if progress is not None:
            progress(1)
    return found


def save_codes(dictionaries: Mapping[Location, Supervised], directory: str | Path) -> dict[Location, Path]:
    """Save each location's dictionary in a directory below one that `load_dictionaries` takes.

    Raises:
        UserError: the disk refuses.
    """
    return {
        location: save_dictionary(dictionary, Path(directory) / directory_name(location))
        for location, dictionary in dictionaries.items()
    }
