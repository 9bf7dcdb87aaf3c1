"""Some causal-LM types of the installed `transformers`: right to 1e-4, or refused by name. The sweep has them all."""

from __future__ import annotations

import pytest
from tests.lm.right_or_refused import faults
from transformers import PreTrainedTokenizerFast

from trimtab import cli
from trimtab.lm import survey
from trimtab.lm.capabilities import Capabilities
from trimtab.lm.zoo import build_tiny, causal_lm_types

SOME = ("falcon", "gemma2", "gpt_bigcode", "gpt_neo", "lfm2", "mamba", "phi", "qwen3_next", "roberta")
"""Types of as many kinds: fused heads, norms behind branches, one key head, a window that is built in, a hybrid, a
state, parallel branches, gated queries, positions that begin elsewhere."""


@pytest.mark.parametrize("model_type", SOME)
def test_types_are_right_or_refused(model_type: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert model_type in causal_lm_types()
    assert faults(build_tiny(model_type, tiny_tokenizer)) == []


@pytest.mark.parametrize(
    ("model_type", "kept_on"),
    [("gpt_bigcode", "attn_v"), ("roberta", "positions"), ("mamba", "decode"), ("bert", "logit-lens")],
)
def test_what_is_off_would_be_wrong(model_type: str, kept_on: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each refusal is needed: with one capability left on, the comparison finds a fault or the model breaks."""
    model = build_tiny(model_type, tiny_tokenizer)
    off = {name: why for name, why in model.capabilities.off.items() if name not in (kept_on, "prefix")}
    assert kept_on in model.capabilities.off
    model.assume(Capabilities(off=off))
    try:
        found = faults(model)
    except Exception:  # as loud as wrong
        return
    assert found


def test_the_table_says_what_works_and_why_not(tmp_path, capsys) -> None:
    zoo = survey(["llama", "mamba", "blt"])
    llama, mamba, blt = zoo.entries
    assert (llama.off, llama.refused) == ({}, "")
    assert (llama.mark("decode"), mamba.mark("decode"), blt.mark("decode")) == ("✓", "–", "")
    assert "parameters at its smallest" in blt.refused
    assert zoo.summary.endswith("3 types. All works on 1, a part on 1; 1 are not run.")
    page = zoo.markdown()
    assert "All works on llama." in page
    assert "layers with a state other than keys and values" in page
    assert cli.main(["models", "zoo", "--type", "lama"]) == 2
    assert "did you mean llama?" in capsys.readouterr().err
    assert cli.main(["models", "zoo", "--type", "llama", "--page", str(tmp_path / "zoo.md"), "--json"]) == 0
    assert "All works on llama." in (tmp_path / "zoo.md").read_text()
