"""The path by which programs written for earlier versions import the logit lens."""

from trimtab.lm.logit_lens import LensTokens, logit_lens, token_texts

__all__ = ["LensTokens", "logit_lens", "token_texts"]
