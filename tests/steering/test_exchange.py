"""Steerings in other tools' files, read again by the other tools' own readers, and theirs read here."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_dictionary import make_dictionary

from trimtab import cli
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, decode
from trimtab.runs import json_safe, read_typed
from trimtab.steering import StaticSource, Steering, VectorSource, load
from trimtab.steering.exchange import (
    Exported,
    added_vectors,
    export_steering,
    gguf_file,
    import_steering,
    layer_vectors,
)

CONFIG = DecodeConfig(max_new_tokens=6, stop_at_eos=False)
TEXTS = ["the sea and the ship", "an inn"]


def rows(n: int = 2, d: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def steering(model: LanguageModel, **options: Any) -> Steering:
    """Two sites, several directions, signs."""
    v = rows()
    given: dict[str, Any] = {"unit": "absolute", "positions": "all", **options}
    doses = {"resid_post.1": [3.0, -2.0], "resid_post.3": -1.5}
    return Steering.of(
        model, VectorSource({"resid_post.1": v, "resid_post.3": v[0]}, doses=doses, **given), about="sea"
    )


def by_hand() -> dict[int, torch.Tensor]:
    """The same sums, in plain arithmetic."""
    first, second = (v / v.norm() for v in rows().double())
    return {1: (3 * first - 2 * second).float(), 3: (-1.5 * first).float()}


def logits_with_hooks(model: LanguageModel, layers: dict[int, torch.Tensor]) -> torch.Tensor:
    """What llama.cpp and steering-vectors do: add the vector of layer N to its output, at every token."""
    batch = TokenBatch.pad([model.encode_text(TEXTS[0])], model.pad_id, model.device)
    handles = [
        model.hf.model.layers[layer].register_forward_hook(lambda m, a, output, row=row: output + row)
        for layer, row in layers.items()
    ]
    found = model.forward(batch)
    for handle in handles:
        handle.remove()
    return found


def logits_of(model: LanguageModel, one: Steering) -> torch.Tensor:
    with one.applied(model):
        return model.forward(TokenBatch.pad([model.encode_text(TEXTS[0])], model.pad_id, model.device))


def check_gguf(model: LanguageModel, path: Path, one: Steering | None = None) -> None:
    """By the gguf package's own reader, as llama.cpp takes it."""
    one = one or steering(model)
    export_steering(one, path)
    file = gguf.GGUFReader(path)
    assert file.get_field("general.architecture").contents() == "controlvector"
    assert file.get_field("controlvector.model_hint").contents() == "llama"
    assert file.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.tensor_type for tensor in file.tensors] == [gguf.GGMLQuantizationType.F32] * 2
    found = {int(tensor.name.removeprefix("direction.")): torch.tensor(tensor.data) for tensor in file.tensors}
    assert list(found) == [1, 3]
    for layer, row in by_hand().items():
        torch.testing.assert_close(found[layer], row, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_with_hooks(model, found), logits_of(model, one), rtol=1e-4, atol=1e-4)


