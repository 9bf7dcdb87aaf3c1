"""Models of llama2.c (Karpathy): its version-0 checkpoint and tokenizer files, as a `transformers` Llama.

Checkpoint: seven int32 (width, MLP width, layers, heads, KV heads, ±vocabulary, context; a negative vocabulary means an
untied head), then float32 weights, one kind after another, each over all layers. Tokenizer: the longest piece's length
(int32), then for each piece its score (float32), length (int32) and bytes.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from trimtab.errors import UserError

_BOS, _EOS = 1, 2
_SPACE = "▁"


def read_llama2c_model(path: Path) -> transformers.LlamaForCausalLM:
    """The model in a llama2.c checkpoint, float32.

    Raises:
        UserError: the file's size is not what its header says.
    """
    raw = path.read_bytes()
    if len(raw) < 28:
        raise _not_llama2c(path, "it has no header")
    width, mlp, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    tied, vocab = vocab > 0, abs(vocab)
    if min(width, mlp, layers, heads, kv_heads, vocab, context) <= 0 or width % heads or heads % kv_heads:
        raise _not_llama2c(path, "its header makes no sense")
    head_dim = width // heads
    kv_width = head_dim * kv_heads
    blocks = {
        "embed": (vocab, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, kv_width, width),
        "self_attn.v_proj": (layers, kv_width, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, mlp, width),
        "mlp.down_proj": (layers, width, mlp),
        "mlp.up_proj": (layers, mlp, width),
        "norm": (width,),
        "rope tables": (2, context, head_dim // 2),
    } | ({} if tied else {"head": (vocab, width)})
    expected = 28 + 4 * sum(int(np.prod(shape)) for shape in blocks.values())
    if len(raw) != expected:
        raise _not_llama2c(path, f"it has {len(raw):,} bytes where its header asks for {expected:,}")
    weights, offset = {}, 28
    for name, shape in blocks.items():
        count = int(np.prod(shape))
        weights[name] = torch.from_numpy(np.frombuffer(raw, "<f4", count, offset).reshape(shape).copy())
        offset += 4 * count

    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
    )
    state = {
        "model.embed_tokens.weight": weights["embed"],
        "model.norm.weight": weights["norm"],
        "lm_head.weight": weights["embed" if tied else "head"],
    }
    for name, block in weights.items():
        if name in ("embed", "norm", "head", "rope tables"):
            continue
        for layer in range(layers):
            weight = block[layer]
            if name.endswith(("q_proj", "k_proj")):
                weight = _halves_from_pairs(weight, head_dim)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [_BOS, _EOS]  # training set the next story's BOS where one ends
    return model.float().eval()


def read_llama2c_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    """The SentencePiece BPE tokenizer in a llama2.c tokenizer file (pieces with scores, byte fallback).

    Raises:
        UserError: the file is truncated.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = _read_pieces(path)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3:]  # by falling score, which is how the file is ordered
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not re.fullmatch("<0x...", piece)  # no byte
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _read_pieces(path: Path) -> list[str]:
    raw, pieces, offset = path.read_bytes(), ["<unk>", "<s>", "</s>"], 4
    index = 0
    while offset < len(raw):
        if offset + 8 > len(raw):
            raise _not_llama2c(path, "it ends within a piece")
        (length,) = struct.unpack_from("<i", raw, offset + 4)
        piece = raw[offset + 8 : offset + 8 + length]
        if length < 0 or len(piece) < length:
            raise _not_llama2c(path, "it ends within a piece")
        if index >= 3:
            pieces.append(piece.decode("utf-8").replace(" ", _SPACE))
        offset, index = offset + 8 + length, index + 1
    return pieces


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows reordered from rotary pairs side by side (llama2.c) to the two halves that `transformers` rotates."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _not_llama2c(path: Path, why: str) -> UserError:
    return UserError(f"file {path}", f"it is not a whole llama2.c file: {why}", "fetch it again")
