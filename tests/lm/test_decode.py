"""The decode loop without steering: against `transformers.generate`, and its own promises about ends, forks, errors."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Edit, EditRequest, LanguageModel, decode
from trimtab.steering import VectorSource

LENGTHS = (3, 17, 11, 24, 1)
GREEDY = DecodeConfig(max_new_tokens=8, stop_at_eos=False)


def prompts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 100, (n,), generator=generator).tolist() for n in lengths]


def next_token_logp(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] in one unpadded pass of the bare transformers model."""
    with torch.no_grad():
        return torch.log_softmax(model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)


def test_greedy_equals_generate(any_tiny: LanguageModel) -> None:
    decoded = decode(any_tiny, prompts_of(), GREEDY)
    for row, prompt in enumerate(prompts_of()):
        expected = any_tiny.hf.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=-1,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert decoded.token_ids[row] == expected
    assert decoded.finish == ["length"] * len(LENGTHS)
    assert decoded.sample == list(range(len(LENGTHS)))
    assert len(decoded.edits) == 0


def test_log_probabilities_and_entropies_are_the_model_s(any_tiny: LanguageModel) -> None:
    config = replace(GREEDY, temperature=0.7, top_p=0.9)  # neither changes what is logged
    decoded = decode(any_tiny, prompts_of(), config)
    for row, prompt in enumerate(prompts_of()):
        logp = next_token_logp(any_tiny, prompt + decoded.token_ids[row])
        for step, token in enumerate(decoded.token_ids[row]):
            mine = logp[len(prompt) - 1 + step]
            assert decoded.token_logp[row][step] == pytest.approx(float(mine[token]), abs=1e-4)
            assert decoded.entropy[row][step] == pytest.approx(float(-(mine.exp() * mine).sum()), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_changes_nothing(any_tiny: LanguageModel, batch_size: int) -> None:
    config = replace(GREEDY, temperature=1.0)
    assert (
        decode(any_tiny, prompts_of(), replace(config, batch_size=batch_size)).token_ids
        == decode(any_tiny, prompts_of(), config).token_ids
    )


def test_rows_end_at_end_of_text(tiny_llama: LanguageModel) -> None:
    eos = min(tiny_llama.eos_ids)
    plan = [[20, eos, 30, 31], [20, 21, 22, 23], [eos, 1, 2, 3]]
    decoded = decode(tiny_llama, prompts_of((4, 9, 2)), DecodeConfig(max_new_tokens=4), teacher=plan)
    assert decoded.token_ids == [[20, eos], [20, 21, 22, 23], [eos]]
    assert decoded.finish == ["eos", "length", "eos"]
    assert decoded.texts[0] == tiny_llama.decode_ids([20])
    on = decode(tiny_llama, prompts_of((4, 9, 2)), GREEDY, teacher=plan)
    assert on.token_ids == plan


def test_rows_end_at_a_stop_string_across_tokens(tiny_llama: LanguageModel) -> None:
    model = tiny_llama
    text = model.encode_text("xyab cd")
    config = DecodeConfig(max_new_tokens=len(text), stop=("b c", "never"))
    decoded = decode(model, prompts_of((4, 6)), config, teacher=[text, text[:2]])
    assert decoded.texts == ["xya", "xy"]
    assert decoded.finish == ["stop", "length"]
    assert model.decode_ids(decoded.token_ids[0]) == "xyab c"
    both = decode(model, prompts_of((4,)), replace(config, stop=("b c", "ab c")), teacher=[text])
    assert (both.texts, both.finish) == (["xy"], ["stop"])  # up to the first of them


def test_forced_tokens_begin_the_text(any_tiny: LanguageModel) -> None:
    plain = decode(any_tiny, prompts_of(), GREEDY)
    forced = [tokens[:3] for tokens in plain.token_ids]
    rest = decode(any_tiny, prompts_of(), replace(GREEDY, max_new_tokens=5), forced=forced)
    assert rest.token_ids == [tokens[3:] for tokens in plain.token_ids]
    assert rest.texts == plain.texts
    assert rest.first_position(0) == len(prompts_of()[0]) + 3


def test_a_teacher_is_fed_and_the_choice_is_kept_beside_it(any_tiny: LanguageModel) -> None:
    teacher = prompts_of((5, 5, 5, 5, 5), seed=9)
    decoded = decode(any_tiny, prompts_of(), replace(GREEDY, max_new_tokens=5), teacher=teacher)
    assert decoded.token_ids == teacher
    for row, prompt in enumerate(prompts_of()):
        logp = next_token_logp(any_tiny, prompt + teacher[row])
        for step in range(5):
            mine = logp[len(prompt) - 1 + step]
            chosen = decoded.decided_ids[row][step]
            assert chosen == int(mine.argmax())
            assert decoded.decided_logp[row][step] == pytest.approx(float(mine.max()), abs=1e-4)
            assert decoded.token_logp[row][step] == pytest.approx(float(mine[teacher[row][step]]), abs=1e-4)


@pytest.mark.parametrize("lengths", [(5, 18, 11), (1, 1)])
def test_repeats_equal_rows_of_their_own(any_tiny: LanguageModel, lengths: tuple[int, ...]) -> None:
    """Copies share a prefill; each has its own branch, hence draws. Prompts of one token have nothing to share."""
    prompts = prompts_of(lengths)
    config = replace(GREEDY, temperature=1.0, batch_size=4)
    copies = decode(any_tiny, prompts, config, repeats=3)
    assert copies.branch == [0, 1, 2] * len(prompts)
    assert copies.sample == [i for i in range(len(prompts)) for _ in range(3)]
    each = [p for p in prompts for _ in range(3)]
    alone = decode(any_tiny, each, config, samples=copies.sample, branches=copies.branch)
    assert copies.token_ids == alone.token_ids
    assert len(set(map(tuple, copies.token_ids[:3]))) > 1


def test_progress_counts_every_row_once(tiny_llama: LanguageModel) -> None:
    eos = min(tiny_llama.eos_ids)
    ended: list[int] = []
    plan = [[20, eos, 30, 31], [20, 21, 22, 23], [eos, 1, 2, 3], [20, 21, 22, eos], [20, 21, 22, 23]]
    config = DecodeConfig(max_new_tokens=4, batch_size=2)
    decode(tiny_llama, prompts_of(), config, teacher=plan, progress=ended.append)
    assert sum(ended) == 5


def test_a_row_that_fills_the_context_is_allowed(tiny_llama: LanguageModel) -> None:
    """The last token is chosen but never fed, so 254 + 3 tokens fit a context of 256."""
    decoded = decode(tiny_llama, prompts_of((254,)), DecodeConfig(max_new_tokens=3, stop_at_eos=False))
    assert len(decoded.token_ids[0]) == 3
    with pytest.raises(UserError, match="together 258 tokens, but tiny-llama holds 256"):
        decode(tiny_llama, prompts_of((254,)), DecodeConfig(max_new_tokens=4))


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([], {}, "the prompts: there is none"),
        ([[7], []], {}, "prompt 1: it is empty"),
        ([[7, 160]], {}, "prompt 0: tiny-llama has tokens 0 to 159"),
        ([[7, -1]], {}, "prompt 0: tiny-llama has tokens 0 to 159"),
        ([[7]], {"forced": [[999]]}, "prompt 0: tiny-llama has tokens 0 to 159"),
        ([[7]], {"repeats": 0}, "repeats = 0: it must be at least 1"),
        ([[7], [8]], {"teacher": [[7], []]}, "the list of the teacher's tokens of row 1: it is empty"),
    ],
)
def test_bad_prompts_are_refused(
    tiny_llama: LanguageModel, prompts: list[list[int]], kwargs: dict, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        decode(tiny_llama, prompts, GREEDY, **kwargs)
    assert message in caught.value.line


@pytest.mark.parametrize(
    "field",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"temperature": 1e-40}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"batch_size": 0},
        {"stop": ("a", "")}, {"stop": "ab"},
    ],
)  # fmt: skip
def test_bad_configs_are_refused(field: dict) -> None:
    (name, value), *_ = field.items()
    with pytest.raises(UserError, match=re.escape(f"{name} {value!r}: it must be")):
        DecodeConfig(**field)


def test_a_source_may_write_to_what_it_is_shown(tiny_llama: LanguageModel) -> None:
    """Rows go on with numbers of their own. Mutation: those are handed out as they are."""
    vector, config = torch.ones(tiny_llama.d_model), DecodeConfig(max_new_tokens=12, stop_at_eos=False, temperature=1.0)

    class Writing(VectorSource):
        def choose(self, request: EditRequest) -> Edit | None:
            found = super().choose(request)
            for column in (request.seed, request.sample, request.branch, request.token, request.position):
                column.add_(1)
            return found

    def run(kind: type[VectorSource]) -> list[list[int]]:
        return decode(tiny_llama, [[7, 8, 9], [5, 6]], config, kind(vector, "resid_post.1", 0.1)).token_ids

    expected = run(VectorSource)
    assert run(Writing) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda self: self)
        with pytest.raises((AssertionError, RuntimeError)):
            assert run(Writing) == expected
