"""What the JSON files beside a tokenizer say: its special and added tokens, its BOS/EOS rule, its chat template."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from tinygptq.config import read_json
from tinygptq.errors import TinyGPTQError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the model's own rules see it; ``lstrip``/``rstrip`` eat spaces beside it."""

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class FolderRules:
    """What tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja say."""

    tokenizer_class: str | None = None
    add_bos: bool | None = None  # None: not said
    add_eos: bool | None = None
    legacy: bool = True
    add_prefix_space: bool = True
    chat_template: str | None = None
    named: dict[str, AddedToken] = field(default_factory=dict)  # "bos_token" -> its token
    added: tuple[AddedToken, ...] = ()

    @property
    def is_llama(self) -> bool:
        """LLaMA's own tokenizer class, or none named: BOS is on unless the folder says otherwise."""
        return self.tokenizer_class is None or "Llama" in self.tokenizer_class

    @classmethod
    def read(cls, folder: Path) -> FolderRules:
        """Read the rules of a folder; files that are not there say nothing, files that are broken are an error."""
        raw = {
            name: read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        }
        config, special_map = raw["tokenizer_config.json"], raw["special_tokens_map.json"]
        named = {}
        for name in NAMED_TOKENS:
            token = _token(config.get(name) or special_map.get(name), f"{folder}: '{name}'")
            if token is not None:
                named[name] = token
        extra = config.get("additional_special_tokens") or special_map.get("additional_special_tokens") or []
        extra = [token for item in extra if (token := _token(item, f"{folder}: 'additional_special_tokens'"))]
        specials = [*named.values(), *extra]
        return cls(
            tokenizer_class=config.get("tokenizer_class"),
            add_bos=_maybe_flag(config, "add_bos_token", folder),
            add_eos=_maybe_flag(config, "add_eos_token", folder),
            legacy=_maybe_flag(config, "legacy", folder) is not False,
            add_prefix_space=_maybe_flag(config, "add_prefix_space", folder) is not False,
            chat_template=_chat_template(folder, config),
            named=named,
            added=_added_tokens(folder, config.get("added_tokens_decoder") or {}, raw["added_tokens.json"], specials),
        )


def _maybe_flag(config: dict, key: str, folder: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TinyGPTQError(f"{folder}/tokenizer_config.json: '{key}' should be true or false, found {value!r}")
    return value


def _token(value: object, where: str, id: int | None = None, special: bool = True) -> AddedToken | None:
    """A token as the JSON files write it: its text, or an object with content and flags. Empty text names none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return AddedToken(value, id, special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TinyGPTQError(f"{where} should be a token's text, found {value!r}")
    if not value["content"]:
        return None
    return AddedToken(
        value["content"],
        id,
        bool(value.get("special", special)),
        bool(value.get("lstrip", False)),
        bool(value.get("rstrip", False)),
    )


def _added_tokens(folder: Path, decoder: dict, ids: dict, specials: list[AddedToken]) -> tuple[AddedToken, ...]:
    """Added tokens in id order, each once; those whose id the folder does not say come last, with id None."""
    known: dict[str, AddedToken] = {}
    names = {token.content for token in specials}
    for key, value in decoder.items():
        token = _token(value, f"{folder}: added_tokens_decoder[{key!r}]", _id(key, folder), special=False)
        if token is not None:
            known[token.content] = replace(token, special=token.special or token.content in names)
    for content, id in ids.items():
        known.setdefault(content, AddedToken(content, _id(id, folder), content in names))
    for token in specials:
        known.setdefault(token.content, token)
    return tuple(sorted(known.values(), key=lambda token: (token.id is None, token.id or 0)))


def _id(value: object, folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise TinyGPTQError(f"{folder}: an added token's id should be a number, found {value!r}")
    return int(value)


def _chat_template(folder: Path, config: dict) -> str | None:
    """The folder's chat template: chat_template.jinja, else tokenizer_config.json's (of a list, the default one)."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}.get("default")
    if value is not None and not isinstance(value, str):
        raise TinyGPTQError(f"{folder}/tokenizer_config.json: 'chat_template' should be text, found {type(value).__name__}")
    return value
