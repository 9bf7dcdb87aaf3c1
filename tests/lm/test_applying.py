"""Edits in the model's own calls equal those of `decode`, or are refused where they could not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.errors import UserError
from trimtab.lm import AppliedEdits, DecodeConfig, LanguageModel, applied, decode
from trimtab.steering import CombinedSource, DirectionTable, RandomFeatureSource, StaticSource, VectorSource

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
PROMPTS = ["the sea and the ship", "an inn", "in the end, the trim tab turned the rudder"]
SITE = "resid_post.1"


def vector(model: LanguageModel) -> torch.Tensor:
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))


def padded(model: LanguageModel, side: str = "left") -> dict[str, torch.Tensor]:
    ids = [model.encode_text(text) for text in PROMPTS]
    longest = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        pad, real = [model.pad_id] * (longest - len(row)), [1] * len(row)
        rows.append([*pad, *row] if side == "left" else [*row, *pad])
        masks.append([*[0] * len(pad), *real] if side == "left" else [*real, *[0] * len(pad)])
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


@pytest.mark.parametrize("positions", ["generated", "prompt", "all", "1:9", [0, 2, -1]])
def test_generate_gives_what_decode_gives(any_tiny: LanguageModel, positions: Any) -> None:
    def source() -> CombinedSource:
        options: dict[str, Any] = {"positions": positions}
        return CombinedSource([
            VectorSource(vector(any_tiny), SITE, 0.6, **options),
            VectorSource(vector(any_tiny), "attn_out.2", 0.9, operation="clamp", **options),
        ])  # fmt: skip

    ids = [any_tiny.encode_text(text) for text in PROMPTS]
    config = DecodeConfig(max_new_tokens=8, stop_at_eos=False)
    expected = decode(any_tiny, ids, config, source())
    plain = decode(any_tiny, ids, config)
    given = padded(any_tiny)
    with applied(any_tiny, source()) as calls:
        found = any_tiny.hf.generate(**given, **GREEDY)
    width = given["input_ids"].shape[1]
    assert found[:, width:].tolist() == expected.token_ids
    assert expected.token_ids != plain.token_ids
    for name in ("row", "position", "site", "feature"):
        assert torch.equal(calls.edits.columns[name], expected.edits.columns[name])
    assert torch.allclose(calls.edits.delta_norm, expected.edits.delta_norm, rtol=1e-4)
    assert any_tiny.hf.generate(**given, **GREEDY)[:, width:].tolist() == plain.token_ids  # nothing is left behind


def test_a_plain_forward_is_a_prompt(tiny_llama: LanguageModel) -> None:
    """Against a hook of PyTorch's own, which adds the vector at the last token of each row."""
    given, v = padded(tiny_llama, "right"), 3 * vector(tiny_llama)
    last = given["attention_mask"].sum(dim=1) - 1

    def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[torch.arange(len(last)), last] += v
        return output

    handle = tiny_llama.hf.model.layers[1].register_forward_hook(add)
    expected = tiny_llama.hf(**given).logits
    handle.remove()
    with applied(tiny_llama, VectorSource(v, SITE, keep_length=True)) as calls:
        found = tiny_llama.hf(**given).logits
        tiny_llama.hf(**given)
        assert torch.equal(calls.edits.position, last)  # of the call before
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, tiny_llama.hf(**given).logits, atol=1e-2)


def test_each_call_begins_anew(tiny_llama: LanguageModel) -> None:
    """A source with a memory of rows forgets the rows of the call before, and draws are the same again."""
    dictionary = DirectionTable(torch.randn(9, 32, generator=torch.Generator().manual_seed(1)))
    given = padded(tiny_llama)
    with applied(tiny_llama, RandomFeatureSource(dictionary, 0.9, SITE)):
        first, second = (tiny_llama.hf.generate(**given, **GREEDY) for _ in range(2))
    assert torch.equal(first, second)


def test_rows_may_have_features_of_their_own_in_one_call(tiny_llama: LanguageModel) -> None:
    table = DirectionTable(torch.randn(9, 32, generator=torch.Generator().manual_seed(1)))
    ids, features = [tiny_llama.encode_text(text) for text in PROMPTS], torch.tensor([[0], [4], [8]])
    expected = decode(
        tiny_llama, ids, DecodeConfig(max_new_tokens=8, stop_at_eos=False), StaticSource(table, features, 0.8, SITE)
    )
    given = padded(tiny_llama)
    with applied(tiny_llama, StaticSource(table, features, 0.8, SITE)):
        found = tiny_llama.hf.generate(**given, **GREEDY)
        assert found[:, given["input_ids"].shape[1] :].tolist() == expected.token_ids
        with pytest.raises(UserError, match="each row has features of its own"):
            tiny_llama.hf.generate(**given, **GREEDY)


