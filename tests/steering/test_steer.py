"""`trimtab steer` as a function: arms, sweeps, runs, replay, rendering, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, capture, decode, site_width
from trimtab.lm.layouts import head_count
from trimtab.runs import read_typed
from trimtab.steering import (
    DirectionTable,
    PatchSource,
    ReplayReport,
    StaticSource,
    SteerConfig,
    SteerResult,
    TopActiveSource,
    Trace,
    TracedSource,
    VectorSource,
    replay,
    replay_trace,
    run_steer,
    steer,
    trace_replay,
)
from trimtab.steering.composed_sources import SomeRowsSource

PROMPTS = ("the sea and the ship", "an inn", "in the end, the trim tab turned the rudder")


@pytest.fixture
def tiny(tiny_llama: LanguageModel) -> tuple[LanguageModel, Standard]:
    return tiny_llama, make_dictionary(tiny_llama)


@pytest.fixture
def on_disk(tiny: tuple[LanguageModel, Standard], tmp_path: Path) -> dict[str, Any]:
    """Config fields that name a model and an SAE on disk."""
    model, sae = tiny
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    sae.info = type(sae.info)(architecture="standard", site="resid_post.1")
    save_dictionary(sae, tmp_path / "sae")
    return {"model": str(tmp_path / "model"), "sae": str(tmp_path / "sae"), "max_new_tokens": 6}


def shown(result: SteerResult | ReplayReport) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    return console.export_text()


def test_arms_are_what_decoding_alone_gives(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    decoding = DecodeConfig(max_new_tokens=8)
    result = steer(model, sae, PROMPTS, [3, 5], 0.6, decoding=decoding)
    ids = [model.encode_text(p) for p in PROMPTS]
    assert [c.text for c in result.unsteered.continuations] == decode(model, ids, decoding).texts
    alone = decode(model, ids, decoding, StaticSource(sae, [3, 5], 0.6))
    assert [c.text for c in result.steered[0].continuations] == alone.texts
    assert result.unsteered.realised.n_edits == 0
    assert result.unsteered.kl_total == 0
    steered = result.steered[0]
    assert steered.realised.n_edits == sum(map(len, alone.token_ids))
    assert steered.kl_local is not None
    assert steered.kl_local > 0.01
    assert steered.kl_total is not None
    assert steered.kl_total > 0.01
    nll = [-p for row in alone.token_logp for p in row]
    assert steered.unsteered_nll is not None
    assert steered.unsteered_nll > sum(nll) / len(nll)


def test_a_sweep_has_one_arm_per_dose(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    decoding = DecodeConfig(max_new_tokens=5, temperature=1.0, stop_at_eos=False)
    result = steer(model, sae, "the sea", 3, sweep=(0.0, 0.2, 0.8), samples=2, decoding=decoding)
    assert [arm.name for arm in result.arms] == ["unsteered", "dose 0", "dose 0.2", "dose 0.8"]
    assert [arm.realised.relative for arm in result.arms] == pytest.approx([0, 0, 0.2, 0.8], abs=1e-4)
    assert result.arms[0].continuations == result.arms[1].continuations  # arms share their draws
    kl = [arm.kl_local for arm in result.arms]
    assert kl[0] == 0
    assert kl[1] == pytest.approx(0, abs=1e-5)
    assert kl[2] < kl[3]  # type: ignore[operator]
    text = shown(result)
    assert "dose 0.8" in text
    assert "KL local" in text


def test_features_may_have_their_own_doses(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    result = steer(model, sae, "the sea", [3, 5], [0.5, -0.5], decoding=DecodeConfig(max_new_tokens=3), kl=False)
    assert result.arms[1].dose == [0.5, -0.5]
    assert result.arms[1].name == "dose 0.5, -0.5"
    assert result.arms[1].kl_total is None


def test_chat_and_token_ids_are_prompts(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    chat = steer(model, sae, "an inn", 3, chat=True, decoding=DecodeConfig(max_new_tokens=3))
    ids = steer(model, sae, [model.encode_text("an inn", chat=True)], 3, decoding=DecodeConfig(max_new_tokens=3))
    assert chat.arms == ids.arms


def test_a_run_is_written_resumed_and_replayed(on_disk: dict[str, Any], tmp_path: Path) -> None:
    config = SteerConfig(
        **on_disk, prompt=PROMPTS, feature=(3,), sweep=(0.3, 0.9), temperature=0.8, seed=2, run=tmp_path / "run"
    )
    result = run_steer(config)
    assert isinstance(result, SteerResult)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert set(record["hashes"]) == {"model", "dictionary"}
    assert record["trace"]["decoding"]["temperature"] == 0.8
    trace = Trace.read(tmp_path / "run")
    assert len(trace.facts["rows"]) == 9
    assert trace.facts["rows"][0]["prompt"]
    kl = [value for row in trace.per_row("kl_local") for value in row]
    assert None not in kl
    before = (tmp_path / "run" / "tokens.parquet").stat().st_mtime_ns
    assert run_steer(config) == result  # done: read back, not decoded again
    assert (tmp_path / "run" / "tokens.parquet").stat().st_mtime_ns == before

    report = run_steer(SteerConfig(replay=tmp_path / "run"))
    assert isinstance(report, ReplayReport)
    assert report.exact
    assert report.n_rows == 9
    assert report.n_edits == sum(arm.realised.n_edits for arm in result.arms)
    assert f"exact: {report.n_tokens} of {report.n_tokens} tokens" in shown(report)
    assert json.dumps(report.to_json())

    with pytest.raises(UserError, match=r"temperature was 0\.8 and is now 0\.5"):
        run_steer(SteerConfig(**{**vars(config), "temperature": 0.5}))


def test_a_run_replays_from_another_directory(
    on_disk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_steer(SteerConfig(**on_disk | {"model": "model", "sae": "sae"}, prompt=PROMPTS, feature=(3,), run=Path("run")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert replay("../run").exact
    monkeypatch.setattr(trace_replay, "path_of_run", lambda record, name: name)  # without which it finds no model
    with pytest.raises(UserError, match="model"):
        replay("../run")


@pytest.mark.parametrize(
    ("given", "named"), [({"prompt": ("Another text",)}, "prompt"), ({"max_new_tokens": 3}, "--max-new-tokens")]
)
def test_a_replay_takes_nothing_but_the_run(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{named} with --replay: a replay takes it from the run; leave it out"):
        run_steer(SteerConfig(replay=tmp_path, **given))


@pytest.mark.parametrize("operation", ["ablate", "clamp", "scale", "overwrite"])
def test_other_operations_replay_too(on_disk: dict[str, Any], tmp_path: Path, operation: str) -> None:
    dose = {} if operation == "ablate" else {"dose": (1.5,)}
    config = SteerConfig(
        **on_disk, **dose, prompt=PROMPTS, feature=(3, 4), unit="max_activation", operation=operation,
        positions="all", run=tmp_path / "run", kl=False,
    )  # fmt: skip
    run_steer(config)
    assert replay(tmp_path / "run").exact


def test_a_replay_needs_the_same_model_and_dictionary(
    on_disk: dict[str, Any], tiny: tuple[LanguageModel, Standard], tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    run_steer(SteerConfig(**on_disk, prompt=("an inn",), feature=(3,), run=tmp_path / "run", kl=False))
    with pytest.raises(UserError, match=r"its hash is .* give the model that the run used"):
        replay(tmp_path / "run", model=tiny_gpt2)
    model, _ = tiny
    with pytest.raises(UserError, match="give the dictionary that the run used"):
        replay(tmp_path / "run", dictionary=make_dictionary(model, n=40))
    with pytest.raises(UserError, match=r"there is no run\.json"):
        run_steer(SteerConfig(replay=tmp_path / "nowhere"))


def test_side_by_side_shows_both_texts(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    result = steer(model, sae, "the sea", 3, 0.9, decoding=DecodeConfig(max_new_tokens=4))
    text = shown(result)
    assert "add feature 3 at resid_post.1 of tiny-llama, unit relative" in text
    assert "unsteered" in text
    assert "dose 0.9" in text
    assert read_typed(SteerResult, json.loads(json.dumps(result.to_json()))) == result


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ()}, "the prompts: there is none"),
    ({"prompt": ("",)}, "the prompt: it is empty"),
    ({"feature": ()}, "the features: there is none to steer with"),
    ({"feature": (48,)}, "feature 48: the dictionary has features 0 to 47; choose one of them"),
    ({"feature": (-1,)}, "feature -1: the dictionary has features 0 to 47"),
    ({"dose": (math.nan,)}, "dose nan: a dose is a finite number"),
    ({"operation": "ablate", "dose": (0.7,)}, "a dose: operation ablate has no dose; leave it out"),
    ({"operation": "no_such_module:op"}, "no_such_module cannot be imported"),
    ({"operation": "math:floor"}, "operation 'floor': allowed are add, "),
    ({"sweep": (0.1, math.inf)}, "dose inf: a dose is a finite number"),
    ({"dose": (0.1, 0.2, 0.3)}, "3 doses: there are 1 features"),
    ({"unit": "percent"}, "unit 'percent'"),
    ({"operation": "remove"}, "operation 'remove'"),
    ({"positions": "5:1"}, "positions '5:1': allowed are generated, prompt, all or START:STOP"),
    ({"site": "resid_post.9"}, "site resid_post.9: tiny-llama has layers 0 to 3"),
    ({"site": "resid_post"}, "site 'resid_post'"),
    ({"site": "resid_post.2"}, "site resid_post.2: the dictionary reads resid_post.1"),
    ({"samples": 3}, "greedy decoding gives the same text every time"),
    ({"samples": 0, "temperature": 1.0}, "samples 0"),
    ({"temperature": math.nan}, "temperature nan"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"max_new_tokens": 1000}, "together 1001 tokens, but tiny-llama holds 256"),
    ({"operation": "ablate", "sweep": (1.0,)}, "operation ablate has no dose"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_input_says_what_is_wrong(
    fields: dict[str, Any], message: str, tiny: tuple[LanguageModel, Standard]
) -> None:
    model, sae = tiny
    given = {"prompt": ("in",), "feature": (3,), **fields}
    chosen = {name: given.pop(name) for name in vars(DecodeConfig()).keys() & given.keys()}
    with pytest.raises(UserError) as caught:
        steer(model, sae, given.pop("prompt"), given.pop("feature"), decoding=DecodeConfig(**chosen), **given)
    assert message in caught.value.line


@pytest.mark.parametrize("fields", [{"feature": (99,)}, {"max_new_tokens": 1000}, {"prompt": ("",)}, {"unit": "x"}])
def test_a_mistake_leaves_no_run_behind(on_disk: dict[str, Any], tmp_path: Path, fields: dict[str, Any]) -> None:
    config = {**on_disk, "prompt": ("in",), "feature": (3,), "run": str(tmp_path / "run"), **fields}
    with pytest.raises(UserError):
        run_steer(SteerConfig(**config))
    assert not (tmp_path / "run").exists()


def test_a_dictionary_of_another_width_or_model_is_refused(
    tiny: tuple[LanguageModel, Standard], on_disk: dict[str, Any], tiny_gemma3: LanguageModel, tmp_path: Path
) -> None:
    model, _ = tiny
    wide = make_dictionary(tiny_gemma3, "attn_z.1.0")  # one head, 16 wide
    wide.info = type(wide.info)(architecture="standard")
    with pytest.raises(UserError, match="dictionary of width 16: tiny-llama has width 32"):
        steer(model, wide, "in", 3, site="resid_post.1")
    foreign = make_dictionary(tiny_gemma3)
    save_dictionary(foreign, tmp_path / "foreign")
    with pytest.raises(UserError, match="tiny-gemma3"):
        run_steer(SteerConfig(**{**on_disk, "sae": str(tmp_path / "foreign")}, prompt=("in",), feature=(3,)))


def test_a_vector_of_any_shape_steers_at_any_site(any_tiny: LanguageModel) -> None:
    """Against decoding with the same vectors as rows, which the tests of sources hold against hooks."""
    generator = torch.Generator().manual_seed(0)
    ids, decoding = [any_tiny.encode_text(p) for p in PROMPTS], DecodeConfig(max_new_tokens=6)
    layer = any_tiny.layout.layers[2]
    heads = head_count(layer, any_tiny.site("attn_z.2"))
    width = site_width(any_tiny, any_tiny.site("attn_z.2"))
    for site, shape, rows in (
        ("resid_post.1", (32,), 1),
        ("mlp_out.1", (1, 1, 32), 1),
        ("resid_mid.1", (2, 32), 2),
        ("attn_z.2", (heads, width // heads), 1),
        ("attn_z.2", (width,), 1),
        ("attn_v.2.0", (width // heads,), 1),
    ):
        vector = torch.randn(shape, generator=generator)
        source = StaticSource(DirectionTable(vector.reshape(rows, -1)), range(rows), 0.9, site)
        for given in (vector, vector.numpy(), vector.tolist()):
            result = steer(any_tiny, given, PROMPTS, site=site, dose=0.9, decoding=decoding, kl=False)
            assert [c.text for c in result.unsteered.continuations] == decode(any_tiny, ids, decoding).texts
            assert [c.text for c in result.steered[0].continuations] == decode(any_tiny, ids, decoding, source).texts
            assert result.steered[0].realised.n_edits
    assert "add a vector at attn_v.2.0" in shown(result)


def test_a_vector_may_keep_its_length_or_be_swept(tiny_llama: LanguageModel) -> None:
    vector = torch.full((32,), 0.5)
    decoding = DecodeConfig(max_new_tokens=3)
    kept = steer(tiny_llama, vector, "the sea", site="resid_post.1", keep_length=True, decoding=decoding)
    assert kept.steered[0].realised.absolute == pytest.approx(float(vector.norm()), rel=1e-5)
    swept = steer(tiny_llama, {"resid_post.1": vector, "resid_post.2": vector.tolist()}, "the sea", sweep=(0.1, 0.3))
    assert [arm.realised.relative for arm in swept.arms] == pytest.approx([0, 0.1, 0.3], abs=1e-4)
    assert swept.site == "resid_post.1, resid_post.2"
    assert "add 2 vectors" in shown(swept)


def test_any_source_steers_its_own_rows_alone(tiny: tuple[LanguageModel, Standard]) -> None:
    """Per-row features, a draw, and a patch of values for each row, each against decoding with the source alone."""
    model, sae = tiny
    ids, decoding = [model.encode_text(p) for p in PROMPTS], DecodeConfig(max_new_tokens=6)
    batch = TokenBatch.pad([model.encode_text(p[::-1]) for p in PROMPTS], model.pad_id, model.device)
    values = capture(model, batch, ["resid_post.2"])

    def sources() -> list[Any]:
        return [
            StaticSource(sae, torch.tensor([[3], [5], [8]]), 0.7),
            TopActiveSource(sae, 0.7, over="context"),
            PatchSource(values, positions=[1], lengths=batch.lengths, keep_replacements=True),  # type: ignore[arg-type]
        ]

    for source, same in zip(sources(), sources(), strict=True):
        result = steer(model, source, PROMPTS, decoding=decoding)
        alone = decode(model, ids, decoding, same)
        assert [c.text for c in result.unsteered.continuations] == decode(model, ids, decoding).texts
        assert [c.text for c in result.steered[0].continuations] == alone.texts
        assert result.steered[0].realised.n_edits == int((alone.edits.feature >= 0).any(dim=1).sum())
        assert result.unsteered.kl_total == pytest.approx(0, abs=1e-5)
        assert (result.steered[0].kl_total or 0) > 0.01
        assert type(source).__name__ in shown(result)


def test_the_trace_of_a_result_replays(tiny_llama: LanguageModel) -> None:
    model = tiny_llama
    vector = torch.ones(32)
    result = steer(model, vector, PROMPTS, site="resid_post.1", dose=0.6, decoding=DecodeConfig(max_new_tokens=5))
    assert result.trace is not None
    assert result.trace.edits.num_rows == result.steered[0].realised.n_edits
    source = TracedSource(result.trace, [DirectionTable(vector[None])])
    assert replay_trace(model, result.trace, source).exact
    assert "trace" not in result.to_json()


BAD_DIRECTIONS: list[tuple[Any, dict[str, Any], str]] = [
    (torch.ones(31), {"site": "resid_post.1"}, "a vector of shape 31: site resid_post.1 has width 32; give [width]"),
    (torch.ones(32, 3), {"site": "resid_post.1"}, "a vector of shape 32×3: site resid_post.1 has width 32"),
    (torch.ones(2, 16), {"site": "attn_z.1"}, "values of attn_z.1 for 2 heads of 16: tiny-llama has 4 heads of 8"),
    (torch.ones(32), {}, r"the site: the directions do not name the one they are for; give a site (--site"),
    (torch.zeros(32), {"site": "resid_post.1"}, "a steering vector: it is zero"),
    ([math.nan] * 32, {"site": "resid_post.1"}, "directions: some values are not finite"),
    (torch.ones(32), {"site": "resid_post.9"}, "site resid_post.9: tiny-llama has layers 0 to 3"),
    (torch.ones(2, 32), {"site": "resid_post.1", "dose": [1, 2, 3]}, "3 doses: there are 2 features"),
    (torch.ones(32), {"site": "resid_post.1", "keep_length": True, "unit": "relative"}, "keep their own length"),
    (VectorSource(torch.ones(32), "resid_post.1"), {"site": "resid_post.1"}, "site beside VectorSource: the source"),
    (VectorSource(torch.ones(32), "resid_post.1"), {"dose": 0.3}, "dose beside VectorSource: the source decides"),
]


@pytest.mark.parametrize(("directions", "options", "message"), BAD_DIRECTIONS)
def test_directions_that_do_not_fit_are_refused(
    tiny_llama: LanguageModel, directions: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        steer(tiny_llama, directions, "in", **options)
    assert message in caught.value.line


def test_rows_of_another_arm_would_be_seen(
    tiny: tuple[LanguageModel, Standard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: the source takes rows by their place among all rows."""
    monkeypatch.setattr(
        SomeRowsSource, "start", lambda self, start: self.source.start(start) or setattr(self, "_index", start.row)
    )
    with pytest.raises((AssertionError, UserError)):
        test_any_source_steers_its_own_rows_alone(tiny)


