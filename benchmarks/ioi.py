"""Speed of path patching: all heads into the name movers' queries, against a loop of hooked forward passes.

Pinned: the default model, 64 prompts of the paper's templates, corrupted ones that name three other persons, and as
receivers the queries at END of its four strongest heads that copy the indirect object (23.0, 23.1, 23.2, 23.7).

- `ratio`: seconds of the loop over those of `path_patch`. The loop is the definition: for each head a forward pass of
  all prompts with every head's output replaced (its own by the corrupted one, the others by the clean ones), and one
  with the receivers' queries replaced; of logits it computes the last alone. It is timed on some heads (`--naive`),
  spread over the layers below the receivers, and counted for all of these.
- `max_abs_difference`: largest difference of an effect between the two, in logits, on those heads.

- `three_tests_seconds` (with `--tests`): approximation, control and interpretability at one cross-section, the outputs
  of these heads, by `trimtab evaluate ioi` with its defaults: 2,000 training prompts are read, codes fitted and SAEs
  trained.

Measurements alternate; figures are medians over the repeats of per-repeat ratios.

    python benchmarks/ioi.py --json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from figures import arguments, device_options, measured_on, print_result, seconds
from machine import peak_mib

from trimtab.evaluation.circuits.circuit import Circuit, CircuitHead
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.circuits.path_patching import path_patch
from trimtab.evaluation.circuits.rows import PromptRows, rows_of
from trimtab.evaluation.supervised.command import IOIConfig, run_ioi
from trimtab.lm import LanguageModel, load_model
from trimtab.tasks.ioi_prompts import IOIDistribution

MODEL, RECEIVERS = "smollm2-135m-instruct", ((23, 0), (23, 1), (23, 2), (23, 7))


class Loop:
    """Path patching by whole forward passes of a plain Llama with hooks."""

    def __init__(self, model: LanguageModel, rows: PromptRows, other: torch.Tensor, receivers: list[Location]) -> None:
        self.hf, self.rows, self.receivers = model.hf, rows, receivers
        self.layers = list(model.hf.model.layers)
        self.head_dim = self.hf.config.head_dim
        self.clean, self.corrupted = self._z(rows.ids), self._z(other)
        self.before = self._difference()

    def _z(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: found.append(args[0].clone()))
            for layer in self.layers
        ]
        self.hf(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return found

    def _difference(self) -> torch.Tensor:
        last = self.hf(input_ids=self.rows.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        right, wrong = last.gather(1, self.rows.answers).unbind(1)
        return right - wrong

    def effect(self, layer: int, head: int) -> torch.Tensor:
        """Of one head."""
        part = slice(head * self.head_dim, (head + 1) * self.head_dim)
        values = [z.clone() for z in self.clean]
        values[layer][..., part] = self.corrupted[layer][..., part]
        read: dict[Location, torch.Tensor] = {}
        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(lambda _m, _args, z=z: (z,))
            for block, z in zip(self.layers, values, strict=True)
        ]
        for receiver in self.receivers:

            def keep(_module: object, _args: object, out: torch.Tensor, receiver: Location = receiver) -> None:
                read[receiver] = out[:, -1, self._columns(receiver)].clone()

            handles.append(self.layers[receiver.site.layer].self_attn.q_proj.register_forward_hook(keep))
        self.hf(input_ids=self.rows.ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        handles = []
        for receiver, value in read.items():

            def put(
                _module: object,
                _args: object,
                out: torch.Tensor,
                receiver: Location = receiver,
                value: torch.Tensor = value,
            ) -> torch.Tensor:
                out = out.clone()
                out[:, -1, self._columns(receiver)] = value
                return out

            handles.append(self.layers[receiver.site.layer].self_attn.q_proj.register_forward_hook(put))
        after = self._difference()
        for handle in handles:
            handle.remove()
        return after - self.before

    def _columns(self, receiver: Location) -> slice:
        assert receiver.site.head is not None
        return slice(receiver.site.head * self.head_dim, (receiver.site.head + 1) * self.head_dim)


def three_tests(model: LanguageModel) -> float:
    """Seconds of `trimtab evaluate ioi` at the receivers' outputs."""
    heads = tuple(CircuitHead(layer=layer, head=head, role="name mover") for layer, head in RECEIVERS)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "circuit.json"
        Circuit(model=MODEL, fingerprint=model.fingerprint, heads=heads).save(file)
        place = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        config = IOIConfig(model=MODEL, circuit=file, cross_section=("name-mover outputs",), **place)
        return seconds(lambda: run_ioi(config), model.device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--naive", type=int, default=6, help="heads patched by the loop per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    device_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--tests", action="store_true", help="time the three tests on one cross-section, too")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_num_threads(args.threads)
    model = load_model(MODEL, dtype=args.dtype, device=args.device)
    ioi = IOIDistribution.load(model.encode_text, "paper")
    prompts = ioi.prompts(args.prompts)
    (rows,) = rows_of([ioi.tokenise(prompt) for prompt in prompts], model, batch_size=args.prompts)
    (other,) = rows_of([ioi.tokenise(ioi.without_repeat(p)) for p in prompts], model, batch_size=args.prompts)
    receivers = [head_location(model, "attn_q", layer, head, "END") for layer, head in RECEIVERS]
    n_heads = model.hf.config.num_attention_heads
    senders = [(layer, head) for layer in range(RECEIVERS[0][0]) for head in range(n_heads)]
    sample = senders[:: -(-len(senders) // args.naive)]
    ratios, loops, ours, difference = [], [], [], 0.0
    effects: dict[str, torch.Tensor] = {}

    def patched() -> None:
        effects["ours"] = path_patch(model, rows, other.ids, receivers)

    def looped() -> None:
        loop = Loop(model, rows, other.ids, receivers)
        effects["loop"] = torch.stack([loop.effect(*sender) for sender in sample], 1)

    for _ in range(args.repeats):
        ours.append(seconds(patched, args.device))
        loops.append(seconds(looped, args.device) * len(senders) / len(sample))
        ratios.append(loops[-1] / ours[-1])
        expected = torch.stack([effects["ours"][:, layer, head] for layer, head in sample], 1)
        difference = max(difference, float((effects["loop"] - expected).abs().max()))
    result = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(ours),
        "loop_seconds": statistics.median(loops),
        "max_abs_difference": difference,
        "peak_gib": peak_mib() / 2**10,
        "prompts": args.prompts,
        "heads": len(senders),
        "heads_timed": len(sample),
        "dtype": args.dtype,
        **measured_on(args.device, args.dtype),
    }
    if args.tests:
        result["three_tests_seconds"] = three_tests(model)
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()
