"""The examples that ship: of the SAE beside them, of every feature, small, and of text whose licence is stated."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq

from trimtab.dictionaries import SAEInfoConfig, describe_sae, load_dictionary
from trimtab.dictionaries.shipped import shipped_dictionary


def test_sae_info_says_what_the_page_says() -> None:
    said = describe_sae(SAEInfoConfig(sae="default")).render()
    assert "3 top, 1 weighted, 1 random windows of 16 tokens for 5,120 features, out of 208,875 tokens (1.3 MB)" in said
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text("utf-8")
    stated = (
        "three `top` windows, one `weighted`, one `random`, of 16 tokens, out of 208,875 tokens; 1.3 MB, "
        "as `trimtab sae info default` says"
    )
    assert stated in page


def test_the_examples_that_ship() -> None:
    sae = load_dictionary("default")
    found = sae.feature_examples
    place = shipped_dictionary("default")
    assert found is not None
    assert place is not None
    file = place / "feature_examples.parquet"
    assert sae.examples_file == file
    assert file.stat().st_size < 3_000_000
    assert found.dictionary == sae.fingerprint
    assert (found.model, found.site) == (sae.info.model, sae.info.site)
    assert len(found.live) == sae.n_features
    assert found.tokens.shape[1] == 16
    assert {window.kind for window in found[2112].windows} == {"top", "weighted", "random"}
    notice = (place / "NOTICE").read_text("utf-8")
    stated = {
        r"[A-Z][a-z]+_[A-Z][a-z]+_(18[89]|19[012])\d#\d+": "AUTHOR_TITLE_YEAR#",
        r"(19|20)\d\d-[\w-]+#\d+": "YEAR-PRESIDENT#",
        r"review/.*": "review/",
        r"wikitext.*": "wikitext",
        r"tinystories.*": "tinystories",
        r"gsm8k#.*": "gsm8k#",
    }
    for document in set(pq.read_table(file).column("document").to_pylist()):
        assert any(re.fullmatch(pattern, document) for pattern in stated), document
    assert all(f"\n{beginning}" in notice for beginning in stated.values())
