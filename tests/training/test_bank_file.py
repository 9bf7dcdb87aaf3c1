"""Bank files and products of options: what they expand to, and every mistake named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.training import BankConfig, TrainCommand, TrainTextConfig, command_defaults, expand


def bank(tmp_path: Path, content: str) -> BankConfig | TrainTextConfig:
    path = tmp_path / "bank.toml"
    path.write_text(content)
    return TrainCommand(**command_defaults({"bank": [str(path)]})).expanded()


def names(config: BankConfig | TrainTextConfig) -> list[str]:
    assert isinstance(config, BankConfig)
    return [member.name for member in config.members]


def test_lists_multiply_and_members_replace_defaults(tmp_path: Path) -> None:
    config = bank(
        tmp_path,
        """
        [defaults]
        text = ["a.txt"]
        model = "tiny"
        n_features = 512
        seed = [0, 1]
        l0 = 8
        rows = 1000
        aux_coefficient = 0.1
        [[member]]
        arch = ["topk", "relu"]
        site = ["resid_post.1", "resid_post.2"]
        [[member]]
        arch = "relu"
        sparsity_weight = 0.5
        seed = 3
        """,
    )
    assert isinstance(config, BankConfig)
    assert (config.text, config.model) == (("a.txt",), "tiny")
    assert config.sites == ("resid_post.1", "resid_post.2", "resid_post.15")
    assert len(config.members) == 9
    assert names(config)[0] == "resid_post.1-topk-n512-l0_8-seed0"
    assert names(config)[-1] == "resid_post.15-relu-n512-weight0.5-seed3"
    topk, relu, last = config.members[0].config, config.members[2].config, config.members[-1].config
    assert topk is not None
    assert relu is not None
    assert last is not None
    assert (topk.arch, topk.aux_coefficient, topk.l0) == ("topk", 0.1, 8.0)
    assert (relu.arch, relu.aux_coefficient, relu.rows) == ("relu", None, 1000)
    assert (last.l0, last.sparsity_weight) == (None, 0.5)


def test_options_beside_the_file_replace_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "bank.toml"
    path.write_text('[defaults]\nrows = 5\nseed = [0, 1]\ntext = ["a"]\nworkers = 3\nrun = "there"\n')
    command = TrainCommand(**command_defaults({"bank": [str(path)]}))
    assert (command.rows, command.seed, command.workers, command.run) == (5, (0, 1), 3, Path("there"))
    assert command_defaults({"rows": ["7"]}) == {}


def test_a_product_of_one_is_a_single_training(tmp_path: Path) -> None:
    config = bank(tmp_path, '[defaults]\ntext = ["a"]\nk = 4\nlr = 0.01\n[[member]]\nsite = "resid_post.3"\n')
    assert config == TrainTextConfig(text=("a",), k=4, lr=0.01, site="resid_post.3")


def test_a_member_that_cannot_be_built_is_kept_with_its_reason(tmp_path: Path) -> None:
    config = bank(tmp_path, '[defaults]\ntext = ["a"]\nn_features = 16\n[[member]]\nk = [4, 16]\n')
    assert isinstance(config, BankConfig)
    good, bad = config.members
    assert good.error is None
    assert bad.config is None
    assert "k 16: it must be from 1 to n_features − 1 = 15" in str(bad.error)
    assert bad.name == "resid_post.15-topk-n16-l0_16-seed0"


def test_fields_that_tell_members_apart_are_in_their_names() -> None:
    found = expand({"seed": (0, 1), "rows": (9,)}, [("", {"warmup_share": (0.1,)}), ("", {"lr": (0.1, 0.2)})])
    assert [member.name.removeprefix("resid_post.15-topk-n4096-l0_32-") for member in found] == [
        "seed0-warmup_share0.1", "seed1-warmup_share0.1",
        "seed0-lr0.1", "seed0-lr0.2", "seed1-lr0.1", "seed1-lr0.2",
    ]  # fmt: skip
    (long,) = expand({"site": ("x" * 300,)})
    assert len(long.name) == 120


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[defaults]\nn-features = 5",
            r"bank.toml: \[defaults\]: n-features: there is no such option; did you mean n_f",
        ),
        (
            "[defaults]\nsequences_per_pass = 4",
            r"bank.toml: \[defaults\]: sequences_per_pass: there is no such option; write model_batch_size",
        ),
        ("[[member]]\n[[member]]\narhc = 'topk'", r"bank.toml: \[\[member\]\] 2: arhc: .*; did you mean arch\?"),
        ("[[member]]\ntext = ['a']", r"\[\[member\]\] 1: text: all members share it; move it to \[defaults\]"),
        ("[[member]]\nk = [4, 'x']", r"\[\[member\]\] 1: k: it must be a whole number, not 'x'"),
        ("[[member]]\nlr = true", r"1: lr: it must be a number, not True"),
        ("[defaults]\nrows = 1.5", r"\[defaults\]: rows: it must be a whole number, not 1.5"),
        ("[defaults]\ndecay = 'slow'", r"decay: it must be one of linear, cosine, none, not 'slow'"),
        ("[[member]]\npenalty = 'tan'", r"1: penalty: it must be one of l0_target, tanh, l0, not 'tan'"),
        ("[defaults]\ntext = [1]", r"text\[0\]: it must be a text, not 1"),
        ("[[member]]\nk = []", r"1: k: the list is empty; name at least one value"),
        (
            "[[members]]\nk = 4",
            r"bank.toml: members: a bank file holds \[defaults\] and \[\[member\]\]; did you mean \[\[m",
        ),
        ("defaults = 3", r"defaults: it is no table"),
        ("member = 3", r"member: it is no list of tables"),
        ("[defaults", r"bank.toml: it is not TOML"),
        ("[[member]]\narch = 'topkk'", r"arch 'topkk': it is one of .*; did you mean topk\?"),
        ("[[member]]\narch = 'relu'\nk_aux = 3", r"\[\[member\]\] 1: k_aux: architecture relu has no k_aux"),
        ("[defaults]\nk_aux = 3\narch = 'relu'", r"k_aux 3: only .*topk.* has it; leave it out"),
        ("[[member]]\nseed = [1, 1]", r"member resid_post.15-topk-n4096-l0_32-seed1: it is there twice"),
        ("[[member]]\nl0 = 32\n[[member]]\nk = 32", r"\[\[member\]\] 2: member .*l0_32-seed0: it is there twice"),
        ('[[member]]\n[[member]]\narch = "topp"', r"\[\[member\]\] 2: arch.* 'topp'"),
        ("[[member]]\nlr = 0.1\n[[member]]\n[defaults]\nlr = 0.1", r"member .*: it is there twice"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bank(tmp_path, content)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"bank file nowhere.toml: it cannot be read"):
        command_defaults({"bank": ["nowhere.toml"]})


def test_groups_multiply_as_lists_of_lists(tmp_path: Path) -> None:
    from trimtab.training.bank_file import read_bank_file

    path = tmp_path / "bank.toml"
    path.write_text("[[member]]\ngroups = [0.5, 0.5]\n[[member]]\ngroups = [[0.5, 0.5], [0.25, 0.75]]\n")
    one, two = read_bank_file(path, TrainCommand).members
    assert one == {"groups": ((0.5, 0.5),)}
    assert two == {"groups": ((0.5, 0.5), (0.25, 0.75))}


def test_options_that_are_one_of_a_few_texts_may_be_set(tmp_path: Path) -> None:
    text = '[defaults]\ntext = ["a"]\nb_dec_init = "mean"\n[[member]]\narch = "jumprelu"\npenalty = ["tanh", "l0"]\n'
    config = bank(tmp_path, text + '[[member]]\narch = "relu"\ndecoder_norm = "free"\n')
    assert isinstance(config, BankConfig)
    found = [member.config for member in config.members if member.config is not None]
    assert [one.penalty for one in found] == ["tanh", "l0", None]
    assert [one.decoder_norm for one in found] == [None, None, "free"]
    assert [one.b_dec_init for one in found] == ["mean"] * 3
