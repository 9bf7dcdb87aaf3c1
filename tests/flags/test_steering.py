"""`trimtab flags steer`: what `steer` gives, in a run that is replayed and has a page; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_corpus import PROMPTS, share_of, toy_examples

from trimtab.cli import main
from trimtab.errors import UserError
from trimtab.flags import FlagSpec, TrainedFlags, command, load_flagged, snapshots, train_flags
from trimtab.flags.command import FlagSteerConfig, run_flag_steer
from trimtab.lm import LanguageModel
from trimtab.lm.capabilities import Capabilities
from trimtab.runs import Run


@pytest.fixture(scope="module")
def saved(finetuned: dict[str, TrainedFlags], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuned["forced"].save(tmp_path_factory.mktemp("flags") / "model")


def test_a_run_is_steered_replayed_and_has_a_page(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["flags", "steer", str(saved), *PROMPTS, "--on", "war", "--off", "sea", "--max-new-tokens", "6"]
    words += ["--run", str(run), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steered_with"] == "war on, sea off"
    free, steered = ([one["text"] for one in arm["continuations"]] for arm in result["arms"])
    assert share_of("war", steered) > 0.9
    assert steered != free
    assert result["arms"][1]["kl_total"] > 0.1
    assert result["arms"][0]["kl_total"] < 1e-6
    assert main(["steer", "--replay", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]
    assert main(words) == 0  # a run that is done is read back
    assert json.loads(capsys.readouterr().out) == result
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "What does steering with war on, sea off write?" in page
    assert "8 sites from resid_mid.0 to resid_post.3" in page


def test_a_model_that_cannot_decode_is_refused_before_any_work(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tired(*args: Any, **options: Any) -> tuple[LanguageModel, Any]:
        model, flags = load_flagged(*args, **options)
        model.assume(Capabilities(off={"decode": "it is tired"}))
        return model, flags

    def planned(*_args: Any) -> None:
        raise AssertionError("it is planned")

    monkeypatch.setattr(command, "load_flagged", tired)
    monkeypatch.setattr(command, "plan_steering", planned)
    with pytest.raises(UserError, match="it is tired"):
        run_flag_steer(FlagSteerConfig(model=str(saved), prompt=("Go",), on=("sea",), max_new_tokens=2))


def test_strengths_and_samples(saved: Path) -> None:
    result = run_flag_steer(
        FlagSteerConfig(
            model=str(saved), prompt=("Go",), on=("sea",), strength=("war=0.25",), samples=3, temperature=1.0,
            max_new_tokens=4, kl=False,
        )
    )  # fmt: skip
    assert result.steered_with == "sea on, war 0.25"
    assert len(result.steered[0].continuations) == 3
    assert result.headline().startswith("overwrite sea on, war 0.25 at 8 sites from resid_mid.0 to resid_post.3 of")
    edits = result.trace.to_frame("edits")
    assert set(edits["position"]) >= {0, 1}  # the prompt's, too
    generated = FlagSteerConfig(model=str(saved), prompt=("Go",), on=("sea",), positions="generated", kl=False)
    assert result.positions == "all" != run_flag_steer(generated).positions


def test_a_finished_run_of_a_finetuning_will_do(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Run.open(run, "flags train", {}) as opened:
        made = dict(opened.record_dict)
    (run / "model").symlink_to(saved)
    for status, message in (("done", ""), ("running", "its finetuning has not finished; run the same `flags train`")):
        record = {**made, "command": "flags train", "status": status}
        (run / "run.json").write_text(json.dumps(record))
        config = FlagSteerConfig(model=str(run), prompt=("Go",), off=("sea",), max_new_tokens=2)
        if message:
            with pytest.raises(UserError, match=message):
                run_flag_steer(config)
        else:
            assert run_flag_steer(config).steered_with == "sea off"
    (run / "run.json").write_text(json.dumps({**made, "command": "rank", "status": "done"}))
    with pytest.raises(UserError, match="it belongs to `rank`; give a run of `flags train`"):
        run_flag_steer(config)


WRONG = {
    "an unknown concept": ({"on": ("see",)}, r"concept 'see': the flags are sea, war; did you mean sea\?"),
    "an unknown one's strength": ({"strength": ("wra=0.5",)}, r"concept 'wra': .*; did you mean war\?"),
    "set twice": ({"on": ("sea",), "off": ("sea",)}, "concept 'sea': it is set twice; give it to one of --on, --off"),
    "no number": ({"strength": ("sea=half",)}, "strength 'sea=half': it is not NAME=NUMBER; write it like sea=0.5"),
    "no name": ({"strength": ("0.5",)}, "strength '0.5': it is not NAME=NUMBER"),
    "not finite": ({"strength": ("sea=nan",)}, "strength nan of 'sea': 0 is off and 1 is on; give one between"),
    "nothing": ({}, "the switches: all flags are free; set one, such as --on 'sea'"),
    "no prompt": ({"on": ("sea",), "prompt": ()}, "the prompts: there is none"),
    "greedy samples": ({"on": ("sea",), "samples": 2}, "samples = 2: greedy decoding gives the same text every time"),
    "positions": ({"on": ("sea",), "positions": "some"}, "positions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    changed, message = WRONG[case]
    run = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        run_flag_steer(FlagSteerConfig(**{"model": str(saved), "prompt": ("Go",), "run": run, **changed}))
    assert not run.exists()


def test_prompts_are_put_where_the_model_was_trained(
    tiny_llama: LanguageModel, flags: FlagSpec, tmp_path: Path
) -> None:
    """In the chat template or not, as flags.json says, unless told otherwise; snapshots say it, too."""
    for chat in (True, False):
        run = tmp_path / f"chat-{chat}"
        train_flags(tiny_llama, flags, toy_examples(24), chat=chat, run=run, steps=4, batch_size=8, snapshots=2)
        for kept in snapshots(run):
            config = FlagSteerConfig(model=str(kept.path), prompt=("Go",), on=("sea",), max_new_tokens=2, kl=False)
            asked = run_flag_steer(config).trace.facts["rows"][0]["prompt"]
            assert list(asked) == tiny_llama.encode_text("Go", chat=chat)
            other = run_flag_steer(replace(config, chat=not chat)).trace.facts["rows"][0]["prompt"]
            assert list(other) == tiny_llama.encode_text("Go", chat=not chat)


def test_what_is_no_model(tmp_path: Path) -> None:
    for path, why in ((tmp_path, r"there is no flags\.json in it"), (tmp_path / "none", "there is none")):
        with pytest.raises(UserError, match=f"{why}; give a run of `flags train`, or a directory with flags"):
            run_flag_steer(FlagSteerConfig(model=str(path), prompt=("Go",), on=("sea",)))
