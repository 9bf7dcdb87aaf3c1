"""What an error advises is right: its options and commands exist, and whoever follows it gets on."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

import trimtab
from trimtab import cli
from trimtab.dictionaries import save_dictionary
from trimtab.errors import UserError
from trimtab.flags import FlagSpec, save_flags
from trimtab.lm import LanguageModel
from trimtab.steering import effects

SOURCE = Path(trimtab.__file__).parent
OPTIONS = json.loads((Path(__file__).parent / "test_configs.json").read_text(encoding="utf-8"))["flags"]
OF_OTHERS = ("lm/fetching.py", "--control-vector")
"""Options of pip and of llama-cli."""


@cache
def texts() -> list[tuple[str, str]]:
    """Every text in the source, with its file."""
    return list(_texts())


def _texts() -> Iterator[tuple[str, str]]:
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield name, node.value


def test_every_option_that_a_text_names_exists() -> None:
    known = {option for flags in OPTIONS.values() for flag in flags for option in re.findall(r"--[a-z0-9.-]+", flag)}
    named = [
        (name, option)
        for name, text in texts()
        if name not in OF_OTHERS
        for option in re.findall(r"(?:^|(?<=[\s(`]))--[a-z][a-z0-9.-]*[a-z0-9]", text)
        if option not in (*OF_OTHERS, "--help", "--version")
    ]
    assert len(named) > 100
    assert [(name, option) for name, option in named if option not in known] == []


def mistyped(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Commands that texts name and that are none. In prose ("trimtab does not …") only what begins like one is."""
    commands = {tuple(command.split()) for command in cli.COMMANDS}
    groups = {command[0] for command in commands if len(command) > 1}
    first = groups | {command[0] for command in commands}
    found: list[tuple[str, str]] = []
    for name, text in texts:
        for before, words in re.findall(r"(`|\(|\b)trimtab ((?:[a-z][a-z-]*(?: (?=[a-z]))?){1,2})", text):
            said = tuple(words.split())
            is_command = said[:1] in commands or said[:2] in commands or said in {(group,) for group in groups}
            if not is_command and (before or said[0] in first):
                found.append((name, words))
    return found


def test_every_command_that_a_text_names_exists() -> None:
    assert sum("trimtab " in text for _, text in texts()) > 100
    assert mistyped(texts()) == []


@pytest.mark.parametrize("words", ["sae stat", "`trimtab", "models shw NAME", "polcy train", "policy trian", "flags"])
def test_mutation_a_command_that_is_none(words: str) -> None:
    wrong = "run `trimtab sae stat SAE` first" if words == "`trimtab" else f"see `trimtab {words}`, or not"
    assert bool(mistyped([("a.py", wrong)])) == (words != "flags")
    if words[0] in "smp" and words != "polcy train":
        assert mistyped([("a.py", f"first trimtab {words}")])


class Hint(NamedTuple):
    """What an error advises, as the source writes it."""

    file: str
    text: str
    """With \\0 for whatever stands there in an error."""

    @property
    def names_something(self) -> bool:
        """Whether it names an option or a command."""
        return bool(re.search(r"--[a-z]|trimtab |`", self.text))

    def says(self, text: str) -> bool:
        """Whether an error with this hint may say this."""
        return bool(re.fullmatch(".*?".join(map(re.escape, self.text.split("\0"))), text, re.DOTALL))


@cache
def hints() -> list[Hint]:
    """The hint of every `UserError` in the source; those that a name stands for in its module are found by it."""
    return list(dict.fromkeys(_hints()))


def _hints() -> Iterator[Hint]:
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=False))
                    for one, value in pairs:
                        if isinstance(one, ast.Name):
                            known.setdefault(one.id, []).extend(_forms(value, {}))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                given = [keyword.value for keyword in node.keywords if keyword.arg == "hint"] or node.args[2:3]
                for text in (form for value in given for form in _forms(value, known)):
                    yield Hint(file.relative_to(SOURCE).as_posix(), text)


