"""Steerings in other tools' files: llama.cpp's control vectors (GGUF), steering-vectors' and plain tensors.

A format is one file of this folder; `FORMATS` in `exchanging.py` knows it by the ends of its files' names.
"""

from trimtab.steering.exchange.exchanging import Exported, export_steering, import_steering
from trimtab.steering.exchange.layer_vectors import AddedVectors, added_vectors

__all__ = ["AddedVectors", "Exported", "added_vectors", "export_steering", "import_steering"]
