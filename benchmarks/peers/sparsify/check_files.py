"""Does trimtab read what sparsify saves, and compute the same? Run it in its environment (../README.md).

Random weights, with decoder norms from 0.5 to 2 and biases away from 0, so that no default hides a mistake, saved by
sparsify itself in several precisions and opened by both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError

LIMIT = 1e-5
D, N, K, ROWS = 96, 512, 12, 400


class Case(NamedTuple):
    """One directory that both libraries opened."""

    settings: dict[str, Any]
    dtype: str
    encode: float
    """max |ours − theirs| / max |theirs| over all codes."""
    decode: float
    """The same for reconstructions, each from its own codes."""
    support_differs: int
    """Codes that fire in one library only."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = Path(folder) / "run"
        cases = [
            compare(run / f"{number}" / "layers.3", settings, dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
            for number, settings in enumerate(
                [
                    {"num_latents": N},
                    {"num_latents": 0, "expansion_factor": 4},
                    {"num_latents": N, "normalize_decoder": False},
                    {"num_latents": N, "multi_topk": True},
                ]
            )
        ]
        refused = [check_refused(run / "refused" / name, {name: value}) for name, value in REFUSED.items()]
    largest = max(max(case.encode, case.decode) for case in cases)
    good = largest <= LIMIT and not any(case.support_differs for case in cases)
    if arguments.json:
        result = {"sparsify": version("eai-sparsify"), "limit": LIMIT, "largest": largest, "good": good}
        print(json.dumps({**result, "refused": refused, "cases": [case._asdict() for case in cases]}))
    else:
        for case in cases:
            what = " ".join(f"{name}={value}" for name, value in case.settings.items())
            differences = f"encode {case.encode:.1e} decode {case.decode:.1e} support {case.support_differs}"
            print(f"{case.dtype:8} {differences} {what}")
        print(f"refused, as they should be: {', '.join(refused)}")
        print(f"largest {largest:.1e}, limit {LIMIT:.0e}: {'good' if good else 'BAD'}")
    return 0 if good else 1


REFUSED = {"transcode": True, "skip_connection": True, "activation": "groupmax"}


def random_coder(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> SparseCoder:
    coder = SparseCoder(D, SparseCoderConfig(k=K, **settings), dtype=dtype)
    n = coder.num_latents
    rows = torch.randn(n, D)
    coder.W_dec.data = (rows / rows.norm(dim=1, keepdim=True) * (0.5 + 1.5 * torch.rand(n, 1))).to(dtype)
    coder.encoder.weight.data = (torch.randn(n, D) / D**0.5).to(dtype)
    coder.encoder.bias.data = (0.3 * torch.randn(n)).to(dtype)
    coder.b_dec.data = (0.3 * torch.randn(D)).to(dtype)
    return coder


def compare(path: Path, settings: dict[str, Any], dtype: torch.dtype) -> Case:
    random_coder(settings, dtype).save_to_disk(path)
    theirs = SparseCoder.load_from_disk(path).float()
    ours = load_dictionary(path)
    assert ours.info.site == "resid_post.3", ours.info
    x = 3 * torch.randn(ROWS, D)
    top = theirs.encode(x)
    f_peer = torch.zeros(ROWS, theirs.num_latents).scatter_(1, top.top_indices, top.top_acts)
    assert (f_peer > 0).any(), "nothing fires, so nothing is compared"
    f = ours.encode(x)
    return Case(
        settings,
        str(dtype).removeprefix("torch."),
        encode=relative(f, f_peer),
        decode=relative(ours.decode(f), theirs.decode(top.top_acts, top.top_indices)),
        support_differs=int(((f > 0) != (f_peer > 0)).sum()),
    )


def check_refused(path: Path, settings: dict[str, Any]) -> str:
    random_coder({"num_latents": N, **settings}).save_to_disk(path)
    (name,) = settings
    try:
        load_dictionary(path)
    except UserError as error:
        said = error.line
    else:
        said = "nothing"
    assert f"field {name} = " in said, f"{settings} should be refused, and trimtab said {said}"
    return name


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    sys.exit(main())