def _forms(node: ast.AST, known: Mapping[str, list[str]]) -> list[str]:
    """What an expression may come to."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [_forms(v.value if isinstance(v, ast.FormattedValue) else v, known) for v in node.values]
        return ["".join(form) for form in itertools.product(*parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _forms(node.left, known) for b in _forms(node.right, known)]
    if isinstance(node, ast.IfExp):
        return [form for value in (node.body, node.orelse) for form in _forms(value, known)]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "did_you_mean" and len(node.args) > 2:
        return _forms(node.args[2], known)
    if isinstance(node, ast.Name):
        return known.get(node.id) or ["\0"]
    return ["\0"]


WAYS = "--window 6 --context 16"
M = "--model tiny-llama"
STEER = f"steer Once --feature 3 {M} --max-new-tokens 2 --no-kl"
WITH = f"steer Once {M} --max-new-tokens 2 --no-kl --with"
HARVEST = f"harvest {M} --site resid_post.1 --run run --holdout 0 --context 16 --text"
RANK = f"rank {M} --sae sae --run ranked --criterion"
FEATURE = f"feature 3 {M} --max-new-tokens 2 --prompt Once --dose 0.4 --run page"
EXAMPLES = f"examples --text text.jsonl {M} --run windows-2 --top 6 --weighted 8 --random 2 {WAYS}"
TRAIN = f"train {M} --n-features 16 --rows 64 --batch-size 16 --heldout-rows 32 --context 16 --run trained"
FIND = (
    f"find {M} --sae sae --examples 6 6 10 --n-neutral 2 3 --max-new-tokens 4 --text-tokens 6 --set-size 1 "
    "--shortlist 4 --tried 1 --dose 0.2 --way --run found-2"
)
IMPORT = "flags import --concepts concepts.txt --run imported --judge-share 0 --min-characters 4 --none-share 0"
AUTOINTERP = (
    f"autointerp {M} --judge rules --run judged --features 2 --top 4 --weighted 4 --silent 8 --test-top 2 "
    "--test-weighted 1 --test-silent 4"
)
FLAGS = "flags steer flagged Once --max-new-tokens 2 --no-kl"
FOLLOWED: dict[str, tuple[str, str, list[str]]] = {
    "held out": (
        f"harvest {M} --site resid_post.1 --run run --text one.txt --context 16 --holdout 0.999999",
        "split it into more documents, or give --holdout 0",
        [f"{HARVEST} one.txt"],
    ),
    "context": (
        f"harvest {M} --site resid_post.1 --run run --text one.txt --holdout 0 --context 4000",
        "give more text or a smaller --context",
        [f"{HARVEST} one.txt"],
    ),
    "field": (f"{HARVEST} table.jsonl", "choose with --text-field", [f"{HARVEST} table.jsonl --text-field body"]),
    "kind of a field": (
        f"{HARVEST} table.jsonl --text-field n",
        "choose another --text-field",
        [f"{HARVEST} table.jsonl --text-field body"],
    ),
    "sites": (f"{HARVEST} one.txt --site resid_post.1 resid_post.1", "change --site", [f"{HARVEST} one.txt"]),
    "site": (
        f"{STEER} --sae sae --site resid_post.0",
        "use --site resid_post.1",
        [f"{STEER} --sae sae --site resid_post.1"],
    ),
    "model": (
        f"{STEER} --sae others",
        "choose a dictionary trained on this model, or model another, or allow any model (--any-model) if activations "
        "agree",
        [f"{STEER} --sae others --any-model"],
    ),
    "checkpoint": (
        f"{STEER} --sae checkpoint",
        "allow any model (--any-model) if it is that one",
        [f"{STEER} --sae checkpoint --any-model"],
    ),
    "no site": (
        f"{STEER} --sae nowhere",
        "give a site (--site resid_post.15)",
        [f"{STEER} --sae nowhere --site resid_post.1"],
    ),
    "statistics": (
        f"{RANK} delta-confidence",
        "compute them with `trimtab sae stats SAE --text FILE`, or choose what needs none, such as delta-confidence "
        "with --unit relative --dose 0.4",
        [
            f"{RANK} delta-confidence --unit relative --dose 0.4",
            f"sae stats sae --text text.jsonl {M} --context 16",
            f"{RANK} delta-confidence --run ranked-2",
        ],
    ),
    "target": (
        f"{TRAIN} --activations harvested --site resid_post.1 --arch jumprelu --penalty l0_target --sparsity-weight 1",
        "give --l0, or another --penalty",
        [f"{TRAIN} --activations harvested --site resid_post.1 --arch jumprelu --penalty l0_target --l0 4"],
    ),
    "other examples": (
        f"{FEATURE} --sae swapped",
        "make examples of this SAE (trimtab examples), or remove the file",
        [f"{EXAMPLES} --sae swapped --into swapped", f"{FEATURE} --sae swapped"],
    ),
    "damaged examples": (
        f"{FEATURE} --sae damaged",
        "make the examples again (trimtab examples)",
        [f"{EXAMPLES} --sae damaged --into damaged", f"{FEATURE} --sae damaged"],
    ),
    "no windows": (
        f"{EXAMPLES} --sae sae --top 0 --weighted 0 --random 0",
        "give --top, --weighted or --random",
        [f"{EXAMPLES} --sae sae --top 0 --weighted 0 --random 2"],
    ),
    "site of rows": (
        f"examples --activations harvested --sae nowhere {WAYS} --run windows-2",
        "convert it with --site (trimtab sae convert)",
        [
            "sae convert nowhere placed --site resid_post.1",
            f"examples --activations harvested --sae placed {WAYS} --run windows-2",
        ],
    ),
    "no examples": (
        f"{FEATURE} --sae sae --examples harvested",
        "name a run of `trimtab examples`",
        [f"{FEATURE} --sae sae --examples windows"],
    ),
    "no features": (
        f"{FEATURE.replace(' 3', '')} --sae sae",
        "give some ids, like `trimtab feature 2112`",
        [f"{FEATURE} --sae sae"],
    ),
    "prompts of words": (
        f"{FIND} --contrast contrast.jsonl --prompt prompts.txt",
        "give it with --more or --less",
        [f"{FIND} --prompt prompts.txt --more Y"],
    ),
    "unwanted": (
        f"{FIND} --want joy --unwanted unwanted.txt",
        "give --wanted, too",
        [f"{FIND} --wanted wanted.txt --unwanted unwanted.txt"],
    ),
    "wanted": (
        f"{FIND} --wanted wanted.txt",
        "give --unwanted, too, or one .jsonl file of both kinds",
        [f"{FIND} --wanted both.jsonl"],
    ),
    "score of": (f"{WITH} found --score harvested", "give a run of trimtab find", [f"{WITH} found --score found"]),
    "score": (f"{WITH} found found --score found", "leave --score out", [f"{WITH} found found"]),
    "wishes": (
        "evaluate wishes found found --run wishes",
        "give different runs of trimtab find",
        ["evaluate wishes found found-3 --run wishes"],
    ),
    "no wish": (
        "evaluate wishes found harvested --run wishes",
        "give finished runs of trimtab find",
        ["evaluate wishes found found-3 --run wishes"],
    ),
    "label of texts": (
        f"{IMPORT} --text plain.txt",
        "name it with --label, or give a directory that has a folder of texts for each label",
        [f"{IMPORT} --text plain.txt --label sea --others none"],
    ),
    "columns": (
        f"{IMPORT} --text columns.jsonl",
        "name them with --text-field and --label-field",
        [f"{IMPORT} --text columns.jsonl --text-field body --label-field kind"],
    ),
    "texts alone": (
        f"{IMPORT} --text alone.json",
        "correct it; a list of texts alone needs --label",
        [f"{IMPORT} --text alone.json --label sea"],
    ),
    "label": (
        f"{IMPORT} --text labelled.jsonl",
        "say which it is with --rename, or what becomes of such texts with --others",
        [f"{IMPORT} --text labelled.jsonl --others drop", f"{IMPORT} --text labelled.jsonl --rename qqq=war --run i2"],
    ),
    "nearly a label": (
        f"{IMPORT} --text nearly.jsonl --others none",
        "say what is meant: --rename seaa=sea, or seaa=none",
        [f"{IMPORT} --text nearly.jsonl --others none --rename seaa=sea"],
    ),
    "no flags": (
        "flags steer tiny-llama Once --on sea",
        "give a run of `flags train`, or a directory with flags.json, such as one that save_flags wrote",
        [f"{FLAGS} --on sea"],
    ),
    "no switch": (FLAGS, "set one, such as --on 'sea'", [f"{FLAGS} --on sea"]),
    "two switches": (
        f"{FLAGS} --on sea --off sea",
        "give it to one of --on, --off and --strength",
        [f"{FLAGS} --on sea --off war"],
    ),
    "one SAE": (
        f"{AUTOINTERP} --sae sae others",
        "give one --sae",
        [f"{AUTOINTERP} --sae sae --examples windows --window 6"],
    ),
    "narrow windows": (
        f"{AUTOINTERP} --sae sae --examples windows",
        "make others (trimtab examples --top 12 --weighted 20 --random 2 --window 21), or --window",
        [f"{AUTOINTERP} --sae sae --examples windows --window 6"],
    ),
    "no name": ("models show ''", "give one; `trimtab models list` names some", ["models list"]),
    "no such model": (
        f"{STEER} --sae sae --model owner/none",
        "check the id, log in for a gated model (hf auth login), or give a directory; `trimtab models list` names "
        "models that need no hub",
        ["models list", f"{STEER} --sae sae"],
    ),
    "half precision": (
        f"{STEER} --sae sae --model large --any-model --dtype float16",
        "load it in float32 (--dtype float32)",
        [f"{STEER} --sae sae --model large --any-model --dtype float32"],
    ),
    "a file as run": (f"{RANK} firing-rate --run one.txt", "choose another --run directory", [f"{RANK} random"]),
    "a damaged run": (
        f"{RANK} random --run broken",
        "choose another --run directory, or delete this one to start over",
        [f"{RANK} random"],
    ),
    "a run of a later version": (
        f"{RANK} random --run later",
        "use the version of trimtab that wrote it, or choose another --run directory",
        [f"{RANK} random"],
    ),
    "unit": (
        f"{RANK} delta-confidence --unit relative",
        "give one, like --dose 0.4",
        [f"{RANK} delta-confidence --unit relative --dose 0.4"],
    ),
    "too large a dose": (
        f"{RANK} delta-confidence --unit absolute --dose 1e6 --dtype float16",
        "use --dtype float32 or a smaller dose",
        [
            f"{RANK} delta-confidence --unit absolute --dose 1e6 --dtype float32 --run ranked-2",
            f"{RANK} delta-confidence --unit absolute --dose 1 --dtype float16 --run ranked-3",
        ],
    ),
    "explanations": (
        f"{RANK} explanation-score",
        "name a run of `trimtab autointerp`: --explanations RUN",
        [f"{RANK} explanation-score --explanations explained"],
    ),
    "no explanations": (
        f"{RANK} explanation-score --explanations none.csv",
        "give a run of `trimtab autointerp`, or a Parquet or CSV table with the columns feature and score",
        [f"{RANK} explanation-score --explanations scores.csv"],
    ),
    "examples of a criterion": (
        f"{RANK} input-score",
        "make them with `trimtab examples --sae SAE --text FILE --into SAE`",
        [f"{EXAMPLES} --sae sae --into sae", f"{RANK} input-score"],
    ),
    "saved sweep": (
        f"{STEER} --sae sae --sweep 0.1 0.2 --save kept",
        "save with the one --dose that you choose",
        [f"{STEER} --sae sae --dose 0.2 --save kept"],
    ),
    "positions of others": (
        "steering export saved out.gguf",
        "say that you want that: --positions all",
        ["steering export saved out.gguf --positions all --norm 12"],
    ),
    "architecture": (
        "steering import other.gguf imported --model tiny-gpt2",
        "give its model (--model), or allow any (--any-model)",
        [
            f"steering import other.gguf imported {M}",
            "steering import other.gguf imported-2 --model tiny-gpt2 --any-model",
        ],
    ),
    "width": (
        f"steering import narrow.pt imported {M} --site resid_post.1",
        "give the model that it was made for (--model)",
        ["steering import narrow.pt imported --model narrow --site resid_post.1"],
    ),
    "place": (
        f"steering import one.pt imported {M}",
        "give the site: --site resid_post.15",
        [f"steering import one.pt imported {M} --site resid_post.1"],
    ),
    "nothing to steer with": (
        f"steer Once {M} --sae sae --max-new-tokens 2 --no-kl",
        "give at least one, like --feature 123",
        [f"{STEER} --sae sae"],
    ),
    "doses": (
        f"{WITH} saved --dose 1 2",
        "give one, or several to --sweep",
        [f"{WITH} saved --sweep 1 2", f"{WITH} saved --dose 2"],
    ),
    "controls": (
        f"{STEER} --sae sae --controls",
        "leave --no-kl out",
        [f"{STEER.removesuffix(' --no-kl')} --sae sae --controls"],
    ),
    "no steering": (
        f"{WITH} harvested",
        "give a directory that trimtab find, steer --save or steering import wrote, or Steering.save",
        [f"{WITH} saved", f"steering import other.gguf imported {M}", f"{WITH} imported"],
    ),
    "another's steering": (
        f"{WITH} saved --model large",
        "steer that one, or allow any model (--any-model, any_model=True) if activations agree",
        [f"{WITH} saved --model large --any-model", f"{WITH} saved"],
    ),
    "nothing to replay": (
        "steer --replay harvested",
        "name a run that `trimtab steer` finished",
        ["steer --replay steered"],
    ),
    "learning rate": (
        f"{TRAIN} --activations harvested --site resid_post.1 --l0 4 --lr 1e30 --clip-norm 0",
        "lower --lr, or raise --warmup-share",
        [f"{TRAIN} --activations harvested --site resid_post.1 --l0 4 --run trained-2"],
    ),
    "live": (
        f"{TRAIN} --text text.jsonl --live --l0 4 --site resid_post.0 resid_post.1",
        "leave out --live, so that one harvest serves all sites",
        [f"{TRAIN} --text text.jsonl --l0 4 --site resid_post.0 resid_post.1"],
    ),
    "names of features": (
        f"steer Once {M} --max-new-tokens 2 --no-kl --sae known --feature-name Quixote",
        "trimtab sae info --json says what they mean",
        ["sae info known --json", f"steer Once {M} --max-new-tokens 2 --no-kl --sae known --feature-name meaning-4"],
    ),
}
"""A mistake, what the error advises, and what somebody does who follows it."""


def quiet(line: str) -> None:
    assert cli.main(shlex.split(line)) == 0, line


@pytest.fixture(scope="module")
def ground(
    tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A directory with models, SAEs, texts and runs."""
    place = tmp_path_factory.mktemp("advice")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(Path(__file__).parent / "steering")
        for name, model in {"tiny-llama": tiny_llama, "tiny-gpt2": tiny_gpt2}.items():
            model.hf.save_pretrained(name)
            model.tokenizer.save_pretrained(name)
        large = copy.deepcopy(tiny_llama.hf)
        with torch.no_grad():
            large.model.norm.weight.mul_(1e6)  # 65,504 is the largest number of float16
        narrow = type(tiny_llama.hf)(transformers.LlamaConfig(**{**tiny_llama.hf.config.to_dict(), "hidden_size": 16}))
        for name, hf in {"large": large, "narrow": narrow}.items():
            hf.save_pretrained(name)
            tiny_llama.tokenizer.save_pretrained(name)
        spec = FlagSpec(concepts=("sea", "war"), dims=((0,), (1,)), d_model=32, targets={"resid_post.2": 1.0})
        save_flags(tiny_llama, spec, "flagged")
        write_saes(tiny_llama)
        write_texts()
        for line in (
            f"{HARVEST} text.jsonl --run harvested",
            f"{EXAMPLES} --sae sae --run windows",
            f"{STEER} --sae sae --dose 0.2 --run steered --save saved",
            f"{FIND} --wanted both.jsonl --run found",
            f"{STEER} --sae sae --unit absolute --dose 0.2 --positions all --save everywhere",
            "steering export everywhere other.gguf",
            f"{AUTOINTERP} --sae sae --examples windows --window 6 --run explained",
        ):
            quiet(line)
        shutil.copytree("found", "found-3")
        torch.save(torch.ones(32), "one.pt")
        torch.save(torch.ones(16), "narrow.pt")
        shutil.copy("windows/feature_examples.parquet", "swapped")
    return place


