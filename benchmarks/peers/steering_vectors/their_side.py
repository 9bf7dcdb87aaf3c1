"""In steering-vectors' environment: what its `SteeringVector` does with a file that trimtab wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM


def check(directory: Path) -> dict[str, float]:
    """Largest differences of one model, and the same vector pickled for trimtab to read."""
    expected = load_file(directory / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    vector = SteeringVector(**torch.load(directory / "sea.pt", weights_only=True))
    ids = expected["ids"]
    with torch.no_grad():
        plain = model(ids).logits
        with vector.apply(model):
            steered = model(ids).logits
            written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.save(vector, directory / "theirs.pt")
    vectors = [float((row - expected[f"layer.{layer}"]).abs().max()) for layer, row in vector.layer_activations.items()]
    return {
        "vectors": max(vectors),
        "unsteered": float((plain - expected["unsteered"]).abs().max()),
        "steered": float((steered - expected["steered"]).abs().max()),
        "changed by": float((steered - plain).abs().max()),
        "tokens that differ": int((written[:, ids.shape[1] :] != expected["tokens"]).sum()),
    }


if __name__ == "__main__":
    print(json.dumps({path.name: check(path) for path in sorted(Path(sys.argv[1]).iterdir())}))
