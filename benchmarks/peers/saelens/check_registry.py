"""Does `saelens:RELEASE/SAE_ID` reach SAELens's real registry? Run it in SAELens's environment (../README.md).

No hub is asked. Every id of the registry must be understood; a release whose SAEs are in dictionary_learning's format
is served from a directory with random weights in place of the hub, and what SAELens makes of it must compute what
trimtab's own reader of that format makes of the same directory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import Tensor

from trimtab.dictionaries import load_dictionary
from trimtab.dictionaries.foreign.saelens_registry import PREFIX, split_name
from trimtab.errors import UserError

LIMIT = 1e-5
D, N, K = 64, 256, 12
FORMAT = "dictionary_learning_1"
PLAIN = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "b_dec": (D,)}
GATED = {name: (N,) for name in ("gate_bias", "mag_bias", "r_mag")}
CLASSES: dict[str, dict[str, tuple[int, ...]]] = {
    "GatedAutoEncoder": {"encoder.weight": (N, D), "decoder.weight": (D, N), "decoder_bias": (D,), **GATED},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (N,)},
    "AutoEncoderTopK": LINEAR,
    "BatchTopKSAE": {**LINEAR, "threshold": ()},
    "MatryoshkaBatchTopKSAE": {**PLAIN, "threshold": ()},
}
"""Without AutoEncoder, whose norms dictionary_learning folds and SAELens does not."""


def main() -> int:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    registry = get_pretrained_saes_directory()
    ids = {release: list(entry.saes_map) for release, entry in registry.items()}
    for release, names in ids.items():
        for name in names:
            assert split_name(f"{PREFIX}{release}/{name}") == (release, name), (release, name)
    release = next(name for name, entry in registry.items() if entry.conversion_func == FORMAT)
    name = f"{PREFIX}{release}/{ids[release][0]}"
    refusals = [
        refusal(name, "could not be fetched"),
        refusal(name[:-1], "did you mean"),
        refusal(f"{PREFIX}gemma-scope-2b-res/x", "did you mean gemma-scope-2b-pt-res"),
    ]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cases = {dict_class: compare(name, dict_class, Path(folder)) for dict_class in CLASSES}
    largest = max(cases.values())
    print(f"SAELens {sae_lens.__version__}: {len(ids)} releases, {sum(map(len, ids.values())):,} ids")
    for line in refusals:
        print(f"  {line[:160]}")
    for dict_class, difference in cases.items():
        print(f"{name}, a {dict_class}: {difference:.1e}")
    print(f"largest {largest:.1e}, limit {LIMIT:.0e}: {'good' if largest <= LIMIT else 'BAD'}")
    return 0 if largest <= LIMIT else 1


def compare(name: str, dict_class: str, folder: Path) -> float:
    """Relative difference of reconstructions between SAELens's reading of a directory and ours."""
    path = folder / dict_class
    path.mkdir()
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "k": K, "layer": 3, "lm_name": "o/m"}
    config = {"trainer": {**trainer, "submodule_name": "resid_post"}, "buffer": {"ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {weight: draw(weight, shape) for weight, shape in CLASSES[dict_class].items()}
    torch.save(tensors, path / "ae.pt")
    pretrained_sae_loaders.hf_hub_download = lambda *_, **asked: serve(path, asked)
    theirs, ours = load_dictionary(name), load_dictionary(path)
    assert theirs.architecture == ours.architecture
    assert theirs.info.site == ours.info.site == "resid_post.3"
    x = 3 * torch.randn(200, D)
    expected = ours(x)
    assert torch.equal(theirs.encode(x) > 0, ours.encode(x) > 0)
    return float((theirs(x) - expected).abs().max() / expected.abs().max())


def serve(path: Path, asked: dict[str, Any]) -> str:
    return str(path / Path(asked["filename"]).name)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    weight = torch.randn(shape)
    if len(shape) == 2:
        return weight / D**0.5
    return 0.3 * (weight.abs() if name == "threshold" else weight)


def refusal(name: str, part: str) -> str:
    try:
        load_dictionary(name)
    except UserError as error:
        said = error.line
    else:
        said = "nothing"
    assert part in said, f"{name} should be refused, and trimtab said {said}"
    return said


if __name__ == "__main__":
    sys.exit(main())
