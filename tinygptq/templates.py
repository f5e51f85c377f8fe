"""Prompt templates: how a question, or a whole conversation, is written for an instruction-tuned model.

A template is chosen by name (``tulu``, ``alpaca``, ...), or is the Jinja text a model folder carries (`render_chat`).
Begin-of-sequence is left to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygptq.errors import TinyGPTQError

if TYPE_CHECKING:
    from tinygptq.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FOLDER_TEMPLATE = "folder"  # in place of a template's name: the folder's own chat template


@dataclass(frozen=True)
class Template:
    """The texts around the parts of a conversation, which is ``open system user reply`` and then, for each further
    turn, ``between open user reply``; ``user`` runs up to where the reply begins."""

    user: str
    reply: str
    system: str
    default_system: str | None = None
    open: str = ""
    between: str = ""


TEMPLATES = {
    # Tulu (open-instruct): the last newline of the prompt matters, the model was trained with it.
    "tulu": Template(user="<|user|>\n{prompt}\n<|assistant|>\n", reply="{reply}{eos}\n", system="<|system|>\n{system}\n"),
    # Stanford Alpaca
    "alpaca": Template(
        user="### Instruction:\n{prompt}\n\n### Response:",
        reply="{reply}{eos}\n\n",
        system="{system}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "chatml": Template(
        user="<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
        reply="{reply}<|im_end|>\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
    ),
    # Llama 2's reference code: the system message stands inside the first user turn.
    "llama-2-chat": Template(
        user="{prompt} [/INST]",
        reply=" {reply} {eos}",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        open="[INST] ",
        between="{bos}",
    ),
    # Vicuna 1.1 (FastChat)
    "vicuna": Template(
        user="USER: {prompt} ASSISTANT:",
        reply=" {reply}{eos}",
        system="{system} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's "
        "questions.",
    ),
    "none": Template(user="{prompt}", reply="\n{reply}\n\n", system="{system}\n\n"),
}


def get_template(name: str) -> Template:
    """The template of that name; an unknown name is a TinyGPTQError that lists the known ones."""
    if name not in TEMPLATES:
        raise TinyGPTQError(f"unknown prompt template {name!r}; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(name: str, prompt: str, system: str | None = None) -> str:
    """One prompt in the named template, ending where the model's reply begins."""
    template = get_template(name)
    return template.open + _system(template, system) + template.user.format(prompt=prompt)


def render_conversation(name: str, messages: Sequence[Message], bos: str = "", eos: str = "") -> str:
    """A whole conversation with its replies, as a model is trained on it.

    messages: an optional system message, then user and assistant in turn; ``bos`` and ``eos`` are the tokens' texts.
    """
    template, messages = get_template(name), list(messages)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    text = ""
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise TinyGPTQError(
                f"message {i + 1} of a conversation should be the {expected}'s, found role {message['role']!r}"
            )
        if expected == "user":
            text += template.between.format(bos=bos) if i else ""
            text += template.open + ("" if i else _system(template, system))
            text += template.user.format(prompt=message["content"])
        else:
            text += template.reply.format(reply=message["content"], eos=eos)
    return text


def _system(template: Template, system: str | None) -> str:
    system = template.default_system if system is None else system
    return template.system.format(system=system) if system else ""


def render_chat(
    template_text: str,
    messages: Sequence[Message],
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """Render a model folder's own chat template (Jinja) in a sandbox: the text comes from strangers.

    Sees what transformers gives such a template: messages, bos_token, eos_token, add_generation_prompt,
    raise_exception and strftime_now. Needs the optional package jinja2.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise TinyGPTQError("a folder's own chat template needs the package jinja2: pip install tinygptq[hf]") from None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(raise_exception=raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(template_text).render(
            messages=list(messages), bos_token=bos_token, eos_token=eos_token, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of the folder's: it can raise whatever it likes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TinyGPTQError(f"the folder's chat template cannot be used: {first}") from None


def render_messages(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> str:
    """Messages in a template by name, or in the folder's own (FOLDER_TEMPLATE), with the tokenizer's BOS and EOS.

    ``add_generation_prompt``: of the folder's own; those with names end where their messages do.
    """
    bos, eos = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
    if template == FOLDER_TEMPLATE:
        return render_chat(tokenizer.chat_template or "", messages, bos, eos, add_generation_prompt)
    return render_conversation(template, messages, bos, eos)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
