"""Import paths of earlier versions lead to what is there now."""

from __future__ import annotations


def test_standard_where_it_was() -> None:
    from trimtab.dictionaries import architectures
    from trimtab.dictionaries.standard import Standard

    assert Standard is architectures.standard.Standard


def test_the_logit_lens_where_it_was() -> None:
    from trimtab.lm import logit_lens as now
    from trimtab.selection import logit_lens
    from trimtab.selection.logit_lens import token_texts

    assert logit_lens is getattr(now, "logit_lens", now)
    assert callable(token_texts)
