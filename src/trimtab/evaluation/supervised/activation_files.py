"""Activations of prompts on disk, so that a run that goes on, and the stages of a study, read the model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.cross_sections import Values, activations_of
from trimtab.lm import LanguageModel
from trimtab.runs import atomic_path, text_id
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt


def kept_activations(
    file: Path,
    model: LanguageModel,
    ioi: IOIDistribution,
    prompts: Sequence[IOIPrompt],
    locations: Sequence[Location],
    progress: Callable[[int], None] | None = None,
) -> Values:
    """`activations_of`, from a file where it is of the same model, prompts and locations; it is written otherwise.

    Raises:
        UserError: the file is damaged, or the disk refuses.
    """
    about = text_id(str((model.fingerprint, [prompt.text for prompt in prompts], list(map(str, locations)))))
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as found:
                if (found.metadata() or {}).get("of") == about:
                    if progress is not None:
                        progress(len(prompts))
                    return {location: found.get_tensor(str(location)) for location in locations}
        except (OSError, SafetensorError) as error:
            raise UserError(str(file), f"not readable ({error})".splitlines()[0], "remove it") from error
    x = activations_of(model, ioi, prompts, locations, progress=progress)
    with atomic_path(file) as partial:
        save_file({str(location): rows.contiguous() for location, rows in x.items()}, partial, {"of": about})
    return x
