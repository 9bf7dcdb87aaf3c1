"""Steer with a vector of one's own: texts side by side, what was done, and a trace of every token."""

import rich

import trimtab
from trimtab.lm import last_activations

model = trimtab.load_model("smollm2-135m-instruct")
site = f"resid_post.{model.n_layers // 2}"
happy, sad = (last_activations(model, [text], site) for text in ("What a wonderful day", "What a terrible day"))
result = trimtab.steer(model, happy - sad, "Yesterday I went to the", site=site, dose=0.4)
rich.print(result)
