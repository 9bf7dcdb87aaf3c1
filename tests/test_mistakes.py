"""What a newcomer gets wrong in Python is one line that says how to get it right, or simply works."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab
from trimtab.activations import top_contexts
from trimtab.control import Setting
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.features import ExampleOptions
from trimtab.lm import DecodeConfig, LanguageModel, PositionRule, Site, applied, decode, last_activations
from trimtab.selection import DeltaConfidence
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    RandomFeatureSource,
    ReconstructionSource,
    StaticSource,
    Steering,
    VectorSource,
)
from trimtab.steering import load as load_steering
from trimtab.steering.exchange import export_steering

FIVE = ["a", "b", "c", "d", "e"]
DOCUMENTS = ["an inn in the end, the trim tab turned the rudder"] * 4


@pytest.fixture(scope="module")
def sae(tiny_llama: LanguageModel) -> Standard:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "steering")
        return import_module("tiny_dictionary").make_dictionary(tiny_llama)


def one(prompt: str, answer: str) -> float:
    return 1.0


Call = Callable[[LanguageModel, Standard], Any]
MISTAKES: dict[str, tuple[Call, str]] = {
    "features as a text": (
        lambda m, s: trimtab.steer(m, s, "an inn", "35"),  # type: ignore[arg-type]
        r"feature '35': features are whole numbers; give 35 without quotes, or several like \[3, 14\]",
    ),
    "a fraction": (lambda m, s: trimtab.steer(m, s, "an inn", 3.5), "feature 3.5: features are whole"),  # type: ignore[arg-type]
    "a flag": (lambda m, s: trimtab.steer(m, s, "an inn", True), "feature True: features are whole"),
    "no feature": (lambda m, s: trimtab.steer(m, s, "an inn", []), "the features: there is none"),
    "a dose as a text": (lambda m, s: trimtab.steer(m, s, "an inn", 3, "0.4"), "dose '0.4': a dose is a finite"),  # type: ignore[arg-type]
    "no dose": (lambda m, s: trimtab.steer(m, s, "an inn", 3, []), "the doses: there is none"),
    "a dose beside ablate": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, 0.4, operation="ablate"),
        "a dose: operation ablate has no dose; leave it out",
    ),
    "a dose beside a sweep": (lambda m, s: trimtab.steer(m, s, "an inn", 3, 0.4, sweep=[0.4]), "the sweep says the"),
    "a feature in the singular": (
        lambda m, s: trimtab.rank(m, s, feature=[1]),
        r"rank\(feature=…\): it has no such argument; did you mean features\?",
    ),
    "a layer as a site": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, site=15),
        r"site 15: a site is KIND\.LAYER.*; did you mean resid_post\.15\?",
    ),
    "a fraction as a position": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, positions=[1.5]),
        "position 1.5: positions are whole numbers",
    ),
    "an argument misspelt": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, max_tokens=3),
        r"steer\(max_tokens=…\): it has no such argument; did you mean max_new_tokens\?",
    ),
    "the command's name of an argument": (
        lambda m, s: trimtab.steer(m, s, "an inn", feature=3),
        r"steer\(feature=…\): it has no such argument; did you mean features\?",
    ),
    "an unknown argument": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, xyz=3),
        r"steer\(xyz=…\): it has no such argument; there is sweep, unit, operation",
    ),
    "an argument of another type": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, samples="2"),
        "samples: it must be a whole number, not '2'",
    ),
    "a name as the model": (
        lambda m, s: trimtab.steer("gpt2", s, "an inn", 3),  # type: ignore[arg-type]
        r"model 'gpt2': it is a name, not a loaded model; give trimtab\.load_model\('gpt2'\)",
    ),
    "a model of transformers": (
        lambda m, s: trimtab.rank(m.hf, s),  # type: ignore[arg-type]
        r"the LlamaForCausalLM .*: it is a model of transformers; give LanguageModel\.from_hf\(it, tokenizer\)",
    ),
    "the arguments swapped": (lambda m, s: trimtab.rank(s, m), "the Standard that is given as the model"),  # type: ignore[arg-type]
    "a name as the SAE": (
        lambda m, s: trimtab.steer(m, "default", "an inn", 3),  # type: ignore[arg-type]
        r"dictionary 'default': it is a name, not a loaded one; give trimtab\.load_sae\('default'\)",
    ),
    "a module as the SAE": (lambda m, s: trimtab.evaluate(m, torch.nn.Linear(2, 2)), "the Linear .* no Dictionary"),  # type: ignore[arg-type]
    "nothing to steer with": (lambda m, s: trimtab.steer(m, None, "an inn"), "the NoneType .* no Dictionary"),  # type: ignore[arg-type]
    "a list of no numbers": (
        lambda m, s: trimtab.steer(m, [{}], "an inn", site="resid_post.1"),  # type: ignore[arg-type]
        "the list that is to steer: it is neither a dictionary nor numbers",
    ),
    "no prompt": (lambda m, s: trimtab.steer(m, s, [], 3), "the prompts: there is none"),
    "None as the prompts": (lambda m, s: trimtab.steer(m, s, None, 3), "prompts None: they are no texts"),  # type: ignore[arg-type]
    "tokens of one prompt": (lambda m, s: trimtab.steer(m, s, [7, 8], 3), "prompt 7: it is neither a text nor token"),  # type: ignore[arg-type]
    "decode a text": (
        lambda m, s: decode(m, "hi"),  # type: ignore[arg-type]
        r"the prompts: they are texts; give token ids, like \[model\.encode_text\(text\)\]",
    ),
    "decode tokens": (
        lambda m, s: decode(m, [1, 2]),
        r"tokens of a single one; give a list of prompts, like \[tokens\]",
    ),  # type: ignore[list-item]
    "decode numbers": (lambda m, s: decode(m, [[7.5]]), "prompt 0: its tokens are no whole numbers"),  # type: ignore[list-item]
    "a source as the config": (
        lambda m, s: decode(m, [[7]], VectorSource(torch.ones(32), "resid_post.1")),  # type: ignore[arg-type]
        r"the VectorSource that is given as the config: it is no DecodeConfig; .*a source comes behind it",
    ),
    "a vector as a source": (
        lambda m, s: decode(m, [[7]], DecodeConfig(), torch.ones(32)),  # type: ignore[arg-type]
        r"the Tensor that is to steer: it is no source of interventions; give one, like .*VectorSource\(vector, site",
    ),
    "a vector to apply": (
        lambda m, s: applied(m, torch.ones(32)).__enter__(),  # type: ignore[arg-type]
        "the Tensor that is to steer: it is no source of interventions",
    ),
    "a text as a vector": (lambda m, s: VectorSource("happy", "resid_post.1"), "the str that is to steer"),  # type: ignore[arg-type]
    "a name in a source": (lambda m, s: StaticSource("default", 3), "dictionary 'default': it is a name"),  # type: ignore[arg-type]
    "texts as one": (lambda m, s: m.encode_text(["an inn"]), r"prompt \['an inn'\]: it is no text"),  # type: ignore[arg-type]
    "a number as a text": (lambda m, s: DecodeConfig(max_new_tokens="3"), "max_new_tokens '3': it must be at least 1"),  # type: ignore[arg-type]
    "a text as the prefixes": (
        lambda m, s: DeltaConfidence(prefixes="From"),  # type: ignore[arg-type]
        "prefixes 'From': they are a single text; give a tuple of texts",
    ),
    "contexts of nothing": (lambda m, s: top_contexts(m, s, ["an inn"], []), "the features: there is none"),
    "a name in a setting": (
        lambda m, s: Setting(model=m, dictionary="default", site=None),  # type: ignore[arg-type]
        "dictionary 'default': it is a name",
    ),
    "a criterion misspelt": (
        lambda m, s: trimtab.rank(m, s, "delta_confidence"),
        r"criterion 'delta_confidence': .* did you mean delta-confidence\?",
    ),
    "no criterion": (lambda m, s: trimtab.rank(m, s, 3), "criterion 3: it is neither a name nor a criterion"),  # type: ignore[arg-type]
    "rank a text": (lambda m, s: trimtab.rank(m, s, features="35"), "feature '35': features are whole"),  # type: ignore[arg-type]
    "rank nothing": (lambda m, s: trimtab.rank(m, s, features=[]), "the features: there is none; choose some"),
    "a batch of none": (lambda m, s: trimtab.rank(m, s, batch_size=0), "batch_size 0: it must be at least 1"),
    "numbers as texts": (lambda m, s: trimtab.evaluate(m, s, [1]), "text 0: it is of the type int"),  # type: ignore[list-item]
    "None as texts": (lambda m, s: trimtab.train_sae(m, None, "resid_post.1"), "texts None: they are no texts"),  # type: ignore[arg-type]
    "no texts": (lambda m, s: trimtab.evaluate(m, s, []), "the text: there is no text in it"),
    "evaluate with a misspelt option": (
        lambda m, s: trimtab.evaluate(m, s, contex=3),
        r"evaluate\(contex=…\): .* did you mean context\?",
    ),
    "a metric misspelt": (
        lambda m, s: trimtab.evaluate(m, s, ["the end of an inn. "] * 3, context=8)["explained-variance"],
        r"metric 'explained-variance': there is l0, .*; did you mean explained_variance\?",
    ),
    "train at TransformerLens's site": (
        lambda m, s: trimtab.train_sae(m, ["abc"], "blocks.1.hook_resid_post"),
        r"site 'blocks\.1\.hook_resid_post': .* did you mean resid_post\.1\?",
    ),
    "train with a misspelt option": (
        lambda m, s: trimtab.train_sae(m, ["abc"], "resid_post.1", n_feature=3),
        r"train_sae\(n_feature=…\): .* did you mean n_features\?",
    ),
    "train with a text": (
        lambda m, s: trimtab.train_sae(m, ["abc"], "resid_post.1", n_features="512"),
        "n_features: it must be a whole number, not '512'",
    ),
    "harvest options by name": (
        lambda m, s: trimtab.train_sae(m, ["abc"], "resid_post.1", harvest_options={"context": 3}),  # type: ignore[arg-type]
        r"harvest_options .*: they are no HarvestOptions; give trimtab\.activations\.HarvestOptions\(context=…\)",
    ),
    "one text as the prompts of a policy": (
        lambda m, s: trimtab.train_policy(m, s, "abc", one),
        "prompts 'abc': it is a single text; give a list of texts",
    ),
    "numbers as prompts": (lambda m, s: trimtab.train_policy(m, s, [1], one), "prompt 1: it is no text"),  # type: ignore[list-item]
    "a number as the reward": (lambda m, s: trimtab.train_policy(m, s, FIVE, 1), "reward 1: it is no function"),  # type: ignore[arg-type]
    "a reward of the answer alone": (
        lambda m, s: trimtab.train_policy(m, s, FIVE, lambda answer: 1.0),  # type: ignore[misc]
        r"a reward that takes \(answer\): it is called with a prompt and an answer",
    ),
    "a reward that forgets to return": (
        lambda m, s: trimtab.train_policy(m, s, FIVE, lambda prompt, answer: None, iterations=1),  # type: ignore[arg-type, return-value]
        "reward None: it is no number; let the function return one",
    ),
    "a policy with a misspelt option": (
        lambda m, s: trimtab.train_policy(m, s, FIVE, one, iteration=3),
        r"train_policy\(iteration=…\): .* did you mean iterations\?",
    ),
    "a policy with a task": (lambda m, s: trimtab.train_policy(m, s, FIVE, one, task="ioi"), "it has no such argument"),
    "a model in memory to load": (
        lambda m, s: trimtab.load_model(m.hf),  # type: ignore[arg-type]
        r"the LlamaForCausalLM .*: it is neither a name nor a path; .* LanguageModel\.from_hf\(model, tokenizer\)",
    ),
    "no name of a model": (lambda m, s: trimtab.load_model(""), "the model's name: it is empty"),
    "an SAE misspelt": (lambda m, s: trimtab.load_sae("defualt"), r"dictionary 'defualt': .* did you mean default\?"),
    "an SAE of another model": (
        lambda m, s: s.check_same_model("another"),
        "dictionary trained on tiny-llama: the model is another; choose .*, or model tiny-llama, or allow",
    ),
    "a name as the SAE's model": (
        lambda m, s: trimtab.load_sae("default", model="gpt2"),  # type: ignore[arg-type]
        "model 'gpt2': it is a name",
    ),
    "a special token in a chat": (
        lambda m, s: m.encode_chat([{"role": "user", "content": "an <eos> inn"}]),
        "'<eos>' in a turn of the user: tiny-llama would read it as a special token",
    ),
    "a special token in a chat's instructions": (
        lambda m, s: m.encode_chat([{"role": "user", "content": "an inn"}], system="<user>"),
        "'<user>' in a turn of the system",
    ),
    "a text as a chat": (lambda m, s: m.encode_chat("hi"), "the chat: it is not a list of turns"),  # type: ignore[arg-type]
    "a count as a text": (
        lambda m, s: trimtab.rank(m, s, "random").top("five"),  # type: ignore[arg-type]
        "count 'five': it is no whole number; give one, like 3",
    ),
    "a count below 0": (
        lambda m, s: trimtab.rank(m, s, "random").bottom(-1),
        "count -1: it must be at least 0; change it",
    ),
    "windows of a text": (
        lambda m, s: trimtab.examples(m, s, DOCUMENTS, context=16, window=4)["12"],  # type: ignore[index]
        "feature '12': it is no whole number",
    ),
    "a profile of nothing": (lambda m, s: trimtab.feature(m, s, []), "the features: there is none; give some ids"),
    "a path as the examples of a feature": (
        lambda m, s: trimtab.feature(m, s, 3, examples="examples.parquet"),  # type: ignore[arg-type]
        r"the str that is given as the examples: they are none; give what .*FeatureExamples\.read\(path\)",
    ),
    "an option of a config misspelt": (
        lambda m, s: ExampleOptions(windw=16),  # type: ignore[call-arg]
        r"ExampleOptions\(windw=…\): it has no such argument; did you mean window\?",
    ),
    "an option of a decode misspelt": (
        lambda m, s: DecodeConfig(max_tokens=3),  # type: ignore[call-arg]
        r"DecodeConfig\(max_tokens=…\): .* did you mean max_new_tokens\?",
    ),
    "an argument of a source misspelt": (
        lambda m, s: VectorSource(torch.ones(32), "resid_post.1", dose=0.4),  # type: ignore[call-arg]
        r"VectorSource\(dose=…\): it has no such argument; did you mean doses\?",
    ),
    "a source's option misspelt": (
        lambda m, s: StaticSource(s, 3, 0.4, position="all"),  # type: ignore[call-arg]
        r"StaticSource\(position=…\): .* did you mean positions\?",
    ),
    "a number of features as a text": (
        lambda m, s: RandomFeatureSource(s, 0.4, k="2"),
        "k '2': it is no whole number",  # type: ignore[arg-type]
    ),
    "a table of no numbers": (lambda m, s: DirectionTable("happy"), "the str that is to steer"),  # type: ignore[arg-type]
    "an axis as a text": (lambda m, s: DirectionTable.axes(32, ["x"]), "dimension 'x': dimensions are whole"),  # type: ignore[list-item]
    "numbers as combined sources": (lambda m, s: CombinedSource([3]), "the int that is to steer: it is no source"),  # type: ignore[list-item]
    "a name to reconstruct by": (
        lambda m, s: ReconstructionSource("default", "resid_post.1"),  # type: ignore[arg-type]
        "dictionary 'default': it is a name",
    ),
    "an SAE to save as a steering": (
        lambda m, s: Steering.of(m, s),  # type: ignore[arg-type]
        "the Standard that is to be saved: it decides anew at each token",
    ),
    "evidence of numbers": (
        lambda m, s: Steering.of(m, StaticSource(s, 3, 0.4), evidence=[0.3]),  # type: ignore[list-item]
        r"the float among the evidence: it is no Evidence; give trimtab\.steering\.Evidence",
    ),
    "a steering's number": (
        lambda m, s: load_steering(3),  # type: ignore[arg-type]
        "the int that is given as the steering: it is no path",
    ),
    "a place to save that is none": (
        lambda m, s: Steering.of(m, StaticSource(s, 3, 0.4)).save(None),  # type: ignore[arg-type]
        "the NoneType that is given as the steering's directory: it is no path",
    ),
    "a name to export": (
        lambda m, s: export_steering("sea", "sea.gguf"),  # type: ignore[arg-type]
        "the str that is exported: it is no Steering",
    ),
    "activations of another width": (
        lambda m, s: s.encode(torch.ones(2, 31)),
        r"the Tensor of shape \(2, 31\) to encode: a tensor \[\.\.\., 32\] is needed; give one",
    ),
    "a list to encode": (lambda m, s: s.encode([1.0] * 32), "the list to encode: a tensor"),  # type: ignore[arg-type]
    "a name to save": (
        lambda m, s: save_dictionary("default", "sae"),
        "dictionary 'default': it is a name",  # type: ignore[arg-type]
    ),
    "a table misspelt": (
        lambda m, s: trimtab.steer(m, s, "an inn", 3, max_new_tokens=2).to_frame("dose"),
        r"SteerResult's table 'dose': there is texts, doses; did you mean doses\?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_a_hint(mistake: str, tiny_llama: LanguageModel, sae: Standard) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as raised:
        call(tiny_llama, sae)
    assert raised.value.why
    assert "\n" not in raised.value.line
    assert raised.value._render_traceback_() == [f"{type(raised.value).__name__}: {raised.value.line}"]


def test_numbers_of_numpy_and_torch_are_numbers(tiny_llama: LanguageModel, sae: Standard) -> None:
    def steered(features: Any, dose: Any = 0.3, **options: Any) -> Any:
        result = trimtab.steer(tiny_llama, sae, "an inn", features, dose, max_new_tokens=3, **options)
        return result.features, result.positions, result.steered[0].continuations, result.steered[0].dose

    assert steered(np.int64(3)) == steered(torch.tensor(3)) == steered(3)
    assert steered(np.array([3, 5]), np.float64(0.3)) == steered(torch.tensor([[3, 5]])) == steered([3, 5])
    assert steered(3, positions=np.int64(-1)) == steered(3, positions=[-1]) == steered(3, positions="-1")
    assert steered(3, positions=torch.tensor([1, 2])) == steered(3, positions="1,2")
    assert steered(3, samples=np.int64(2), temperature=np.float32(1), seed=5)[2] != steered(3)[2]
    assert PositionRule.parse(-1) == PositionRule.parse("-1")
    wanted = trimtab.rank(tiny_llama, sae, features=[3, 5]).score.tolist()
    assert trimtab.rank(tiny_llama, sae, features=np.array([3, 5])).score.tolist() == wanted
    assert trimtab.rank(tiny_llama, sae, DeltaConfidence, features=torch.tensor([3, 5])).score.tolist() == wanted  # type: ignore[arg-type]
    texts = ["the end of an inn. " * 5] * 30
    trained = trimtab.train_sae(tiny_llama, texts, Site("resid_post", 1), n_features=np.int64(64), l0=np.float32(4))
    assert trained.sae.n_features == 64


def test_one_text_and_a_site_s_name_will_do(tiny_llama: LanguageModel, sae: Standard) -> None:
    one_text = last_activations(tiny_llama, "an inn", "resid_post.1")
    assert torch.equal(one_text, last_activations(tiny_llama, ["an inn"], "resid_post.1"))
    assert Setting(model=tiny_llama, dictionary=sae, site="resid_post.1").site == Site("resid_post", 1)  # type: ignore[arg-type]


def test_how_tokens_are_chosen_is_said_in_steer_itself(tiny_llama: LanguageModel, sae: Standard) -> None:
    ours = trimtab.steer(tiny_llama, sae, "an inn", 3, max_new_tokens=5, stop=["a"], temperature=0.7, seed=3)
    decoding = DecodeConfig(max_new_tokens=5, stop=("a",), temperature=0.7, seed=3)
    assert ours == trimtab.steer(tiny_llama, sae, "an inn", 3, decoding=decoding)
    both = trimtab.steer(tiny_llama, sae, "an inn", 3, decoding=decoding, max_new_tokens=2)
    assert {one.n_tokens for one in both.unsteered.continuations} <= {1, 2}


def test_ablation_without_a_dose(tiny_llama: LanguageModel, sae: Standard) -> None:
    result = trimtab.steer(tiny_llama, sae, "an inn", 3, operation="ablate", max_new_tokens=2)
    assert [arm.name for arm in result.arms] == ["unsteered", "ablated"]
    kept = trimtab.steer(tiny_llama, sae.W_dec[3].detach(), "an inn", site="resid_post.1", operation="ablate", kl=False)
    assert kept.steered[0].name == "ablated"


@pytest.mark.parametrize(
    ("text", "likely"),
    [
        ("resid_pots.15", "resid_post.15"),
        ("resid-post.15", "resid_post.15"),
        ("resid_post_15", "resid_post.15"),
        ("blocks.15.hook_resid_post", "resid_post.15"),
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.9.attn.hook_z", "attn_z.9"),
        ("attnz.9.6", "attn_z.9.6"),
        ("model.layers.15", "resid_post.15"),
        ("transformer.h.15", "resid_post.15"),
        ("15", "resid_post.15"),
        ("resid.3", "resid_post.3"),
        ("resid_post.1.2", "resid_post.1"),
        ("resid_post", ""),
        ("resid_post.-1", ""),
        ("nonsense.3", ""),
    ],
)
def test_a_site_by_another_name(text: str, likely: str) -> None:
    with pytest.raises(UserError) as raised:
        Site.parse(text)
    assert raised.value.hint == (f"did you mean {likely}?" if likely else "write it like resid_post.15 or attn_z.9.6")


def test_text_in_a_chat_that_is_no_special_token(tiny_llama: LanguageModel) -> None:
    """`<unk>` stands in many corpora, and means what it says."""
    ids = tiny_llama.encode_chat([{"role": "user", "content": "an <unk> inn"}])
    assert tiny_llama.decode_ids(ids, special=True) == "<user>an <unk> inn<eos><model>"
