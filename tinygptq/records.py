"""Records to running text: text files and JSON lines, prompts and answers through a template, trees of messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.templates import Message, get_template, render_chat, render_conversation
from tinygptq.tokenizer import Tokenizer

CHAT_TEMPLATE = "chat"  # in place of a template's name: the model folder's own chat template


class RecordWriter:
    """Writes records and conversations as text through one prompt template.

    Args:
        tokenizer: its BOS and EOS, and its folder's chat template.
        template: a name from :mod:`.templates`, or CHAT_TEMPLATE.

    Raises:
        TinyGPTQError: no such template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        self.template = template
        self.bos, self.eos = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
        self.chat_template = tokenizer.chat_template or ""
        if template != CHAT_TEMPLATE:
            get_template(template)  # an unknown name should not wait for a download
        elif not self.chat_template:
            raise TinyGPTQError("the model folder has no chat template; choose a template by name")

    def conversation(self, messages: list[Message]) -> str:
        """A whole conversation as text, its last answer included."""
        if self.template == CHAT_TEMPLATE:
            return render_chat(self.chat_template, messages, self.bos, self.eos, add_generation_prompt=False)
        return render_conversation(self.template, messages, self.bos, self.eos)

    def record(self, record: dict, where: str) -> str:
        """One record as text, by the fields it has.

        Raises:
            TinyGPTQError: it has none of those, or of another type; the line begins with ``where``.
        """
        if "messages" in record:
            return self.conversation(_messages(record["messages"], where))
        for fields in (("prompt", "response"), ("instruction", "output"), ("instruction", "response")):
            if all(name in record for name in fields):
                prompt, reply = (_string(record, name, where) for name in fields)
                context = next((_string(record, name, where) for name in ("input", "context") if record.get(name)), "")
                prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
                return self.conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}])
        if "text" in record:
            return _string(record, "text", where) + "\n\n"
        raise TinyGPTQError(
            f"{where}: found the fields {', '.join(map(str, record)) or '(none)'}; expected text, or "
            "prompt and response, or instruction, input and output, or messages"
        )


def _string(record: dict, name: str, where: str) -> str:
    if not isinstance(record[name], str):
        raise TinyGPTQError(f"{where}: the field {name!r} should be text, found {type(record[name]).__name__}")
    return record[name]


def _messages(messages: Any, where: str) -> list[Message]:
    wanted = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
        )
    )
    if not wanted:
        raise TinyGPTQError(f"{where}: the field 'messages' should be a list of objects with role and content")
    return messages


def file_text(path: Path, writer: RecordWriter) -> str:
    """A text file as it is; the records of a .jsonl file one after another.

    Raises:
        TinyGPTQError: it cannot be read, is not UTF-8, or a line is not a record; the line is named.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text: line ends stay what they are
    except UnicodeDecodeError as error:
        raise TinyGPTQError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise TinyGPTQError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix.lower() != ".jsonl":
        return text
    return "".join(_record_texts(text, path, writer))


def _record_texts(text: str, path: Path, writer: RecordWriter) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TinyGPTQError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise TinyGPTQError(f"{where}: expected a JSON object, found {type(record).__name__}")
        try:
            yield writer.record(record, where)
        except TinyGPTQError as error:  # a template's complaint does not know the line
            raise error if str(error).startswith(where) else TinyGPTQError(f"{where}: {error}") from None


def conversations(rows: Iterable[dict]) -> list[list[Message]]:
    """English conversations of an oasst1 table: each tree walked from its root along the best-ranked replies.

    rows: one message each, with message_id, parent_id, text, role ("prompter" or "assistant"), lang, rank (0 is best,
    may be None) and, perhaps, deleted. A walk ends with the last assistant's reply; roots without any are left out.
    """
    children: dict[str | None, list[dict]] = {}
    for reply in rows:
        if reply["lang"] == "en" and not reply.get("deleted"):
            children.setdefault(reply["parent_id"], []).append(reply)
    for replies in children.values():
        replies.sort(key=lambda row: (row["rank"] is None, row["rank"] or 0))
    roles = {"prompter": "user", "assistant": "assistant"}
    found: list[list[Message]] = []
    for first in children.get(None, []):
        row: dict | None = first
        messages: list[Message] = []
        while row is not None:
            messages.append({"role": roles[row["role"]], "content": row["text"]})
            row = next(iter(children.get(row["message_id"], [])), None)
        if messages[-1]["role"] == "user":
            messages.pop()
        if messages:
            found.append(messages)
    return found
