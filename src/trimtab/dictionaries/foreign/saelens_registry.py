"""Published SAEs by the names of SAELens's registry: `saelens:RELEASE/SAE_ID`.

A release's name has no slash, an SAE's id may have several: `saelens:gemma-scope-2b-pt-res/layer_20/width_16k/…`. The
extra `saelens` brings SAELens, which fetches and converts; what it made is then checked like any file of its layout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from trimtab.dictionaries.checked_weights import FoundSAE
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.saelens_layout import found_in_saelens
from trimtab.errors import UserError, did_you_mean

PREFIX = "saelens:"
_NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


def read_from_registry(name: str) -> FoundSAE:
    """Fetch `saelens:RELEASE/SAE_ID`, or take it from the hub's cache.

    Raises a `UserError` if SAELens is missing, has no such id or cannot reach the hub, or trimtab does not compute the
    SAE.
    """
    sae_lens, directory = _import(name)
    release, sae_id = split_name(name)
    if release not in directory:
        fix = did_you_mean(release, directory, f"write {PREFIX}RELEASE/SAE_ID")
        raise UserError(f"release {release!r}", f"SAELens has {len(directory):,} releases", fix)
    ids = directory[release].saes_map
    if sae_id not in ids:
        what = f"SAE {sae_id!r} of {release}" if sae_id else f"dictionary {name!r}"
        fix = did_you_mean(sae_id, ids, f"write {PREFIX}RELEASE/SAE_ID")
        raise UserError(what, f"the release has {len(ids):,} SAEs, such as {next(iter(ids))}", fix)
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            sae = sae_lens.SAE.from_pretrained(release, sae_id, device="cpu")
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "no details")
        reason = f"{type(error).__name__}: {said}"
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK:
            why = f"it is not in the hub's cache and could not be fetched ({reason})"
            hint = "check the connection and HF_ENDPOINT, and for a gated repository log in (hf auth login)"
        else:
            why, hint = f"SAELens could not load it ({reason})", "update sae-lens, or use another dictionary"
        raise UserError(f"dictionary {name!r}", why, hint) from error
    return found_in_saelens(Fields(sae.cfg.to_dict(), f"the config of {name}"), sae.state_dict(), name)


def split_name(name: str) -> tuple[str, str]:
    """`saelens:RELEASE/SAE_ID` in its parts; the first slash parts them."""
    release, _, sae_id = name.removeprefix(PREFIX).partition("/")
    return release, sae_id


def _import(name: str) -> tuple[Any, Mapping[str, Any]]:
    try:
        import sae_lens  # pyright: ignore[reportMissingImports]
        from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
            get_pretrained_saes_directory,
        )
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sae_lens"
        raise UserError(
            f"dictionary {name!r}",
            "SAELens is not installed" if missing else f"SAELens could not be imported ({error})",
            'pip install "trimtab[saelens]"',
        ) from error
    return sae_lens, get_pretrained_saes_directory()
