"""Pieces of text behind others, special tokens, and tokens that a model has no row for, whatever the tokenizer."""

from __future__ import annotations

import copy
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.activations import Document, HarvestOptions, LiveSource, as_documents, harvest, tokenise, top_contexts
from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.evaluation.documents import pack
from trimtab.finding.examples import Ask
from trimtab.flags.examples import Example, encode
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, capture, decode, last_activations
from trimtab.lm.logit_lens import token_texts
from trimtab.tasks import load_task
from trimtab.tasks.ioi_material import NAMES

WORDS = ["the", "sea", "and", "boat", "then", "Yes", *NAMES]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank before a text and takes it away again: one token per word, letter and byte."""
    blank = "\u2581"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), blank, *string.ascii_letters]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for word in WORDS:
        for start in (blank, ""):
            letters = [*start, *word]
            begun = letters[0]
            for letter in letters[1:]:
                merges += [] if (begun, letter) in merges else [(begun, letter)]
                begun += letter
                vocab.setdefault(begun, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    end = [decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
        core.decoder = decoders.Sequence([decoders.Replace(blank, " "), *end, decoders.Strip(" ", 1, 0)])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=blank, prepend_scheme="always", split=False)
        core.decoder = decoders.Sequence([decoders.Metaspace(replacement=blank, prepend_scheme="always"), *end])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


def model_of(tokenizer: PreTrainedTokenizerFast, rows: int | None = None) -> LanguageModel:
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    return LanguageModel.from_hf(LlamaForCausalLM(config), tokenizer, "tiny")


@pytest.fixture(scope="module", params=["llama", "metaspace", "bytes"])
def model(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    if request.param != "bytes":
        return model_of(sentencepiece(request.param))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return model_of(tokenizer)


def ids_of(model: LanguageModel, text: str) -> list[int]:
    """Tokens of a text, without the one that begins it."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


@pytest.mark.parametrize("text", [" the sea", "the sea", "Yes", "\nYes", "  and", "x"])
def test_a_piece_is_what_it_is_within_a_text(model: LanguageModel, text: str) -> None:
    before = "boat\n"
    whole = ids_of(model, before + text)
    # mutation: `encode_plain` in `encode_continuation`, `decode_plain` in `decode_continuation`
    assert model.encode_continuation(text) == whole[len(ids_of(model, before)) :]
    assert model.decode_continuation(model.encode_continuation(text)) == text
    assert model.decode_ids(model.encode_text("the sea")) == "the sea"


def test_texts_of_continuations_keep_their_blank(model: LanguageModel) -> None:
    answer = model.encode_continuation(" sea and boat")
    written = decode(model, [model.encode_text("the")], DecodeConfig(max_new_tokens=len(answer)), teacher=[answer])
    assert written.texts == [" sea and boat"]
    stopped = DecodeConfig(max_new_tokens=len(answer), stop=(" sea",))
    assert decode(model, [model.encode_text("the")], stopped, teacher=[answer]).texts == [""]


def test_no_two_tokens_look_alike(model: LanguageModel) -> None:
    size = len(model.tokenizer)
    (texts,) = token_texts(model, torch.arange(size)[None])
    # an ASCII letter may have a byte's token beside its own, as in Llama's vocabulary
    bytes_ = {i for i in range(size) if str(model.tokenizer.convert_ids_to_tokens(i)).startswith("<0x")}
    others = [text for i, text in enumerate(texts) if i not in bytes_]
    assert len({*others}) == len(others)  # mutation: `decode_plain` in `token_text`
    assert len({texts[i] for i in bytes_}) == len(bytes_)
    (blank,), (none,) = (ids_of(model, "x the")[-1:], model.encode_continuation("the")[-1:])
    assert model.token_text(blank) == " the"
    assert model.token_text(none) in ("the", "e")
    assert model.token_text(size + 7) == f"<no token {size + 7}>"


