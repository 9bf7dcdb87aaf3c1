"""In llama.cpp's environment: greedy tokens and logits of a GGUF model, without and with a control vector.

What is called is llama.cpp itself, as the wheel of xllamacpp holds it: `common_control_vector_load`, by which
`--control-vector` reads its file, and `llama_set_adapter_cvec`, by which it is applied. The wheel's Python classes do
not reach them, so they are called through ctypes. Structs that llama.cpp takes by value are passed on as it gives them.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from ctypes import CDLL, POINTER, Structure, byref, c_char, c_float, c_int32, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path


class Blob(Structure):
    """A struct passed by value, larger than any that it stands for: its end lies behind what the callee reads."""

    _fields_ = [("bytes", c_char * 1024)]


def functions() -> CDLL:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    lib = CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", Blob, []),
        ("llama_context_default_params", Blob, []),
        ("llama_model_load_from_file", c_void_p, [ctypes.c_char_p, Blob]),
        ("llama_init_from_model", c_void_p, [c_void_p, Blob]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_vocab_n_tokens", c_int32, [c_void_p]),
        ("llama_model_n_layer", c_int32, [c_void_p]),
        ("llama_batch_get_one", Blob, [POINTER(c_int32), c_int32]),
        ("llama_decode", c_int32, [c_void_p, Blob]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_set_adapter_cvec", c_int32, [c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32]),
        ("llama_free", None, [c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def read_vector(lib: CDLL, path: str) -> tuple[int, list[int]]:
    """Width, and begin and end in memory of what llama.cpp's own reader makes of a control vector's file.

    Its argument is a std::vector of {float strength; std::string name}, its result {int width; std::vector<float>}.
    """
    one, anything = ctypes.create_string_buffer(16), ctypes.create_string_buffer(8)
    struct.pack_into("f", one, 0, 1.0)
    begin = ctypes.addressof(one)
    CDLL("libstdc++.so.6")._ZNSsC1EPKcRKSaIcE(c_void_p(begin + 8), path.encode(), anything)
    given, found = (c_void_p * 3)(begin, begin + 16, begin + 16), ctypes.create_string_buffer(32)
    load = lib._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE
    load.restype = None
    load(byref(found), byref(given))
    width, first, last, _ = struct.unpack("i4xQQQ", found.raw)
    return width, [first, last]


def main() -> None:
    model_file, vector_file, out = sys.argv[1:]
    prompts, steps = json.load(sys.stdin)
    lib = functions()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(model_file.encode(), lib.llama_model_default_params())
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    width, (first, last) = read_vector(lib, vector_file)
    assert width > 0, "llama.cpp did not read the control vector"
    tokens: dict[str, list[list[int]]] = {"unsteered": [], "steered": []}
    with open(out, "wb") as logits_file:
        for name, found in tokens.items():
            for prompt in prompts:
                context = lib.llama_init_from_model(model, lib.llama_context_default_params())
                if name == "steered":
                    layers = lib.llama_model_n_layer(model)
                    assert lib.llama_set_adapter_cvec(context, first, (last - first) // 4, width, 1, layers) == 0
                ids, written = list(prompt), list[int]()
                for _ in range(steps):
                    array = (c_int32 * len(ids))(*ids)
                    assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))) == 0
                    logits = lib.llama_get_logits_ith(context, -1)
                    logits_file.write(ctypes.string_at(logits, 4 * n_vocab))
                    row = logits[:n_vocab]
                    ids = [row.index(max(row))]
                    written += ids
                found.append(written)
                lib.llama_free(context)
    print(json.dumps({"tokens": tokens, "n_vocab": n_vocab, "layers": (last - first) // 4 // width}))


if __name__ == "__main__":
    main()
