"""The tokenizer inside a GGUF file to the files of a Hugging Face folder.

Model "gpt2" is byte-level BPE: tokens, merges and the name of a rule that cuts a text into words first, which becomes
tokenizer.json. Model "llama" is sentencepiece: pieces, scores and kinds, which become tokenizer.model.
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import write_json

log = logging.getLogger(__name__)

# Kinds of token: GGUF's numbers are sentencepiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's name -> GGUF's
END_KEYS = ("eos", "eot", "eom")  # ends of sequence, turn and message: generation stops at each

# How "pre" cuts words (llama.cpp, llm_tokenizer_bpe): each rule is applied to the pieces that the one before it left.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_WORDS = CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
DEFAULT_WORDS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
WORD_RULES: dict[str, tuple[str, ...]] = {
    "default": DEFAULT_WORDS,
    "llama-bpe": (LLAMA3_WORDS,),
    "llama3": (LLAMA3_WORDS,),
    "qwen2": (QWEN2_WORDS,),
}
GPT2_ALONE = ("gpt-2", "olmo", "mpt")  # GPT-2's rule and nothing before it
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")  # one digit at a time before it
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3")  # a word that is a token needs no merges; and BOS is on by default


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """``{"bos": id, ...}`` of the special tokens that the file names."""
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_KEYS.items()}
    return {name: id for name, id in found.items() if id is not None}


def write_tokenizer(metadata: dict[str, Any], folder: Path, max_length: int, where: Path) -> None:
    """tokenizer.json or tokenizer.model, tokenizer_config.json, special_tokens_map.json and generation_config.json.

    Raises:
        TinyGPTQError: a kind of tokenizer or a word rule that is not known, or lists that contradict one another.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TinyGPTQError(f"{where}: tokenizer model is {kind!r}, supported are 'gpt2' and 'llama'")
    tokens = _list(metadata, "tokens", str, where)
    kinds = _list(metadata, "token_type", int, where, len(tokens))
    ids = special_ids(metadata)
    wrong = [id for id in ids.values() if not 0 <= id < len(tokens)]
    if wrong:
        raise TinyGPTQError(f"{where}: special token id {wrong[0]} is outside the {len(tokens)} tokens")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
        if kind == "gpt2":  # files older than May 2024, some of them of models with a rule of their own
            log.warning("%s: names no pre-tokeniser; the default one is written, as llama.cpp would use", where)
    bos_by_default = kind == "llama" or pre in WHOLE_WORDS_FIRST
    rules = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)) and "bos" in ids,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in ids,
    }
    if kind == "gpt2":
        # the generic class: transformers' GPT2Tokenizer would put its own word rule in place of the file's
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **rules, "add_prefix_space": False}
        tokenizer = bpe_tokenizer(tokens, kinds, _list(metadata, "merges", str, where), pre, where)
        _add_ends(tokenizer, tokens, ids, rules)
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        # legacy, as llama.cpp does it: the leading space also follows a special token inside a text
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **rules,
            "add_prefix_space": prefix,
            "legacy": True,
            "added_tokens_decoder": _added_tokens(tokens, kinds),
        }
        scores = _list(metadata, "scores", float, where, len(tokens))
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, scores, kinds, ids, prefix, where))
    named = {f"{name}_token": tokens[id] for name, id in ids.items()}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_length, **named}
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "generation_config.json", _generation_config(metadata, ids))


