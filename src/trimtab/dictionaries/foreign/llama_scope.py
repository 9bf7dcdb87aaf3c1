"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` beside `checkpoints/final.safetensors`.

JumpReLU SAEs with one threshold, trained on activations scaled to a mean norm of √d over a text; the config holds that
mean, and the threshold in units of the model. Read as SAELens reads them: encoder and decoder take up the scale, the
threshold is multiplied by it. Where the config says that decoder norms count towards the threshold, they do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.checked_weights import FoundSAE, read_safetensors, take_weights, without_wrappers
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.normalising import fold_input_scale
from trimtab.dictionaries.saelens_layout import site_from_hook

WEIGHTS_FILE = "checkpoints/final.safetensors"
CONFIG_FILE = "hyperparams.json"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}


def read(path: Path) -> FoundSAE:
    """Read a directory of Llama Scope. Raises a `UserError` that names the file and the field or tensor."""
    field = Fields.read(path / CONFIG_FILE, "Llama Scope")
    cfg, file = field.cfg, path / WEIGHTS_FILE
    if cfg.get("act_fn", "jumprelu") != "jumprelu":
        raise field.error("act_fn", "trimtab reads those whose activation function is jumprelu")
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        raise field.error("norm_activation", "trimtab reads SAEs of activations scaled by one number (dataset-wise)")
    if cfg.get("use_glu_encoder"):
        raise field.error("use_glu_encoder", "trimtab reads SAEs whose encoder is linear")
    source, target = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    if target not in (None, source):
        raise field.error("hook_point_out", f"it is a transcoder, which reads {source}", "use an SAE (LXR, LXA, LXM)")
    n, d = field.positive_integer("d_sae"), field.positive_integer("d_model")
    scale = d**0.5 / field.part("dataset_average_activation_norm").positive_number("in")
    threshold = field.positive_number("jump_relu_threshold") * scale
    tensors = dict(without_wrappers(read_safetensors(file)[0]))
    if not field.boolean("use_decoder_bias", True):
        tensors.setdefault("decoder.bias", torch.zeros(d))
    weights = take_weights(tensors, file, JumpReLU, n=n, d=d, stated=("act_fn", "jumprelu"), names=_NAMES)
    by_norm = field.boolean("sparsity_include_decoder_norm", False)
    norms = weights["W_dec"].float().norm(dim=1) if by_norm else torch.ones(n)
    weights["threshold"] = threshold / norms.clamp_min(torch.finfo(torch.float32).tiny)
    settings = {"apply_b_dec_to_input": field.boolean("apply_decoder_bias_to_pre_encoder", False)}
    return FoundSAE(JumpReLU, fold_input_scale(weights, scale), settings, _info(path, field, str(source)))


def _info(path: Path, field: Fields, hook: str) -> DictionaryInfo:
    model = field.cfg.get("model_name") or ("meta-llama/Llama-3.1-8B" if path.absolute().name.startswith(_OWN) else "")
    return DictionaryInfo(
        architecture=JumpReLU.architecture,
        model=str(model),
        site=site_from_hook(hook),
        metadata={"read_from": "Llama Scope", "llama_scope": dict(field.cfg)},
    )


_OWN = "Llama3_1-8B-Base-L"
"""How the names of the published directories begin."""
