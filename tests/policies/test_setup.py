"""What a policy works with is loaded in the order in which mistakes are cheap to find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.lm import ModelConfig
from trimtab.policies.config import PolicyConfig
from trimtab.policies.headroom.command import HeadroomConfig, run_headroom
from trimtab.policies.setup import Setup


def begin_training(data: Path) -> None:
    Setup.of(PolicyConfig(task="gsm8k", data=data))


def begin_headroom(data: Path) -> None:
    run_headroom(HeadroomConfig(task="gsm8k", data=data))


class ModelLoadedError(Exception):
    """The model was asked for."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ModelLoadedError

    monkeypatch.setattr(ModelConfig, "load_model", load)


def write(data: Path, answer: str) -> Path:
    folder = data / "gsm8k"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        rows = [{"question": f"What is {i} of {name}?", "answer": f"It is {i}.\n{answer} {i}"} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.mark.parametrize("begin", [begin_training, begin_headroom])
def test_data_are_read_before_the_model_is_loaded(begin: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        begin(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train\.jsonl.*row 1|row 1.*train\.jsonl"):
        begin(write(tmp_path / "bad", "###"))
    with pytest.raises(ModelLoadedError):
        begin(write(tmp_path / "good", "####"))


def test_a_split_is_looked_for_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = HeadroomConfig(task="gsm8k", data=write(tmp_path / "good", "####"), split="dev")
    with pytest.raises(UserError, match="split 'dev'"):
        run_headroom(config)


def test_a_task_that_needs_the_tokenizer_waits_for_the_model() -> None:
    with pytest.raises(ModelLoadedError):
        Setup.of(PolicyConfig(task="ioi"))
