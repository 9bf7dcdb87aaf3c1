"""Core metrics against dictionaries whose metrics are known, and against a slow float64 reference."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from trimtab.activations import Document, HarvestOptions, read_documents, sample_text, tokenise
from trimtab.activations.sequences import pack_splits
from trimtab.dictionaries import SAE, Gated, JumpReLU, Standard, TopK, load_dictionary, save_dictionary
from trimtab.dictionaries.base import Dictionary, DictionaryInfo
from trimtab.errors import UserError
from trimtab.evaluation import (
    CoreConfig,
    CoreOptions,
    SAEStatsConfig,
    evaluate,
    evaluate_core,
    measure_stats,
    pack,
    run_core,
)
from trimtab.lm import LanguageModel, RowDelta, edited

SITE = "resid_post.1"
CONTEXT = 24
TEXTS = [
    "the cat and the dog sat in the warm rain, and then another one came by and sang",
    "A ship in the fog.\nNobody answers; the bell rings again and again, thinner than before",
    "numbers like 12 and 34 are not words, they are counts of things in the other room",
    "when they returned in winter the garden had gone under water and weeds, and then ice",
]


class Identity(Dictionary):
    architecture = "identity"

    def __init__(self, d: int) -> None:
        super().__init__(DictionaryInfo(architecture="identity", site=SITE))
        self.W_dec = nn.Parameter(torch.eye(d))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f


class Constant(Identity):
    """Rebuilds everything as one vector."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__(len(value))
        self.value = value

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.value.expand_as(f)


class Relu(Identity):
    """Ten random features."""

    def __init__(self, d: int, scale: float = 1.0) -> None:
        super().__init__(d)
        draw = torch.Generator().manual_seed(0)
        self.W_enc = torch.randn(d, 10, generator=draw) / d**0.5
        self.b_enc = 0.1 * torch.randn(10, generator=draw)
        self.W_dec = nn.Parameter(scale * torch.randn(10, d, generator=draw) / 10**0.5)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc.to(x) + self.b_enc.to(x))

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec.to(f)


def packed_texts(model: LanguageModel, context: int = CONTEXT):
    documents = [Document(f"d{i}", text, "test") for i, text in enumerate(TEXTS)]
    return pack(tokenise(documents, model.tokenizer), "all", 0.05, context, model)


OPTIONS = CoreOptions(context=CONTEXT, batch_size=3, n_resamples=200)


def kept_rows(model: LanguageModel, packed, x: torch.Tensor) -> torch.Tensor:
    """The rows `[R]` (flat places) that training would keep, worked out token by token."""
    special = set(model.tokenizer.all_special_ids)
    sequences = packed.batch(range(len(packed)))
    norms = x.norm(dim=-1)
    keep = [
        (b, t)
        for b in range(len(packed))
        for t in range(1, packed.context)
        if int(sequences.tokens[b, t]) not in special
    ]
    limit = 10 * torch.stack([norms[b, t] for b, t in keep]).median()
    return torch.tensor([b * packed.context + t for b, t in keep if norms[b, t] <= limit])


def site_rows(model: LanguageModel, packed) -> torch.Tensor:
    ids = torch.from_numpy(packed.batch(range(len(packed))).tokens).long()
    return model.hf(ids, output_hidden_states=True).hidden_states[2]


def test_identity_changes_nothing(any_tiny: LanguageModel):
    packed = packed_texts(any_tiny)
    result, _ = evaluate_core(any_tiny, Identity(32), packed, OPTIONS)
    assert result["explained_variance"].estimate == pytest.approx(1, abs=1e-9)
    assert result["normalised_mse"].estimate == pytest.approx(0, abs=1e-9)
    assert result["cosine"].estimate == pytest.approx(1, abs=1e-6)
    assert result["ce_increase"].estimate == pytest.approx(0, abs=1e-6)
    assert result["kl"].estimate == pytest.approx(0, abs=1e-6)
    assert result["recovered_mean"].estimate == pytest.approx(1, abs=1e-4)
    assert result["recovered_zero"].estimate == pytest.approx(1, abs=1e-4)
    assert result["kl_recovered_zero"].estimate == pytest.approx(1, abs=1e-4)


