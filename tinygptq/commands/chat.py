"""``tinygptq chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from tinygptq.commands.arguments import add_cache_bits, add_device, add_model, add_sampling
from tinygptq.errors import TinyGPTQError
from tinygptq.templates import FOLDER_TEMPLATE, TEMPLATES

HELP = """/reset          forget the conversation
/system TEXT    set the system message and forget the conversation; without TEXT, take it away
/save FILE      write the conversation as JSON
/retry          another answer to the last message
/stats          tokens and speed of the last answer
/help           this
/exit           leave, as does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""
PROMPT, MORE = ">>> ", "... "


def register(command) -> None:
    """Add the subcommand to the parser; see the package."""
    parser = command("chat", _chat, "a conversation in the terminal; /help there lists what else it can do")
    add = parser.add_argument
    add_model(parser)
    add(
        "--template",
        choices=[FOLDER_TEMPLATE, *sorted(TEMPLATES)],
        help="how turns are written (default: the folder's own chat template, or none where it has none)",
    )
    add("--system", metavar="TEXT", help="a system message")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: %(default)s)")
    add_sampling(parser)
    add("--seed", type=int, help="same seed, same answers")
    add("--context", type=int, metavar="N", help="room for the conversation (default: the model's maximum)")
    add_cache_bits(parser)
    add_device(parser)


def _chat(args: argparse.Namespace) -> None:
    from tinygptq.conversation import Conversation
    from tinygptq.language_model import load

    if sys.stdin is None:
        raise TinyGPTQError("chat reads standard input, which is closed")
    options = {"revision": args.revision, "cache_bits": args.cache_bits}
    model = load(args.model, device=args.device, context=args.context, **options)
    conversation = Conversation(
        model, args.template, args.system, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history, where the system has it
        print(f"{model.checkpoint.folder.name}, template {conversation.template}; /help lists commands")
    Terminal(conversation).run()


class Terminal:
    """Reads lines, prints answers; the conversation knows nothing of it."""

    def __init__(self, conversation) -> None:
        self.conversation = conversation

    def run(self) -> None:
        """Until the input ends or /exit."""
        while True:
            try:
                line = self._read()
                if line is None or line.strip() in ("/exit", "/quit"):
                    return
                if line.strip():
                    self._do(line)
            except TinyGPTQError as error:  # a mistake ends neither the conversation nor the program
                print(f"{error}", file=sys.stderr)
            except KeyboardInterrupt:  # at the prompt: the line is given up
                print()

    def _read(self) -> str | None:
        """One message, None at the end of the input."""
        lines, prompt = [], PROMPT if sys.stdin.isatty() else ""
        try:
            while True:
                line = input(prompt)
                lines.append(line.removesuffix("\\"))
                if not line.endswith("\\"):
                    return "\n".join(lines)
                prompt = MORE if prompt else ""
        except EOFError:
            if sys.stdin.isatty():
                print()
            return "\n".join(lines) or None
        except UnicodeDecodeError:
            raise TinyGPTQError("the input is not valid UTF-8; this line is left out") from None

    def _do(self, line: str) -> None:
        name, _, rest = line.rstrip().partition(" ")
        commands = {"/reset": self._reset, "/system": self._system, "/save": self._save, "/retry": self._retry,
                    "/stats": self._stats, "/help": lambda _: print(HELP)}  # fmt: skip
        if name in commands:
            commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            raise TinyGPTQError(f"unknown command {name}; /help lists them, and a message may begin with a space")
        else:
            self._answer(line.strip())

    def _answer(self, text: str) -> None:
        pieces = self.conversation.answer(text)
        leading = True  # the space or newline that most templates leave to the model
        try:
            for piece in pieces:
                piece = piece.lstrip() if leading else piece
                leading = leading and not piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            pieces.close()
            print(flush=True)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        print("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        self.conversation.reset()
        print("the system message is set" if text else "there is no system message")

    def _save(self, name: str) -> None:
        if not name:
            raise TinyGPTQError("/save needs the name of a file")
        system = [{"role": "system", "content": self.conversation.system}] if self.conversation.system else []
        record = {"messages": [*system, *self.conversation.messages]}
        try:
            path, content = Path(name).expanduser(), (json.dumps(record, ensure_ascii=False) + "\n").encode()
        except (RuntimeError, UnicodeEncodeError) as error:  # no such home; text that is no Unicode
            raise TinyGPTQError(f"/save {name}: {error}") from None
        _write_new(path, content)
        print(f"{len(self.conversation.messages)} messages in {path}")

    def _retry(self, _: str) -> None:
        if not self.conversation.messages:
            raise TinyGPTQError("there is no message to answer again")
        del self.conversation.messages[-1]
        self._answer(self.conversation.messages.pop()["content"])

    def _stats(self, _: str) -> None:
        print(self.conversation.stats or "no answer yet")


def _write_new(path: Path, content: bytes) -> None:
    """A file that was not there before, whole or not at all."""
    try:
        file = path.open("xb")
    except FileExistsError:
        raise TinyGPTQError(f"{path} exists already; choose another name") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise TinyGPTQError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    try:
        with file:
            file.write(content)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TinyGPTQError(f"{path}: cannot be written ({error.strerror or error})") from None
