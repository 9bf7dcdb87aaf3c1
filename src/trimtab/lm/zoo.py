"""Every causal-LM type of the installed `transformers`, as a tiny random model, and what is found to work on each.

A type's config is made small field by field, by what fields are called in any of them; what does not come out small
enough, or cannot be built or run without further inputs, is named with the reason.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers

from trimtab.errors import UserError
from trimtab.lm.capabilities import CAPABILITIES
from trimtab.lm.model import LanguageModel
from trimtab.lm.silence import transformers_silenced
from trimtab.runs import OutputPath, json_safe
from trimtab.runs.tables import Column, result_table

if TYPE_CHECKING:
    from rich.table import Table

MOST_PARAMETERS = 3_000_000
VOCABULARY = 160

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "emb_dim", "dim_model", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "dim_ff", "mlp_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "dim_head", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), 96),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "num_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "index_topk": 64,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_d_ssm": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "first_k_dense_replace": 1,
    "image_size": 32,
    "patch_size": 16,
    "depth": 2,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
    "is_decoder": True,
}
"""What fields are set to, wherever a config has them. Sizes are unequal where they could be confused."""

OWN: dict[str, dict[str, Any]] = {
    "gemma3": {"image_token_index": 3},  # within the vocabulary, as that of real ones
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8},
    "zamba2": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_shape": (8, 12), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local"] * 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}
"""What single types need besides."""


def causal_lm_types() -> tuple[str, ...]:
    """Model types that `transformers` can load as a causal LM, in order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # loads model classes

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def build_tiny(
    model_type: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **own: Any,
) -> LanguageModel:
    """A tiny random model of a type, with its checks done.

    Args:
        model_type: one of `causal_lm_types()`.
        tokenizer: of at most 160 tokens, where texts are wanted.
        dtype: what it computes in.
        own: fields of its config, or of its text model's where that is nested.

    Raises:
        UserError: it cannot be built small, or is refused as a causal LM.
    """
    try:
        with transformers_silenced():
            config = tiny_config(model_type, **own)
            make = transformers.AutoModelForCausalLM.from_config
            with torch.device("meta"):
                size = sum(p.numel() for p in make(config).parameters())
            if size > MOST_PARAMETERS:
                raise UserError(f"type {model_type}", f"it has {size:,} parameters at its smallest", "leave it out")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                hf = make(config).float().eval()
                for parameter in hf.parameters():  # norms and biases begin at 1 and 0, where nothing would be missed
                    if parameter.ndim == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
    except UserError:
        raise
    except Exception as error:  # whatever a config says to sizes that it does not expect
        lines = str(error).strip().splitlines() or [""]
        why = f"it cannot be built small ({type(error).__name__}: {lines[0][:100]})"
        raise UserError(f"type {model_type}", why, "leave it out") from error
    return LanguageModel(hf.to(dtype), tokenizer, model_type)  # type: ignore[arg-type]


def tiny_config(model_type: str, **own: Any) -> transformers.PretrainedConfig:
    """The config of a tiny model of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], {**OWN.get(model_type, {}), **own})


def _small(kind: type[transformers.PretrainedConfig], own: dict[str, Any]) -> transformers.PretrainedConfig:
    """A config of a class with small sizes, those of nested configs included."""
    fields = set(inspect.signature(kind.__init__).parameters)
    known: dict[str, type[Any]] = kind.sub_configs  # type: ignore[assignment]
    nested = {name: part for name, part in known.items() if name in fields}
    usual = kind() if transformers.AutoConfig in nested.values() else None  # says which parts it has
    parts = {
        name: type(getattr(usual, name)) if part is transformers.AutoConfig else part for name, part in nested.items()
    }
    inner = {name: value for name, value in own.items() if name not in fields} if parts else {}
    made = {
        name: _small(part, inner if "text" in name or "decoder" in name else {})
        for name, part in parts.items()
        if issubclass(part, transformers.PretrainedConfig)
    }
    sizes = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # every head has its own keys
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    return kind(**{**sizes, **made, **{name: value for name, value in own.items() if name not in inner}})


@dataclass(frozen=True, kw_only=True)
class ZooConfig:
    """Build a tiny random model of every causal-LM type of the installed transformers, and list what works on each."""

    type: tuple[str, ...] = ()
    """Model types, such as llama; all by default."""
    page: OutputPath | None = None
    """Markdown file to write, with the reasons for what does not work."""


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A type of model and what works on it."""

    model_type: str
    refused: str = ""
    """Why there is no tiny model of it, or why it is refused as a whole; empty otherwise."""
    off: dict[str, str] = field(default_factory=dict)
    """What does not work, by capability, each with the reason."""

    def mark(self, name: str) -> str:
        """Whether a capability is there: `✓`, `–`, or nothing if the type is refused as a whole."""
        return "" if self.refused else "–" if name in self.off else "✓"


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """All types that were looked at."""

    transformers_version: str
    entries: tuple[ZooEntry, ...]

    def to_json(self) -> dict[str, Any]:
        return json_safe(self)

    @property
    def summary(self) -> str:
        """How many types are right, right but for what is off, and not run."""
        run = [entry for entry in self.entries if not entry.refused]
        whole = sum(not entry.off for entry in run)
        return (
            f"transformers {self.transformers_version}: {len(self.entries)} types. All works on {whole}, a part on "
            f"{len(run) - whole}; {len(self.entries) - len(run)} are not run."
        )

    def render(self) -> Table:
        return result_table(_COLUMNS, self.entries, title=self.summary)

    def markdown(self) -> str:
        """The table for a page: types on which all works in one line, the others a row each."""
        whole = [entry.model_type for entry in self.entries if not entry.refused and not entry.off]
        lines = [
            self.summary,
            "",
            f"All works on {', '.join(whole)}.",
            "",
            "| type | does not work | why |",
            "|---|---|---|",
        ]
        for entry in self.entries:
            if entry.refused:
                lines.append(f"| {entry.model_type} | not run | {_cell(entry.refused)} |")
            reasons: dict[str, list[str]] = {}
            for name, why in entry.off.items():
                reasons.setdefault(why, []).append(name)
            lines += [f"| {entry.model_type} | {', '.join(n)} | {_cell(why)} |" for why, n in reasons.items()]
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


_SHORT = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_z": "z"}
_COLUMNS = (
    Column("type", "model_type", whole=True),
    *(
        Column(_SHORT.get(name, name.replace("resid_", "")), lambda entry, name=name: entry.mark(name))
        for name in CAPABILITIES
    ),
    Column("not run", "refused", spare=1),
)


def survey(types: Sequence[str] = ()) -> Zoo:
    """Build a tiny model of each type and ask what works on it.

    Args:
        types: some of `causal_lm_types()`; all by default.

    Raises:
        UserError: there is no such type.
    """
    for name in types:
        if name not in causal_lm_types():
            close = difflib.get_close_matches(name, causal_lm_types(), 1)
            hint = f"did you mean {close[0]}?" if close else "`trimtab models zoo` lists those it has"
            raise UserError(f"model type {name!r}", "transformers has no causal LM of that type", hint)
    return Zoo(
        transformers_version=transformers.__version__,
        entries=tuple(_entry(name) for name in types or causal_lm_types()),
    )


def _entry(model_type: str) -> ZooEntry:
    try:
        model = build_tiny(model_type)
    except UserError as error:
        return ZooEntry(model_type=model_type, refused=error.why)
    return ZooEntry(model_type=model_type, off=model.capabilities.off)
