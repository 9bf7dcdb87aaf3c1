"""A bank of 30 SAEs, harvest included: trimtab beside SAELens's runner for several SAEs, whole runs in turn."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sae_training.turns import BENCHMARKS, Process, Trainer, spread
from trimtab.lm.catalogue import cached_path, find_entry

ARCHITECTURES = ("topk", "batchtopk", "relu", "gated", "jumprelu")
SPARSITIES = (8, 16, 24, 32, 48, 64)
WEIGHTS = (8.0, 6.0, 5.0, 4.0, 3.0, 2.0)
"""SAELens's sparsity weights in place of the targets; what they come to is in the result."""
SITE, HOOK = "resid_post.15", "model.layers.15"
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class BankJob:
    """One bank, the same for both libraries."""

    text: str
    """A JSON-lines file of documents."""
    model: str
    """A directory with the model."""
    tokens: int
    """Activations to train on."""
    architectures: tuple[str, ...] = ARCHITECTURES
    sparsities: tuple[int, ...] = SPARSITIES
    weights: tuple[float, ...] = WEIGHTS
    d: int = 576
    n: int = 2048
    batch: int = 2048
    lr: float = 1e-3
    threads: int = 2
    device: str = "cpu"
    site: str = SITE
    hook: str = HOOK

    @classmethod
    def load(cls, path: str) -> BankJob:
        """Read what `measure_bank` wrote."""
        return cls(**json.loads(Path(path).read_text()))


def trainers() -> dict[str, Trainer]:
    """Who takes part: trimtab, and SAELens if its environment is there."""
    peer = BENCHMARKS / "peers"
    found = {"ours": Trainer(Path(sys.executable), BENCHMARKS / "sae_training" / "bank_ours.py")}
    python = peer / ".venvs" / "saelens" / "bin" / "python"
    if python.exists():
        found["saelens"] = Trainer(python, peer / "saelens" / "train_bank.py")
    return found


def measure_bank(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train the bank with each library, in turn."""
    entry = find_entry(MODEL)
    model = entry and cached_path(entry)
    if model is None:
        print(f"bank: left out, as {MODEL} is not there (trimtab models pull {MODEL})", file=sys.stderr)
        return {}
    job = BankJob(
        text=str(_text(folder / "text.jsonl", options.bank_tokens)),
        model=str(model),
        tokens=options.bank_tokens,
        n=options.bank_n,
        threads=options.threads,
        device=options.device,
    )
    if options.quick:
        job = dataclasses.replace(job, architectures=("topk", "relu"), sparsities=(8, 16), n=256, batch=256)
    path = folder / "bank.json"
    path.write_text(json.dumps(dataclasses.asdict(job)))
    seconds: dict[str, list[float]] = {}
    answers: dict[str, dict[str, object]] = {}
    for turn in range(options.bank_repeats):
        order = [(name, one) for name, one in trainers().items() if name == "ours" or name in options.peers]
        for name, trainer in order if turn % 2 == 0 else reversed(order):
            process = Process(f"bank-{name}", trainer, path, folder / f"bank-{name}.log", job.threads)
            try:
                answer = process.answer()
            finally:
                process.stop()
            seconds.setdefault(name, []).append(float(answer["seconds"]))
            answers[name] = answer
    found: dict[str, object] = {}
    if "saelens" in seconds:
        ratio = spread([peer / own for own, peer in zip(seconds["ours"], seconds["saelens"], strict=True)])
        found = {"bank.vs_saelens": round(ratio.median, 2), "bank.vs_saelens_range": [round(r, 2) for r in ratio[1:]]}
    sizes = {"members": len(job.architectures) * len(job.sparsities), "n": job.n, "d": job.d, "tokens": job.tokens}
    runs = {
        name: {**answer, "seconds": round(spread(seconds[name]).median, 1), "all_seconds": seconds[name]}
        for name, answer in answers.items()
    }
    return {**found, "bank": {**sizes, "batch": job.batch, "trainers": runs}}


def bank_table(found: dict[str, object]) -> str:
    """The bank's figures as Markdown."""
    bank = found.get("bank")
    if not isinstance(bank, dict):
        return ""
    lines = [
        f"\n### bank of {bank['members']}: d {bank['d']}, n {bank['n']}, {bank['tokens']:,} tokens, "
        f"batch {bank['batch']}\n",
        "|  | seconds | trimtab over it | range | peak MiB | of them before |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in bank["trainers"].items():
        ratio = f"{found['bank.vs_saelens']} | {found['bank.vs_saelens_range']}" if name == "saelens" else "|"
        title = "trimtab" if name == "ours" else f"{name} {run['version']}"
        lines.append(f"| {title} | {run['seconds']} | {ratio} | {run['peak_mib']:,.0f} | {run['baseline_mib']:,.0f} |")
    return "\n".join(lines)


def _text(path: Path, tokens: int) -> Path:
    """The package's sample text, over and over; it is the speed that counts."""
    folder = resources.files("trimtab") / "assets" / "sample_text"
    lines = [
        line
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    texts = [json.loads(line)["text"] for line in lines]
    characters = 0
    with path.open("w", encoding="utf-8") as out:
        for number, text in enumerate(itertools.cycle(texts)):
            if characters > 6 * tokens:
                break
            characters += len(text)
            out.write(json.dumps({"text": text, "id": str(number)}) + "\n")
    return path
