"""Study files: what they mean, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.studies.utility.plan import read_study

BANK = """
[[bank]]
model = "stories-260k"
text = ["texts"]
site = ["resid_post.1", "resid_post.2"]
arch = ["topk", "jumprelu"]
l0 = [8, 16, 32]
n_features = 256
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text, "utf-8")
    return path


def test_lists_multiply_and_each_bank_has_its_own_run(tmp_path: Path) -> None:
    other = BANK.replace('["topk", "jumprelu"]', '"gated"').replace("stories-260k", "smollm2-135m-instruct")
    text = '[study]\nfeatures = 12\ncriterion = "kl"\nfactor = [0.5, 1]\n' + BANK + other
    study = read_study(written(tmp_path, text), tmp_path / "run", {"device": "cpu"})
    assert (study.plan.features, study.plan.criterion, study.plan.factor) == (12, ("kl",), (0.5, 1.0))
    first, second = study.banks
    assert len(first.members) == 2 * 2 * 3
    assert len(second.members) == 2 * 3
    assert {member.values["arch"] for member in second.members} == {"gated"}
    assert (first.run, second.run) == (tmp_path / "run" / "banks" / "1", tmp_path / "run" / "banks" / "2")
    assert (first.model, second.model) == ("stories-260k", "smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[study", "it is not TOML"),
        ("[study]\nfeatures = 12\n", "bank: it is no list of tables; write [[bank]] for each model"),
        ("[studies]\n" + BANK, "studies: a study file holds [study] and [[bank]]; did you mean study?"),
        ("[study]\nfeature = 12\n" + BANK, "[study]: feature: there is no such option; did you mean features?"),
        ('[study]\nfeatures = "many"\n' + BANK, "[study]: features"),
        ("[study]\nfactor = [0.5, 0.5]\n" + BANK, "factor [0.5, 0.5]: one occurs twice"),
        ("[study]\ncriterion = []\n" + BANK, "criterion []: there is none"),
        (
            BANK.replace("n_features", "n_feature"),
            "[[bank]] 1: n_feature: there is no such option; did you mean n_features?",
        ),
        (BANK.replace('"jumprelu"', '"jumpsrelu"'), "jumpsrelu"),
        (BANK + "run = 'there'\n", "[[bank]] 1: run: there is no such option"),
        (
            '[[bank]]\ntext = ["texts"]\narch = "topk"\nl0 = 8\n',
            "[[bank]] 1: it is one SAE; give several values of arch, l0, site or seed",
        ),
        ('[[bank]]\narch = ["topk", "gated"]\n', "neither is given"),
        (BANK + 'device = "cuda"\n', "[[bank]] 1: device: there is no such option"),
        (BANK + 'activations = "harvest"\n', "[[bank]] 1: activations: there is no such option"),
        (BANK.replace("32]", "500]"), "l0_500"),
        ('[study]\ncriterion = "delta-confidense"\n' + BANK, "did you mean delta-confidence?"),
        ('[study]\ncriterion = "input-score"\n' + BANK, "criterion input-score: it reads windows or explanations"),
        ('[study]\njudge = "endpont:x"\n' + BANK, "endpont"),
        ('[study]\njudge_option = "loud=1"\n' + BANK, "loud"),
        ('[study]\ninstructions = "none.json"\n' + BANK, "none.json"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_study(written(tmp_path, text), tmp_path / "run")
    assert message in caught.value.line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it cannot be read"):
        read_study(tmp_path / "none.toml", tmp_path)


@pytest.mark.parametrize(("name", "models", "saes"), [("one-model", 1, 30), ("small", 2, 90), ("paper", 3, 90)])
def test_recipes(name: str, models: int, saes: int, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / f"utility-{name}.toml"
    study = read_study(recipe, tmp_path)
    assert len(study.banks) == models
    assert sum(len(bank.members) for bank in study.banks) == saes
    for bank in study.banks:
        assert {member.values["arch"] for member in bank.members} == {"topk", "batchtopk", "jumprelu", "gated", "relu"}
        assert len({member.values["l0"] for member in bank.members}) == 6
        assert all(member.error is None for member in bank.members)
