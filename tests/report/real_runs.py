"""Real runs of each command on a tiny model, beside what the commands printed."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from planted_readout import SITE, planted_model, planted_sae

from trimtab import cli
from trimtab.dictionaries import FeatureStatsAccumulator, save_dictionary
from trimtab.lm import LanguageModel, TokenBatch, capture

QUICK = "--n-random 4 --used 4 --finalists 2 --draws 2 --kl-items 8 --vector-steps 3 --headroom-items 4"
TINY = "--model {model} --text {text} --live --site resid_post.1 --n-features 48 --batch-size 32 --holdout 0.2"
COMMANDS = {
    "train": f"train {TINY} --arch topk gated --l0 4 8 --rows 1600 --context 32 --run {{run}}",
    "train-one": f"train {TINY} --arch topk --l0 4 --rows 3200 --context 32 --log-every 20 --run {{run}}",
    "rank": "rank --model {model} --sae {sae} --criterion delta-confidence max-activation --run {run}",
    "steer": "steer cat,dog --model {model} --sae {sae} --feature 3 5 --sweep 0.5 1 --samples 2 --temperature 1 "
    "--max-new-tokens 6 --run {run}",
    "core": "evaluate core --model {model} --sae {sae} --text {text} --context 32 --run {run}",
    "policy": "policy train --model {model} --sae {sae} --task planted_readout:HalfHurt --options-only --dose 2 "
    "--iterations 3 --items-per-iteration 8 --samples 2 --hidden 8 --validate-every 1 --validation-items 16 "
    "--headroom-items 6 --mask none --initial-no-edit 0 --seed 1 --run {run}",
    "evaluation": "policy evaluate {policy} --items 12 --train-items 16 --control random static vector prompting "
    + QUICK,
    "analysis": "policy analyze {policy} --items 8 --branch-items 4 --branch-candidates 5 --layer-items 6 "
    "--dose-factor 0.5 1 --text {text} --text-rows 300 --live-sample 16 --ablated 2 --headroom-items 4",
}


class Made(NamedTuple):
    """A run directory, and what its command printed as JSON."""

    path: Path
    printed: dict[str, Any]


def runner(tiny: LanguageModel, place: Path) -> Callable[[str], Made]:
    """What runs a command by its name here, once, on a model, an SAE and a text that it writes."""
    model = planted_model(tiny)
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    sae = planted_sae(model)
    sae.info = replace(sae.info, model=str(place / "model"))
    ids = torch.randint(6, 100, (16, 24), generator=torch.Generator().manual_seed(2))
    stats = FeatureStatsAccumulator(sae.decoder_norms)
    stats.update(sae.encode(capture(model, TokenBatch.full(ids), [SITE])[model.site(SITE)].flatten(0, 1)))
    save_dictionary(sae, place / "sae", stats.result())
    texts = [f"{who} went to the {where} and ran." for who in ("a cat", "the dog", "two men") for where in "abcdefghij"]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text * 4}) + "\n" for text in texts))
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            of_policy = name in ("evaluation", "analysis")
            path = make("policy").path if of_policy else place / name
            named = {"model": place / "model", "sae": place / "sae", "text": place / "text.jsonl", "run": path}
            words = COMMANDS[name].format(**named, policy=path).split()
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                assert cli.main([*(word.replace(",", " ") for word in words), "--json"]) == 0
            known[name] = Made(path, json.loads(said.getvalue()))
        return known[name]

    return make