def test_a_control_vector_is_what_llama_cpp_adds(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    check_gguf(tiny_llama, tmp_path / "sea.gguf")


def check_steering_vectors(model: LanguageModel, path: Path) -> None:
    """By what the library's class is made of."""
    export_steering(steering(model), path)
    given = torch.load(path, weights_only=True)
    assert given["layer_type"] == "decoder_block"
    assert list(given["layer_activations"]) == [1, 3]
    for layer, row in by_hand().items():
        torch.testing.assert_close(given["layer_activations"][layer], row, rtol=1e-5, atol=1e-6)


def test_steering_vectors_gets_its_arguments(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    check_steering_vectors(tiny_llama, tmp_path / "sea.pt")


@pytest.mark.parametrize("name", ["sea.gguf", "sea.pt"])
def test_what_was_exported_comes_back(tiny_llama: LanguageModel, name: str, tmp_path: Path) -> None:
    """As its vectors, which do the same."""
    said = export_steering(steering(tiny_llama), tmp_path / name)
    back = import_steering(tmp_path / name, tiny_llama)
    assert [(part.site, len(part.dose)) for part in back.parts] == [("resid_post.1", 1), ("resid_post.3", 1)]
    for part, layer in zip(back.parts, said.layers, strict=True):
        assert part.dose[0] == pytest.approx(layer.length, rel=1e-5)
    torch.testing.assert_close(
        logits_of(tiny_llama, back), logits_of(tiny_llama, steering(tiny_llama)), rtol=1e-4, atol=1e-4
    )
    again = load(back.save(tmp_path / "back"))
    ids = [tiny_llama.encode_text(text) for text in TEXTS]
    tokens = decode(tiny_llama, ids, CONFIG, again.source(tiny_llama)).token_ids
    assert tokens == decode(tiny_llama, ids, CONFIG, steering(tiny_llama).source(tiny_llama)).token_ids


def relative(model: LanguageModel, norms: dict[str, float] | None = None) -> Steering:
    return Steering.of(model, StaticSource(make_dictionary(model), [3, 5], [0.4, -0.2], positions="all"), norms=norms)


def check_relative(model: LanguageModel, path: Path) -> None:
    sae = make_dictionary(model)
    first, second = sae.directions[3], sae.directions[5]
    said = export_steering(relative(model, {"resid_post.1": 50.0}), path)
    expected = 50 * (0.4 * first - 0.2 * second)
    torch.testing.assert_close(torch.tensor(gguf.GGUFReader(path).tensors[0].data), expected, rtol=1e-4, atol=1e-5)
    assert said.layers[0].norm == 50
    assert said.layers[0].length == pytest.approx(float(expected.norm()), rel=1e-4)
    assert read_typed(Exported, json.loads(json.dumps(json_safe(said)))) == said


def test_a_relative_dose_needs_a_norm(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    check_relative(tiny_llama, tmp_path / "stated.gguf")
    given = added_vectors(relative(tiny_llama), norms=20)
    stated = added_vectors(relative(tiny_llama, {"resid_post.1": 50.0}))
    torch.testing.assert_close(given.layers[1] * 2.5, stated.layers[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError) as caught:
        export_steering(relative(tiny_llama), tmp_path / "x.gguf")
    assert caught.value.line == (
        "the relative dose at resid_post.1: a vector of other tools has one length, and the typical ‖x‖ that this dose "
        "is a share of is not known; state it, above 0: --norm 120"
    )
    assert not (tmp_path / "x.gguf").exists()


def test_shared_doses_and_largest_activations_are_converted(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    source = StaticSource(sae, [3, 5], 1.5, unit="max_activation", combine="total", positions="all")
    most = torch.as_tensor(sae.feature_stats.max_activation)[[3, 5]]  # type: ignore[union-attr]
    row = (most[:, None] * sae.directions[[3, 5]]).sum(0)
    expected = row / row.norm() * 1.5 * most.mean()
    found = added_vectors(Steering.of(tiny_llama, source)).layers[1]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_before_a_layer_is_behind_the_one_below(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_length": True, "positions": "all"}
    one = Steering.of(tiny_llama, VectorSource(rows(1), "resid_pre.2", **options))
    assert list(added_vectors(one).layers) == [1]
    torch.testing.assert_close(
        logits_with_hooks(tiny_llama, added_vectors(one).layers),
        logits_of(tiny_llama, one),
        rtol=1e-4,
        atol=1e-4,  # type: ignore[arg-type]
    )


REFUSED: dict[str, tuple[Callable[[LanguageModel], Steering], str, str]] = {
    "positions": (
        lambda m: steering(m, positions="generated"), "x.gguf",
        "positions generated of sea: other tools add their vectors at every token, the prompt's included; say that you "
        "want that: --positions all",
    ),
    "clamp": (lambda m: steering(m, operation="clamp"), "x.pt", "operation clamp of sea: other tools' files"),
    "another site": (
        lambda m: Steering.of(m, VectorSource(rows(1), "mlp_out.1", 3.0, unit="absolute", positions="all")), "x.pt",
        "site mlp_out.1: other tools add their vectors to the outputs of layers",
    ),
    "layer 0": (
        lambda m: Steering.of(m, VectorSource(rows(1), "resid_post.0", keep_length=True, positions="all")), "x.gguf",
        "a control vector for layer 0: llama.cpp adds nothing to the output of layer 0",
    ),
    "no tool": (steering, "x.bin", "file x.bin: its name does not say for which tool it is; end it in .gguf"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    tiny_llama: LanguageModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, file, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        export_steering(make(tiny_llama), file)
    assert message in caught.value.line
    assert not list(tmp_path.iterdir())


def test_positions_may_be_given_up(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    export_steering(steering(tiny_llama, positions="generated"), tmp_path / "x.gguf", positions="all")
    with pytest.raises(UserError, match=r"x\.gguf: it is there already; choose another name"):
        export_steering(steering(tiny_llama), tmp_path / "x.gguf")


def write_repeng(
    path: Path, directions: dict[int, np.ndarray], hint: str = "llama", arch: str = "controlvector"
) -> None:
    """As repeng's `ControlVector.export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", hint)
    writer.add_uint32(f"{arch}.layer_count", len(directions))
    for layer, row in directions.items():
        writer.add_tensor(f"direction.{layer}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_vector_of_repeng_is_read(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    """In repeng's order, from the last layer down, one of them empty, as its layers 1 to 3 would be."""
    values = {layer: row.numpy() for layer, row in zip((3, 2, 1), rows(3), strict=True)}
    values[2] = np.zeros(32, dtype=np.float32)
    write_repeng(tmp_path / "happy.gguf", values)
    found = import_steering(tmp_path / "happy.gguf", tiny_llama, positions="generated")
    assert [part.site for part in found.parts] == ["resid_post.1", "resid_post.3"]
    assert (found.unit, found.positions, found.about) == ("absolute", "generated", "happy.gguf")
    for part in found.parts:
        row = torch.from_numpy(values[int(part.site[-1])])
        torch.testing.assert_close(found.directions[part.site][0] * part.dose[0], row, rtol=1e-5, atol=1e-6)
    assert import_steering(tmp_path / "happy.gguf", tiny_llama).positions == "all"


@dataclass
class SteeringVector:
    """As steering-vectors (0.12) defines it."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


def test_a_pickled_steering_vector_is_read_into_a_stand_in(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `torch.save(steering_vector)` leaves, without the library."""
    module = types.ModuleType("steering_vectors.steering_vector")
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(SteeringVector, "__module__", module.__name__)
    v = rows()
    torch.save(SteeringVector({1: v[0], 3: v[1].half()}), tmp_path / "theirs.pt")
    monkeypatch.undo()
    found = import_steering(tmp_path / "theirs.pt", tiny_llama)
    assert [part.site for part in found.parts] == ["resid_post.1", "resid_post.3"]
    torch.testing.assert_close(found.directions["resid_post.1"][0] * found.parts[0].dose[0], v[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "site"),
    [
        ("v.pt", rows(1)[0], "resid_post.2"),
        ("v.pt", rows(1)[None], "resid_post.2"),
        ("v.pt", {2: rows(1)[0]}, None),
        ("v.safetensors", {"resid_post.2": rows(1)[0]}, None),
        ("v.safetensors", {"layer_2": rows(1)[0]}, None),
        ("v.safetensors", {"anything": rows(1)[0]}, "resid_post.2"),
    ],
)
def test_saved_tensors_are_read(
    tiny_llama: LanguageModel, name: str, value: Any, site: str | None, tmp_path: Path
) -> None:
    save_file(value, tmp_path / name) if name.endswith("tensors") else torch.save(value, tmp_path / name)
    found = import_steering(tmp_path / name, tiny_llama, site=site)
    assert [part.site for part in found.parts] == ["resid_post.2"]
    torch.testing.assert_close(found.directions["resid_post.2"] * found.parts[0].dose[0], rows(1), rtol=1e-5, atol=1e-6)


def torch_file(value: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        torch.save(value, path / "v.pt")
        return path / "v.pt"

    return write


def control_vector(directions: dict[int, Any], **more: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        write_repeng(
            path / "v.gguf", {layer: np.asarray(row, dtype=np.float32) for layer, row in directions.items()}, **more
        )
        return path / "v.gguf"

    return write


def damaged(path: Path) -> Path:
    file = control_vector({1: rows(1)[0]})(path)
    file.write_bytes(file.read_bytes()[:60])
    return file


def unknown(path: Path) -> Path:
    (path / "v.npz").write_bytes(b"")
    return path / "v.npz"


ONES = torch.ones(32)
BAD: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "nothing": (lambda p: p / "v.pt", {}, "v.pt: there is none; give a file of another tool"),
    "an unknown end": (unknown, {}, "its name does not say what it is; give one that ends in .gguf, .pt"),
    "a model": (control_vector({1: ONES}, arch="llama"), {}, "it holds a llama, no controlvector; give another"),
    "cut short": (damaged, {}, "it could not be read as GGUF"),
    "another architecture": (control_vector({1: ONES}, hint="qwen2"), {}, "for a model of the architecture qwen2"),
    "a layer too high": (control_vector({4: ONES}), {}, "site resid_post.4: tiny-llama has layers 0 to 3"),
    "another width": (control_vector({1: np.ones(31)}), {}, "v.gguf of width 31: tiny-llama has width 32"),
    "NaN": (control_vector({1: np.full(32, np.nan)}), {}, "layer 1 of v.gguf: some values are not finite"),
    "zeros": (control_vector({1: np.zeros(32)}), {}, "v.gguf: all its vectors are zero"),
    "a site of a control vector": (control_vector({1: ONES}), {"site": "resid_post.1"}, "says for which layers it is"),
    "no site": (torch_file(ONES), {}, "it does not say where its vector is for; give the site: --site resid_post.15"),
    "a site too many": (torch_file({1: ONES, 2: ONES}), {"site": "resid_post.1"}, "holds 2 vectors by name"),
    "a matrix": (torch_file(torch.ones(3, 32)), {"site": "resid_post.1"}, "of shape 3×32: it is not one vector"),
    "another kind of layer": (
        torch_file({"layer_activations": {1: ONES}, "layer_type": "mlp"}), {}, "layer_type 'mlp' in",
    ),
    "an unknown name": (torch_file({"happy": ONES}), {}, "vectors are named by layer (15) or by site"),
    "another site": (torch_file({"mlp_out.1": ONES}), {}, "only vectors for resid_post are read"),
    "whole numbers": (torch_file({1: torch.ones(32, dtype=torch.long)}), {}, "no tensor of floating-point numbers"),
    "a list": (torch_file([1.0]), {}, "it holds a list, no vectors; save one tensor, or one per layer"),
    "code": (torch_file(Path("x")), {}, "would have to be unpickled, which can run any code; trimtab does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tiny_llama: LanguageModel, name: str, tmp_path: Path) -> None:
    write, options, message = BAD[name]
    path = write(tmp_path)
    with pytest.raises(UserError) as caught:
        import_steering(path, tiny_llama, **options)
    assert message in caught.value.line


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_the_commands(tiny_llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From features to a saved steering, a replayed run, a control vector, and back."""
    from trimtab.dictionaries import save_dictionary

    model, sae, sea = tmp_path / "model", tmp_path / "sae", tmp_path / "sea"
    tiny_llama.hf.save_pretrained(model)
    tiny_llama.tokenizer.save_pretrained(model)
    own = make_dictionary(tiny_llama)
    own.info = type(own.info)(architecture="standard", site="resid_post.1", model=str(model))
    save_dictionary(own, sae)
    short = ["--max-new-tokens", 6]
    of_features = ["--model", model, "--sae", sae, "--feature", 3, 5, "--dose", 0.5, *short]
    made = run_json(capsys, "steer", "the sea", *of_features, "--save", sea)
    shown = run_json(capsys, "steering", "show", sea)
    (part,) = shown["parts"]
    assert (part["feature"], part["sae"], part["dose"]) == ([3, 5], str(sae), [0.5, 0.5])
    assert part["norm"] > 0
    assert shown["evidence"][0]["value"] == pytest.approx(made["arms"][1]["kl_total"])
    used = run_json(capsys, "steer", "the sea", "--with", sea, *short, "--run", tmp_path / "run")  # it names its model
    texts = [[one["text"] for one in result["arms"][1]["continuations"]] for result in (made, used)]
    assert texts[0] == texts[1]
    assert used["steered_with"] == made["steered_with"] == "feature 3, 5"
    assert run_json(capsys, "steer", "--replay", tmp_path / "run")["exact"]
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "What does steering with feature 3, 5 write?" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    swept = run_json(capsys, "steer", "the sea", "--with", sea, sea, "--sweep", 0.5, 1, *short, "--no-kl")
    assert [round(arm["realised"]["relative"], 2) for arm in swept["arms"]][2] == pytest.approx(
        2 * used["arms"][1]["realised"]["relative"], abs=0.02
    )
    assert "the prompt's included" in refused(capsys, "steering", "export", sea, tmp_path / "sea.gguf")
    said = run_json(capsys, "steering", "export", sea, tmp_path / "sea.gguf", "--positions", "all")
    assert said["layers"][0]["norm"] == part["norm"]
    back = run_json(capsys, "steering", "import", tmp_path / "sea.gguf", tmp_path / "back", "--model", model)
    assert back["parts"][0]["dose"] == pytest.approx([said["layers"][0]["length"]], rel=1e-5)
    assert "beside --sweep" in refused(capsys, "steer", "in", *of_features[:7], "--sweep", 1, "--save", tmp_path / "x")
    assert "beside --with" in refused(capsys, "steer", "in", "--with", sea, "--save", tmp_path / "x")
    assert "it is there already" in refused(capsys, "steer", "in", *of_features, "--save", sea)
    assert "feature beside" in refused(capsys, "steer", "in", "--with", sea, "--feature", 3)
    assert "no value follows it" in refused(capsys, "steer", "in", "--with", "--dose", 1)


def one_layer_late(patch: pytest.MonkeyPatch) -> None:
    real = layer_vectors._layer
    patch.setattr(layer_vectors, "_layer", lambda site: real(site) + 1)


def sign_lost(patch: pytest.MonkeyPatch) -> None:
    real = layer_vectors.edit_delta
    patch.setattr(layer_vectors, "edit_delta", lambda *given: real(*given).abs())


def norm_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer_vectors, "_norm", lambda part, norms: 1.0)


def written_in_half(patch: pytest.MonkeyPatch) -> None:
    real = gguf_file.gguf.GGUFWriter.add_tensor
    patch.setattr(
        gguf_file.gguf.GGUFWriter, "add_tensor", lambda self, name, row: real(self, name, row.astype(np.float16))
    )


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[LanguageModel, Path], None], str]] = {
    "one layer late, for llama.cpp": (one_layer_late, check_gguf, "x.gguf"),
    "one layer late, for steering-vectors": (one_layer_late, check_steering_vectors, "x.pt"),
    "the sign lost": (sign_lost, check_gguf, "x.gguf"),
    "the norm forgotten": (norm_forgotten, check_relative, "x.gguf"),
    "written in half precision": (written_in_half, check_gguf, "x.gguf"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(
    name: str, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, check, file = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(tiny_llama, tmp_path / file)
