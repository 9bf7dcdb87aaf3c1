"""steering-vectors uses what trimtab exports, and trimtab reads what steering-vectors saves; see ../README.md.

Both need other versions of transformers, so that each side runs in its own environment: this script in trimtab's, which
starts `their_side.py` in the peer's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from trimtab.lm import LanguageModel
from trimtab.steering import Steering, VectorSource
from trimtab.steering.exchange import export_steering, import_steering

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".venvs" / "steering_vectors" / "bin" / "python"
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)),
    "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)),
}
TOLERANCE = 1e-4
"""Of logits, in absolute terms; those here are of size 1 to 10."""


def write(directory: Path, name: str) -> tuple[LanguageModel, dict[int, torch.Tensor]]:
    """A model, its steering in steering-vectors' file, and what trimtab makes of it."""
    torch.manual_seed(0)
    hf = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    hf.save_pretrained(directory / "model")
    model = LanguageModel.around(hf)
    rows = torch.randn(2, 32)
    source = VectorSource({"resid_post.0": rows[0], "resid_post.2": rows}, doses=3.0, unit="absolute", positions="all")
    steering = Steering.of(model, source, about="sea")
    export_steering(steering, directory / "sea.pt")
    ids = torch.randint(1, 96, (2, 7))  # 0 is padding
    with torch.no_grad():
        unsteered = hf(ids).logits
        with steering.applied(hf):
            steered = hf(ids).logits
            tokens = hf.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    units = rows / rows.norm(dim=1, keepdim=True)
    layers = {0: 3 * units[0], 2: 3 * units.sum(0)}
    expected = {"ids": ids, "unsteered": unsteered, "steered": steered, "tokens": tokens[:, 7:].contiguous()}
    expected |= {f"layer.{layer}": row.contiguous() for layer, row in layers.items()}
    save_file(expected, directory / "expected.safetensors")
    return model, layers


def read(directory: Path, model: LanguageModel, layers: dict[int, torch.Tensor]) -> float:
    """The largest difference of what steering-vectors pickled, read without its code."""
    found = import_steering(directory / "theirs.pt", model)
    vectors = {part.site: part.dose[0] * found.directions[part.site][0] for part in found.parts}
    return max(float((vectors[f"resid_post.{layer}"] - row).abs().max()) for layer, row in layers.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    if not PYTHON.exists():
        print(f"{PYTHON} is not there; benchmarks/peers/README.md says how it is made", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name in MODELS:
            (Path(folder) / name).mkdir()
            made[name] = write(Path(folder) / name, name)
        said = subprocess.run([PYTHON, HERE / "their_side.py", folder], capture_output=True, text=True, check=True)
        found = json.loads(said.stdout.splitlines()[-1])
        for name, parts in made.items():
            found[name]["read back"] = read(Path(folder) / name, *parts)
    apart = ("vectors", "unsteered", "steered", "tokens that differ", "read back")
    largest = max(one[key] for one in found.values() for key in apart)
    print(json.dumps({**found, "largest": largest}) if as_json else f"{json.dumps(found, indent=1)}\n{largest = }")
    return int(largest > TOLERANCE or any(one["changed by"] < 0.1 for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
