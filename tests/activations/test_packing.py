from __future__ import annotations

import numpy as np
import pytest

from trimtab.activations import Document, PackedText, tokenise
from trimtab.errors import UserError
from trimtab.lm import LanguageModel

DOCUMENTS = [Document(f"d{i}", "the boat and the tide " * (1 + i % 4) + str(i), "test") for i in range(23)]


@pytest.mark.parametrize("context", [2, 7, 16])
def test_packing_equals_a_slow_loop(tiny_llama: LanguageModel, context: int) -> None:
    tokenizer = tiny_llama.tokenizer
    chosen = [0, 3, 4, 9, 22]
    stream = []
    for index in chosen:
        tokens = tokenizer.encode(DOCUMENTS[index].text, add_special_tokens=False)
        stream += [(token, index, position) for position, token in enumerate([*tokens, tokenizer.eos_token_id])]
    body = context - 1
    expected = [
        [(tokenizer.bos_token_id, -1, -1), *stream[i : i + body]] for i in range(0, len(stream) - body + 1, body)
    ]
    packed = PackedText(tokenise(DOCUMENTS, tokenizer), np.array(chosen, dtype=np.int32), context)
    assert len(packed) == len(expected)
    order = np.random.default_rng(0).permutation(len(packed))
    batch = packed.batch(order)
    np.testing.assert_array_equal(np.stack(batch, axis=-1), np.array([expected[i] for i in order]))


def test_chat_markup_becomes_special_tokens(tiny_llama: LanguageModel) -> None:
    tokenizer = tiny_llama.tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    corpus = tokenise([Document("chat", str(text), "")], tokenizer)
    user, eos = tokenizer.convert_tokens_to_ids(["<user>", "<eos>"])
    assert corpus.tokens[0] == user
    assert list(corpus.tokens[-2:]) == [eos, eos]  # the turn's end, then the separator
    assert len(corpus.tokens) == 1 + len("hi") + 2


def test_the_end_of_text_token_separates_documents_where_there_is_one(tiny_llama: LanguageModel) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    corpus = tokenise(DOCUMENTS[:3], tokenizer)
    assert corpus.separator == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert all(corpus.tokens[end - 1] == corpus.separator for end in corpus.starts[1:])
    assert corpus.first_token == tokenizer.bos_token_id


def test_limit_ends_behind_the_document_that_reaches_it(tiny_llama: LanguageModel) -> None:
    whole = tokenise(DOCUMENTS, tiny_llama.tokenizer)
    limited = tokenise(DOCUMENTS, tiny_llama.tokenizer, limit_tokens=int(whole.starts[5]) - 1)
    assert limited.ids == whole.ids[:5]
    np.testing.assert_array_equal(limited.tokens, whole.tokens[: whole.starts[5]])


def test_no_text() -> None:
    class NoTokens:
        bos_token_id = eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(UserError, match="no end-of-text, EOS or BOS token"):
        tokenise([], NoTokens())  # type: ignore[arg-type]


def test_empty_corpus(tiny_llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="there is no text in it"):
        tokenise([], tiny_llama.tokenizer)
