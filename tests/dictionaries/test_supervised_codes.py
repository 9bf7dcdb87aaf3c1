"""Supervised codes as a dictionary: which value is read, what is rebuilt, what the files say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab import cli
from trimtab.dictionaries import DictionaryInfo, Supervised, load_dictionary, save_dictionary
from trimtab.errors import UserError

NAMES = ["IO=Anna", "IO=Paul", "IO=Mary", "Pos=ABB", "Pos=BAB"]


def codes(**metadata: object) -> Supervised:
    """Three values along the first two coordinates, two along the third; the mean is (1, 1, 1)."""
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1]])
    return Supervised(
        rows.T, torch.zeros(5), rows, torch.ones(3), torch.tensor([2.0, 3.0, 4.0, 0.5, 0.0]), rows.T, torch.zeros(5),
        factors=[3, 2],
        info=DictionaryInfo(
            architecture="supervised", model="tiny", site="attn_z.2.1",
            metadata={"position": "END", "feature_names": NAMES, **metadata},
        ),
    )  # fmt: skip


def test_the_value_of_the_largest_score_fires_with_the_length_of_its_code() -> None:
    sae = codes()
    x = torch.tensor([[3.0, 2.0, 1.5], [1.0, 4.0, 2.0], [-9.0, 1.0, 0.0]])
    assert sae.read(x).tolist() == [[0, 3], [1, 3], [2, 4]]
    assert sae.encode(x).tolist() == [[2, 0, 0, 0.5, 0], [0, 3, 0, 0.5, 0], [0, 0, 4, 0, 0]]  # a code of length 0
    assert sae(x).tolist() == [[3.0, 1.0, 1.5], [1.0, 4.0, 1.5], [-3.0, 1.0, 1.0]]
    found = sae.encode_sparse(x)
    assert torch.equal(found.dense(5), sae.encode(x))
    assert torch.equal(sae.decode_sparse(found), sae(x))
    assert sae.encode_features(x, torch.tensor([3, 1])).tolist() == [[0.5, 0], [0.5, 3], [0, 0]]


def test_files_give_back_every_bit(tmp_path: Path) -> None:
    sae = codes(fit="mse")
    sae.b_enc.data += torch.tensor([0.1, -0.2, 0.3, 1e-7, 3.0])
    loaded = load_dictionary(save_dictionary(sae, tmp_path / "sae"))
    assert type(loaded) is Supervised
    assert all(torch.equal(getattr(loaded, name), getattr(sae, name)) for name in sae.shapes)
    assert (loaded.settings, loaded.fingerprint) == (sae.settings, sae.fingerprint)
    assert loaded.feature_names == tuple(NAMES)
    assert (loaded.info.site, loaded.info.metadata["position"], loaded.info.metadata["fit"]) == (
        "attn_z.2.1", "END", "mse",
    )  # fmt: skip
    assert {file.name for file in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_features_by_what_they_mean(random_sae) -> None:
    sae = codes()
    assert sae.features_named(["Pos=BAB", "IO=Anna"]) == [4, 0]
    assert [sae.label(i) for i in (0, 4)] == ["0 (IO=Anna)", "4 (Pos=BAB)"]
    with pytest.raises(UserError, match=r"feature 'IO=Ann': no feature means that; did you mean IO=Anna\?"):
        sae.features_named(["IO=Ann"])
    with pytest.raises(UserError, match=r"feature '': no feature means that"):
        codes(feature_names=["", *NAMES[1:]]).features_named([""])
    with pytest.raises(UserError, match=r"feature 'a': 2 features mean that; give its number"):
        codes(feature_names=["a", "a", "b", "", "c"]).features_named(["a"])
    plain = random_sae("standard")
    assert (plain.feature_names, plain.label(3)) == ((), "3")
    with pytest.raises(UserError, match=r"the dictionary does not say what its features mean; give its number"):
        plain.features_named(["IO=Anna"])


def test_any_architecture_may_say_what_its_features_mean(random_sae, tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(20)]
    info = DictionaryInfo(architecture="topk", metadata={"feature_names": names})
    path = save_dictionary(random_sae("topk", info=info), tmp_path / "sae")
    assert load_dictionary(path).label(7) == "7 (f7)"


@pytest.mark.parametrize("names", [NAMES[:4], "IO=Anna", [1, 2, 3, 4, 5], None])
def test_meanings_that_are_not_one_for_each_feature(tmp_path: Path, names: object) -> None:
    message = r"field metadata.feature_names in .*: it must be a list of 5 texts, one for each feature"
    with pytest.raises(UserError, match=message):
        save_dictionary(codes(feature_names=names), tmp_path / "refused")
    path = save_dictionary(codes(), tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"]["feature_names"] = names
    (path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=message):
        load_dictionary(path)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([3, 3], r"field factors = \[3, 3\] in .*: there are 5 features"),
        ([5, 0], r"field factors = \[5, 0\] in .*: it must be a list of how many values each factor has"),
        ("32", r"field factors = '32' in .*: it must be a list"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, factors: object, message: str) -> None:
    path = save_dictionary(codes(), tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | {"factors": factors}))
    with pytest.raises(UserError, match=message):
        load_dictionary(path)


def test_factors_of_other_features() -> None:
    rows = torch.eye(3)
    with pytest.raises(UserError, match=r"factors of 2, 2 values: the dictionary has 3 features"):
        Supervised(rows, torch.zeros(3), rows, torch.zeros(3), torch.ones(3), rows, torch.zeros(3), factors=[2, 2])


def test_the_commands_that_describe_and_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {"IO": {"estimate": 0.75, "low": 0.3, "high": 0.95, "n": 4, "level": 0.95, "method": "wilson"}}
    path = save_dictionary(codes(read_accuracy=accuracy), tmp_path / "sae")
    assert cli.main(["sae", "info", str(path)]) == 0
    said = capsys.readouterr().out
    for part in (
        "supervised (SAELens has none of that name)", "0 IO=Anna, 1 IO=Paul, 2 IO=Mary, 3 Pos=ABB, 4 Pos=BAB",
        "IO 0.75 [0.30, 0.95] of 4 held-out prompts", "position = END",
    ):  # fmt: skip
        assert part in said
    assert said.count("IO=Anna") == 1
    assert cli.main(["sae", "info", str(path), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["feature_names"], described["read_accuracy"]) == (NAMES, accuracy)
    assert cli.main(["sae", "convert", str(path), str(tmp_path / "copy")]) == 0
    assert "SAELens has no architecture supervised: only trimtab opens it" in capsys.readouterr().out
    assert load_dictionary(tmp_path / "copy").feature_names == tuple(NAMES)


def test_other_dictionaries_are_described_as_before(
    random_sae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_dictionary(random_sae("standard"), tmp_path / "sae")
    assert cli.main(["sae", "info", str(path), "--json"]) == 0
    assert not {"feature_names", "read_accuracy"} & json.loads(capsys.readouterr().out).keys()