def test_mean_dictionary_recovers_nothing(any_tiny: LanguageModel):
    packed = packed_texts(any_tiny)
    x = site_rows(any_tiny, packed)
    mean = x.flatten(0, 1)[kept_rows(any_tiny, packed, x)].mean(dim=0)
    result, _ = evaluate_core(any_tiny, Constant(mean), packed, OPTIONS)
    assert result["explained_variance"].estimate == pytest.approx(0, abs=1e-5)
    assert result["recovered_mean"].estimate == pytest.approx(0, abs=1e-4)
    assert result["ce_increase"].estimate == pytest.approx(result["ce_increase_mean"].estimate, abs=1e-6)
    assert abs(result["ce_increase_mean"].estimate) > 1e-3  # else the test above compares noise


def test_zero_dictionary_is_zero_ablation(tiny_llama: LanguageModel):
    result, _ = evaluate_core(tiny_llama, Constant(torch.zeros(32)), packed_texts(tiny_llama), OPTIONS)
    assert result["normalised_mse"].estimate == pytest.approx(1)
    assert result["recovered_zero"].estimate == pytest.approx(0, abs=1e-5)
    assert result["kl_recovered_zero"].estimate == pytest.approx(0, abs=1e-5)
    assert abs(result["ce_increase_zero"].estimate) > 1e-3


def test_metrics_equal_a_float64_reference_written_token_by_token(tiny_llama: LanguageModel):
    packed, dictionary = packed_texts(tiny_llama), Relu(32)
    result, _ = evaluate_core(tiny_llama, dictionary, packed, OPTIONS)

    hf = copy.deepcopy(tiny_llama.hf).double()
    sequences = packed.batch(range(len(packed)))
    ids = torch.from_numpy(sequences.tokens).long()
    with torch.no_grad():
        out = hf(ids, output_hidden_states=True)
        x = out.hidden_states[2]
        keep = kept_rows(tiny_llama, packed, x)
        rows = x.flatten(0, 1)[keep]
        f = dictionary.encode(rows)
        rebuilt = dictionary.decode(f)

        def logits_with(new_rows: torch.Tensor) -> torch.Tensor:
            def replace(_module, _args, output):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden.flatten(0, 1).clone()
                hidden[keep] = new_rows
                hidden = hidden.view(x.shape)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = hf.model.layers[1].register_forward_hook(replace)
            try:
                return hf(ids).logits
            finally:
                handle.remove()

        clean = out.logits.log_softmax(-1)
        spliced = logits_with(rebuilt).log_softmax(-1)
        ablated = logits_with(rows.mean(dim=0).expand_as(rows)).log_softmax(-1)
        rise, rise_mean, kl, count = 0.0, 0.0, 0.0, 0
        for b in range(len(packed)):
            for t in range(packed.context - 1):
                if sequences.document[b, t] != sequences.document[b, t + 1]:
                    continue
                target = ids[b, t + 1]
                rise += float(clean[b, t, target] - spliced[b, t, target])
                rise_mean += float(clean[b, t, target] - ablated[b, t, target])
                kl += float((clean[b, t].exp() * (clean[b, t] - spliced[b, t])).sum())
                count += 1
    residual = (rows - rebuilt).square().sum()
    expected = {
        "l0": (f > 0).double().sum(dim=-1).mean(),
        "explained_variance": 1 - residual / (rows - rows.mean(dim=0)).square().sum(),
        "normalised_mse": residual / rows.square().sum(),
        "cosine": torch.cosine_similarity(rows, rebuilt, dim=-1).mean(),
        "ce_increase": rise / count,
        "ce_increase_mean": rise_mean / count,
        "kl": kl / count,
        "recovered_mean": (rise_mean - rise) / rise_mean,
        "dead_share": (f > 0).sum(dim=0).eq(0).double().mean(),
        "dense_share": (f > 0).double().mean(dim=0).gt(0.1).double().mean(),
    }
    assert result.tokens == len(keep)
    assert result.predicted == count
    for name, value in expected.items():
        assert result[name].estimate == pytest.approx(float(value), rel=2e-4, abs=1e-6), name


