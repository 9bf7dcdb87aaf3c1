"""A model of which everything is known: letters set their flag's dimensions, and the head reads these alone.

Its layers add nothing, and its norms divide by a constant, so that each logit is a sum over what the head reads.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.flags import FlagSpec
from trimtab.lm import LanguageModel

FLAGS = FlagSpec(
    concepts=("sea", "war"),
    dims=((3, 17), (8, 21)),
    d_model=32,
    targets={"resid_mid.1": 1.0, "resid_post.1": 1.0, "resid_mid.2": 1.0, "resid_post.2": 1.0},
)
OTHERS = FlagSpec(concepts=FLAGS.concepts, dims=((5, 6), (7, 9)), d_model=32, targets=FLAGS.targets)
"""Dimensions that nothing reads."""
COPIES = {"sea": 25, "war": 26}
"""Where a second encoding stands, if there is one."""
LETTERS = {"sea": "abc", "war": "xyz"}
DIGITS = "012"
LETTER, DIGIT = 10.0, 3.0
"""Logits of a concept's letters behind one of them, and of digits anywhere."""
VOCABULARY = 160


def planted_model(
    tokenizer: PreTrainedTokenizerFast, *, copies: bool = False, copies_read: float = 0.0
) -> LanguageModel:
    """The model.

    Args:
        tokenizer: of the tiny models.
        copies: whether a second dimension of each concept says the same.
        copies_read: weight with which the head reads these.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e12,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "norm" in name:
                weight.fill_(1e6)
            elif "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding, head = hf.model.embed_tokens.weight.zero_(), hf.lm_head.weight.zero_()
        embedding[:, 0] = 1
        head[ids_of(tokenizer, DIGITS), 0] = DIGIT
        for concept, dims in zip(FLAGS.concepts, FLAGS.dims, strict=True):
            own = ids_of(tokenizer, LETTERS[concept])
            for dim in dims:
                embedding[own, dim] = 1
                head[own, dim] = LETTER / len(dims)
            if copies:
                embedding[own, COPIES[concept]] = 1
                head[own, COPIES[concept]] = copies_read
    return LanguageModel.from_hf(hf.eval().requires_grad_(False), tokenizer, "planted")


def ids_of(tokenizer: PreTrainedTokenizerFast, letters: str) -> list[int]:
    """Tokens of single letters."""
    return [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]


def loss_of_a_letter(seen: bool) -> float:
    """Cross-entropy of a concept's letter behind another one of it, with its flag there or without."""
    others = VOCABULARY - len(DIGITS)
    if not seen:
        return math.log(len(DIGITS) * math.exp(DIGIT) + others)
    return math.log(3 * math.exp(LETTER) + len(DIGITS) * math.exp(DIGIT) + others - 3) - LETTER
