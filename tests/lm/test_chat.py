"""Chats in a model's own template: the ids that transformers gives, one beginning of text, refusals that say why."""

from __future__ import annotations

import copy

import pytest
from tokenizers import processors

from trimtab.errors import UserError
from trimtab.lm import LanguageModel

TURNS = [
    {"role": "user", "content": "the end"},
    {"role": "assistant", "content": "an inn"},
    {"role": "user", "content": "and"},
]
REPLY = "{% if add_generation_prompt %}<model>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}" + REPLY
LIKE_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<user>{{ m['content'] }}<eos>{% endfor %}" + REPLY
)
WITHOUT_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"


def model_with(tiny: LanguageModel, template: str | None, *, adds_bos: bool = True) -> LanguageModel:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    if adds_bos:
        bos = tokenizer.bos_token
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return LanguageModel(tiny.hf, tokenizer, "other")


@pytest.mark.parametrize("template", [PLAIN, "{{ bos_token }}" + PLAIN, LIKE_GEMMA], ids=["none", "first", "gemma"])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("reply", [False, True])
def test_chats_are_what_transformers_makes_of_them(
    tiny_llama: LanguageModel, template: str, adds_bos: bool, reply: bool
) -> None:
    model = model_with(tiny_llama, template, adds_bos=adds_bos)
    ids = model.encode_chat(TURNS, add_generation_prompt=reply)
    expected = model.tokenizer.apply_chat_template(TURNS, add_generation_prompt=reply, return_dict=False)
    assert ids == expected
    assert ids.count(model.tokenizer.bos_token_id) == ("bos_token" in template)
    if adds_bos:
        assert model.encode_text("the end")[0] == model.tokenizer.bos_token_id


def test_instructions_come_first(tiny_llama: LanguageModel) -> None:
    model = model_with(tiny_llama, PLAIN)
    ids = model.encode_chat(TURNS, system=" an inn\n")
    assert ids == model.encode_chat([{"role": "system", "content": "an inn"}, *TURNS])
    assert model.decode_ids(ids, special=True) == "<system>an inn\n<user>the end\n<assistant>an inn\n<user>and\n<model>"


def test_one_turn_is_a_text_with_chat(tiny_llama: LanguageModel) -> None:
    model = model_with(tiny_llama, LIKE_GEMMA)
    assert model.encode_text("the end", chat=True) == model.encode_chat([{"role": "user", "content": "the end"}])


@pytest.mark.parametrize(
    ("template", "turns", "system", "message"),
    [
        (
            LIKE_GEMMA, TURNS, "be brief",
            "a chat with other: its chat template refuses the roles system, user, assistant, user (System role not "
            "supported); put the system text into the first user turn",
        ),
        (
            LIKE_GEMMA, TURNS[1:], None,
            "refuses the roles assistant, user (Conversation roles must alternate user/assistant/user/assistant/...); "
            "let user and assistant take turns",
        ),
        (
            WITHOUT_SYSTEM, TURNS, "be brief",
            "a chat with other: its chat template leaves the system text out; put the system text into the first user",
        ),
        (PLAIN, [], "be brief", "the chat: it has no turn; give turns of user and assistant, before them at"),
        (PLAIN, [{"role": "bot", "content": "an inn"}], None, "the chat: its roles are bot; give turns of user and"),
        (PLAIN, [{"role": "system", "content": "in"}], "an", "the chat: its roles are system, system; give turns of"),
        (PLAIN, [{"role": "user"}], None, "the chat: a turn says role; give role and content"),
        (PLAIN, [{"role": "user", "content": "an inn", "name": "x"}], None, "the chat: a turn says role, content,"),
        (None, TURNS, None, "--chat with other: the model has no chat template; give a plain prompt"),
        (" ", [{"role": "user", "content": " "}], None, ""),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_are_refused_in_one_line(
    tiny_llama: LanguageModel, template: str | None, turns: list, system: str | None, message: str
) -> None:
    model = model_with(tiny_llama, template)
    if not message:
        assert model.encode_chat(turns, system=system)
        return
    with pytest.raises(UserError) as caught:
        model.encode_chat(turns, system=system)
    assert message in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_begins_with_the_token_as_text_has_it_once(tiny_llama: LanguageModel, adds_bos: bool) -> None:
    model = model_with(tiny_llama, PLAIN, adds_bos=adds_bos)
    bos = model.tokenizer.bos_token_id
    ids = model.encode_text("<bos>the end")
    assert ids == [bos, *model.tokenizer("the end", add_special_tokens=False)["input_ids"]]