def test_intervals_resample_documents(tiny_llama: LanguageModel):
    result, _ = evaluate_core(tiny_llama, Relu(32), packed_texts(tiny_llama), OPTIONS)
    for name in ("explained_variance", "ce_increase", "recovered_mean", "l0"):
        interval = result[name]
        assert interval.n == result.documents == len(TEXTS)
        assert interval.low <= interval.estimate <= interval.high


def test_sinks_special_tokens_and_outliers_are_left_untouched(tiny_llama: LanguageModel):
    hf = copy.deepcopy(tiny_llama.hf)
    loud = tiny_llama.tokenizer("N")["input_ids"][0]
    with torch.no_grad():
        hf.model.embed_tokens.weight[loud] *= 1_000
    model = LanguageModel.from_hf(hf, tiny_llama.tokenizer, "loud")

    class WrongWhereLoud(Identity):
        def decode(self, f: torch.Tensor) -> torch.Tensor:
            return torch.where(f.norm(dim=-1, keepdim=True) > 10 * f.norm(dim=-1).median(), torch.zeros_like(f), f)

    packed = packed_texts(model)
    result, _ = evaluate_core(model, WrongWhereLoud(32), packed, OPTIONS)
    tokens = packed.batch(range(len(packed))).tokens
    separators = int(np.isin(tokens[:, 1:], model.tokenizer.all_special_ids).sum())
    assert result.excluded == {"first": len(packed), "special": separators, "outlier": int((tokens == loud).sum())}
    assert separators > 0
    assert result.excluded["outlier"] > 0
    assert sum(result.excluded.values()) + result.tokens == tokens.size
    assert result["ce_increase"].estimate == pytest.approx(0, abs=1e-6)
    assert abs(result["ce_increase_everywhere"].estimate) > 1e-3


def test_batch_size_does_not_matter(tiny_llama: LanguageModel):
    packed = packed_texts(tiny_llama)
    one, _ = evaluate_core(tiny_llama, Relu(32), packed, CoreOptions(context=CONTEXT, batch_size=1))
    all_, _ = evaluate_core(tiny_llama, Relu(32), packed, CoreOptions(context=CONTEXT, batch_size=64))
    for metric in one.metrics:
        assert all_[metric.name].estimate == pytest.approx(metric.value.estimate, rel=1e-4, abs=1e-6), metric.name


def random_sae(architecture: str) -> SAE:
    draw = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(48, 32, generator=draw), dim=1)
    common = {"W_enc": 0.5 * W_dec.T.clone(), "W_dec": W_dec, "b_dec": 0.1 * torch.randn(32, generator=draw)}
    info = DictionaryInfo(architecture=architecture, site=SITE)
    bias = 0.1 * torch.randn(48, generator=draw) - 0.2
    if architecture == "topk":
        return TopK(**common, b_enc=bias, k=5, info=info)
    if architecture == "jumprelu":
        return JumpReLU(**common, b_enc=bias, threshold=torch.full((48,), 0.1), info=info)
    if architecture == "gated":
        return Gated(**common, b_gate=bias, b_mag=bias + 0.1, r_mag=0.5 * bias, info=info)
    return Standard(**common, b_enc=bias, apply_b_dec_to_input=False, info=info)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_any_architecture_from_its_file_gives_the_metrics_of_its_rows(
    architecture: str, tiny_llama: LanguageModel, tmp_path: Path
):
    save_dictionary(random_sae(architecture), tmp_path / "sae")
    sae = load_dictionary(str(tmp_path / "sae"))
    packed = packed_texts(tiny_llama)
    result, rebuilt = evaluate_core(tiny_llama, sae, packed, OPTIONS)
    x = site_rows(tiny_llama, packed)
    rows = x.flatten(0, 1)[kept_rows(tiny_llama, packed, x)]
    f = sae.encode(rows)
    residual = (rows - sae.decode(f)).square().sum()
    rate = (f > 0).double().mean(dim=0)
    assert 0 < float(rate.sum()) < 48
    assert result["l0"].estimate == pytest.approx(float(rate.sum()), rel=1e-6)
    assert result["explained_variance"].estimate == pytest.approx(
        float(1 - residual / (rows - rows.mean(dim=0)).square().sum()), rel=1e-4
    )
    assert result["dead_share"].estimate == pytest.approx(float((rate == 0).double().mean()))
    assert result["dense_share"].estimate == pytest.approx(float((rate > 0.1).double().mean()))
    np.testing.assert_allclose(rebuilt.stats.firing_rate, rate.numpy(), rtol=1e-6)


