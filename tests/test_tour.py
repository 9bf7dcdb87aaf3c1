"""The notebook of examples/ runs, and what it shows can be read: tables, figures, no addresses, no walls of numbers.

`python tests/test_tour.py` runs it on the default model and keeps what comes out (five minutes).
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from trimtab.dictionaries import save_dictionary
from trimtab.lm import LanguageModel

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"
WALL = 60
"""Numbers that no output shows more of, tables aside."""
SMALL = """
import itertools, trimtab, trimtab.activations
from trimtab.activations import read_documents as read
from trimtab.dictionaries import load_dictionary
from trimtab.lm import load_model
trimtab.load_model = lambda name: load_model({model!r})
trimtab.load_sae = lambda name, model: load_dictionary({sae!r}, model=model)
trimtab.activations.read_documents = lambda paths: itertools.islice(read(paths), 6)
"""
"""A small model and SAE in place of the default ones, and a few of the texts."""

Shown = list[tuple[str, dict[str, str]]]


def outputs(notebook: Any) -> Shown:
    """What each code cell shows, with its source; bars that are gone aside."""
    found = [
        (cell.source, {"stream": output.text} if output.output_type == "stream" else dict(output.data))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return [(source, data) for source, data in found if any(data.values())]


def run(notebook: Any, directory: Path) -> None:
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(directory)}}).execute()


@pytest.fixture(scope="module")
def shown(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    root = tmp_path_factory.mktemp("tour")
    tiny_llama.hf.save_pretrained(root / "model")
    tiny_llama.tokenizer.save_pretrained(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "steering")
        sae = import_module("tiny_dictionary").make_dictionary(tiny_llama)
    sae.info = replace(sae.info, model="model")
    save_dictionary(sae, root / "sae")
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("resid_post.15", "resid_post.1")
        if cell.cell_type == "code":
            cell.outputs = []
    given = SMALL.format(model=str(root / "model"), sae=str(root / "sae"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(given))
    run(notebook, root)
    return outputs(notebook)


def of(shown: Shown, source: str) -> list[dict[str, str]]:
    """The outputs of the cell that ends with a line."""
    return [data for text, data in shown if text.splitlines()[-1] == source]


def check_readable(shown: Shown) -> None:
    for source, data in shown:
        text = data.get("text/plain", "") + data.get("stream", "")
        assert not re.search(r"0x[0-9a-f]{6,}|Warning|Traceback|tensor\(|array\(", text), source
        assert len(text) < 4000, source
        if "text/html" not in data:
            assert len(re.findall(r"\d+\.\d+", text)) < WALL, source


def test_no_output_is_an_address_a_warning_or_a_wall(shown: Shown) -> None:
    check_readable(shown)


def test_a_mistake_in_a_notebook_is_one_line(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import trimtab\ntrimtab.load_model('')")])
    notebook.cells[0].metadata["tags"] = ["raises-exception"]
    run(notebook, tmp_path)
    (said,) = notebook.cells[0].outputs[-1].traceback
    assert said == "UserError: the model's name: it is empty; give one; `trimtab models list` names some"


def test_what_is_looked_for_is_found() -> None:
    for bad in ("<object at 0x7f9dac56a090>", "FutureWarning: …", "tensor([1.0])", "1.5 " * WALL):
        with pytest.raises(AssertionError):
            check_readable([("cell", {"text/plain": bad})])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ranking.top(5)", ["tokens by logit lens", "dose ‖Δ‖/‖x‖"]),
        ("top_contexts(model, sae, texts[:10], feature, count=5)", ["activation", "before", "token", "after"]),
        ("steered", ["unsteered", "dose 0.8", "‖Δ‖/‖x‖", "Yesterday I went to the"]),
        ("evaluation", ["cross-entropy increase, spliced (nats)"]),
        ("trained", ["explained variance", "L0 asked for"]),
        ("policy", ["validation reward", "rollouts"]),
        ('policy.steer("The captain saw the ship and said")', ["unsteered", "steered", "KL total"]),
    ],
)
def test_results_are_tables(shown: Shown, source: str, words: list[str]) -> None:
    (data,) = of(shown, source)
    assert data["text/html"].count("<tr") > 1
    for word in words:
        assert word in data["text/html"]


def test_frames_are_frames(shown: Shown) -> None:
    frames = [data for source, data in shown if ".to_frame(" in source]
    assert len(frames) == 3
    assert all('<table border="1" class="dataframe">' in data["text/html"] for data in frames)


def test_objects_say_themselves_in_a_line(shown: Shown) -> None:
    (both,) = of(shown, "model, sae")
    assert re.fullmatch(
        r"\(<LanguageModel .*: LlamaForCausalLM, 4 layers of width 32, float32>,\s+"
        r"<Standard: 48 features of width 32, resid_post\.1 of model>\)",
        both["text/plain"],
    )
    (trained,) = of(shown, "trained.sae, trained.sae.feature_stats")
    assert "512 features of width 32, resid_post.1" in trained["text/plain"]
    assert "of 512 features fired on" in trained["text/plain"]
    said, done = of(shown, "done")
    assert said["stream"].startswith("Yesterday I went to the")
    assert re.fullmatch(r"<AppliedEdits of <VectorSource: .*>: \d+ edits>", done["text/plain"])


def test_every_figure_is_an_image(shown: Shown) -> None:
    figures = [(source, sorted(data)) for source, data in shown if source.endswith(".plot();")]
    assert figures == [
        (f"{name}.plot();", ["image/png", "text/plain"])
        for name in ("ranking", "steered", "evaluation", "policy", "comparison")
    ]


def test_outputs_that_are_kept_are_of_one_run_on_the_default_model_and_can_be_read() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not outputs(notebook):
        assert [cell.execution_count for cell in cells] == [None] * len(cells)
        return
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = outputs(notebook)
    check_readable(shown)
    assert "<LanguageModel smollm2-135m-instruct" in shown[0][1]["text/plain"]
    assert not re.search("/tmp/|/home/|/work/", str([data for _, data in shown if "image/png" not in data]))
    assert {source for source, _ in shown} == {cell.source for cell in cells}
    assert TOUR.stat().st_size < 200_000


def tidied(notebook: Any) -> Any:
    """Without bars that are gone and times of cells, figures in the few colours that they have."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.output_type == "stream" or any(o.data.values())]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    tour = nbformat.read(TOUR, as_version=4)
    run(tour, TOUR.parent)
    nbformat.write(tidied(tour), TOUR)