def test_a_result_is_frames_and_a_figure(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    decoding = DecodeConfig(max_new_tokens=5, temperature=1.0)
    result = steer(model, sae, PROMPTS[:2], 3, sweep=(0.3, 0.9), samples=2, decoding=decoding)
    texts, doses = result.to_frame(), result.to_frame("doses")
    arms = [arm.name for arm in result.arms]
    for arm in result.arms:
        mine = texts[texts.arm == arm.name]
        assert mine.text.tolist() == [one.text for one in arm.continuations]
        assert mine.prompt.tolist() == [PROMPTS[one.prompt] for one in arm.continuations]
    assert doses.name.tolist() == arms
    assert doses.realised_relative.tolist() == [arm.realised.relative for arm in result.arms]
    assert result.trace is not None
    tokens, edits = result.trace.to_frame(), result.trace.to_frame("edits")
    assert len(edits) == sum(arm.realised.n_edits for arm in result.arms)
    lines = result.plot(Figure().add_subplot()).lines
    assert [line.get_label() for line in lines] == arms[1:]
    first = tokens.groupby(["sample", "branch"]).kl_total.first().groupby("branch").mean()
    assert [line.get_ydata()[0] for line in lines] == pytest.approx(first.tolist()[1:])  # type: ignore[index]
    shown = result._repr_html_()
    assert shown.count("<tr>") == 1 + len(texts) + 1 + len(arms)
    assert (
        repr(result) == "<SteerResult: add feature 3 at resid_post.1 of tiny-llama, unit relative, positions generated>"
    )


def test_what_has_no_divergences_is_not_drawn(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    result = steer(model, sae, "in", 3, decoding=DecodeConfig(max_new_tokens=2), kl=False)
    with pytest.raises(UserError, match="a plot of steering: its KL was not measured; steer with kl=True"):
        result.plot()
