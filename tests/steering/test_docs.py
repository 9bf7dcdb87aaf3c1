"""The examples of docs/steering.md run, one after the other, on each kind of model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, LanguageModel, decode
from trimtab.runs import Run
from trimtab.steering import OPERATIONS, PatchSource, ReplayReport, StaticSource, SteerResult, Trace, replay

PAGE = Path(__file__).parents[2] / "docs" / "steering.md"


def test_the_examples(any_tiny: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.steering.operations.OPERATIONS", dict(OPERATIONS))
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {"model": any_tiny, "sae": sae}
    for example in examples:
        exec(example, names)
    for name in ("result", "raised", "swept"):
        found = names[name]
        assert isinstance(found, SteerResult)
    plain = decode(any_tiny, names["prompts"], names["config"])  # type: ignore[arg-type]
    for name, n_edits in (("steered", 2 * 2 * 8), ("alternating", 2 * 8), ("patched", 1)):
        found = names[name]
        assert isinstance(found, Decoded)
        assert len(found.edits) == n_edits
    assert names["steered"].token_logp != plain.token_logp  # type: ignore[attr-defined]
    change = names["change"]
    assert isinstance(change, Tensor)
    assert 0 < float(change.abs().max()) < 20
    assert isinstance(names["taken"], SteerResult)
    assert names["ids"].shape[1] > len(names["prompts"][0])  # type: ignore[attr-defined, index]
    report = names["report"]
    assert isinstance(report, ReplayReport)
    assert report.n_edits == 16
    assert (len(names["first"].token_ids), len(names["second"].token_ids)) == (8, 3)  # type: ignore[attr-defined]


def test_an_operation_in_a_file_of_ones_own(
    any_tiny: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's, by `module:name`, does what it does by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.steering.operations.OPERATIONS", dict(OPERATIONS))
    monkeypatch.delitem(sys.modules, "my_own_operations", raising=False)
    page = PAGE.read_text("utf-8")
    example = re.findall(r"```python\n(from trimtab.steering import Slots.*?)\n\n\nraised", page, re.DOTALL)
    (tmp_path / "my_own_operations.py").write_text(example[0], "utf-8")
    source = StaticSource(sae, 3, 0.9, operation="my_own_operations:at_least")
    assert source.operation == "at_least"
    edits = decode(any_tiny, [[7, 8, 9]], DecodeConfig(max_new_tokens=3), source).edits
    assert len(edits) == 3
    assert float(edits.coefficient.min()) >= 0
    assert float(edits.coefficient.max()) > 0


def test_a_patch_replays_without_a_dictionary(any_tiny: LanguageModel, tmp_path: Path) -> None:
    """And a hand-made run says what it lacks."""
    config, site = DecodeConfig(max_new_tokens=3), any_tiny.site("resid_post.1")
    source = PatchSource({site: torch.ones(any_tiny.d_model)}, positions=[-1], keep_replacements=True)
    trace = Trace.of(any_tiny, decode(any_tiny, [[7, 8, 9]], config, source), config, source)
    for name, hashes in (("patch", {"model": any_tiny.fingerprint}), ("nothing", {})):
        with Run.open(tmp_path / name, "my-patch", {}) as run:
            run.record(hashes=hashes)
            trace.write(run)
    report = replay(tmp_path / "patch", model=any_tiny)
    assert report.exact
    assert report.n_edits == 1
    with pytest.raises(UserError, match="its config does not name the model; give the model"):
        replay(tmp_path / "patch")
    with pytest.raises(UserError, match="does not say with which model it was made"):
        replay(tmp_path / "nothing", model=any_tiny)