def test_density_counts_every_feature_on_every_evaluated_row(tiny_llama: LanguageModel):
    result, rebuilt = evaluate_core(tiny_llama, random_sae("jumprelu"), packed_texts(tiny_llama), OPTIONS)
    density = result.density
    assert density.n_rows == result.tokens
    assert sum(density.counts) + density.never == 48
    assert density.never == round(48 * result["dead_share"].estimate)
    rate = rebuilt.stats.firing_rate
    assert density.quantiles["0.5"] == pytest.approx(np.median(np.log10(rate[rate > 0])))
    assert result.to_json()["density"]["counts"] == list(density.counts)
    assert density.render() in result.render()
    assert result.plot(Figure().add_subplot()).patches[0].get_data().values.tolist() == list(density.counts)  # type: ignore[attr-defined]
    frame = result.to_frame()
    assert frame.label.tolist() == [metric.label for metric in result.metrics]
    assert frame.value.dropna().tolist() == [
        m.value.estimate for m in result.metrics if m.value.estimate == m.value.estimate
    ]
    assert "48 features" in repr(result)


def test_evaluate_takes_texts(tiny_llama: LanguageModel):
    options = {"context": CONTEXT, "n_resamples": 50}
    result = evaluate(tiny_llama, random_sae("topk"), TEXTS, **options)
    documents = [Document(f"text#{i:06d}", text, "text") for i, text in enumerate(TEXTS)]
    packed = pack(tokenise(documents, tiny_llama.tokenizer), "all", 0.05, CONTEXT, tiny_llama)
    same, _ = evaluate_core(tiny_llama, random_sae("topk"), packed, CoreOptions(**options))
    assert json.dumps(result.to_json()) == json.dumps(same.to_json())
    with pytest.raises(UserError, match="it does not fill one sequence of 256"):
        evaluate(tiny_llama, random_sae("topk"), TEXTS[:1])


def test_coherence_is_of_the_decoder(tiny_llama: LanguageModel):
    sae = random_sae("standard")
    result, _ = evaluate_core(tiny_llama, sae, packed_texts(tiny_llama), OPTIONS)
    cosine = (sae.directions @ sae.directions.T).abs().fill_diagonal_(0)
    assert result["coherence_max"].estimate == pytest.approx(float(cosine.max()), rel=1e-5)
    assert result["coherence_mean"].estimate == pytest.approx(float(cosine.amax(1).mean()), rel=1e-5)
    orthogonal, _ = evaluate_core(tiny_llama, Identity(32), packed_texts(tiny_llama), OPTIONS)
    assert orthogonal["coherence_max"].estimate == 0


def test_result_prints_and_becomes_json(tiny_llama: LanguageModel):
    result, _ = evaluate_core(tiny_llama, Relu(32), packed_texts(tiny_llama), OPTIONS)
    text = result.render()
    assert f"{result['explained_variance'].estimate:.4f}" in text
    assert "position 0" in text
    restored = json.loads(json.dumps(result.to_json()))
    assert restored["metrics"]["ce_increase"]["estimate"] == result["ce_increase"].estimate
    assert restored["metrics"]["dead_share"]["low"] is None


