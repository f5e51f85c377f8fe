"""Text to token ids and back: sentencepiece folders (tokenizer.model) and tokenizers folders (tokenizer.json).

Encoding follows transformers: special and added tokens typed inside a text become their single id, and BOS/EOS follow
the folder's own files. Decoding is written here once for both kinds: an id stands for some bytes, the bytes of all ids
are joined and read as UTF-8, and the one space that LLaMA's encoder puts before a text is taken off again. Streaming
does the same a token at a time, so its pieces always join to exactly what decoding everything at once gives.
"""

from __future__ import annotations

import codecs
import importlib.util
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tinygptq.config import read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.tokenizer_rules import AddedToken, FolderRules

log = logging.getLogger(__name__)

SPACE = "\u2581"  # sentencepiece writes a space as this character
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
FAST_ONLY = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that know tokenizer.json alone

# sentencepiece writes one U+FFFD for each undecodable byte, Python and tokenizers one for each undecodable sequence.
ONE_MARK_A_BYTE = "tinygptq-one-mark-a-byte"


def _one_mark_a_byte(error: Any) -> tuple[str, int]:
    """For a UnicodeDecodeError."""
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(ONE_MARK_A_BYTE, _one_mark_a_byte)


# ------------------------------------------------------------------------------------------------ the interface


