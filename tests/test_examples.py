"""The programs in examples/ run on a tiny model, and none takes more than ten statements."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import trimtab
from trimtab.activations import read_documents, top_contexts
from trimtab.dictionaries import DictionaryInfo, Standard, load_dictionary
from trimtab.evaluation import evaluate
from trimtab.lm import LanguageModel

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MOST = 10


def statements(source: str) -> int:
    """Statements at any depth, the text at the top aside."""
    tree = ast.parse(source)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - (ast.get_docstring(tree) is not None)


@pytest.fixture
def run(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an example by its name with the tiny model in place of the default one; gives what it defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trimtab, "load_model", lambda name: tiny_llama, raising=False)
    return lambda name: runpy.run_path(str(EXAMPLES[0].parent / f"{name}.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_takes_at_most_ten_statements(example: Path) -> None:
    assert statements(example.read_text(encoding="utf-8")) <= MOST


def test_statements_are_counted_at_any_depth() -> None:
    assert statements('"""Text."""\nimport a\nfor b in a:\n    c = b; d = c\nwith a: e()\n') == 6


def test_every_example_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals()}
    assert {path.stem for path in EXAMPLES} <= tests


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (EXAMPLES[0].parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert sorted(shown) == sorted(path.read_text(encoding="utf-8").partition('"""\n\n')[2] for path in EXAMPLES)


def test_steer_with_a_vector(run: Any) -> None:
    result = run("steer_with_a_vector")["result"]
    assert result.steered[0].realised.relative == pytest.approx(0.4, abs=1e-4)
    assert result.unsteered.realised.n_edits == 0
    assert result.steered[0].continuations[0].text != result.unsteered.continuations[0].text
    assert result.trace.edits.num_rows == result.steered[0].realised.n_edits


def test_generate_with_a_vector(run: Any, tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    made = run("generate_with_a_vector")
    unsteered = tiny_llama.hf.generate(**made["inputs"], max_new_tokens=20)
    assert made["tokens"].tolist() != unsteered.tolist()
    assert "Yesterday I went to the" in capsys.readouterr().out


def test_train_an_sae(run: Any, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.activations.read_documents", lambda paths: islice(read_documents(paths), 8))
    made = run("train_an_sae")
    assert "held-out rows" in repr(made["trained"])
    again = load_dictionary("my_sae", model=tiny_llama)
    assert torch.equal(again.W_dec, made["trained"].sae.W_dec)
    strongest = top_contexts(tiny_llama, again, made["texts"], made["feature"])
    assert len(strongest.contexts) == 10
    assert again.feature_stats is not None
    assert again.feature_stats.max_activation[made["feature"]] == again.feature_stats.max_activation.max()


def test_evaluate_an_sae_object(run: Any, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for SAELens that gives an SAE for the tiny model."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "dictionaries")
    classes = import_module("foreign_classes")
    weights = make_weights(tiny_llama)
    metadata = classes.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    theirs = classes.StandardSAE(classes.StandardSAEConfig(d_in=32, d_sae=64, metadata=metadata), weights)
    package = ModuleType("sae_lens")
    package.SAE = SimpleNamespace(from_pretrained=lambda release, sae_id: theirs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    made = run("evaluate_an_sae_object")
    own = Standard(**weights, info=DictionaryInfo(architecture="standard", site="resid_post.1"))
    assert made["result"]["explained_variance"] == evaluate(tiny_llama, own)["explained_variance"]
    assert made["result"].sae == "StandardSAE in memory"


def make_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    W_dec = torch.nn.functional.normalize(torch.randn(64, model.d_model, generator=generator), dim=1)
    b_enc, b_dec = torch.full((64,), -0.2), torch.zeros(model.d_model)
    return {"W_enc": W_dec.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def test_train_a_policy(run: Any, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "steering")
    sae = import_module("tiny_dictionary").make_dictionary(tiny_llama)
    monkeypatch.setattr(trimtab, "load_sae", lambda name, model: sae, raising=False)
    made = run("train_a_policy")
    task = made["policy"].setup.task
    assert sorted(item.prompt for item in task.items("all")) == sorted(made["prompts"])
    item = task.items("train")[0]
    assert task.parse(item, "in the sea").reward == 10 / 20
    assert made["comparison"].result.reference == "policy"
    assert made["comparison"].result.items == len(task.items("test"))
    assert len(made["policy"].metrics) >= 10
