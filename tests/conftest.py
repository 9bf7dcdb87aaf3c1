"""Models that every test may use: tiny random ones in three layouts, and the real default model."""

from __future__ import annotations

import os
import socket
import string
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, as classes of transformers do

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from trimtab.lm import LanguageModel

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<model>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<model>' }}{{ message['content'] }}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
VOCAB_SIZE = 160
"""Rows of the tiny models' embeddings: more than the tokenizer's tokens, as in most real models."""


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline, and a few merges, so that texts round-trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space, newline = "Ġ", "Ċ"
    pieces = [*string.ascii_letters, *string.digits, *string.punctuation, space, newline]
    merges = [("t", "h"), ("th", "e"), (space, "the"), ("i", "n"), ("a", "n"), ("an", "d"), (space, "and"), ("e", "r")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, *pieces])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) <= VOCAB_SIZE
    return tokenizer


def _wrap(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> LanguageModel:
    """The model with its norms and biases shaken, since at their initial 1 and 0 a test would not miss them."""
    import torch

    from trimtab.lm import LanguageModel

    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel.from_hf(hf.float().eval().requires_grad_(False), tokenizer, name=name)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


@pytest.fixture(scope="session", autouse=True)
def disks_need_no_waiting() -> Iterator[None]:
    """Files are not forced onto the disk in the tests' own process: no test takes the machine's power away, and ten
    thousand small files would wait for it. Processes that are killed wait as they always do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits until something holds that another thread brings about: a machine may be slow for a while."""

    def wait(holds: Callable[[], bool], patience: float = 60.0) -> None:
        end = time.monotonic() + patience
        while not holds():
            assert time.monotonic() < end, f"not within {patience:.0f} seconds"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 110 tokens with pad, bos, eos and a chat template."""
    return _byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """Llama layout: 4 layers, d 32, 4 query and 2 KV heads of 8, untied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **_special_ids(tiny_tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _wrap(LlamaForCausalLM(config), tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """Gemma-3 layout: 6 layers, every third one global, the others with a window of 8; d 32, QK-norm, scaled
    embeddings, head dimension (16) unequal to d / heads, tied head."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=256,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        initializer_range=0.2,
        **_special_ids(tiny_tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return _wrap(Gemma3ForCausalLM(config), tiny_tokenizer, "tiny-gemma3")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """GPT-2 layout: 4 layers, d 32, 4 heads of 8, learned positions, fused and transposed QKV, tied head."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        **_special_ids(tiny_tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _wrap(GPT2LMHeadModel(config), tiny_tokenizer, "tiny-gpt2")


@pytest.fixture(params=["tiny_llama", "tiny_gemma3", "tiny_gpt2"])
def any_tiny(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of the three tiny models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def real_model() -> LanguageModel:
    """SmolLM2-135M-Instruct in float32 (for tests marked `real`)."""
    from trimtab.lm import load_model

    return load_model("smollm2-135m-instruct")


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start a Python script as the ranks of one job, `start_ranks(script, size=2)`, as torchrun does; its output is
    piped, each rank has one thread, and what still runs when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, size: int = 2) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script)],
                env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.communicate()