def write_saes(model: LanguageModel) -> None:
    sae = import_module("tiny_dictionary").make_dictionary(model)
    stats, own = sae.feature_stats, sae.info
    for name, change in {
        "sae": {}, "damaged": {}, "nowhere": {"site": ""}, "others": {"model": "another"},
        "checkpoint": {"metadata": {"model_from_pretrained_kwargs": {"checkpoint_value": 1000}}},
        "known": {"metadata": {"feature_names": [f"meaning-{i}" for i in range(sae.n_features)]}},
    }.items():  # fmt: skip
        sae.info, sae.feature_stats = dataclasses.replace(own, **change), stats if name == "known" else None
        save_dictionary(sae, Path(name))
    Path("damaged/feature_examples.parquet").write_text("no table")
    sae.info = own
    with torch.no_grad():
        sae.W_dec[0] += 1
    save_dictionary(sae, Path("swapped"))


def write_texts() -> None:
    sentence = "the cat sat in the rain, and another came. "

    def lines(name: str, rows: list[Any]) -> None:
        Path(name).write_text("\n".join(json.dumps(row) for row in rows))

    Path("one.txt").write_text(sentence * 30)
    lines("table.jsonl", [{"n": i, "body": sentence * 4} for i in range(20)])
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], 4)) for _ in range(200)]
    texts, others = ([" ".join([first, *rng.choice(words, 5)]) for _ in range(60)] for first in ("ships", "towns"))
    lines("text.jsonl", [{"id": str(i), "text": " ".join(rng.choice(words, 16))} for i in range(40)])
    Path("wanted.txt").write_text("\n".join(texts))
    Path("unwanted.txt").write_text("\n".join(others))
    Path("prompts.txt").write_text("\n".join(texts))
    lines("both.jsonl", [{"text": t, "wanted": t in texts} for t in (*texts, *others)])
    lines("contrast.jsonl", [{"prompt": text, "wanted": "Y", "unwanted": "N"} for text in texts])
    Path("concepts.txt").write_text("sea: ships and tides\nwar: battles\n")
    Path("plain.txt").write_text("\n\n".join(texts))
    lines("columns.jsonl", [{"body": t, "kind": ("sea", "war")[i % 2]} for i, t in enumerate(texts)])
    Path("alone.json").write_text(json.dumps(texts))
    lines("labelled.jsonl", [{"text": t, "label": ("sea", "war", "qqq")[i % 3]} for i, t in enumerate(texts)])
    lines("nearly.jsonl", [{"text": t, "label": ("sea", "war", "seaa")[i % 3]} for i, t in enumerate(texts)])
    Path("scores.csv").write_text("feature,score\n1,0.5\n2,0.25\n")
    for name, record in {"broken": "{", "later": json.dumps({"schema": 999})}.items():
        Path(name).mkdir()
        Path(name, "run.json").write_text(record)


