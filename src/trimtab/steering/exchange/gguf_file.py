"""Control vectors of llama.cpp (`--control-vector FILE`), as llama.cpp's cvector-generator and repeng write them.

The architecture is `controlvector`; a tensor `direction.N`, float32 and one-dimensional, is added to the output of
layer N counted from 0 (`build_cvec(cur, il)` at each layer's end, llama.cpp's `llama_adapter_cvec`), times the scale
given there (1 by default). There is never one of layer 0: llama.cpp refuses the file.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.gguf_files import first_line
from trimtab.runs import atomic_path
from trimtab.steering.exchange.layer_vectors import AddedVectors

ARCHITECTURE = "controlvector"
_TYPES = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def write(vectors: AddedVectors, path: Path, about: str) -> None:
    """Write a control vector, to be used at scale 1.

    Raises:
        UserError: there is a vector for layer 0, or the disk refuses.
    """
    if 0 in vectors.layers:
        why = "llama.cpp adds nothing to the output of layer 0 (resid_post.0), and refuses such a file"
        raise UserError("a control vector for layer 0", why, "steer at resid_post.1 or later")
    with atomic_path(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vectors.architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors.layers))
        writer.add_description(about)
        for layer, row in sorted(vectors.layers.items()):
            writer.add_tensor(f"direction.{layer}", row.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path) -> AddedVectors:
    """Read a control vector of llama.cpp's or repeng's.

    Raises:
        UserError: it is damaged, no control vector, or a tensor is not one that llama.cpp reads.
    """
    try:
        file = gguf.GGUFReader(path)
        arch, hint = (_text(file, name) for name in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in file.tensors]
    except Exception as error:  # a damaged file may fail anywhere in the parser
        why = f"it could not be read as GGUF ({type(error).__name__}: {first_line(error)})"
        raise UserError(str(path), why, "get the file again") from error
    if arch != ARCHITECTURE:
        raise UserError(str(path), f"it holds a {arch or 'file of no architecture'}, no {ARCHITECTURE}", "give another")
    layers: dict[int, Tensor] = {}
    for name, kind, values in tensors:
        match = re.fullmatch(r"direction\.(\d+)", name)
        if match is None or kind not in _TYPES or values.ndim != 1:
            why = "a control vector has direction.N, each one row of float32"
            raise UserError(f"tensor {name} in {path}", why, "get the file again")
        layers[int(match[1])] = torch.from_numpy(values.astype(np.float32))
    if not layers:
        raise UserError(str(path), "it holds no direction", "get the file again")
    return AddedVectors(layers=layers, architecture=hint)


def _text(file: gguf.GGUFReader, name: str) -> str:
    found = file.get_field(name)
    return "" if found is None else str(found.contents())
