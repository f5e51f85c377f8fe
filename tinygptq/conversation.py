"""A conversation with a model: its history in the model's template, kept within the context, answers streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.generate import StoppedText, generate_ids
from tinygptq.language_model import LanguageModel
from tinygptq.sampling import Sampler, SamplingParams, check_seed
from tinygptq.templates import FOLDER_TEMPLATE, TEMPLATES, Message, get_template, render_messages


@dataclass(frozen=True)
class AnswerStats:
    """Of one answer. prompt_tokens: of the whole prompt, ``computed`` of them anew. dropped: messages that no longer fit.

    first: seconds to the first token. rate: tokens a second after it.
    """

    prompt_tokens: int
    computed: int
    dropped: int
    new_tokens: int
    first: float
    rate: float

    def __str__(self) -> str:
        text = (f"{self.new_tokens} tokens, the first after {self.first:.2f} s, then {self.rate:.1f} a second; "
                f"prompt {self.prompt_tokens} tokens, {self.computed} of them computed anew")  # fmt: skip
        return text + (f"; {self.dropped} old messages left out" if self.dropped else "")


def encode_messages(model: LanguageModel, template: str, messages: list[Message]) -> list[int]:
    """The ids of messages in a template, by name or FOLDER_TEMPLATE, to where the model's next reply begins.

    Raises:
        TinyGPTQError: an unknown template, none in the folder, or one that cannot be used.
    """
    _check_template(model, template)
    tokenizer = model.tokenizer
    text, bos = render_messages(tokenizer, template, messages), tokenizer.token_text(tokenizer.bos_id)
    return tokenizer.encode(text, bos=False if bos and text.startswith(bos) else None)


def _check_template(model: LanguageModel, template: str) -> None:
    if template != FOLDER_TEMPLATE:
        get_template(template)
    elif model.tokenizer.chat_template is None:
        known = ", ".join(TEMPLATES)
        raise TinyGPTQError(f"{model.checkpoint.folder}: the folder has no chat template; choose one of {known}")


class Conversation:
    """Messages so far, and what answers them.

    Args:
        template: a template's name, or FOLDER_TEMPLATE; None is the folder's own where it has one, else none at all.
        system: a system message that stays when old messages are left out.
        settings: temperature, top_k, top_p, repetition_penalty (None is the folder's own) and seed.

    Attributes:
        messages: without the system message. stats: of the last answer, or None.
    """

    def __init__(
        self, model: LanguageModel, template: str | None = None, system: str | None = None, max_new_tokens: int = 512,
        **settings: Any,
    ) -> None:  # fmt: skip
        if template is None:
            template = "none" if model.tokenizer.chat_template is None else FOLDER_TEMPLATE
        _check_template(model, template)
        if max_new_tokens < 1:
            raise TinyGPTQError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.model, self.template, self.system, self.max_new_tokens = model, template, system, max_new_tokens
        self.messages: list[Message] = []
        self.stats: AnswerStats | None = None
        self._seed = settings.pop("seed", None)
        check_seed(self._seed)
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        chosen = {name: settings.pop(name, None) for name in names}
        if settings:
            raise TinyGPTQError(f"unknown setting {next(iter(settings))!r} of a conversation")
        defaults = {name: getattr(model.defaults, name) for name in names}
        self._params = SamplingParams(**{**defaults, **{name: value for name, value in chosen.items() if value is not None}})
        self._engine = model.sequence

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages, self.stats = [], None

    def answer(self, text: str) -> Iterator[str]:
        """Add a message of the user's and stream the answer; it is part of the history, also when it is broken off.

        Raises:
            TinyGPTQError: the message alone does not fit the context; it is then not part of the history.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids, dropped = self._prompt()
        except TinyGPTQError:
            self.messages.pop()
            raise
        reply = {"role": "assistant", "content": ""}
        self.messages.append(reply)
        return self._stream(ids, dropped, reply)

    def _stream(self, ids: list[int], dropped: int, reply: Message) -> Iterator[str]:
        model, eos = self.model, self.model.defaults.eos_token_ids
        seed = None if self._seed is None else self._seed + len(self.messages)
        sampler = Sampler(self._params, model.config.vocab_size, eos, seed)
        text = StoppedText(model.tokenizer.stream(continues=True), self._stops())
        kept = self._engine.common(ids)
        started = first = time.perf_counter()
        count = 0
        try:
            for token in generate_ids(self._engine, ids, sampler, self.max_new_tokens, eos):
                first = time.perf_counter() if count == 0 else first
                count += 1
                yield text.push(token)
                if text.ended:
                    return
            yield text.rest()
        finally:
            reply["content"] = text.text.strip()
            after = time.perf_counter() - first
            rate = (count - 1) / after if count > 1 and after > 0 else 0.0
            self.stats = AnswerStats(len(ids), len(ids) - kept, dropped, count, first - started, rate)

    def _prompt(self) -> tuple[list[int], int]:
        """Ids of the longest end of the history that leaves room for an answer, and how many messages it leaves out."""
        capacity = self._engine.capacity
        room = capacity - min(self.max_new_tokens, capacity // 2)
        system = [{"role": "system", "content": self.system}] if self.system else []
        for dropped in range(0, len(self.messages), 2):  # a question goes with its answer
            ids = encode_messages(self.model, self.template, [*system, *self.messages[dropped:]])
            if len(ids) <= room:
                return ids, dropped
        raise TinyGPTQError(f"the message makes a prompt of {len(ids)} tokens; {room} fit the context of {capacity} beside "
                            "an answer")  # fmt: skip

    def _stops(self) -> list[str]:
        """What begins the user's next turn: a model that goes on with it has ended its own."""
        if self.template == FOLDER_TEMPLATE:
            return []
        template = TEMPLATES[self.template]
        beginnings = (template.open, template.user.partition("{prompt}")[0])
        return [beginning.strip() for beginning in beginnings if beginning.strip()]
