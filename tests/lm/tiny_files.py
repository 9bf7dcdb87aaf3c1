"""Tiny model files for loading tests: a GGUF file, a wheel that holds it, llama2.c files."""

from __future__ import annotations

import itertools
import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch

from trimtab.lm import LanguageModel


def write_gguf(model: LanguageModel, path: Path) -> Path:
    """A Llama model as llama.cpp's converter writes it: float32, query and key rows in rotary pairs."""
    config, backend = model.hf.config, model.tokenizer.backend_tokenizer
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "e r"])
    for add, token in (
        (writer.add_bos_token_id, "<bos>"),
        (writer.add_eos_token_id, "<eos>"),
        (writer.add_unk_token_id, "<unk>"),
        (writer.add_pad_token_id, "<pad>"),
    ):
        add(backend.token_to_id(token))
    writer.add_chat_template(model.tokenizer.chat_template)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {name: tensor.numpy() for name, tensor in model.hf.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if theirs.endswith(("q_proj", "k_proj")):
                heads = weight.shape[0] // config.head_dim
                weight = weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel `name` 1.0 that pip accepts, holding `files`."""
    stem = name.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    members = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = directory / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


class Llama2c:
    """A random model in llama2.c's layout, and its forward pass written from run.c's equations in float64."""

    width, mlp, layers, heads, kv_heads, vocab, context = 16, 24, 2, 4, 2, 290, 32

    def __init__(self, *, tied: bool) -> None:
        rng = np.random.default_rng(0)
        head = self.width // self.heads
        kv = head * self.kv_heads
        self.shapes = {
            "embed": (self.vocab, self.width),
            "att_norm": (self.layers, self.width),
            "wq": (self.layers, self.width, self.width),
            "wk": (self.layers, kv, self.width),
            "wv": (self.layers, kv, self.width),
            "wo": (self.layers, self.width, self.width),
            "ffn_norm": (self.layers, self.width),
            "w1": (self.layers, self.mlp, self.width),
            "w2": (self.layers, self.width, self.mlp),
            "w3": (self.layers, self.mlp, self.width),
            "final_norm": (self.width,),
            "rope": (2, self.context, head // 2),
        }
        if not tied:
            self.shapes["head"] = (self.vocab, self.width)
        self.weights = {name: rng.normal(size=shape).astype("<f4") * 0.5 for name, shape in self.shapes.items()}
        self.tied = tied

    def write(self, path: Path) -> Path:
        vocab = self.vocab if self.tied else -self.vocab
        header = struct.pack("<7i", self.width, self.mlp, self.layers, self.heads, self.kv_heads, vocab, self.context)
        path.write_bytes(header + b"".join(weight.tobytes() for weight in self.weights.values()))
        return path

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits `[T, vocab]`."""
        w = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        head, group = self.width // self.heads, self.heads // self.kv_heads
        x = w["embed"][ids]

        def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

        def rotate(x: np.ndarray) -> np.ndarray:  # [T, width]; neighbouring values are one complex number
            angle = np.arange(len(x))[:, None] * 10000.0 ** -(np.arange(0, head, 2) / head)
            z = x.reshape(len(x), -1, head // 2, 2)
            z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angle)[:, None]
            return np.stack([z.real, z.imag], -1).reshape(x.shape)

        for i in range(self.layers):
            h = norm(x, w["att_norm"][i])
            q, k, v = rotate(h @ w["wq"][i].T), rotate(h @ w["wk"][i].T), h @ w["wv"][i].T
            out = np.zeros_like(x)
            for n in range(self.heads):
                mine, shared = slice(n * head, (n + 1) * head), slice(n // group * head, (n // group + 1) * head)
                scores = q[:, mine] @ k[:, shared].T / np.sqrt(head)
                scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, mine] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
            x = x + out @ w["wo"][i].T
            h = norm(x, w["ffn_norm"][i])
            gate = h @ w["w1"][i].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
        return norm(x, w["final_norm"]) @ w["embed" if self.tied else "head"].T


STORY_PIECES = [" t", "he", " a", " the", "in", " w", "ing", "ed"]


def write_llama2c_tokenizer(path: Path) -> list[tuple[bytes, float]]:
    """A tokenizer file of 270-odd pieces: three specials, 256 bytes, merges by falling score, characters."""
    pieces: list[tuple[bytes, float]] = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)]
    words = [*STORY_PIECES, *" theaingwdsMN"]
    pieces += [(piece.encode(), -float(rank)) for rank, piece in enumerate(dict.fromkeys(words))]
    raw = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    path.write_bytes(struct.pack("<i", 7) + raw)
    return pieces


def greedy_merge(text: str, pieces: list[tuple[bytes, float]]) -> list[int]:
    """llama2.c's `encode`: a space in front, characters (or bytes), then the best-scored pair until none is left."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text:
        known = ids.get(character.encode())
        tokens += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        joined = [
            (pieces[ids[pieces[a][0] + pieces[b][0]]][1], -at)
            for at, (a, b) in enumerate(itertools.pairwise(tokens))
            if pieces[a][0] + pieces[b][0] in ids
        ]
        if not joined:
            return [1, *tokens]
        at = -max(joined)[1]
        tokens[at : at + 2] = [ids[pieces[tokens[at]][0] + pieces[tokens[at + 1]][0]]]


def save_directory(model: LanguageModel, path: Path) -> Path:
    """The model saved in Hugging Face's layout."""
    model.hf.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules hold bit-equal tensors under equal names."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
