"""A copy of a model in bfloat16, where its matrix products are faster: for what needs no more than that."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr

import torch
import transformers
from torch import nn

from trimtab.errors import UserError
from trimtab.lm.model import LanguageModel
from trimtab.lm.products import fast_bfloat16


def quick_copy(model: LanguageModel) -> LanguageModel:
    """The model with its weights in bfloat16, which takes half as much memory again; buffers stay as they are.

    It is the model itself if that is in lower precision, spread over devices, used against its check (`allow`), if
    bfloat16 is no faster there, if there is no memory for it, or if the copy fails the check of something that the
    model passes.
    """
    places = getattr(model.hf, "hf_device_map", None) or {}
    if model.dtype != torch.float32 or model.allow or len(set(places.values())) > 1:
        return model
    if not fast_bfloat16(model.device):
        return model
    try:
        with redirect_stderr(io.StringIO()):  # what the check says of the copy would be read as said of the model
            found = LanguageModel(_halved(model.hf), model.tokenizer, model.name)
    except (UserError, MemoryError, torch.OutOfMemoryError):  # it does not run, or there is no room
        return model
    fails = found.capabilities.off.keys() - model.capabilities.off.keys()
    return model if fails or found.capabilities.unchecked else found


def _halved(hf: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy that takes weights in bfloat16 for its own, so that they are never held twice in float32."""
    halved = {
        id(weight): nn.Parameter(weight.detach().bfloat16() if weight.dtype == torch.float32 else weight, False)
        for weight in hf.parameters()
    }
    found = copy.deepcopy(hf, dict(halved))
    found.config.dtype = torch.bfloat16
    return found
