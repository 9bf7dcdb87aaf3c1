"""llama.cpp steers the default model with a control vector that trimtab exports; see ../README.md.

llama.cpp reads SmolLM2's own GGUF file, its weights in float32 (they are dequantized, so that both sides compute with
the same ones), and the file of `trimtab steering export`, and continues token ids greedily. Its logits are compared
with those of the `transformers` model under the same steering, on llama.cpp's tokens. llama.cpp keeps keys and values
in float16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from trimtab.dictionaries import load_dictionary
from trimtab.lm import load_model
from trimtab.steering import StaticSource, Steering
from trimtab.steering.exchange import export_steering

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venvs" / "llama_cpp"
PROMPTS = ("Yesterday I went to the", "The weather today is", "She opened the door and")
FEATURE, DOSE, TOKENS, LIKELIEST = 2112, 20.0, 16, 100
TOLERANCE = 0.05
"""Of the log-probabilities of the likeliest tokens, in nats."""


def in_float32(source: Path, target: Path) -> None:
    """The same model with its weights dequantized."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = gguf.GGUFWriter(target, architecture.contents())
    for field in reader.fields.values():
        if field.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    files = list(ENVIRONMENT.rglob("SmolLM2-135M-Instruct*.gguf"))
    if not files:
        print(f"{ENVIRONMENT} is not there; benchmarks/peers/README.md says how it is made", file=sys.stderr)
        return 2
    model = load_model("smollm2-135m-instruct")
    sae = load_dictionary("default", model=model)
    steering = Steering.of(model, StaticSource(sae, FEATURE, DOSE, unit="absolute", positions="all"))
    prompts = [model.encode_text(text) for text in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        plain, vector, out = (Path(folder) / name for name in ("model.gguf", "sea.gguf", "logits.f32"))
        in_float32(files[0], plain)
        export_steering(steering, vector)
        said = subprocess.run(
            [ENVIRONMENT / "bin" / "python", HERE / "their_side.py", plain, vector, out],
            input=json.dumps([prompts, TOKENS]), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if said.returncode:
            print(said.stderr[-2000:], file=sys.stderr)
            return 1
        answer = json.loads(said.stdout.splitlines()[-1])
        theirs = np.fromfile(out, np.float32).reshape(2, len(prompts), TOKENS, answer["n_vocab"])
    found: dict[str, Any] = {}
    for number, (name, written) in enumerate(answer["tokens"].items()):
        differences, others = [0.0], 0
        with steering.applied(model) if name == "steered" else nullcontext():
            for row, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
                logits = model.hf(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
                mine = logits.double().log_softmax(-1)
                their_logp = torch.from_numpy(theirs[number, row]).double().log_softmax(-1)
                likeliest = mine.topk(LIKELIEST).indices
                differences.append(float((mine - their_logp).gather(1, likeliest).abs().max()))
                others += int((mine.argmax(-1) != torch.tensor(tokens)).sum())
        found[name] = {
            "largest difference": max(differences), "tokens": TOKENS * len(prompts),
            "tokens that are not this side's": others,
            "texts": [model.decode_ids(tokens) for tokens in written],
        }  # fmt: skip
    pairs = zip(answer["tokens"]["unsteered"], answer["tokens"]["steered"], strict=True)
    found["tokens that steering changes"] = sum(a != b for pair in pairs for a, b in zip(*pair, strict=True))
    found["largest"] = max(found[name]["largest difference"] for name in answer["tokens"])
    print(json.dumps(found) if as_json else json.dumps(found, indent=1))
    return int(found["largest"] > TOLERANCE or found["tokens that steering changes"] == 0)


if __name__ == "__main__":
    sys.exit(main())
