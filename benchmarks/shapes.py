"""Models of known shapes with random weights, which is all that speed depends on; nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Causal
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from trimtab.lm import LanguageModel

SPECIAL = {"pad": 0, "eos": 1, "bos": 2}
SHAPES: dict[str, PretrainedConfig] = {
    "gemma-2-2b": Gemma2Config(),
    "smollm2-135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": Gemma2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=16, head_dim=16, vocab_size=1000, sliding_window=512,
    ),
}  # fmt: skip
"""Gemma 2 2B, the default model, and a small one for trying a benchmark."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocab = {f"<{name}>": i for name, i in SPECIAL.items()}
    vocab |= {byte: len(vocab) + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def random_model(shape: str, device: torch.device | str, dtype: str) -> LanguageModel:
    """A model of a shape with random weights, always the same ones on a device."""
    config = SHAPES[shape]
    config.update({f"{name}_token_id": i for name, i in SPECIAL.items()})
    with torch.device(device):
        torch.manual_seed(0)
        hf = Causal.from_config(config, dtype=getattr(torch, dtype))
    return LanguageModel.from_hf(hf.eval(), byte_tokenizer(), f"random {shape}")
