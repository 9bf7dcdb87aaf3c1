"""Train an SAE on a list of strings, look at where a feature fires, and save it."""

import rich

import trimtab
from trimtab.activations import HarvestOptions, read_documents, sample_text, top_contexts
from trimtab.dictionaries import save_dictionary

model = trimtab.load_model("smollm2-135m-instruct")
texts = [document.text for document in read_documents([sample_text()])]
trained = trimtab.train_sae(
    model,
    texts,
    f"resid_post.{model.n_layers // 2}",
    n_features=1024,
    l0=16,
    epochs=4,
    harvest_options=HarvestOptions(holdout=0.2),
)
feature = trained.sae.feature_stats.max_activation.argmax()
rich.print(trained, top_contexts(model, trained.sae, texts, feature))
save_dictionary(trained.sae, "my_sae")