def test_what_cannot_be_known_is_refused(tiny_llama: LanguageModel) -> None:
    hf, given, name = tiny_llama.hf, padded(tiny_llama), tiny_llama.cache_argument

    def source(positions: Any = "generated") -> VectorSource:
        return VectorSource(vector(tiny_llama), SITE, 0.6, positions=positions)

    with pytest.raises(UserError, match=r"rows that change places: .*num_beams=1"), applied(tiny_llama, source()):
        hf.generate(**given, **{**GREEDY, "num_beams": 4})
    with (
        pytest.raises(UserError, match=r"generation without a cache: .*leave use_cache on"),
        applied(tiny_llama, source()),
    ):
        hf.generate(**given, **GREEDY, use_cache=False)
    with pytest.raises(UserError, match="inputs_embeds: edits are chosen by token"), applied(tiny_llama, source()):
        hf(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UserError, match="the attention mask: it does not say of 3 rows"), applied(tiny_llama, source()):
        hf(input_ids=given["input_ids"], attention_mask=given["attention_mask"][:, None, None])
    cache = hf(**given, use_cache=True)[name]
    with pytest.raises(UserError, match="1 tokens behind a cache"), applied(tiny_llama, source()):
        hf(torch.ones(3, 1, dtype=torch.long), **{name: cache})
    with pytest.raises(UserError, match="position 90 of row 0"), applied(tiny_llama, source([90])):
        hf(**given)
    with (
        pytest.raises(UserError, match=r"site resid_post\.9"),
        applied(tiny_llama, VectorSource(torch.ones(32), "resid_post.9")),
    ):
        pass


def test_positions_that_need_no_prompt_take_every_call(tiny_llama: LanguageModel) -> None:
    """Without a cache, and in several pieces behind one, all positions are edited as in one pass."""
    given = padded(tiny_llama)
    with applied(tiny_llama, VectorSource(vector(tiny_llama), SITE, 0.6, positions="all")):
        cached, uncached = (tiny_llama.hf.generate(**given, **GREEDY, use_cache=use) for use in (True, False))
        whole = tiny_llama.hf(given["input_ids"]).logits
        name = tiny_llama.cache_argument
        head = tiny_llama.hf(given["input_ids"][:, :7], use_cache=True)
        tail = tiny_llama.hf(given["input_ids"][:, 7:], **{name: head[name]}).logits
    assert torch.equal(cached, uncached)
    assert torch.allclose(tail, whole[:, 7:], atol=1e-4)


def test_a_failed_call_does_not_spoil_the_next(tiny_llama: LanguageModel) -> None:
    given = padded(tiny_llama)
    with applied(tiny_llama, VectorSource(vector(tiny_llama), SITE, 0.6)):
        with pytest.raises(IndexError):
            tiny_llama.hf(torch.tensor([[10_000]]))
        found = tiny_llama.hf.generate(**given, **GREEDY)
    with applied(tiny_llama, VectorSource(vector(tiny_llama), SITE, 0.6)):
        assert torch.equal(found, tiny_llama.hf.generate(**given, **GREEDY))


@pytest.mark.parametrize("mutation", ["shifted", "skipped", "uncounted padding"])
def test_mutations_are_seen(tiny_llama: LanguageModel, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aim = AppliedEdits.before

    def before(self: AppliedEdits, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if mutation == "uncounted padding":
            kwargs = {**kwargs, "attention_mask": None}
        aim(self, module, args, kwargs)
        if mutation == "shifted":
            self.runner._time = (self.runner._time - 1).clamp_min(0)
        if mutation == "skipped" and kwargs["input_ids"].shape[1] == 1:
            self.runner.aim(kwargs["input_ids"][:0], kwargs["input_ids"][:0], self._rows, kwargs["input_ids"][:0])  # type: ignore[arg-type]

    monkeypatch.setattr(AppliedEdits, "before", before)
    with pytest.raises((AssertionError, RuntimeError)):
        test_generate_gives_what_decode_gives(
            tiny_llama, [0, 2, -1] if mutation == "uncounted padding" else "generated"
        )


def test_a_source_that_must_know_all_rows_is_refused(tiny_llama: LanguageModel) -> None:

    class Plain:
        sites, positions, unit, operation, dictionary_hash = (tiny_llama.site(SITE),), None, "", "", ""

    with (
        pytest.raises(UserError, match="Plain in the model's own calls: it must know all rows"),
        applied(tiny_llama, Plain()),
    ):  # type: ignore[arg-type]
        pass
