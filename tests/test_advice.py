"""What an error advises is right: its options and commands exist, and whoever follows it gets on."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import trimtab
from trimtab import cli
from trimtab.dictionaries import save_dictionary
from trimtab.errors import UserError
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


def test_every_command_that_a_text_names_exists() -> None:
    commands = {tuple(command.split()) for command in cli.COMMANDS}
    groups = {command[0] for command in commands}
    named = [
        (name, words)
        for name, text in texts()
        for words in re.findall(r"(?:`|\()trimtab ((?:[a-z-]+ ?){1,2})", text)
        if not words.startswith("-")
    ]
    assert len(named) > 10
    for name, words in named:
        said = tuple(words.split())
        assert said[:1] in commands or said[:2] in commands or (len(said) == 1 and said[0] in groups), (name, words)


@pytest.fixture
def here(tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, SAEs and texts."""
    tiny_llama.hf.save_pretrained(tmp_path / "tiny-llama")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "tiny-llama")
    monkeypatch.syspath_prepend(Path(__file__).parent / "steering")
    sae = import_module("tiny_dictionary").make_dictionary(tiny_llama)
    save_dictionary(sae, tmp_path / "sae")
    (tmp_path / "sae" / "feature_stats.parquet").unlink(missing_ok=True)
    for name, change in {"nowhere": {"site": ""}, "others": {"model": "another"}}.items():
        sae.info, kept = dataclasses.replace(sae.info, **change), sae.info
        save_dictionary(sae, tmp_path / name)
        sae.info = kept
    (tmp_path / "one.txt").write_text("the cat sat in the warm rain, and then another one came by. " * 30)
    records = [json.dumps({"id": str(i), "text": "the cat sat in the rain, and another came. " * 4}) for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


STEER = "steer Once --feature 3 --model tiny-llama --max-new-tokens 2 --no-kl"
HARVEST = "harvest --text one.txt --model tiny-llama --site resid_post.1 --run run"
FOLLOWED: dict[str, tuple[str, str, list[str]]] = {
    "held out": (
        f"{HARVEST} --context 16 --holdout 0.999999 --document-characters 100000",
        "give --holdout 0",
        [f"{HARVEST} --context 16 --holdout 0 --document-characters 100000"],
    ),
    "context": (
        f"{HARVEST} --holdout 0 --context 4000",
        "a smaller --context",
        [f"{HARVEST} --holdout 0 --context 16"],
    ),
    "site": (
        f"{STEER} --sae sae --site resid_post.0",
        "use --site resid_post.1",
        [f"{STEER} --sae sae --site resid_post.1"],
    ),
    "model": (f"{STEER} --sae others", "(--any-model)", [f"{STEER} --sae others --any-model"]),
    "no site": (
        f"{STEER} --sae nowhere",
        "give a site (--site resid_post.15)",
        [f"{STEER} --sae nowhere --site resid_post.1"],
    ),
    "statistics": (
        "rank --model tiny-llama --sae sae --criterion delta-confidence --run ranked",
        "`trimtab sae stats SAE --text FILE`",
        [
            "sae stats sae --text text.jsonl --model tiny-llama --context 16",
            "rank --model tiny-llama --sae sae --criterion delta-confidence --run ranked",
        ],
    ),
    "statistics, the other way": (
        "rank --model tiny-llama --sae sae --criterion delta-confidence --run ranked",
        "delta-confidence with --unit relative --dose 0.4",
        ["rank --model tiny-llama --sae sae --criterion delta-confidence --unit relative --dose 0.4 --run ranked"],
    ),
}
"""A mistake, what the error advises, and what somebody does who follows it."""


@pytest.mark.parametrize("name", FOLLOWED)
def test_whoever_follows_the_advice_gets_on(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake, advice, followed = FOLLOWED[name]
    assert cli.main(shlex.split(mistake)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert advice in last, last
    for line in followed:
        assert cli.main(shlex.split(line)) == 0, capsys.readouterr().err


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
