"""Prompts whose tokens fit the tiny models, and whole forward passes with hooks to compare with."""

from __future__ import annotations

import re
from typing import Any

from data_files import word_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.circuits.rows import PromptRows, rows_of
from trimtab.lm import LanguageModel
from trimtab.tasks.ioi_material import NAMES, OBJECTS, PAPER_TEMPLATES, PLACES
from trimtab.tasks.ioi_prompts import IOIDistribution

FEW = {"names": NAMES[:10], "places": PLACES[:3], "objects": OBJECTS[:3]}


def few_names(templates: Any = "paper", tokenizer: Any = None) -> IOIDistribution:
    """Ten names, three places and objects: fewer tokens than a tiny model has."""
    return IOIDistribution.load(tokenizer or word_tokenizer(), templates, **FEW)


def saved_words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words of these prompts that can be saved; all others are unknown to it."""
    words = [word for some in FEW.values() for word in some] + re.findall(r"\w+", " ".join(PAPER_TEMPLATES))
    pieces = dict.fromkeys(["<unk>", "Then", ",", ".", *(f" {word}" for word in words)])
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def aligned(model: LanguageModel, n: int = 3) -> tuple[PromptRows, Tensor]:
    """Prompts of one template, and as many without a repeated name."""
    ioi = few_names()
    prompts = [prompt for prompt in ioi.prompts(12 * n) if prompt.template == ioi.templates[1]][:n]
    (rows,) = rows_of([ioi.tokenise(prompt) for prompt in prompts], model)
    (other,) = rows_of([ioi.tokenise(ioi.without_repeat(prompt)) for prompt in prompts], model)
    return rows, other.ids


class Hooks:
    """Forward hooks on a plain transformers model, removed at the end of the block."""

    def __init__(self, model: LanguageModel) -> None:
        self.layers = list(model.hf.model.layers if hasattr(model.hf, "model") else model.hf.transformer.h)
        self.gpt2 = not hasattr(model.hf, "model")
        self.handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def out(self, layer: int) -> Any:
        block = self.layers[layer]
        return block.attn.c_proj if self.gpt2 else block.self_attn.o_proj

    def read_z(self, into: dict[int, Tensor]) -> None:
        for layer in range(len(self.layers)):
            self.handles.append(
                self.out(layer).register_forward_pre_hook(lambda _m, args, n=layer: into.update({n: args[0].clone()}))
            )

    def write_z(self, values: dict[int, Tensor]) -> None:
        for layer, value in values.items():
            self.handles.append(self.out(layer).register_forward_pre_hook(lambda _m, _args, v=value: (v,)))

    def _columns(self, receiver: Location, rows: PromptRows, head_dim: int) -> tuple[Any, Any]:
        """The module that gives what a receiver reads, and where it stands in its output."""
        layer, kind, head = receiver.site.layer, receiver.site.kind, receiver.site.head
        start = head * head_dim
        if self.gpt2:
            module = self.layers[layer].attn.c_attn
            start += ("attn_q", "attn_k", "attn_v").index(kind) * module.nf // 3
        else:
            module = getattr(self.layers[layer].self_attn, f"{kind[-1]}_proj")
        return module, (range(len(rows.ids)), rows.positions[receiver.position], slice(start, start + head_dim))

    def read_head(self, receiver: Location, rows: PromptRows, head_dim: int, into: dict[Location, Tensor]) -> None:
        module, place = self._columns(receiver, rows, head_dim)
        self.handles.append(
            module.register_forward_hook(lambda _m, _a, out: into.update({receiver: out[place].clone()}))
        )

    def write_head(self, receiver: Location, rows: PromptRows, head_dim: int, value: Tensor) -> None:
        module, place = self._columns(receiver, rows, head_dim)

        def put(_module: Any, _args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[place] = value
            return out

        self.handles.append(module.register_forward_hook(put))

    def write_z_head(self, location: Location, rows: PromptRows, head_dim: int, value: Tensor) -> None:
        assert location.site.head is not None
        start = location.site.head * head_dim

        def put(_module: Any, args: Any) -> Any:
            z = args[0].clone()
            z[range(len(z)), rows.positions[location.position], start : start + head_dim] = value
            return (z,)

        self.handles.append(self.out(location.site.layer).register_forward_pre_hook(put))


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.hf(input_ids=ids, use_cache=False).logits
