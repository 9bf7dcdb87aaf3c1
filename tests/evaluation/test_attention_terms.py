"""Attention scores against those that plain models compute, and their terms against sums and planted products."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from circuit_prompts import few_names
from torch import Tensor

from trimtab.dictionaries import Dictionary, DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.evaluation.circuits import Circuit, head_location
from trimtab.evaluation.circuits.rows import rows_of
from trimtab.evaluation.supervised.attention_result import ALL, BOTH, DIFFERENCE, AttentionTerms, HeadTerms
from trimtab.evaluation.supervised.attention_scores import (
    KEYS,
    ScoredHead,
    check_scores,
    score_locations,
    scored_heads,
)
from trimtab.evaluation.supervised.attention_terms import Terms, attention_terms, best_terms, terms_of
from trimtab.evaluation.supervised.codes import FITS, Factors
from trimtab.evaluation.supervised.cross_sections import activations_of
from trimtab.evaluation.supervised.parts import FittedCodes, n_parts
from trimtab.evaluation.supervised.rotation import Rotation, random_rotation
from trimtab.lm import LanguageModel
from trimtab.runs import json_safe, read_typed
from trimtab.tasks.ioi_material import PAPER_TEMPLATES
from trimtab.tasks.ioi_prompts import IOIDistribution

IOI = few_names()


@pytest.fixture
def tiny_qwen3(tiny_tokenizer: Any) -> LanguageModel:
    """QK-norm of Llama's kind, grouped queries, a scaled rotation."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
    )  # fmt: skip
    torch.manual_seed(4)
    hf = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel.from_hf(hf, tiny_tokenizer, name="tiny-qwen3")


@pytest.fixture(params=["tiny_llama", "tiny_gemma3", "tiny_gpt2", "tiny_qwen3"])
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


def all_heads(model: LanguageModel) -> list[tuple[int, int]]:
    return list(itertools.product(range(model.n_layers), range(4)))


