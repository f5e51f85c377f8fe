"""Prompt templates, letter by letter."""

from __future__ import annotations

import pytest

from tinygptq.errors import TinyGPTQError
from tinygptq.templates import TEMPLATES, render, render_chat, render_conversation

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tulu", "<|user|>\nHi {x}\n<|assistant|>\n"),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nHi {x}\n\n### Response:",
        ),
        ("chatml", "<|im_start|>user\nHi {x}<|im_end|>\n<|im_start|>assistant\n"),
        ("llama-2-chat", "[INST] Hi {x} [/INST]"),
        (
            "vicuna",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Hi {x} ASSISTANT:",
        ),
        ("none", "Hi {x}"),
    ],
)
def test_prompt(name, text):
    assert render(name, "Hi {x}") == text  # braces of a prompt are text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tulu", "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"),
        ("alpaca", "Be brief.\n\n### Instruction:\nHi\n\n### Response:"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("llama-2-chat", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("vicuna", "Be brief. USER: Hi ASSISTANT:"),
        ("none", "Be brief.\n\nHi"),
    ],
)
def test_system_message(name, text):
    assert render(name, "Hi", "Be brief.") == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tulu", "<|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nWhy?\n<|assistant|>\nSo.</s>\n"),
        ("llama-2-chat", "[INST] Hi [/INST] Hello </s><s>[INST] Why? [/INST] So. </s>"),
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
        ),
    ],
)
def test_conversation(name, text):
    assert render_conversation(name, TURNS, "<s>", "</s>") == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_begins_as_its_prompt_does(name):
    with_system = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert render_conversation(name, TURNS).startswith(render(name, "Hi"))
    assert render_conversation(name, with_system).startswith(render(name, "Hi", "Be brief."))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(TinyGPTQError, match=r"'tullu'.*tulu, alpaca, chatml, llama-2-chat, vicuna, none"):
        render("tullu", "Hi")


def test_turns_out_of_order():
    with pytest.raises(TinyGPTQError, match=r"message 1 .*should be the user's, found role 'assistant'"):
        render_conversation("tulu", TURNS[1:])


def test_chat_template_of_a_folder():
    pytest.importorskip("jinja2")
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}U:{{ m.content }}{{ eos_token }}"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render_chat(template, TURNS[:1], "<s>", "</s>") == "<s>U:Hi</s>A:"
    assert render_chat(template, TURNS[:1], "<s>", "</s>", add_generation_prompt=False) == "<s>U:Hi</s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # out of the sandbox
        "{{ messages.append(1) }}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(template):
    pytest.importorskip("jinja2")
    with pytest.raises(TinyGPTQError, match="chat template cannot be used") as caught:
        render_chat(template, TURNS)
    assert "\n" not in str(caught.value)