@pytest.fixture
def here(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands run; no hub is asked."""
    shutil.copytree(ground, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


@pytest.mark.parametrize("name", FOLLOWED)
def test_whoever_follows_the_advice_gets_on(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake, advice, followed = FOLLOWED[name]
    assert cli.main(shlex.split(mistake)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"; {advice}"), last
    for line in followed:
        assert cli.main(shlex.split(line)) == 0, f"{line}: {capsys.readouterr().err}"


def test_advice_of_all_kinds_is_followed() -> None:
    """What is followed is what the source advises; and it is much of all that names an option or a command."""
    named = {hint.text for hint in hints() if hint.names_something}
    assert len(named) > 100
    assert len({hint.text for hint in hints()}) > 500
    by_case = {name: {h.text for h in hints() if h.says(advice)} & named for name, (_, advice, _) in FOLLOWED.items()}
    assert [name for name, found in by_case.items() if not found] == []
    assert len({min(found, key=lambda text: text.count("\0")) for found in by_case.values() if found}) >= 50


def test_a_model_that_cannot_be_shown_copies_is_steered_without_kl(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Callable[..., bool] = lambda model, layer, way: False  # noqa: E731
    monkeypatch.setattr(effects, "can_run_from", told)
    line = STEER.removesuffix(" --no-kl") + " --sae sae"
    assert cli.main(shlex.split(line)) == 2
    assert "turn it off: --no-kl (kl=False)" in capsys.readouterr().err
    assert cli.main(shlex.split(f"{line} --no-kl")) == 0


def test_mutation_an_option_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.texts", lambda: [("a.py", "leave out --keel-over")] * 101)
    with pytest.raises(AssertionError, match="keel-over"):
        test_every_option_that_a_text_names_exists()
    assert issubclass(UserError, ValueError)