def products_of(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> list[Tensor]:
    """Per layer `[B, heads, T, T]`: what the model's own attention multiplies, before mask and softmax."""
    found: list[Tensor] = []
    module = sys.modules[type(model.hf).__module__]
    plain: Callable[..., Any] = module.eager_attention_forward  # type: ignore[attr-defined]

    def record(attention: Any, query: Tensor, key: Tensor, *args: Any, scaling: float, **kwargs: Any) -> Any:
        repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        found.append(query @ repeated.transpose(2, 3) * scaling)
        return plain(attention, query, key, *args, scaling=scaling, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", record)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        model.hf(input_ids=ids, use_cache=False)
    model.hf.set_attn_implementation(before)
    return found


def test_scores_are_the_models_own(any_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads of all layers, prompts of all lengths, in the order that they were given in."""
    ioi = few_names([*PAPER_TEMPLATES[:2], "Then, {first} and {second} had fun. {s} gave a ring to"])
    prompts, heads = ioi.prompts(6), all_heads(any_model)
    x = activations_of(any_model, ioi, prompts, score_locations(any_model, heads))
    scored = scored_heads(any_model, ioi, prompts, heads, x)
    found = {head.name: head.scores(x) for head in scored}
    assert len({len(ioi.tokenise(prompt).ids) for prompt in prompts}) > 1
    for number, prompt in enumerate(prompts):
        (rows,) = rows_of([ioi.tokenise(prompt)], any_model)
        products = products_of(any_model, monkeypatch, rows.ids)
        for layer, head in heads:
            for key in KEYS:
                expected = products[layer][0, head, -1, int(rows.positions[key])]
                one = found[f"{layer}.{head}"][key][number].float()
                torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


def dictionaries(model: LanguageModel, heads: list[tuple[int, int]], threshold: float = 0.5) -> dict[Any, Dictionary]:
    """A random one with both biases at every location."""
    generator, found = torch.Generator().manual_seed(0), {}
    for place in score_locations(model, heads):
        w = activations_of(model, IOI, IOI.prompts(2), [place])[place].shape[1]
        weight, bias = (torch.randn(*size, generator=generator) for size in ((40, w), (w,)))
        found[place] = Standard(
            weight.T.contiguous(), torch.full((40,), -threshold), weight / w, bias,
            info=DictionaryInfo(architecture="standard"),
        )  # fmt: skip
    return found


def codes(model: LanguageModel, heads: list[tuple[int, int]], ioi: Any = IOI) -> dict[Any, FittedCodes]:
    train = ioi.prompts(60)
    factors = Factors.of(train)
    x = activations_of(model, ioi, train, score_locations(model, heads))
    return {place: FittedCodes(FITS["mse"](own, factors, factors.rows(train)), factors) for place, own in x.items()}


def turned(means: dict[Any, Tensor]) -> Rotation:
    """At random, two directions for each attribute."""
    bases = {place: torch.zeros(len(mean), 6) for place, mean in means.items()}
    return random_rotation(Rotation(means, bases, dict.fromkeys(means, ("IO", "S", "Pos") * 2)))


def rotations(model: LanguageModel, heads: list[tuple[int, int]]) -> dict[Any, Rotation]:
    x = activations_of(model, IOI, IOI.prompts(6), score_locations(model, heads))
    return dict.fromkeys(x, turned({place: own.mean(0) for place, own in x.items()}))


def reconstruction(one: Any, place: Any, x: Tensor, prompts: Any) -> Tensor:
    if isinstance(one, FittedCodes):
        return one.codes.reconstruct(one.factors.rows(prompts))
    return one.reconstruct(place, x) if isinstance(one, Rotation) else one(x).detach()


@pytest.mark.parametrize("kind", [codes, rotations, dictionaries])
def test_terms_add_up_to_the_score(any_model: LanguageModel, kind: Callable[..., Any]) -> None:
    """The last layer's, bias and error included; without errors to the reconstructions' score."""
    prompts, heads = IOI.prompts(6), [(any_model.n_layers - 1, head) for head in (0, 3)]
    x = activations_of(any_model, IOI, prompts, score_locations(any_model, heads))
    contender = kind(any_model, heads)
    for head in scored_heads(any_model, IOI, prompts, heads, x):
        expected = head.scores(x)
        rebuilt = {place: reconstruction(one, place, x[place], prompts) for place, one in contender.items()}
        found = terms_of(head, contender, prompts, x)
        for key in KEYS:
            terms = found[key].terms
            torch.testing.assert_close(terms.total(6), expected[key], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(terms.total(6, terms.allowed), head.scores(rebuilt)[key], atol=1e-5, rtol=1e-5)
        difference = expected["IO"] - expected["S1"]
        torch.testing.assert_close(found[DIFFERENCE].terms.total(6), difference, atol=1e-5, rtol=1e-5)
        both = torch.cat([expected["IO"], expected["S1"]])
        torch.testing.assert_close(found[BOTH].terms.total(12), both, atol=1e-5, rtol=1e-5)


def test_each_term_is_the_product_of_two_features(tiny_llama: LanguageModel) -> None:
    """Written out: code · decoder row, rotated by hand, for one prompt and one pair of active features."""
    prompts, heads = IOI.prompts(4), [(3, 2)]
    places = score_locations(tiny_llama, heads)
    x = activations_of(tiny_llama, IOI, prompts, places)
    contender = dictionaries(tiny_llama, heads)
    (head,) = scored_heads(tiny_llama, IOI, prompts, heads, x)
    scored = terms_of(head, contender, prompts, x)["S1"]
    position = IOI.tokenise(prompts[1]).positions

    def rotated(place: Any, feature: int) -> Tensor:
        own = contender[place]
        vector = (own.encode(x[place])[1, feature] * own.W_dec[feature]).detach().double()
        angle = position[place.position] / 10000.0 ** (torch.arange(0, 8, 2).double() / 8)
        first, second = vector[:4], vector[4:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

    q, k = (int(contender[place].encode(x[place])[1].argmax()) for place in (places[0], places[2]))
    expected = float(rotated(places[0], q) @ rotated(places[2], k)) / 8**0.5
    pairs = [
        n for n, pair in enumerate(scored.terms.pair.tolist())
        if scored.name(pair) == (str(q), str(k), "S1") and scored.terms.prompt[n] == 1
    ]  # fmt: skip
    assert [float(value) for value in scored.terms.value[pairs]] == pytest.approx([expected], abs=1e-5)


def test_the_first_term_is_the_best_of_all() -> None:
    """Against all pairs, one by one; and no term is taken that adds variance."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(50, 12, generator=generator).double() * torch.rand(12, generator=generator).double()
    dense[:, 3] *= torch.rand(50, generator=generator) > 0.7
    prompt, pair = (dense != 0).nonzero(as_tuple=True)
    allowed = pair != 5
    terms = Terms(pair * 7 + 1, prompt, dense[prompt, pair], allowed)
    score = dense.sum(1)

    def left(chosen: list[int]) -> float:
        return float((score - dense[:, chosen].sum(1)).var(correction=0))

    found = [(pair - 1) // 7 for pair in best_terms(terms, 50, 12)]
    one_by_one: list[int] = []
    while others := [pair for pair in range(12) if pair != 5 and pair not in one_by_one]:
        best = min(others, key=lambda pair: left([*one_by_one, pair]))
        if left([*one_by_one, best]) >= left(one_by_one):
            break
        one_by_one.append(best)
    assert found == one_by_one
    assert len(found) > 5
    assert [(pair - 1) // 7 for pair in best_terms(terms, 50, 3)] == found[:3]


def planted(prompts: Any, seed: int) -> tuple[ScoredHead, dict[Any, Tensor]]:
    """Queries hold IO's number along axis 0 and the order along axis 1; keys the same, and noise along axis 2."""
    locations = ("query", "IO", "S1")
    through = dict.fromkeys(locations, lambda parts, _rows: parts.double())
    head = ScoredHead("0.0", locations[0], {"IO": "IO", "S1": "S1"}, 0.5, through)  # type: ignore[arg-type]
    number = {name: i - 4.5 for i, name in enumerate(IOI.names)}
    generator = torch.Generator().manual_seed(seed)
    x = {place: torch.zeros(len(prompts), 4) for place in locations}
    for place in locations:
        x[place][:, 0] = torch.tensor([number[prompt.attributes["IO"]] for prompt in prompts])
        x[place][:, 1] = torch.tensor([1.0 if prompt.pattern == "ABB" else -1.0 for prompt in prompts])
        x[place][:, 2] = torch.randn(len(prompts), generator=generator)
    x["query"][:, 2] = 0
    x["S1"][:, :2] *= -0.6
    return head, x


def test_planted_terms_are_found() -> None:
    train, test = IOI.prompts(200), IOI.prompts(60, "test")
    factors = Factors.of(train)
    head, x = planted(train, 0)
    contender = {
        place: FittedCodes(FITS["mse"](own, factors, factors.rows(train)), factors) for place, own in x.items()
    }
    found = terms_of(head, contender, train, x)  # type: ignore[arg-type]
    names = {score: [scored.name(n) for n in best_terms(scored.terms, scored.n, 2)] for score, scored in found.items()}
    assert names["IO"][0] == ("IO", "IO", "IO")
    assert names[DIFFERENCE][0] == ("IO", "IO", "IO")
    assert names[DIFFERENCE][1] == ("IO", "IO", "S1")
    held, y = planted(test, 1)
    terms = terms_of(held, contender, test, y)["IO"].terms  # type: ignore[arg-type]
    chosen = best_terms(found["IO"].terms, 200, 3)
    assert {found["IO"].name(pair)[:2] for pair in chosen} == {("IO", "IO"), ("mean", "IO"), ("IO", "mean")}
    score = held.scores(y)["IO"]  # type: ignore[arg-type]
    rest = score - sum(terms.total(len(test), terms.pair == pair) for pair in chosen)
    assert float(rest.var() / score.var()) < 1e-6  # what Pos adds is the same in all prompts
    both = [found[BOTH].name(pair) for pair in best_terms(found[BOTH].terms, 400, 8)]
    assert {("Pos", "Pos", "IO"), ("Pos", "Pos", "S1")} <= set(both)  # but not for both keys


def test_shares_of_several_contenders(tiny_llama: LanguageModel) -> None:
    """In order, never above the whole reconstruction's by more than chance; written and read back; drawn."""
    heads = [(3, 0), (3, 1)]
    contenders = {"codes": codes(tiny_llama, heads), "random": dictionaries(tiny_llama, heads)}
    train, test, done = IOI.prompts(60), IOI.prompts(20, "test"), []
    found = attention_terms(tiny_llama, IOI, heads, train, test, contenders, n_terms=(1, 4, 100), progress=done.append)
    assert len(done) == 4
    assert {(one.contender, one.head, one.score) for one in found.scores} == set(
        itertools.product(contenders, ("3.0", "3.1", ALL), ("IO", "S1", DIFFERENCE, BOTH))
    )
    for one in found.scores:
        assert [share.t for share in one.shares] == [1, 4, 100]
        assert all(share.share is not None and share.share.n == 20 for share in one.shares)
    x = activations_of(tiny_llama, IOI, test, score_locations(tiny_llama, heads))
    for head, of in zip(scored_heads(tiny_llama, IOI, test, heads, x), ("3.0", "3.1"), strict=True):
        score = head.scores(x)["IO"]
        rebuilt = {p: c.codes.reconstruct(c.factors.rows(test)) for p, c in contenders["codes"].items()}
        expected = 1 - float((score - head.scores(rebuilt)["IO"]).var() / score.var())
        own = next(one for one in found.scores if (one.contender, one.head, one.score) == ("codes", of, "IO"))
        assert own.whole is not None
        assert own.whole.estimate == pytest.approx(expected, abs=1e-6)
        assert own.n_terms == 16
    again = read_typed(AttentionTerms, json_safe(found), "terms")
    assert again == found
    assert found.headline().startswith("variance of attention scores explained by few terms: codes ")
    frame = found.to_frame()
    assert list(frame["n_terms"]) == [one.n_terms for one in found.scores]
    assert len(found.plot().lines) == 2
    given = attention_terms(
        tiny_llama, IOI, heads, train, test, contenders, n_terms=(1, 4, 100), test_activations=x,
        train_activations=activations_of(tiny_llama, IOI, train, tuple(x)),
    )  # fmt: skip
    assert given == found


def test_dense_dictionaries_are_chosen_by_fewer_prompts(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measured on all, block by block, which changes nothing."""
    heads, module = [(3, 0), (3, 1)], sys.modules[Terms.__module__]
    contenders = {"codes": codes(tiny_llama, heads), "dense": dictionaries(tiny_llama, heads, -2.0)}
    train, test = IOI.prompts(60), IOI.prompts(30, "test")

    def run(train: Any) -> AttentionTerms:
        return attention_terms(tiny_llama, IOI, heads, train, test, contenders, n_terms=(1, 4))

    def of(found: AttentionTerms, contender: str) -> list[HeadTerms]:
        return [one for one in found.scores if one.contender == contender]

    def check(found: Sequence[HeadTerms], expected: Sequence[HeadTerms]) -> None:
        """Up to rounding, the same terms with the same shares."""
        for one, other in zip(found, expected, strict=True):
            names = [[(term.query, term.key, term.position) for term in of.terms] for of in (one, other)]
            assert (one.n_train, one.n_terms, names[0]) == (other.n_train, other.n_terms, names[1])
            for share, like in zip((*(s.share for s in one.shares), one.whole), numbers(other), strict=True):
                assert share is not None
                assert (share.estimate, share.low, share.high) == pytest.approx(like, abs=1e-4, rel=1e-4)

    def numbers(one: HeadTerms) -> list[tuple[float, float, float]]:
        shares = [share for share in (*(s.share for s in one.shares), one.whole) if share is not None]
        return [(share.estimate, share.low, share.high) for share in shares]

    whole, by_ten = run(train), run(train[:10])
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(module, "PRODUCTS", 3000)
    check(run(train).scores, whole.scores)
    monkeypatch.setattr(module, "MOST_TERMS", 12_000)
    found = run(train)
    check(of(found, "codes"), of(whole, "codes"))
    n_train = {one.n_train for one in of(found, "dense")}
    assert 2 <= min(n_train) <= max(n_train) < 30
    assert {one.n_train for one in of(whole, "dense")} == {60}
    for one, like in zip(of(found, "dense"), of(whole, "dense"), strict=True):
        assert numbers(one)[-1] == pytest.approx(
            numbers(like)[-1], abs=1e-4, rel=1e-4
        )  # the whole, on all test prompts
        assert one.shares[0].share != like.shares[0].share
    assert list(found.to_frame()["n_train"]) == [one.n_train for one in found.scores]
    monkeypatch.setattr(module, "MOST_PROMPTS", 10)
    first = run(train)
    assert first.n_train == 10
    check(of(first, "codes"), of(by_ten, "codes"))


def test_a_prompts_terms_are_as_many_as_are_counted(tiny_llama: LanguageModel) -> None:
    heads, prompts = [(3, 2)], IOI.prompts(6)
    x = activations_of(tiny_llama, IOI, prompts, score_locations(tiny_llama, heads))
    (head,) = scored_heads(tiny_llama, IOI, prompts, heads, x)
    for contender in (codes(tiny_llama, heads), rotations(tiny_llama, heads), dictionaries(tiny_llama, heads)):
        found = terms_of(head, contender, prompts, x)
        key = head.keys["S1"]
        counts = n_parts(contender[head.query], x[head.query]) * n_parts(contender[key], x[key])
        assert found["S1"].terms.prompt.bincount().tolist() == counts.tolist()


def test_a_score_that_does_not_vary_has_no_shares(ioi: IOIDistribution, built: LanguageModel) -> None:
    """Heads without weights in the model built by hand."""
    train = ioi.prompts(40)
    contenders = {"codes": codes(built, [(0, 0)], ioi=ioi)}
    found = attention_terms(built, ioi, [(0, 0)], train, ioi.prompts(10, "test"), contenders, n_terms=(1,))
    assert all(one.whole is None and one.shares[0].share is None for one in found.scores)
    assert found.headline().endswith("few terms: none")
    found.plot()


def test_what_is_refused(
    tiny_llama: LanguageModel, tiny_gemma3: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test, heads = IOI.prompts(60), IOI.prompts(12, "test"), [(3, 0)]
    contender = codes(tiny_llama, heads)

    def run(model: LanguageModel = tiny_llama, of: Any = heads, given: Any = None, **options: Any) -> None:
        attention_terms(model, IOI, of, train, test, {"codes": contender} if given is None else given, **options)

    with pytest.raises(UserError, match="attention terms: there is no name mover, or no head was given; give heads"):
        run(of=Circuit(model="m", fingerprint="", heads=()))
    with pytest.raises(UserError, match="attn_q has heads 0 to 3"):
        run(of=[(3, 4)])
    with pytest.raises(UserError, match=r"n_terms \(0, 2\): at least one term must be chosen"):
        run(n_terms=(0, 2))
    with pytest.raises(UserError, match="there is no contender; give codes or dictionaries"):
        run(given={})
    other = head_location(tiny_llama, "attn_k", 3, 0, "S1")
    lacking = {place: one for place, one in contender.items() if place != other}
    with pytest.raises(UserError, match=r"contender mse: it has nothing for attn_k.3.0 at S1; fit or train it there"):
        run(given={"mse": lacking})
    rotation = turned({place: torch.zeros(8) for place in lacking})
    with pytest.raises(
        UserError, match=r"contender turned: it has nothing for attn_k.3.0 at S1; fit or train it there"
    ):
        run(given={"turned": dict.fromkeys(contender, rotation)})
    narrow = Standard(
        *(torch.zeros(s) for s in ((4, 9), (9,), (9, 4), (4,))), info=DictionaryInfo(architecture="standard")
    )
    with pytest.raises(UserError, match=r"contender sae: its width at attn_k.3.0 at S1 is 4, the site's is 8"):
        run(given={"sae": {**contender, other: narrow}})
    with pytest.raises(
        UserError, match="its attention at END does not reach IO and S1 in every prompt, as where a win"
    ):
        run(model=tiny_gemma3, of=[(0, 0)], given={"codes": codes(tiny_gemma3, [(0, 0)])})
    attention = tiny_llama.layout.layers[3].module.self_attn
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attn_logit_softcapping", 50.0, raising=False)
        with pytest.raises(UserError, match=r"tiny-llama: they are capped \(attn_logit_softcapping 50\)"):
            run()
    with monkeypatch.context() as patch:
        half = {3: {len(IOI.tokenise(train[0]).ids): (torch.ones(30, 4), torch.zeros(30, 4))}}
        patch.setattr("trimtab.evaluation.supervised.attention_scores._rotations", lambda *_given: half)
        with pytest.raises(UserError, match="tiny-llama: it rotates only part of each head; use another model"):
            run()
    read = {
        f"{split}_activations": activations_of(tiny_llama, IOI, prompts, tuple(contender))
        for split, prompts in (("train", train), ("test", test))
    }
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.evaluation.supervised.attention_scores._rotations", lambda *_given: half)
        patch.setattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        with pytest.raises(UserError, match="tiny-llama: it does not say how it rotates queries and keys; use another"):
            run(**read)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "q_norm", torch.nn.RMSNorm(32), raising=False)
        with pytest.raises(UserError, match="its QK-norm is over all heads together; use another model"):
            run()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[Terms.__module__], "MOST_TERMS", 24)
        with pytest.raises(
            UserError, match=r"terms of head 3.0: 25 pairs of active features in one prompt, at most 24 fit; use spar"
        ):
            run()


def test_scores_of_another_kind_are_noticed(tiny_llama: LanguageModel) -> None:
    """As if a model scaled its scores by something that is not known here."""
    prompts, heads = IOI.prompts(8), [(3, 0)]
    x = activations_of(tiny_llama, IOI, prompts, score_locations(tiny_llama, heads))
    (head,) = scored_heads(tiny_llama, IOI, prompts, heads, x)
    check_scores(tiny_llama, IOI, prompts, [head], x, batch_size=3)
    with pytest.raises(UserError, match=r"those of head 3\.0 are not scaled products of normed and rotated queries"):
        check_scores(tiny_llama, IOI, prompts, [head._replace(scaling=head.scaling * 1.02)], x)
