"""Steer inside a `generate` call of one's own."""

import trimtab
from trimtab.lm import applied, last_activations
from trimtab.steering import VectorSource

model = trimtab.load_model("smollm2-135m-instruct")
site = f"resid_post.{model.n_layers // 2}"
happy, sad = (last_activations(model, [text], site) for text in ("What a wonderful day", "What a terrible day"))
inputs = model.tokenizer(
    ["Yesterday I went to the", "My friend"], return_tensors="pt", padding=True, padding_side="left"
)
with applied(model, VectorSource(happy - sad, site, 0.4)):
    tokens = model.hf.generate(**inputs, max_new_tokens=20)
print(*model.tokenizer.batch_decode(tokens, skip_special_tokens=True), sep="\n")
