"""A copy of a model in bfloat16, where its matrix products are faster: for what needs no more than that."""

from __future__ import annotations

import copy

import torch
from torch import nn

from trimtab.lm.model import LanguageModel


def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: on a GPU and a CPU made for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def quick_copy(model: LanguageModel) -> LanguageModel:
    """The model with its weights in bfloat16, which takes half as much memory again; buffers stay as they are.

    It is the model itself if that is in lower precision, spread over devices, used against its check (`allow`), if
    bfloat16 is no faster there, or if the copy fails the check of something that the model passes.
    """
    spread = getattr(model.hf, "hf_device_map", None) is not None
    if model.dtype != torch.float32 or model.allow or spread or not fast_bfloat16(model.device):
        return model
    halved = {
        id(weight): nn.Parameter(weight.detach().bfloat16() if weight.dtype == torch.float32 else weight, False)
        for weight in model.hf.parameters()
    }
    hf = copy.deepcopy(model.hf, dict(halved))  # which takes these for the weights' copies
    hf.config.dtype = torch.bfloat16
    found = LanguageModel(hf, model.tokenizer, model.name)
    return found if found.capabilities.off.keys() <= model.capabilities.off.keys() else model
