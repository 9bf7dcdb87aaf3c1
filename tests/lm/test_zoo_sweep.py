"""All causal-LM types of the installed `transformers`, and 500 random configurations: right to 1e-4, or refused.

Minutes, so that it runs by itself: `pytest -m sweep`.
"""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lm.captured_steps import why_not_captured
from tests.lm.right_or_refused import faults
from transformers import PreTrainedTokenizerFast

from trimtab.errors import UserError
from trimtab.lm.zoo import build_tiny, causal_lm_types

pytestmark = [pytest.mark.slow, pytest.mark.sweep]

CONFIGURATIONS = 500
FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": (False, True), "mlp_bias": (False, True), "head_dim": (4, 8, 16)},
    "mistral": {"sliding_window": (None, 2, 3, 8), "head_dim": (4, 8)},
    "qwen2": {"use_sliding_window": (False, True), "max_window_layers": (0, 2, 4), "sliding_window": (3, 8)},
    "qwen3": {"attention_bias": (False, True), "head_dim": (4, 8, 16)},
    "gemma2": {"sliding_window": (2, 5, 8), "query_pre_attn_scalar": (4, 8), "final_logit_softcapping": (None, 5.0)},
    "gemma3_text": {"sliding_window": (2, 5, 8), "head_dim": (4, 8, 16), "query_pre_attn_scalar": (4, 16)},
    "gpt2": {"scale_attn_by_inverse_layer_idx": (False, True), "reorder_and_upcast_attn": (False, True)},
    "gpt_bigcode": {"multi_query": (False, True)},
    "gpt_neo": {"attention_types": ([[["global", "local"], 2]], [[["local"], 4]]), "window_size": (2, 4, 8)},
    "gpt_neox": {"use_parallel_residual": (False, True), "attention_bias": (False, True)},
    "falcon": {
        "alibi": (False, True),
        "multi_query": (False, True),
        "parallel_attn": (False, True),
        "bias": (False, True),
        "new_decoder_architecture": (False, True),
        "num_kv_heads": (2, 4),
    },
    "bloom": {"apply_residual_connection_post_layernorm": (False, True)},
    "mpt": {"logit_scale": (None, 0.5), "no_bias": (False, True)},
    "opt": {"do_layer_norm_before": (False, True), "word_embed_proj_dim": (16, 32), "enable_bias": (False, True)},
    "phi": {"qk_layernorm": (False, True), "partial_rotary_factor": (0.5, 1.0)},
    "phi3": {"sliding_window": (None, 3, 8)},
    "stablelm": {"use_parallel_residual": (False, True), "qk_layernorm": (False, True), "use_qkv_bias": (False, True)},
    "cohere": {"use_qk_norm": (False, True), "logit_scale": (0.0625, 1.0, 2.0)},
    "cohere2": {"sliding_window": (2, 8), "logit_scale": (0.25, 1.0)},
    "granite": {"residual_multiplier": (1.0, 0.3), "logits_scaling": (1.0, 4.0), "embedding_multiplier": (1.0, 6.0)},
    "olmo2": {"attention_bias": (False, True)},
    "starcoder2": {"sliding_window": (None, 3, 8), "use_bias": (False, True)},
    "mixtral": {"num_experts_per_tok": (1, 2, 4), "sliding_window": (None, 3)},
    "gpt_oss": {"sliding_window": (2, 8)},
    "gptj": {"rotary_dim": (4, 8)},
    "codegen": {"rotary_dim": (4, 8)},
    "glm": {"attention_bias": (False, True)},
    "glm4": {"attention_bias": (False, True)},
    "modernbert-decoder": {"local_attention": (4, 8), "global_attn_every_n_layers": (2, 3)},
    "smollm3": {"no_rope_layer_interval": (2, 4)},
    "bert": {"is_decoder": (False, True)},
}
"""Types whose settings change how heads, groups, windows, branches or logits are laid out, and those settings."""


def right_or_refused(model_type: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, **own: Any) -> None:
    try:
        model = build_tiny(model_type, tokenizer, dtype=dtype, **own)
    except UserError as error:
        pytest.skip(error.why)
    assert faults(model) == []


@pytest.mark.parametrize("model_type", causal_lm_types())
def test_every_type(model_type: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    right_or_refused(model_type, tiny_tokenizer, torch.float32)


def configuration(number: int) -> tuple[str, torch.dtype, dict[str, Any]]:
    draw = random.Random(number)
    model_type = draw.choice(list(FAMILIES))
    heads = draw.choice((2, 4, 8))
    own = {name: draw.choice(values) for name, values in FAMILIES[model_type].items()}
    own |= {"num_attention_heads": heads, "tie_word_embeddings": draw.random() < 0.5}
    own |= {"num_hidden_layers": 4, "hidden_size": 32}
    if model_type not in ("gpt2", "gpt_neo", "gpt_bigcode", "falcon", "bloom", "mpt", "opt", "gptj", "codegen", "bert"):
        own["num_key_value_heads"] = draw.choice([n for n in (1, 2, 4, 8) if n <= heads])
    if model_type == "gptj" or model_type == "codegen":
        own["num_attention_heads"] = 4
    return model_type, torch.bfloat16 if draw.random() < 0.2 else torch.float32, own


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_random_configurations(number: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model_type, dtype, own = configuration(number)
    right_or_refused(model_type, tiny_tokenizer, dtype, **own)


def count(numbers: range) -> dict[str, list[int]]:
    """Which configurations are right in all, which but for what is refused, which are wrong or cannot be built."""
    from tests.conftest import _byte_level_tokenizer

    tokenizer = _byte_level_tokenizer()
    counted: dict[str, list[int]] = {kind: [] for kind in ("right", "refused in part", "wrong", "not built", "unsure")}
    for number in numbers:
        model_type, dtype, own = configuration(number)
        try:
            model = build_tiny(model_type, tokenizer, dtype=dtype, **own)
        except UserError:
            counted["not built"].append(number)
            continue
        kind = "wrong" if faults(model) else "refused in part" if model.capabilities.off else "right"
        counted[kind].append(number)
        if model.capabilities.unsure:
            counted["unsure"].append(number)
    return counted


def steps_table() -> str:
    """Types whose decoding steps cannot be replayed, and why, as Markdown."""
    from tests.conftest import _byte_level_tokenizer

    tokenizer = _byte_level_tokenizer()
    found = dict[str, str | None]()
    for name in causal_lm_types():
        with suppress(UserError):
            found[name] = why_not_captured(build_tiny(name, tokenizer))
    decoded = {name: why for name, why in found.items() if why is not None}
    rows = [f"| {name} | `{why}` |" for name, why in decoded.items() if why]
    said = f"Of {len(decoded)} types that decode, the steps of {len(decoded) - len(rows)} can be replayed as a graph."
    return "\n".join([said, "", "| not those of | why |", "|---|---|", *rows])


def test_the_docs_say_whose_steps_cannot_be_captured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert steps_table() in page


if __name__ == "__main__" and sys.argv[1:] == ["steps"]:  # python -m tests.lm.test_zoo_sweep steps
    print(steps_table())
elif __name__ == "__main__":  # python -m tests.lm.test_zoo_sweep FIRST END
    for kind, numbers in count(range(*map(int, sys.argv[1:3]))).items():
        print(f"{kind}: {len(numbers)}", numbers if kind in ("wrong", "not built", "unsure") else "")