class Tokenizer(ABC):
    """Text to ids and back. Build one with :meth:`from_folder`.

    Attributes: ``bos_id``, ``eos_id`` (None when there is none), ``vocab_size`` (largest id + 1), ``special_ids``,
    ``chat_template`` (a Jinja text or None).
    """

    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    special_ids: frozenset[int]
    chat_template: str | None
    strips_space: bool  # the encoder put one space before the text, so the decoder takes one off
    utf8_errors: str

    @staticmethod
    def from_folder(folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder.

        With both files present tokenizer.model is read (it needs no extra package and is what LLaMA was trained
        with), unless the folder's tokenizer_class is one that only ever reads tokenizer.json and `tokenizers` is
        installed. No tokenizer file, or one that cannot be read, is a TinyGPTQError.
        """
        folder = Path(folder)
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        rules = FolderRules.read(folder)
        prefers_fast = fast.is_file() and rules.tokenizer_class in FAST_ONLY
        if prefers_fast and model.is_file() and importlib.util.find_spec("tokenizers") is None:
            log.warning(
                "%s asks for tokenizer.json, which needs pip install tinygptq[hf]; reading tokenizer.model instead", folder
            )
            prefers_fast = False
        if model.is_file() and not prefers_fast:
            return SentencePieceTokenizer(model, rules)
        if fast.is_file():
            return JsonTokenizer(fast, rules)
        raise TinyGPTQError(f"{folder}: no tokenizer found (neither tokenizer.model nor tokenizer.json)")

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        ``bos`` None follows the folder's rule for BOS and EOS; True puts BOS (and no EOS) to the text's own ids;
        False gives the text's own ids alone. Special tokens written in the text become their ids.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TinyGPTQError(f"the text is not valid Unicode: a lone surrogate at position {error.start}") from None
        if bos is None:
            return self._encode_by_rule(text)
        if not bos:
            return self._encode_text(text)
        if self.bos_id is None:
            raise TinyGPTQError("this tokenizer has no BOS token")
        return [self.bos_id, *self._encode_text(text)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``. Undecodable bytes become U+FFFD; ids the tokenizer does not know stand for nothing."""
        text = b"".join(self.token_bytes(id, skip_special) for id in ids).decode("utf-8", self.utf8_errors)
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_text(self, id: int | None) -> str:
        """One token's own text, a special one's too; what is no UTF-8 becomes U+FFFD. "" for None, a token there is not."""
        return "" if id is None else self.token_bytes(id, skip_special=False).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder fed one id at a time. ``continues``: the ids follow a prompt, so a first space is kept."""
        return StreamDecoder(self, skip_special, continues)

    def token_bytes(self, id: int, skip_special: bool = True) -> bytes:
        """The bytes one id stands for (perhaps part of a character)."""
        if not 0 <= id < self.vocab_size or (skip_special and id in self.special_ids):
            return b""
        return self._piece(int(id))

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of the text alone."""

    @abstractmethod
    def _encode_by_rule(self, text: str) -> list[int]:
        """Ids with BOS and EOS as the folder wants them."""

    @abstractmethod
    def _piece(self, id: int) -> bytes:
        """Bytes of an id in [0, vocab_size), special tokens included."""


class StreamDecoder:
    """Ids to text one at a time, in constant work per id; the pieces join to ``tokenizer.decode`` of all the ids.

    ``push`` keeps back the bytes of an unfinished character until its last byte comes; ``flush`` ends the text and
    gives what is still held back (as U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, continues: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.utf8_errors)
        self._strip = tokenizer.strips_space and not continues

    def push(self, id: int) -> str:
        """The text that is certain once ``id`` has come; may be empty."""
        return self._emit(self._utf8.decode(self._tokenizer.token_bytes(id, self._skip_special)))

    def flush(self) -> str:
        """The rest of the text."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


# ------------------------------------------------------------------------------------------------ sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model through sentencepiece, with the added tokens of the folder's JSON files.

    Encodes as transformers' LlamaTokenizer does. Its `legacy` flag (on when the folder does not name it) decides what
    follows a special token written inside a text: legacy puts the leading space before every stretch of text, not
    legacy before the first only, and only when the text begins with it. Decoding takes off exactly the one space that
    encoding put first (the slow tokenizer of transformers 4 can take a typed one with it).
    """

    utf8_errors = ONE_MARK_A_BYTE

    def __init__(self, path: Path, rules: FolderRules | None = None):
        from sentencepiece import SentencePieceProcessor

        self._rules = rules = rules or FolderRules()
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TinyGPTQError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
        self._size = self._model.vocab_size()
        self.chat_template = rules.chat_template
        self._contents, flags = self._place(rules)  # id -> text, text -> (id, token)
        self._added = flags
        pattern = "|".join(re.escape(text) for text in sorted(flags, key=len, reverse=True))
        self._pattern = re.compile(f"({pattern})") if pattern else None
        special = {id for id, token in flags.values() if token.special}
        controls = (self._model.bos_id(), self._model.eos_id(), self._model.unk_id(), self._model.pad_id())
        self.special_ids = frozenset(special | {id for id in controls if id >= 0})
        self.bos_id = self._named_id("bos_token", self._model.bos_id())
        self.eos_id = self._named_id("eos_token", self._model.eos_id())
        self.vocab_size = max([self._size - 1, *self._contents]) + 1
        self.strips_space = rules.add_prefix_space and self._model.encode("a", out_type=str)[0].startswith(SPACE)

    def _place(self, rules: FolderRules) -> tuple[dict[int, str], dict[str, tuple[int, AddedToken]]]:
        """Give every added token its id: the folder's, the model's own piece, or the next free one."""
        model, tokens = self._model, {token.content: token for token in rules.added}
        for own in (model.unk_id(), model.bos_id(), model.eos_id()):  # transformers names these three by default
            if own >= 0:
                tokens.setdefault(model.id_to_piece(own), AddedToken(model.id_to_piece(own)))
        contents: dict[int, str] = {}
        flags: dict[str, tuple[int, AddedToken]] = {}
        for token in tokens.values():
            id = token.id
            if id is None:
                id = model.piece_to_id(token.content)
                if model.id_to_piece(id) != token.content:  # the answer for an unknown piece is unk
                    id = max([self._size - 1, *contents]) + 1
            contents[id] = token.content
            flags[token.content] = (id, token)
        return contents, flags

    def _named_id(self, name: str, fallback: int) -> int | None:
        token = self._rules.named.get(name)
        id = self._added[token.content][0] if token else fallback
        return id if id >= 0 else None

    @cached_property
    def _bare_model(self):
        """The same model without the leading space: a second normalizer_spec {add_dummy_prefix: false} (field 3 of
        the ModelProto, field 3 in it) appended to the file; protobuf merges the two."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._model.serialized_model_proto() + b"\x1a\x02\x18\x00")

    def _encode_text(self, text: str) -> list[int]:
        parts = self._pattern.split(text) if self._pattern else [text]  # text, token, text, token, ..., text
        for i in range(1, len(parts), 2):
            token = self._added[parts[i]][1]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._added[part][0])
            elif part:
                prefixed = self._rules.legacy or (i == 0 and self._rules.add_prefix_space)
                ids += (self._model if prefixed else self._bare_model).encode(part)
        return ids

    def _encode_by_rule(self, text: str) -> list[int]:
        rules = self._rules
        add_bos = rules.is_llama if rules.add_bos is None else rules.add_bos
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if rules.add_eos and self.eos_id is not None else []
        return bos + self._encode_text(text) + eos

    def _piece(self, id: int) -> bytes:
        if id in self._contents:
            return self._contents[id].encode("utf-8")
        if id >= self._size:  # a gap between the model's pieces and an added token
            return b""
        piece = self._model.id_to_piece(id)
        if self._model.is_byte(id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")


# ------------------------------------------------------------------------------------------------ tokenizers


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-in character for each byte -> the byte: printable ones stand for themselves, the rest, in order,
    for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class JsonTokenizer(Tokenizer):
    """tokenizer.json through the `tokenizers` package (an optional one).

    Two kinds of decoder are known, which are all that LLaMA models use: ByteLevel, and sentencepiece's pieces with
    byte fallback. A run of byte pieces that is not UTF-8 as a whole is read character by character, as sentencepiece
    itself does; `tokenizers` would replace all of it.
    """

    def __init__(self, path: Path, rules: FolderRules | None = None):
        try:
            import tokenizers
        except ImportError:
            raise TinyGPTQError(f"{path}: reading it needs the package tokenizers: pip install tinygptq[hf]") from None
        self._rules = rules = rules or FolderRules()
        decoder = read_json(path).get("decoder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise TinyGPTQError(f"{path}: not readable by tokenizers ({str(error).splitlines()[0]})") from None
        self._tokenizer.no_truncation()  # a saved training limit must not cut texts
        self._tokenizer.no_padding()
        self.chat_template = rules.chat_template
        self._add_tokens(tokenizers.AddedToken, path)
        self._set_decoder(decoder, path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_id, self.eos_id = self._named_id("bos_token"), self._named_id("eos_token")
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _add_tokens(self, added_token: type, path: Path) -> None:
        """Add the tokens that the folder's other files name and tokenizer.json does not."""
        present = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in self._rules.added:
            if token.content in present:
                continue
            new = added_token(
                token.content, special=token.special, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip
            )
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([new])
            id = self._tokenizer.token_to_id(token.content)
            if token.id is not None and id != token.id:
                raise TinyGPTQError(f"{path}: {token.content!r} should have id {token.id}, the next free one is {id}")

    def _set_decoder(self, decoder: object, path: Path) -> None:
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = {step.get("type"): step for step in steps}
        self._alphabet = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        if self._alphabet is None and not kinds.keys() & {"Replace", "Metaspace", "ByteFallback"}:
            raise TinyGPTQError(
                f"{path}: decoder {sorted(map(str, kinds)) or 'none'} is not known (ByteLevel and LLaMA's byte fallback are)"
            )
        metaspace = kinds.get("Metaspace", {"prepend_scheme": "never"})
        self.strips_space = self._alphabet is None and (
            "Strip" in kinds or metaspace.get("prepend_scheme", "always") != "never"
        )
        self.utf8_errors = "replace" if self._alphabet else ONE_MARK_A_BYTE

    def _named_id(self, name: str) -> int | None:
        token = self._rules.named.get(name)
        return self._tokenizer.token_to_id(token.content) if token else None

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_by_rule(self, text: str) -> list[int]:
        """tokenizer.json's post-processor, unless tokenizer_config.json says add_bos_token or add_eos_token."""
        rules = self._rules
        if rules.add_bos is None and rules.add_eos is None:
            return self._tokenizer.encode(text).ids
        add_bos = rules.is_llama if rules.add_bos is None else rules.add_bos
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if rules.add_eos and self.eos_id is not None else []
        return bos + self._encode_text(text) + eos

    def _piece(self, id: int) -> bytes:
        piece = self._tokenizer.id_to_token(id)
        if piece is None:
            return b""
        if self._alphabet is not None:
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
            return piece.encode("utf-8")  # an added token with characters of its own
        if self._byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")
