"""Evaluate an SAE of another library that is in memory, here one that SAELens has loaded."""

import rich
from sae_lens import SAE

import trimtab

model = trimtab.load_model("google/gemma-2-2b")
theirs = SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
sae = trimtab.load_sae(theirs, model=model)
result = trimtab.evaluate(model, sae)
rich.print(result)
print(result.to_frame())
