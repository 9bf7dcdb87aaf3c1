"""How the model was loaded that an SAE of SAELens reads: `model_from_pretrained_kwargs` of its metadata.

They are arguments of TransformerLens's `from_pretrained_no_processing`, which loads weights as they are unless these
ask for more, or of transformers' `from_pretrained`. Each is obeyed, has no effect on what the SAE reads, or is refused:

- `center_writing_weights` takes the mean off all that is written to the residual stream: folded into the SAE;
- `fold_ln` and `center_unembed` change weights whose outputs are the same, or come after every site;
- `fold_value_biases` takes a bias out of values, `refactor_factored_attn_matrices` turns what heads read and give: SAEs
  of these are refused, the residual stream is the same;
- another checkpoint or revision is another model: `Dictionary.check_same_model` refuses the one of the same name.
"""

from __future__ import annotations

from trimtab.dictionaries.base import LOADED_WITH, OTHER_WEIGHTS, DictionaryInfo
from trimtab.dictionaries.config_fields import Fields
from trimtab.lm.sites import HEAD_KINDS, Site

_CHANGES_HEADS = {"fold_value_biases": ("attn_v", "attn_z"), "refactor_factored_attn_matrices": HEAD_KINDS}
_SAME_NUMBERS = (
    "fold_ln", "center_unembed", "n_ctx", "first_n_layers", "device", "device_map", "n_devices", "move_to_device",
    "dtype", "torch_dtype", "load_in_8bit", "load_in_4bit", "quantization_config", "low_cpu_mem_usage", "max_memory",
    "default_prepend_bos", "default_padding_side", "padding_side", "add_bos_token", "trust_remote_code", "token",
    "use_auth_token", "cache_dir", "local_files_only", "force_download", "proxies", "attn_implementation", "use_cache",
    "use_safetensors", "offload_folder", "variant",
)  # fmt: skip
"""Arguments that change where, how precisely or of what length a model computes, but not what."""


def check_model_arguments(field: Fields, info: DictionaryInfo) -> None:
    """Raise a `UserError` if an argument changes what the SAE reads in a way that trimtab does not compute, or is
    unknown. `field` is the config, for messages."""
    given = info.metadata.get(LOADED_WITH)
    if given is None:
        return
    if not isinstance(given, dict):
        raise field.error("metadata", f"its {LOADED_WITH} must be an object, not {given!r}")
    kind = Site.parse(info.site).kind if info.site else ""
    stated = Fields(given, field.source, f"metadata.{LOADED_WITH}.")
    place = info.site or info.metadata.get("hook_name")
    for name, value in given.items():
        if value is None or value is False or name in _SAME_NUMBERS or name in OTHER_WEIGHTS:
            continue
        if name in _CHANGES_HEADS:
            if kind in _CHANGES_HEADS[name] or not kind:
                hint = "use an SAE of a model loaded without it, or one of the residual stream"
                raise stated.error(name, f"it changes what is read at {place}", hint)
        elif name != "center_writing_weights":
            hint = "where it changes nothing about activations, take it out of the file; else use another dictionary"
            raise stated.error(name, "trimtab does not know whether it changes what the model computes", hint)
        elif value is not True:
            raise stated.error(name, "it must be true or false")
        elif not kind:
            hint = "say in the file's metadata which site it reads (site: resid_pre.8)"
            raise stated.error(name, f"trimtab does not know whether it changes what is read at {place}", hint)
