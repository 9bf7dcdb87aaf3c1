"""Does trimtab read what dictionary_learning saves, and compute the same? Run it in its environment (../README.md).

First every class with random weights (decoder norms from 0.5 to 2, biases and thresholds away from 0, so that no
default hides a mistake), then what its own `trainSAE` saves after a few steps with each of its trainers, with and
without scaled activations. Both libraries open the same directory, each with its own loader.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary as open_theirs
from torch import Tensor

from trimtab.dictionaries import load_dictionary
from trimtab.dictionaries.foreign.dictionary_learning import CLASSES

LIMIT = 1e-5
D, N, K, ROWS, STEPS = 96, 512, 12, 400, 20
GROUPS = [128, 384]
PLACE = {"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}

MODULES: dict[str, Any] = {
    "AutoEncoder": lambda: AutoEncoder(D, N),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, N),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, N),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, N),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, N, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, N, K, GROUPS),
}
SPARSE: dict[str, Any] = {"k": K, "threshold_start_step": 5}
ANNEALED: dict[str, Any] = {"anneal_start": 10, "p_end": 0.2}
TRAINERS: dict[Any, dict[str, Any]] = {
    StandardTrainer: {},
    StandardTrainerAprilUpdate: {},
    PAnnealTrainer: ANNEALED,
    GatedSAETrainer: {},
    GatedAnnealTrainer: ANNEALED,
    JumpReluTrainer: {},
    TopKTrainer: SPARSE,
    BatchTopKTrainer: SPARSE,
    MatryoshkaBatchTopKTrainer: {**SPARSE, "group_fractions": [size / N for size in GROUPS]},
}


class Case(NamedTuple):
    """One directory that both libraries opened."""

    made_by: str
    dict_class: str
    encode: float
    """max |ours − theirs| / max |theirs| over all codes."""
    decode: float
    """The same for reconstructions, each from its own codes."""
    support_differs: int
    """Codes that fire in one library only."""


class Rows:
    """The same batches at every reading; `trainSAE` scales them in place and reads them twice."""

    config: dict[str, Any] = {"io": "out", "ctx_len": 128}  # noqa: RUF012

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS + 1):
            yield 3 * torch.randn(256, D, generator=generator)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        cases = [*random_ones(Path(folder)), *trained_ones(Path(folder))]
    largest = max(max(case.encode, case.decode) for case in cases)
    good = largest <= LIMIT and not any(case.support_differs for case in cases)
    if arguments.json:
        result = {"dictionary_learning": version("dictionary-learning"), "limit": LIMIT, "largest": largest}
        print(json.dumps({**result, "good": good, "cases": [case._asdict() for case in cases]}))
    else:
        for case in cases:
            differences = f"encode {case.encode:.1e} decode {case.decode:.1e} support {case.support_differs}"
            print(f"{case.made_by:38} {case.dict_class:23} {differences}")
        print(f"largest {largest:.1e}, limit {LIMIT:.0e}: {'good' if good else 'BAD'}")
    return 0 if good else 1


def random_ones(folder: Path) -> list[Case]:
    assert set(MODULES) == set(CLASSES), "a class is not compared"
    cases = []
    for dict_class, make in MODULES.items():
        module = make()
        randomise(module)
        path = folder / dict_class
        path.mkdir()
        trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "k": K, **PLACE}
        (path / "config.json").write_text(json.dumps({"trainer": trainer}))
        torch.save(module.state_dict(), path / "ae.pt")
        cases.append(compare(path, "random weights"))
    return cases


def trained_ones(folder: Path) -> list[Case]:
    cases = []
    for scaled in (False, True):
        for number, (trainer, own) in enumerate(TRAINERS.items()):
            place = {
                name: PLACE[name] for name in PLACE if trainer is not GatedAnnealTrainer or name in ("layer", "lm_name")
            }
            config = {
                "trainer": trainer,
                "steps": STEPS,
                "activation_dim": D,
                "dict_size": N,
                "lr": 1e-3,
                "warmup_steps": 2,
                "device": "cpu",
                "seed": 0,
                **({} if "k" in own else {"sparsity_warmup_steps": 4}),
                **place,
                **own,
            }
            save = folder / f"trained-{scaled}-{number}"
            trainSAE(
                Rows(), [config], steps=STEPS, save_dir=str(save), normalize_activations=scaled, device="cpu"
            )  # the scale goes into the biases before saving
            cases.append(compare(save / "trainer_0", f"{trainer.__name__}{', scaled rows' * scaled}"))
    return cases


def randomise(module: Any) -> None:
    for name, parameter in module.named_parameters():
        shape = parameter.shape
        weight = torch.randn(shape)
        if name in ("decoder.weight", "W_dec"):
            features = 0 if name == "W_dec" else 1
            weight /= weight.norm(dim=1 - features, keepdim=True)
            weight *= 0.5 + 1.5 * torch.rand(N).unsqueeze(1 - features)
        elif weight.ndim == 2:
            weight /= D**0.5
        else:
            weight *= 0.3
        parameter.data = weight.abs() if name == "threshold" else weight
    if "threshold" in dict(module.named_buffers()):
        module.threshold.fill_(0.7)


def compare(path: Path, made_by: str) -> Case:
    theirs, config = open_theirs(str(path), device="cpu")
    ours = load_dictionary(path)
    assert ours.info.model == PLACE["lm_name"]
    x = 3 * torch.randn(ROWS, D)
    with torch.no_grad():
        f, f_peer = ours.encode(x), theirs.encode(x)
        assert (f_peer > 0).any(), "nothing fires, so nothing is compared"
        return Case(
            made_by,
            config["trainer"]["dict_class"],
            encode=relative(f, f_peer),
            decode=relative(ours.decode(f), theirs.decode(f_peer)),
            support_differs=int(((f > 0) != (f_peer > 0)).sum()),
        )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    sys.exit(main())
