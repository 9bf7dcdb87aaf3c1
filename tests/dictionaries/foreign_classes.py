"""Stand-ins for SAE objects of SAELens and dictionary_learning: their classes' names, attributes and formulas.

Checked against decoderesearch/SAELens (`sae_lens/saes/`, version 6) and saprmarks/dictionary_learning
(`dictionary_learning/dictionary.py`, `trainers/`, commit 60ec6bf).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from foreign_tensors import TENSORS, D, N, codes, rebuilt
from torch import Tensor, nn


class FromTensors(nn.Module):
    """Holds tensors under their names in a state_dict."""

    def __init__(self, tensors: dict[str, Tensor], buffers: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            part, _, last = name.rpartition(".")
            owner = self if not part else self._modules.setdefault(part, nn.Module())
            assert owner is not None
            if name in buffers:
                owner.register_buffer(last, tensor.clone())
            else:
                owner.register_parameter(last, nn.Parameter(tensor.clone()))


class LearnedDictionary(FromTensors):
    """A dictionary of dictionary_learning."""

    def __init__(self, **changed: Tensor) -> None:
        super().__init__(TENSORS[self.kind] | changed, ("k", "threshold", "group_sizes") * hasattr(self, "buffered"))
        self.activation_dim, self.dict_size = D, N

    kind: str

    def encode(self, x: Tensor) -> Tensor:
        return codes(self.kind, self.state_dict(), x.double())

    def decode(self, f: Tensor) -> Tensor:
        return rebuilt(self.kind, self.state_dict(), f)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)).to(x)


LEARNED: dict[str, type[LearnedDictionary]] = {
    name: type(name, (LearnedDictionary,), {"kind": name} | ({"buffered": True} if "k" in tensors else {}))
    for name, tensors in TENSORS.items()
}


class SAEMetadata:
    """Facts under any name; None for what is not there."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update({"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12"} | facts)

    def __getattr__(self, name: str) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return self.__dict__.copy()


@dataclass
class SAEConfig:
    """The config of an SAE of SAELens."""

    d_in: int = D
    d_sae: int = N
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: SAEMetadata = field(default_factory=SAEMetadata)

    kind = ""

    def architecture(self) -> str:
        return self.kind

    def to_dict(self) -> dict[str, Any]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return found | {"metadata": self.metadata.to_dict(), "architecture": self.architecture()}


class StandardSAEConfig(SAEConfig):
    kind = "standard"


class JumpReLUSAEConfig(SAEConfig):
    kind = "jumprelu"


@dataclass
class TopKSAEConfig(SAEConfig):
    k: int = 100
    rescale_acts_by_decoder_norm: bool = False

    kind = "topk"


class SAE(FromTensors):
    """An SAE of SAELens."""

    def __init__(self, cfg: SAEConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.cfg, self.use_error_term = cfg, False

    def hidden_pre(self, x: Tensor) -> Tensor:
        return (x - self.b_dec * self.cfg.apply_b_dec_to_input) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return self.hidden_pre(x).relu()

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return x if self.use_error_term else self.decode(self.encode(x))


class StandardSAE(SAE): ...


class JumpReLUSAE(SAE):
    def encode(self, x: Tensor) -> Tensor:
        h = self.hidden_pre(x)
        return h.relu() * (h > self.threshold.relu())


class TopKSAE(SAE):
    def norms(self) -> Tensor:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else torch.ones(N)  # type: ignore[attr-defined]

    def encode(self, x: Tensor) -> Tensor:
        h = self.hidden_pre(x) * self.norms()
        values, indices = h.topk(self.cfg.k, dim=-1)  # type: ignore[attr-defined]
        return torch.zeros_like(h).scatter(-1, indices, values.relu())

    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts / self.norms())