def _list(metadata: dict[str, Any], key: str, kind: type, where: Path, length: int | None = None) -> list:
    """A list of the tokenizer's metadata: of this kind and, if given, this length."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TinyGPTQError(f"{where}: metadata tokenizer.ggml.{key} is missing or no list of {kind.__name__}")
    if length is not None and len(value) != length:
        raise TinyGPTQError(f"{where}: tokenizer.ggml.{key} has {len(value)} entries, expected {length}")
    return value


def _generation_config(metadata: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    ends = [metadata[key] for name in END_KEYS if (key := f"tokenizer.ggml.{name}_token_id") in metadata]
    ends = list(dict.fromkeys(ends))
    config: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    return config | ({"eos_token_id": ends} if len(ends) > 1 else {})


# ------------------------------------------------------------------------------------------------------ byte-level BPE


def bpe_tokenizer(tokens: list[str], kinds: list[int], merges: list[str], pre: str, where: Path) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer``; special and user-defined tokens are matched before the word rule."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models
    except ImportError:
        raise TinyGPTQError(f"{where}: writing tokenizer.json needs tokenizers: pip install tinygptq[hf]") from None
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TinyGPTQError(f"{where}: {len(tokens) - len(vocabulary)} tokens occur twice")
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]  # tokenizers refuses those that are no pairs
    words = word_rule(pre, where)
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in WHOLE_WORDS_FIRST)
    except Exception as error:  # the package raises bare Exception, for a merge whose parts are no tokens
        raise TinyGPTQError(f"{where}: the merges do not fit the tokens ({str(error).splitlines()[0]})") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, kinds, strict=True))
    special = [token for token, kind in typed if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in typed if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def word_rule(pre: str, where: Path) -> Any:
    """The ``tokenizers`` pre-tokeniser that a GGUF's ``tokenizer.ggml.pre`` stands for."""
    from tokenizers import Regex, pre_tokenizers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GPT2_ALONE:
        return gpt2
    if pre in SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre not in WORD_RULES:
        known = ", ".join(sorted({*WORD_RULES, *GPT2_ALONE, *SINGLE_DIGITS}))
        raise TinyGPTQError(f"{where}: pre-tokeniser {pre!r} is not known (known: {known})")
    cuts = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in WORD_RULES[pre]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_ends(tokenizer: Any, tokens: list[str], ids: dict[str, int], rules: dict[str, bool]) -> None:
    """BOS and EOS as tokenizer.json's own rule, for readers that do not look at tokenizer_config.json's flags."""
    from tokenizers.processors import TemplateProcessing

    bos = [tokens[ids["bos"]]] if rules["add_bos_token"] else []
    eos = [tokens[ids["eos"]]] if rules["add_eos_token"] else []
    if bos or eos:
        named = [(token, tokens.index(token)) for token in dict.fromkeys([*bos, *eos])]
        tokenizer.post_processor = TemplateProcessing(
            single=[*bos, "$A:0", *eos], pair=[*bos, "$A:0", *eos, *bos, "$B:0", *eos], special_tokens=named
        )


# ------------------------------------------------------------------------------------------------------ sentencepiece


def sentencepiece_model(
    tokens: list[str], scores: list[float], kinds: list[int], ids: dict[str, int], prefix: bool, where: Path
) -> bytes:
    """A sentencepiece ModelProto (sentencepiece_model.proto) of a BPE model with these pieces.

    Fields: 1 pieces {1 piece, 2 score, 3 type}; 2 trainer_spec {3 model_type, 4 vocab_size, 35 byte_fallback, 40-43 the ids
    of unk, bos, eos and pad}; 3 normalizer_spec {1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces}.
    """
    kinds = list(kinds)
    if UNKNOWN not in kinds:  # sentencepiece refuses a model without one
        kinds[ids.get("unk", 0)] = UNKNOWN
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _float(2, score) + _varint(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    bpe = 2
    trainer = _varint(3, bpe) + _varint(4, len(tokens)) + _varint(35, int(BYTE in kinds)) + _varint(40, kinds.index(UNKNOWN))
    trainer += b"".join(_varint(field, ids.get(name, -1)) for field, name in ((41, "bos"), (42, "eos"), (43, "pad")))
    normalizer = _field(1, b"identity") + _varint(3, int(prefix)) + _varint(4, 0)
    model = pieces + _field(2, trainer) + _field(3, normalizer)
    _require_loadable(model, where)
    return model


def _require_loadable(model: bytes, where: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise TinyGPTQError(f"{where}: its tokens are no sentencepiece model ({str(error).splitlines()[0]})") from None


def _number(value: int) -> bytes:
    """A protobuf varint: seven bits a byte, low ones first; negative numbers as 64-bit two's complement."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)  # wire type 0


def _field(field: int, payload: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(payload)) + payload  # wire type 2, length-delimited


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)  # wire type 5, 32 bits


def _added_tokens(tokens: list[str], kinds: list[int]) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder: the tokens that are matched as a whole when a text holds them."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(id): {"content": token, **plain, "special": kind != USER_DEFINED}
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