def test_too_little_text_says_so(tiny_llama: LanguageModel):
    with pytest.raises(UserError, match=r"does not fill one sequence of 2000.*smaller --context"):
        packed_texts(tiny_llama, context=2_000)


def test_unnamed_site_says_so(tiny_llama: LanguageModel):
    dictionary = Identity(32)
    dictionary.info = DictionaryInfo(architecture="identity")
    with pytest.raises(UserError, match=r"--site: the SAE's file does not name the site"):
        evaluate_core(tiny_llama, dictionary, packed_texts(tiny_llama), OPTIONS)


def test_wrong_width_says_so(tiny_llama: LanguageModel):
    with pytest.raises(UserError, match=r"dictionary of width 16: tiny-llama has width 32"):
        evaluate_core(tiny_llama, Identity(16), packed_texts(tiny_llama), OPTIONS)


def test_progress_reaches_the_end(tiny_llama: LanguageModel):
    packed, calls = packed_texts(tiny_llama), []
    evaluate_core(tiny_llama, Identity(32), packed, OPTIONS, progress=calls.append)
    assert sum(calls) == 2 * len(packed)


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "resid_post.3"])
def test_every_site_gives_the_loss_of_the_edited_model(any_tiny: LanguageModel, site: str):
    packed, dictionary = packed_texts(any_tiny), Constant(torch.ones(32))
    dictionary.info = DictionaryInfo(architecture="constant", site=site)
    result, _ = evaluate_core(any_tiny, dictionary, packed, OPTIONS)
    sequences = packed.batch(range(len(packed)))
    ids = torch.from_numpy(sequences.tokens).long()
    everything = torch.ones_like(ids, dtype=torch.bool).nonzero(as_tuple=True)

    def replace(x: torch.Tensor) -> RowDelta:
        return RowDelta(*everything, 1 - x[everything])

    inside = torch.from_numpy(
        (sequences.document[:, 1:] == sequences.document[:, :-1]) & (sequences.document[:, 1:] >= 0)
    )

    def loss() -> float:
        log_p = any_tiny.hf(ids).logits.log_softmax(-1)[:, :-1]
        return float(-log_p.gather(-1, ids[:, 1:, None])[..., 0][inside].mean())

    with edited(any_tiny, {any_tiny.site(site): replace}):
        spliced = loss()
    assert result["ce_increase_everywhere"].estimate == pytest.approx(spliced - loss(), rel=1e-4, abs=1e-5)


def test_a_model_that_does_more_than_norm_and_head_is_refused(tiny_llama: LanguageModel):
    model = LanguageModel.from_hf(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer, "scaled")
    model.hf.register_forward_hook(lambda _m, _a, output: output | {"logits": output["logits"] * 3})
    with pytest.raises(UserError, match="model scaled: its logits are not final norm and head of its residual"):
        evaluate_core(model, Relu(32), packed_texts(model), OPTIONS, site=SITE)


def test_statistics_equal_a_count_over_all_rows(tiny_llama: LanguageModel):
    dictionary = Relu(32, scale=2.0)
    calls: list[int] = []
    packed = packed_texts(tiny_llama)
    stats = evaluate_core(tiny_llama, dictionary, packed, OPTIONS, site=SITE, progress=calls.append)[1].stats
    x = site_rows(tiny_llama, packed)
    f = dictionary.encode(x.flatten(0, 1)[kept_rows(tiny_llama, packed, x)])
    norms = dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(torch.from_numpy(stats.max_activation), (f.amax(0) * norms).detach())
    torch.testing.assert_close(torch.from_numpy(stats.firing_rate), (f > 0).double().mean(0))
    assert stats.n_tokens == len(f)
    assert stats.corpus_hash == packed.corpus.hash
    assert "position 0" in stats.sink_filter
    assert "10 × median" in stats.sink_filter
    assert sum(calls) == 2 * len(packed)


