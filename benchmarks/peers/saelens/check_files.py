"""Do SAELens and trimtab read each other's files, and compute the same? Run it in SAELens's environment (../README.md).

Every SAE is random, with decoder norms from 0.5 to 2 and biases away from 0, so that no default hides a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes import sae as peer
from torch import Tensor

from trimtab.dictionaries import ARCHITECTURES, SAE, DictionaryInfo, load_dictionary, save_dictionary
from trimtab.dictionaries.saelens_layout import SAELENS_READS, SAELENS_VERSION

LIMIT = 1e-5
D, N, K, ROWS = 96, 512, 12, 400
METADATA = {"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_pre", "context_size": 64}


class Case(NamedTuple):
    """One SAE that went from one library to the other."""

    writer: str
    architecture: str
    settings: dict[str, Any]
    encode: float
    """max |ours − theirs| / max |theirs| over all codes."""
    decode: float
    """The same for reconstructions, each from its own codes."""
    support_differs: int
    """Codes that fire in one library only."""
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cases = [*ours_opened_by_saelens(Path(folder)), *saelens_opened_by_us(Path(folder))]
    largest = max(max(case.encode, case.decode) for case in cases)
    good = largest <= LIMIT and not any(case.support_differs for case in cases)
    result = {
        "sae_lens": sae_lens.__version__,
        "format_written": SAELENS_VERSION,
        "limit": LIMIT,
        "largest": largest,
        "good": good,
        "cases": [case._asdict() for case in cases],
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for case in cases:
            what = " ".join(f"{name}={value}" for name, value in case.settings.items())
            differences = f"encode {case.encode:.1e} decode {case.decode:.1e}"
            print(f"{case.writer:8} {case.architecture:21} {differences} {case.note} {what}")
        print(f"largest {largest:.1e}, limit {LIMIT:.0e}: {'good' if good else 'BAD'}")
    return 0 if good else 1


def ours_opened_by_saelens(folder: Path) -> list[Case]:
    cases = []
    for architecture in SAELENS_READS:
        for subtract in (True, False):
            for dtype in ("float32", "float16"):
                for rescale in (False, True) if architecture == "topk" else (None,):
                    settings: dict[str, Any] = {"apply_b_dec_to_input": subtract}
                    if rescale is not None:
                        settings |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
                    info = DictionaryInfo(architecture=architecture, model="gpt2", site="resid_pre.5")
                    ours = ARCHITECTURES[architecture](**random_weights(architecture), **settings, info=info)
                    path = save_dictionary(ours, folder / f"ours-{len(cases)}", dtype=dtype)
                    theirs = peer.SAE.load_from_disk(path)
                    assert theirs.cfg.architecture() == architecture
                    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"], "metadata did not arrive"
                    assert theirs.cfg.metadata.model_name == "gpt2"
                    assert all(parameter.dtype == torch.float32 for parameter in theirs.parameters())
                    if dtype == "float32":
                        cases.append(compare("trimtab", architecture, settings, ours, theirs, "as saved"))
                    cases.append(compare("trimtab", architecture, settings, load_dictionary(path), theirs, dtype))
    return cases


def saelens_opened_by_us(folder: Path) -> list[Case]:
    cases = []
    for architecture in SAELENS_READS:
        for subtract in (True, False):
            for rescale in (False, True) if architecture == "topk" else (None,):
                settings: dict[str, Any] = {"apply_b_dec_to_input": subtract}
                if rescale is not None:
                    settings |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
                cls, config = get_sae_class(architecture)
                theirs = cls(config(d_in=D, d_sae=N, metadata=peer.SAEMetadata(**METADATA), **settings))
                randomise(theirs, architecture)
                path = folder / f"theirs-{len(cases)}"
                theirs.save_model(path)
                cases.append(compare("saelens", architecture, settings, opened(path), theirs))
    cases += inference_saes_of_trained_ones(folder)
    return cases


def inference_saes_of_trained_ones(folder: Path) -> list[Case]:
    """What SAELens saves after training: batchtopk and matryoshka become jumprelu."""
    cases = []
    for architecture in ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"):
        for rescale in (False, True) if "topk" in architecture else (None,):
            settings = {} if rescale is None else {"k": K, "rescale_acts_by_decoder_norm": rescale}
            if architecture.startswith("matryoshka"):
                settings["matryoshka_widths"] = [N // 4, N]
            cls, config = get_sae_training_class(architecture)
            training = cls(config(d_in=D, d_sae=N, metadata=peer.SAEMetadata(**METADATA), **settings))
            randomise(training, architecture)
            if hasattr(training, "topk_threshold"):
                training.topk_threshold.fill_(0.7)
            path = folder / f"trained-{len(cases)}"
            training.save_inference_model(path)
            cases.append(
                compare("saelens", architecture, settings, opened(path), peer.SAE.load_from_disk(path), "trained")
            )
    return cases


def opened(path: Path) -> SAE:
    sae = load_dictionary(path)
    assert (sae.info.model, sae.info.site) == ("gpt2", "resid_pre.5"), sae.info
    return sae


def random_weights(architecture: str) -> dict[str, Tensor]:
    sizes = {"d": D, "n": N}
    shapes = ARCHITECTURES[architecture].shapes
    return {name: draw(name, [sizes[size] for size in shape.split()]) for name, shape in shapes.items()}


def randomise(peer: Any, architecture: str) -> None:
    for name, parameter in peer.named_parameters():
        parameter.data = draw(name, list(parameter.shape)).to(parameter.dtype)


def draw(name: str, shape: list[int]) -> Tensor:
    weight = torch.randn(shape)
    if name == "W_dec":
        return weight / weight.norm(dim=1, keepdim=True) * (0.5 + 1.5 * torch.rand(shape[0], 1))
    if name == "W_enc":
        return weight / shape[0] ** 0.5
    return 0.3 * (weight.abs() if name == "threshold" else weight)


def compare(writer: str, architecture: str, settings: dict[str, Any], ours: SAE, theirs: Any, note: str = "") -> Case:
    x = 3 * torch.randn(ROWS, D)
    f, f_peer = ours.encode(x), theirs.encode(x)
    assert (f_peer > 0).any(), "nothing fires, so nothing is compared"
    return Case(
        writer,
        architecture,
        settings,
        encode=relative(f, f_peer),
        decode=relative(ours.decode(f), theirs.decode(f_peer)),
        support_differs=int(((f > 0) != (f_peer > 0)).sum()),
        note=note,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    sys.exit(main())
