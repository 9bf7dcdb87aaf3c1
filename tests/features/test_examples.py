"""Examples against a slow reference that keeps everything; from a harvest, resumed, and in any division."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from slow_examples import Chosen, all_examples

import trimtab
from trimtab.activations import Document, HarvestOptions, harvest, tokenise
from trimtab.activations.shards import read_index
from trimtab.dictionaries import DictionaryInfo, Standard, load_dictionary, save_dictionary
from trimtab.dictionaries import example_collector as collector_module
from trimtab.dictionaries.example_collector import ExampleCollector, Places
from trimtab.dictionaries.feature_examples import KINDS, LEFT_OUT, FeatureExamples
from trimtab.dictionaries.sparse import list_codes, pairs_of
from trimtab.errors import UserError
from trimtab.features import (
    ExampleOptions,
    ExamplesConfig,
    collecting,
    example_rows,
    examples,
    examples_of_harvest,
    run_examples,
)
from trimtab.lm import LanguageModel

OPTIONS = ExampleOptions(top=3, weighted=2, random=2, window=6, seed=3, context=16, batch_size=4)
SHARD_ROWS = 50
"""Fewer than a batch, so that stretches go on in the next shard."""


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_llama: LanguageModel, documents: list[Document]) -> Path:
    directory = tmp_path_factory.mktemp("harvest")
    options = HarvestOptions(context=16, batch_size=4, shard_rows=SHARD_ROWS, holdout=0, seed=3)
    harvest(tiny_llama, ["resid_post.1"], documents, directory, options)
    return directory


def stored(directory: Path) -> dict[str, Any]:
    """All rows of a harvest, as its shards hold them."""
    shards = read_index(directory).shards
    x = torch.cat([load_file(directory / shard.sites["resid_post.1"].name)["rows"] for shard in shards]).float()
    origin = pa.concat_tables([pq.read_table(directory / shard.origin.name) for shard in shards])
    return {"x": x, **{name: origin[name].to_numpy() for name in origin.column_names}}


@pytest.fixture(scope="module")
def wanted(harvested: Path, sae: Standard) -> dict[tuple[int, str], list[Chosen]]:
    """What the slow way keeps."""
    return all_examples(stored(harvested), sae, OPTIONS.counts, OPTIONS.window, OPTIONS.seed)


def check(found: FeatureExamples, wanted: Any, sae: Standard, model: LanguageModel) -> None:
    """Every window is the reference's: places, texts and activations."""
    for feature in range(sae.n_features):
        windows = found[feature].windows
        for kind in KINDS:
            mine = [window for window in windows if window.kind == kind]
            theirs = wanted[feature, kind]
            assert [w.position for w in mine] == [one.position for one in theirs], (feature, kind)
            for window, one in zip(mine, theirs, strict=True):
                assert window.document == f"doc-{one.document}"
                texts = [LEFT_OUT if t is None else model.decode_ids([t], special=True) for t in one.tokens]
                known = [i for i, t in enumerate(one.tokens) if t is not None]
                inside = slice(known[0], known[-1] + 1)
                assert list(window.tokens) == texts[inside]
                assert list(window.activations) == pytest.approx(one.activations[inside], rel=1e-4)
                assert window.activation == window.activations[window.place]


def from_harvest(directory: Path, sae: Standard, model: LanguageModel) -> FeatureExamples:
    (found,) = examples_of_harvest([directory], [sae], OPTIONS, tokenizer=model.tokenizer)
    return found.examples