def test_unfit_dictionary_says_so(tiny_llama: LanguageModel):
    with pytest.raises(ValueError, match="tiny-llama has width 32"):
        evaluate_core(tiny_llama, Relu(8), packed_texts(tiny_llama), OPTIONS)


def save_tiny(model: LanguageModel, folder: Path) -> tuple[str, str]:
    """A model and an SAE on disk."""
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.randn(64, 32, generator=draw)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    save_dictionary(
        Standard(
            W_enc=W_dec.T.clone(),
            b_enc=torch.zeros(64),
            W_dec=W_dec,
            b_dec=torch.zeros(32),
            info=DictionaryInfo(architecture="standard", site=SITE),
        ),
        folder / "sae",
    )
    return str(folder / "model"), str(folder / "sae")


def test_statistics_are_those_of_the_rows_that_core_metrics_are_of(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, sae = save_tiny(tiny_llama, tmp_path)
    options = {"model": model, "sae": sae, "context": 64, "batch_size": 16, "limit_tokens": 3_000}
    result = run_core(CoreConfig(**options, n_resamples=100))
    assert result.tokens > 2_000
    assert result.sae == sae
    monkeypatch.delattr("trimtab.evaluation.core.splice_losses")  # what takes most of the time is not needed
    found = measure_stats(SAEStatsConfig(**options))
    stats = load_dictionary(sae).feature_stats
    assert stats is not None
    assert (stats.n_tokens, stats.corpus_hash) == (result.tokens, result.corpus_hash)
    assert found.firing.l0 == pytest.approx(result["l0"].estimate)
    assert found.path == str(tmp_path / "sae" / "feature_stats.parquet")
    assert measure_stats(SAEStatsConfig(**options, into=tmp_path / "stats")).path.startswith(str(tmp_path / "stats"))
    with pytest.raises(UserError, match=r"^sae 'default': it is no directory to write statistics to; name a directory"):
        measure_stats(SAEStatsConfig(sae="default"))


def test_the_result_names_the_dictionary_as_it_was_loaded_or_as_the_user_calls_it(
    tiny_llama: LanguageModel, tmp_path: Path
):
    _, sae = save_tiny(tiny_llama, tmp_path)
    loaded, packed = load_dictionary(sae), packed_texts(tiny_llama)
    assert evaluate_core(tiny_llama, loaded, packed, OPTIONS)[0].sae == sae
    loaded.name = "mine"
    result, _ = evaluate_core(tiny_llama, loaded, packed, OPTIONS)
    assert (result.sae, result.architecture) == ("mine", "standard")
    assert result.render().startswith("mine (standard, 64 features) at ")
    built = Relu(32)
    assert evaluate_core(tiny_llama, built, packed, OPTIONS)[0].sae == f"unnamed dictionary {built.fingerprint}"


def test_sample_text_is_small_and_licensed():
    folder = Path(sample_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 200_000
    notice = (folder / "NOTICE").read_text()
    documents = list(read_documents([folder]))
    assert len(documents) >= 50
    for file in folder.glob("*.jsonl"):
        assert file.name in notice


def test_split_takes_the_documents_that_training_left_out(tiny_llama: LanguageModel):
    documents = [Document(f"d{i}", "the cat and the dog " * 4, "test") for i in range(40)]
    corpus = tokenise(documents, tiny_llama.tokenizer)
    chosen = {split: set(pack(corpus, split, 0.3, 16, tiny_llama).documents) for split in ("all", "holdout", "train")}
    assert chosen["holdout"] | chosen["train"] == chosen["all"] == set(range(40))
    assert not chosen["holdout"] & chosen["train"]
    trained = pack_splits(corpus, HarvestOptions(holdout=0.3, context=16))
    assert chosen["holdout"] == set(trained["holdout"].documents)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"context": 1}, {"holdout": 5.0}, {"n_resamples": 0}])
def test_impossible_options_say_so(change: dict):
    with pytest.raises(UserError, match=next(iter(change))):
        CoreConfig(**change)