def test_parts_of_characters_are_shown_by_their_bytes() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model = model_of(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    (texts,) = token_texts(model, torch.arange(257)[None])
    assert len({*texts}) == 257
    assert [model.token_text(token) for token in ids_of(model, "é\n ")] == ["\\xc3", "\\xa9", "\n", " "]
    assert model_of(sentencepiece("llama")).token_text(3 + 0xC3) == "<0xC3>"


def test_names_of_one_token_are_found(model: LanguageModel) -> None:
    if "Mary" in model.tokenizer.get_vocab():
        assert load_task("ioi", tokenizer=model.tokenizer, n_train=4, n_validation=4, n_test=4).items("test")
        assert sum(len(model.encode_continuation(f" {name}")) == 1 for name in NAMES) > 50
    else:
        with pytest.raises(UserError, match="names are one token"):
            load_task("ioi", tokenizer=model.tokenizer)


def test_answers_are_tokens_behind_their_prompts(model: LanguageModel) -> None:
    prompt, answer = model.encode_text("the boat"), " then Yes"
    found = encode(model, [Example(prompt="the boat", response=answer, concepts=())], chat=False, max_tokens=99)
    assert found[0].ids == model.encode_text("the boat then Yes")
    assert Ask("the boat").answer_ids(model, answer) == tuple(found[0].ids[len(prompt) :])


STOPS = [
    (("<|end|>",), " sea"),
    (("boat<|end|>",), " sea<|end|>"),  # the stop is only what is written whole
    ((" sea<|end|>",), ""),
    (("<|end|>", "se"), " "),
    (("end", "|"), None),  # what looks like a part of a special token is no text
]


@pytest.mark.parametrize(("stop", "expected"), STOPS)
def test_special_tokens_stop(model: LanguageModel, stop: tuple[str, ...], expected: str | None) -> None:
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    tokens = [*model.encode_continuation(" sea"), end, *model.encode_continuation(" and")]
    config = DecodeConfig(max_new_tokens=len(tokens), stop=stop)
    got = decode(model, [model.encode_text("the")], config, teacher=[tokens])
    if expected is None or "<" in expected:
        assert (got.texts, got.finish) == ([" sea and"], ["length"])
    else:
        assert (got.texts, got.finish) == ([expected], ["stop"])  # mutation: seek in the text without special tokens
        assert len(got.token_ids[0]) <= tokens.index(end) + 1


@pytest.mark.parametrize("stop", [("",), ("a", ""), "a", (3,), (None,)])
def test_stops_that_are_no_texts_are_refused(stop: object) -> None:
    with pytest.raises(UserError, match="it must be a tuple of texts that are not empty"):
        DecodeConfig(stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("pad", ["added", "none", "negative"])
def test_any_pad_token_will_do(tiny_tokenizer: PreTrainedTokenizerFast, pad: str) -> None:
    tokenizer, rows = copy.deepcopy(tiny_tokenizer), len(tiny_tokenizer)
    tokenizer.pad_token = "[PAD]" if pad == "added" else None
    if pad == "added":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == rows
    model = model_of(tokenizer, rows)
    texts = ["the end", "an inn in the end, then an inn", "a"]
    ids = [model.encode_text(text) for text in texts]
    config = DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    together = decode(model, ids, config)
    assert together.token_ids == [decode(model, [one], config).token_ids[0] for one in ids]
    last = last_activations(model, texts, "resid_post.1")  # mutation: `pad_id` as the tokenizer says it
    alone = torch.cat([last_activations(model, [text], "resid_post.1") for text in texts])
    torch.testing.assert_close(last, alone, atol=1e-5, rtol=1e-4)


def with_tokens_without_rows(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    tokenizer, rows = copy.deepcopy(tokenizer), len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    return model_of(tokenizer, rows)


def test_tokens_without_rows_are_refused_by_name(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    model, rows = with_tokens_without_rows(tiny_tokenizer), len(tiny_tokenizer)
    said = f"it holds '<think>', token {rows} of the tokenizer, and tiny has tokens 0 to {rows - 1}; leave it out, or"
    for given in (model.encode_text, model.encode_continuation, lambda text: model.encode_text(text, chat=True)):
        with pytest.raises(UserError, match=f": {said}"):
            given("<think>an end")
        assert given("an end")
    documents = [Document(f"d{i}", "an inn in the end " * 9 + "<think>" * (i == 5), "test") for i in range(8)]
    corpus = tokenise(documents, model.tokenizer)
    info = DictionaryInfo(architecture="standard", site="resid_post.1")
    sae = Standard(torch.ones(16, 2), torch.ones(2), torch.ones(2, 16), torch.zeros(16), info=info)
    options = HarvestOptions(context=16, holdout=0.0)
    calls = [
        lambda: harvest(model, ["resid_post.1"], corpus, tmp_path / "h", options),
        lambda: LiveSource(model, "resid_post.1", corpus, options=options),
        lambda: pack(corpus, "all", 0.0, 16, model),
        lambda: top_contexts(model, sae, documents, [0]),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"document 'd5': {said}"):
            call()
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("text", ["caf\udce9", "half a fish \ud83d"])
def test_what_is_no_text_is_refused(tiny_llama: LanguageModel, text: str) -> None:
    for call in (
        lambda: tiny_llama.encode_text(text),
        lambda: tiny_llama.encode_text(text, chat=True),
        lambda: tiny_llama.encode_continuation(text),
        lambda: tokenise([Document("d", text, "test")], tiny_llama.tokenizer),
        lambda: tokenise(as_documents([text]), tiny_llama.tokenizer),
    ):
        with pytest.raises(UserError, match=r"its character \d+ is (the byte 0xe9, which|half of one)") as error:
            call()
        str(error.value).encode()  # the message itself can be printed


def test_one_beginning_and_a_note(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    bos, name = model.tokenizer.bos_token_id, model.tokenizer.bos_token
    model = LanguageModel(model.hf, copy.deepcopy(model.tokenizer), "tiny")
    adds = model.encode_text("the")[0] == bos
    for text in (f"{name}the", f"{name}{name}the"):
        ids = model.encode_text(text)
        assert ids[: 1 + (not adds and text.count(name) == 2)].count(bos) == ids.count(bos)
        assert ids.count(bos) == (1 if adds else text.count(name))  # who adds none has what was written
    said = capsys.readouterr().err
    note = "trimtab: note: a prompt begins with <s>, which tiny puts before texts itself; it gets one\n"
    assert said == (note if adds else "")


def test_documents_that_begin_with_the_beginning(tiny_llama: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tokenise([Document("a", "the end", ""), Document("b", "an inn", "")], tiny_llama.tokenizer)
    given = tokenise([Document("a", "<bos>the end", ""), Document("b", "an inn", "")], tiny_llama.tokenizer)
    assert given.tokens.tolist() == plain.tokens.tolist()
    assert "1 of 2 documents begin with <bos>" in capsys.readouterr().err
    inside = tokenise([Document("a", "the <bos>end", "")], tiny_llama.tokenizer)
    assert tiny_llama.tokenizer.bos_token_id in inside.tokens


def test_padding_is_masked_whatever_it_is(tiny_llama: LanguageModel) -> None:
    ids = [tiny_llama.encode_text("the end"), tiny_llama.encode_text("an inn in the end")]
    site = tiny_llama.site("resid_post.3")
    one, other = (capture(tiny_llama, TokenBatch.pad(ids, pad), [site])[site] for pad in (0, 9))
    torch.testing.assert_close(one[0, -len(ids[0]) :], other[0, -len(ids[0]) :])