def test_windows_are_those_that_the_slow_way_keeps(
    harvested: Path, wanted: Any, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    check(examples(tiny_llama, sae, documents, **vars(OPTIONS)), wanted, sae, tiny_llama)
    check(from_harvest(harvested, sae, tiny_llama), wanted, sae, tiny_llama)


def test_a_harvest_without_the_model_gives_the_same_and_statistics(
    harvested: Path, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    corpus = tokenise(documents, tiny_llama.tokenizer)
    (text,) = collecting.examples_of_text(tiny_llama, [sae], corpus, OPTIONS)
    (shards,) = examples_of_harvest([harvested], [sae], OPTIONS, tokenizer=tiny_llama.tokenizer)
    for name in ("feature", "kind", "position", "place", "tokens"):
        np.testing.assert_array_equal(getattr(text.examples, name), getattr(shards.examples, name))
    np.testing.assert_allclose(text.examples.activations, shards.examples.activations, rtol=1e-5)
    f = sae.encode(stored(harvested)["x"]) * sae.W_dec.norm(dim=1)
    for found in (text, shards):
        assert found.examples.n_tokens == found.stats.n_tokens == len(f)
        np.testing.assert_allclose(found.stats.firing_rate, (f > 0).double().mean(0))
        np.testing.assert_allclose(found.stats.max_activation, f.amax(0), rtol=1e-5)
        top = found.examples.activations[np.arange(len(found.examples.kind)), found.examples.place]
        first = np.unique(found.examples.feature, return_index=True)[1]
        np.testing.assert_allclose(top[first], found.stats.max_activation[found.examples.live], rtol=1e-5)
    assert text.stats.sink_filter == "position 0 of each 16-token sequence; norm > 10 × median; special tokens"


def norm_of(row: torch.Tensor) -> float:
    return math.sqrt(sum(value * value for value in row.tolist()) / len(row))


def deviation_of(row: torch.Tensor) -> float:
    mean = sum(row.tolist()) / len(row)
    return math.sqrt(sum((value - mean) ** 2 for value in row.tolist()) / (len(row) - 1))


@pytest.mark.parametrize(("kind", "unit_of"), [("constant_norm_rescale", norm_of), ("layer_norm", deviation_of)])
class TestScaledByToken:
    """An SAE that scales each activation by its own norm: what is kept of it is in the model's units."""

    @staticmethod
    def scaled(kind: Any, sae: Standard, model: LanguageModel) -> Standard:
        info = DictionaryInfo(architecture="standard", model=model.name, site="resid_post.1")
        bias, zero = torch.full_like(sae.b_enc, -1.5), torch.zeros_like(sae.b_dec)
        return Standard(sae.W_enc, bias, sae.W_dec, zero, normalize_activations=kind, info=info)

    def test_windows_and_statistics_are_in_model_units(
        self, kind: Any, unit_of: Any, harvested: Path, tiny_llama: LanguageModel, sae: Standard, documents: Any
    ) -> None:
        own, rows = self.scaled(kind, sae, tiny_llama), stored(harvested)
        unit = torch.tensor([[unit_of(row)] for row in rows["x"]])
        wanted = all_examples(rows, own, OPTIONS.counts, OPTIONS.window, OPTIONS.seed, unit)
        (shards,) = examples_of_harvest([harvested], [own], OPTIONS, tokenizer=tiny_llama.tokenizer)
        check(shards.examples, wanted, own, tiny_llama)
        corpus = tokenise(documents, tiny_llama.tokenizer)
        (text,) = collecting.examples_of_text(tiny_llama, [own], corpus, OPTIONS)
        f = own.encode(rows["x"]) * unit * own.W_dec.norm(dim=1)
        for found in (shards.stats, text.stats):
            np.testing.assert_allclose(found.max_activation, f.amax(0), rtol=1e-4)
            mean = f.sum(0) / (f > 0).sum(0).clamp_min(1)
            np.testing.assert_allclose(found.mean_activation, mean, rtol=1e-4)

    def test_mutation_codes_are_taken_as_they_are(
        self, kind: Any, unit_of: Any, harvested: Path, tiny_llama: LanguageModel, sae: Standard, monkeypatch: Any
    ) -> None:
        own, rows = self.scaled(kind, sae, tiny_llama), stored(harvested)
        unit = torch.tensor([[unit_of(row)] for row in rows["x"]])
        wanted = all_examples(rows, own, OPTIONS.counts, OPTIONS.window, OPTIONS.seed, unit)
        monkeypatch.setattr(Standard, "code_unit", lambda self, x: 1.0)
        with pytest.raises(AssertionError):
            check(from_harvest(harvested, own, tiny_llama), wanted, own, tiny_llama)


def test_two_harvests_are_read_as_one_after_the_other(
    harvested: Path, tiny_llama: LanguageModel, sae: Standard
) -> None:
    (found,) = examples_of_harvest([harvested, harvested], [sae], OPTIONS, tokenizer=tiny_llama.tokenizer)
    alone = from_harvest(harvested, sae, tiny_llama)
    assert found.examples.n_tokens == 2 * alone.n_tokens
    feature = int(alone.live[0])
    best, again = found.examples[feature].windows[:2]
    assert best.activation == again.activation == alone[feature].windows[0].activation


def test_one_pass_serves_saes_of_several_sites(
    tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    from tiny_dictionary import make_dictionary

    other = make_dictionary(tiny_llama, "resid_post.2", 20)
    both = examples(tiny_llama, [sae, other], documents, **vars(OPTIONS))
    for one, dictionary in zip(both, (sae, other), strict=True):
        alone = examples(tiny_llama, dictionary, documents, **vars(OPTIONS))
        assert one.site == dictionary.info.site
        assert one.to_table().equals(alone.to_table())


def rows_of_codes(seed: int = 0, stretches: int = 40) -> tuple[torch.Tensor, Places]:
    """Codes of five features, with equal ones, in stretches of 1 to 9 rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 10, stretches)
    f = torch.from_numpy(rng.integers(-4, 5, (int(lengths.sum()), 5))).float().relu()
    document = np.repeat(np.arange(stretches), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    token = np.arange(len(document))
    return f, Places(token, document, position, position + 1)


def collected(parts: list[int], sparse: bool, back: bool = False, **options: Any) -> FeatureExamples:
    """Read in parts that end before some documents; the last part first, if `back`."""
    f, places = rows_of_codes()
    collector = ExampleCollector(torch.ones(5), (4, 4, 4), 5, **{"seed": 1, **options})
    ends = np.searchsorted(places.document, [*parts, 10**6])
    for first, last in list(zip([0, *ends[:-1]], ends, strict=True))[:: -1 if back else 1]:
        rows = f[first:last]
        part = Places(*(column[first:last] for column in places))
        collector.update(pairs_of(list_codes(rows) if sparse else rows), part)
    return collector.result([f"d{i}" for i in range(40)], lambda ids: [str(i) for i in ids], n_tokens=len(f))


def test_neither_the_division_nor_the_form_of_codes_matters() -> None:
    whole = collected([], sparse=False)
    for parts in ([20], [1, 2, 3], list(range(40)), [5, 5]):
        for sparse, back in itertools.product((False, True), repeat=2):
            assert collected(parts, sparse, back).to_table().equals(whole.to_table())


def test_another_seed_draws_others_but_keeps_the_top() -> None:
    one, other = collected([], False, seed=1), collected([], False, seed=2)
    for kind, same in (("top", True), ("weighted", False), ("random", False)):
        places = [
            [(w.document, w.position) for feature in range(5) for w in found[feature].windows if w.kind == kind]
            for found in (one, other)
        ]
        assert (places[0] == places[1]) == same, kind


@pytest.mark.parametrize(("kind", "shares"), [("weighted", (0.1, 0.2, 0.7)), ("random", (1 / 3, 1 / 3, 1 / 3))])
def test_draws_are_in_proportion(kind: str, shares: tuple[float, ...]) -> None:
    """One window of three, a thousand times: within five standard deviations."""
    f = torch.tensor([[1.0], [2.0], [7.0]])
    places = Places(np.arange(3), np.arange(3), np.zeros(3, int), np.ones(3, int))
    counts = np.zeros(3)
    for seed in range(1000):
        collector = ExampleCollector(torch.ones(1), tuple(int(name == kind) for name in KINDS), 3, seed)
        collector.update(pairs_of(f), places)
        counts[collector.kept[kind]["document"][0, 0]] += 1
    expected = np.array(shares) * 1000
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_what_is_kept_does_not_grow_with_the_text() -> None:
    sizes = []
    for seed in (1, 8):
        collector = ExampleCollector(torch.ones(5), (4, 4, 4), 5, 0)
        for number in range(seed):
            f, places = rows_of_codes(number)
            collector.update(pairs_of(f), places)
        sizes.append(sum(tensor.nbytes for tensor in collector.state().values()))
    assert sizes[0] == sizes[1] == 5 * 12 * (8 + 4 + 4 + 5 * 8)


def test_a_pass_that_was_cut_off_goes_on_to_the_same_bytes(
    harvested: Path,
    tmp_path: Path,
    tiny_llama: LanguageModel,
    sae: Standard,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = tokenise(documents, tiny_llama.tokenizer)
    monkeypatch.setattr(collecting, "CHECKPOINT_SECONDS", 0.0)

    def passes(checkpoints: Path | None) -> list[collecting.Found]:
        return [
            *collecting.examples_of_text(tiny_llama, [sae], corpus, OPTIONS, checkpoints and checkpoints / "text"),
            *examples_of_harvest(
                [harvested], [sae], OPTIONS, checkpoints and checkpoints / "rows", tokenizer=tiny_llama.tokenizer
            ),
        ]

    whole = passes(None)
    real, left = collecting._Kept.take, 0

    def take(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(collecting._Kept, "take", take)
    for steps in (4, 3, 9, 5):
        left = steps
        with pytest.raises(KeyboardInterrupt):
            passes(tmp_path)
    left = 0
    for again, before in zip(passes(tmp_path), whole, strict=True):
        assert again.examples.to_table().equals(before.examples.to_table())
        assert again.stats.to_table().equals(before.stats.to_table())


@pytest.fixture
def saved(tmp_path: Path, sae: Standard, documents: list[Document], tiny_llama: LanguageModel) -> Path:
    save_dictionary(sae, tmp_path / "sae")
    loaded = load_dictionary(tmp_path / "sae")
    examples(tiny_llama, loaded, documents, **vars(OPTIONS)).write(tmp_path / "sae" / "feature_examples.parquet")
    return tmp_path / "sae"


def test_the_table_comes_back_and_reads_by_itself(
    saved: Path, sae: Standard, tiny_llama: LanguageModel, documents: list[Document]
) -> None:
    whole = examples(tiny_llama, sae, documents, **vars(OPTIONS))
    loaded = load_dictionary(saved).feature_examples
    assert loaded is not None
    for feature in range(sae.n_features):
        assert loaded[feature].windows == whole[feature].windows
        assert loaded.fires_on(feature, 3) == whole.fires_on(feature, 3)
    assert loaded.to_table().to_pydict() == whole.to_table().to_pydict()
    frame = whole.to_frame()
    assert set(frame.columns) == {
        "feature", "window", "activation", "document", "position", "place", "tokens", "activations",
    }  # fmt: skip
    row = frame.iloc[0]
    assert row.activations[row.place] == row.activation
    assert repr(whole).startswith(f"<FeatureExamples: {len(frame):,} windows of ")
    feature = int(whole.live[0])
    assert whole[feature].to_frame().activation.tolist() == [w.activation for w in whole[feature].windows]
    assert (whole.live % 7 != 0).all()
    assert whole[7].headline() == f"feature 7 never fired on {whole.n_tokens:,} tokens"


def test_examples_that_are_not_this_dictionarys_are_refused(
    saved: Path, tiny_llama: LanguageModel, sae: Standard
) -> None:
    other = Standard(sae.W_enc * 2, sae.b_enc, sae.W_dec, sae.b_dec, info=sae.info)
    other.examples_file = saved / "feature_examples.parquet"
    with pytest.raises(UserError, match="it holds examples of another SAE; make examples of this SAE"):
        _ = other.feature_examples
    with pytest.raises(UserError, match="it describes 48 features, not 5"):
        FeatureExamples.read(saved / "feature_examples.parquet", n_features=5)
    save_dictionary(other, saved)
    assert load_dictionary(saved).feature_examples is None


def test_bad_tables_are_named(saved: Path) -> None:
    path = saved / "feature_examples.parquet"
    table = pq.read_table(path)
    bad = table.column("activations").to_pylist()
    bad[0][0] = float("nan")
    place = table.column_names.index("activations")
    cases = {
        "format 99": table.replace_schema_metadata({"trimtab.feature_examples": '{"format": 99}'}),
        "not readable as examples of features": pa.table({"x": [1]}),
        "tokens": table.drop_columns(["tokens"]),
        "column activations of": table.set_column(place, "activations", pa.array(bad, pa.list_(pa.float32()))),
    }
    for message, wrong in cases.items():
        pq.write_table(wrong, path)
        with pytest.raises(UserError, match=message):
            FeatureExamples.read(path)
    path.unlink()
    with pytest.raises(UserError, match="no such file; make the examples again"):
        FeatureExamples.read(path)


Call = Callable[[LanguageModel, Standard, list[Document]], Any]
MISTAKES: dict[str, tuple[Call, str]] = {
    "a window as long as a sequence": (
        lambda m, s, d: examples(m, s, d, window=16, context=16),
        "window 16: a sequence has 15 tokens of text; give a smaller window or a larger context",
    ),
    "a text shorter than a window": (
        lambda m, s, d: examples(m, s, ["an inn"]),
        r"text of \d+ tokens: it does not fill a window of 32; give more text or a smaller window",
    ),
    "a text shorter than a sequence": (
        lambda m, s, d: examples(m, s, ["an inn " * 20]), "it does not fill one sequence of 256",
    ),
    "no text": (lambda m, s, d: examples(m, s, []), "there is no text in it"),
    "no windows": (lambda m, s, d: examples(m, s, d, top=0, weighted=0, random=0), "there are none of any kind"),
    "an option of none": (lambda m, s, d: examples(m, s, d, count=3), r"examples\(count=…\): it has no such argument"),
    "an SAE by its name": (lambda m, s, d: examples(m, "default", d), "it is a name, not a loaded one"),  # type: ignore[call-overload]
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_is_refused(
    name: str, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        call(tiny_llama, sae, documents)


def test_an_sae_of_another_model_is_refused(
    harvested: Path, tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    with pytest.raises(UserError, match="dictionary trained on tiny-llama: the model is tiny-gpt2"):
        examples(tiny_gpt2, sae, documents, **vars(OPTIONS))
    from tiny_dictionary import make_dictionary

    foreign = make_dictionary(tiny_gpt2)
    with pytest.raises(UserError, match="dictionary trained on tiny-gpt2: the model is tiny-llama"):
        examples_of_harvest([harvested], [foreign], OPTIONS, tokenizer=tiny_llama.tokenizer)
    with pytest.raises(UserError, match=r"site resid_post\.2: the harvest in .* has resid_post\.1"):
        examples_of_harvest([harvested], [make_dictionary(tiny_llama, "resid_post.2")], OPTIONS)


def test_activations_that_are_not_numbers_are_refused(
    harvested: Path, tmp_path: Path, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    weight = tiny_llama.hf.get_input_embeddings().weight
    token = tiny_llama.tokenizer.convert_tokens_to_ids("z")
    text = [*documents[:20], Document("with z", "a zebra in the harbour", "test")]
    original = weight[token].clone()
    try:
        weight[token] = float("nan")
        with pytest.raises(
            UserError, match=r"activations at resid_pre\.0 of token 1 .'z'.: the first that are not finite"
        ):
            examples(tiny_llama, sae, text, **vars(OPTIONS))
    finally:
        weight[token] = original


def test_a_harvest_that_has_not_finished_is_refused(
    tmp_path: Path, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    def stop(state: Any) -> None:
        raise KeyboardInterrupt

    options = HarvestOptions(context=16, holdout=0, shard_rows=64)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, options, stop)
    with pytest.raises(UserError, match="it has not finished; run the same harvest again, which goes on"):
        examples_of_harvest([tmp_path], [sae], OPTIONS)


def test_the_command_writes_a_table_that_commands_find(
    tmp_path: Path, tiny_llama: LanguageModel, sae: Standard, documents: list[Document], harvested: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("trimtab.lm.config.load_model", lambda *_, **__: tiny_llama)
    monkeypatch.setattr(collecting, "load_tokenizer", lambda name: tiny_llama.tokenizer)
    place = save_dictionary(sae, tmp_path / "sae")
    (tmp_path / "text.jsonl").write_text(
        "".join(f'{{"id": "{d.id}", "text": "{d.text}"}}\n' for d in documents), encoding="utf-8"
    )
    values = {**vars(OPTIONS), "model": "tiny-llama", "sae": (str(place),)}
    text = ExamplesConfig(text=(str(tmp_path / "text.jsonl"),), run=tmp_path / "text", into=place, **values)
    done = run_examples(text)
    assert done.saes[0].firing.n_tokens > 500
    assert run_examples(text) == done
    assert not (tmp_path / "text" / "checkpoints").exists()
    rows = run_examples(ExamplesConfig(activations=(harvested,), run=tmp_path / "rows", **values))
    tables = [pq.read_table(Path(one.saes[0].path)) for one in (done, rows)]
    assert (
        tables[0]
        .drop_columns("activations")
        .drop_columns("activation")
        .equals(tables[1].drop_columns("activations").drop_columns("activation"))
    )
    found = load_dictionary(place).feature_examples
    assert found is not None
    assert found.to_table().num_rows == done.saes[0].windows
    (ranking,) = [trimtab.rank(tiny_llama, load_dictionary(place), "max-activation")]
    best = int(ranking.feature[0])
    assert ranking.fires_on[0] == found.fires_on(best, len(ranking.fires_on[0]))
    assert "tokens it fires on" in str(ranking.to_frame("largest").columns.tolist())
    with pytest.raises(UserError, match="--text and --activations: rows come from one of them"):
        ExamplesConfig(text=("a",), activations=(harvested,))


def no_norms(patch: pytest.MonkeyPatch) -> None:
    real = ExampleCollector.__init__
    patch.setattr(ExampleCollector, "__init__", lambda self, norms, *rest: real(self, torch.ones_like(norms), *rest))


def stretches_run_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "stretch", property(lambda places: np.zeros(len(places.token), int)))


def weighted_evenly(patch: pytest.MonkeyPatch) -> None:
    real = ExampleCollector._keys
    patch.setattr(
        ExampleCollector, "_keys", lambda self, kind, *rest: real(self, kind.replace("weighted", "random"), *rest)
    )


def order_of_the_shard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(example_rows, "shard_order", lambda seed, split, number, rows: np.arange(rows))


def stretches_end_with_the_shard(patch: pytest.MonkeyPatch) -> None:
    real = example_rows.ShardBlocks.read

    def read(self: Any, first: int) -> Any:
        steps = self.steps
        for step in steps:  # each alone
            self.steps, self.total = [step], 1
            yield from real(self, 0)
        self.steps, self.total = steps, len(steps)

    patch.setattr(example_rows.ShardBlocks, "read", read)


def last_of_a_stretch(patch: pytest.MonkeyPatch) -> None:
    real = ExampleCollector._keys
    patch.setattr(ExampleCollector, "_keys", lambda *given: -real(*given))


MUTATIONS = [
    no_norms, stretches_run_on, weighted_evenly, order_of_the_shard, stretches_end_with_the_shard, last_of_a_stretch,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_seen(
    mutation: Callable[[pytest.MonkeyPatch], None],
    harvested: Path,
    wanted: Any,
    tiny_llama: LanguageModel,
    sae: Standard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(from_harvest(harvested, sae, tiny_llama), wanted, sae, tiny_llama)


def test_a_tie_that_goes_by_the_order_of_reading_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collected([], sparse=False)
    real = np.lexsort
    monkeypatch.setattr(collector_module.np, "lexsort", lambda keys, **how: real(keys[1:] if how else keys, **how))
    assert collected([20], sparse=False, back=True).to_table().to_pydict() != whole.to_table().to_pydict()
