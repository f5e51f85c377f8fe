"""Configurations: parsed from JSON once, validated once, then frozen.

Three of them: :class:`LlamaConfig` (a folder's ``config.json``), :class:`QuantizeConfig` (``quantize_config.json`` or
``config.json``'s ``quantization_config``) and :class:`GenerationConfig` (``generation_config.json``).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError

SUPPORTED_BITS = (2, 3, 4, 8)
MOST_LAYERS = 10_000  # every layer is walked through before any tensor is looked for
LARGEST_NUMBER = 1e18  # in a config: beyond any size there is, and still an int64


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from ``path``; anything else (missing, not JSON, not an object) is a one-line error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TinyGPTQError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number too long for Python
        raise TinyGPTQError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise TinyGPTQError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _number(raw: dict, key: str, default, kind: type, *, low: float, high: float = math.inf, where: str):
    """One number of a config: ``raw[key]`` or the default, of type ``kind`` and from ``low`` to ``high``."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise TinyGPTQError(f"{where}: '{key}' is missing")
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not whole):
        raise TinyGPTQError(f"{where}: '{key}' should be {kind.__name__}, found {value!r}")
    if not low <= value <= LARGEST_NUMBER:  # also false for NaN
        raise TinyGPTQError(f"{where}: '{key}' should be at least {low} and finite, found {value!r}")
    if value > high:
        raise TinyGPTQError(f"{where}: '{key}' should be at most {high:g}, found {kind(value)!r}")
    return kind(value)


def _flag(raw: dict, key: str, default: bool, where: str) -> bool:
    value = raw.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TinyGPTQError(f"{where}: '{key}' should be true or false, found {value!r}")
    return value


def _ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """Token ids given as null, one id or a list of ids."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
        raise TinyGPTQError(f"{where}: '{key}' should be a token id or a list of them, found {value!r}")
    return tuple(items)


# ---------------------------------------------------------------------------------------------------------- LLaMA


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was trained on.

    ``kind`` is ``linear`` (positions divided by ``factor``), ``dynamic`` (theta grows with the length actually reached,
    "NTK-aware") or ``llama3`` (low frequencies divided, high ones kept, a smooth step between).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_dict(cls, raw: Any, max_positions: int, where: str) -> RopeScaling | None:
        """Parse ``rope_scaling`` (or ``rope_parameters``); None where nothing is stretched. Raises TinyGPTQError."""
        if raw is None:
            return None
        if not isinstance(raw, dict):
            raise TinyGPTQError(f"{where}: 'rope_scaling' should be an object or null, found {raw!r}")
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind == "default":
            return None
        if kind not in ("linear", "dynamic", "llama3"):
            raise TinyGPTQError(f"{where}: rope_scaling type {kind!r} is not supported (linear, dynamic, llama3)")
        original = _number(raw, "original_max_position_embeddings", max_positions, int, low=1, where=where)
        if kind == "dynamic":  # transformers looks at the model's own maximum alone
            original = max_positions
        low = _number(raw, "low_freq_factor", 1.0, float, low=1e-6, where=where)
        high = _number(raw, "high_freq_factor", 4.0, float, low=1e-6, where=where)
        if high <= low:
            raise TinyGPTQError(f"{where}: rope_scaling needs high_freq_factor > low_freq_factor, found {high}, {low}")
        return cls(kind, _number(raw, "factor", None, float, low=1.0, where=where), low, high, original)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA: every field under the name ``config.json`` gives it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """Parse the dict of a ``config.json``; errors name the field, what was found and what was expected."""
        _require_llama(raw, where)

        def size(key: str, default: int | None = None) -> int:
            return _number(raw, key, default, int, low=1, where=where)

        hidden, heads, positions = size("hidden_size"), size("num_attention_heads"), size("max_position_embeddings", 2048)
        # transformers 5 moved rope_theta and rope_scaling into one object, "rope_parameters".
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise TinyGPTQError(f"{where}: 'rope_parameters' should be an object or null, found {rope!r}")
        theta_from = rope if "rope_theta" in rope else raw
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise TinyGPTQError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
        if raw.get("head_dim") is None and hidden % heads:
            raise TinyGPTQError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = size("head_dim", hidden // heads)
        if head_dim % 2:
            raise TinyGPTQError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need pairs")
        bos = _ids(raw.get("bos_token_id"), "bos_token_id", where)
        return cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=_layers(raw, where),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6, float, low=0.0, where=where),
            rope_theta=_number(theta_from, "rope_theta", 10000.0, float, low=1e-6, where=where),
            rope_scaling=RopeScaling.from_dict(raw.get("rope_scaling") or rope or None, positions, where),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", False, where),
            attention_bias=_flag(raw, "attention_bias", False, where),
            mlp_bias=_flag(raw, "mlp_bias", False, where),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_ids(raw.get("eos_token_id"), "eos_token_id", where),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> LlamaConfig:
        """Parse ``config.json`` of a folder; raises TinyGPTQError as :meth:`from_dict` does, and where there is none."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``{name within a block: (in_features, out_features)}`` of the seven linears, in the order they run."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (hidden, q),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (q, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    def has_bias(self, name: str) -> bool:
        """Whether the linear of this name adds a bias (LLaMA's own never do)."""
        return self.attention_bias if "self_attn." in name else self.mlp_bias


def _layers(raw: dict, where: str) -> int:
    layers = _number(raw, "num_hidden_layers", None, int, low=1, where=where)
    if layers > MOST_LAYERS:
        raise TinyGPTQError(f"{where}: 'num_hidden_layers' is {layers}, expected at most {MOST_LAYERS}")
    return layers


def _require_llama(raw: dict, where: str) -> None:
    """Refuse what has another forward pass: other architectures, another activation."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if architectures is not None and architectures != ["LlamaForCausalLM"] and architectures != ["LLaMAForCausalLM"]:
        raise TinyGPTQError(f"{where}: architectures is {architectures}, only ['LlamaForCausalLM'] is supported")
    if architectures is None and model_type != "llama":
        raise TinyGPTQError(f"{where}: model_type is {model_type!r}, only 'llama' is supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise TinyGPTQError(f"{where}: hidden_act is {raw['hidden_act']!r}, LLaMA's is 'silu'")


# ------------------------------------------------------------------------------------------------------ quantising


@dataclass(frozen=True)
class Recipe:
    """What is done beyond the paper's algorithm to choose better scales and codes; the file's format knows nothing of it.

    clip: each group's scale is searched for the smallest rounding error weighted by diag(H) (`gptq.grid.search_clip`).
    act_order: columns are quantised in descending order of diag(H) although groups stay contiguous in the file, on grids
    found beforehand from the uncorrected weights. (With desc_act, groups follow that order instead, as in the original.)
    shrink: the share of H's off-diagonal entries that is taken away before anything else (`gptq.hessian.shrink`).
    drift, residual: how much of the difference that quantising has already made to a linear's inputs, and to the residual
    stream it writes to, its weights make up for (`gptq.drift`). refine: rounds of refitting scales and moving single codes
    after GPTQ (`gptq.refine`). outputs: how far errors of some outputs are made up for by others, by what the model's
    prediction makes of them: the share that is kept of the off-diagonal entries of `gptq.feedback`'s A.
    """

    clip: bool = False
    act_order: bool = False
    shrink: float = 0.0
    drift: float = 0.0
    residual: float = 0.0
    refine: int = 0
    outputs: float = 0.0

    @property
    def follows(self) -> bool:
        """Whether the unquantised model runs beside the quantised one."""
        return bool(self.drift or self.residual or self.outputs)

    @classmethod
    def from_meta(cls, meta: Any) -> Recipe | None:
        """What ``quantize_config.json`` says under ``meta``, None if that names no recipe; unknown parts are passed over."""
        stored = meta.get("recipe") if isinstance(meta, dict) else None
        if not isinstance(stored, dict):
            return None
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        numbers = {name: value for name, value in stored.items() if name in kinds and isinstance(value, (bool, int, float))}
        return cls(**{name: kinds[name](value) for name, value in numbers.items() if abs(value) <= LARGEST_NUMBER})


RECIPES = {
    "plain": Recipe(),
    "fast": Recipe(clip=True, act_order=True, shrink=0.1),
    "best": Recipe(clip=True, act_order=True, shrink=0.1, drift=0.5, residual=0.25, refine=2, outputs=0.5),
}


@dataclass(frozen=True)
class QuantizeConfig:
    """How linears are quantised: the fields AutoGPTQ's ``quantize_config.json`` has, under its names.

    bits: 2, 3, 4 or 8. group_size: input rows that share one scale and zero, -1 for all of them. desc_act: columns are
    quantised in descending order of diag(H) ("act-order"). sym: the zero point is 2^(bits-1). damp_percent: the share of
    mean(diag(H)) added to the diagonal. static_groups: scales come from the uncorrected weights. true_sequential: each
    part of a block is calibrated on what its quantised predecessors give. checkpoint_format: ``gptq`` stores zero - 1,
    ``gptq_v2`` stores zero. recipe: one of RECIPES, or its parts chosen one by one; no field of the file.
    """

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    damp_percent: float = 0.01
    static_groups: bool = False
    true_sequential: bool = True
    checkpoint_format: str = "gptq"
    recipe: Recipe = RECIPES["fast"]

    def __post_init__(self) -> None:
        where = "quantisation config"
        if not isinstance(self.bits, int) or self.bits not in SUPPORTED_BITS:
            raise TinyGPTQError(f"{where}: bits is {self.bits!r}, expected one of {SUPPORTED_BITS}")
        group = self.group_size
        if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group < 1):
            raise TinyGPTQError(f"{where}: group_size is {group!r}, expected -1 or a positive integer")
        if isinstance(self.damp_percent, bool) or not isinstance(self.damp_percent, (int, float)):
            raise TinyGPTQError(f"{where}: damp_percent is {self.damp_percent!r}, expected a number")
        if not 0.0 <= self.damp_percent < 1.0:
            raise TinyGPTQError(f"{where}: damp_percent is {self.damp_percent!r}, expected 0 <= damp_percent < 1")
        for name in ("desc_act", "sym", "static_groups", "true_sequential"):
            if not isinstance(getattr(self, name), bool):
                raise TinyGPTQError(f"{where}: {name} is {getattr(self, name)!r}, expected true or false")
        if not isinstance(self.recipe, Recipe):
            names = ", ".join(f"RECIPES[{name!r}]" for name in RECIPES)
            raise TinyGPTQError(f"{where}: recipe is {self.recipe!r}, expected a Recipe, such as {names}")
        if self.recipe.follows and not self.true_sequential:
            needs = "a recipe with drift, residual or outputs needs true_sequential"
            raise TinyGPTQError(f"{where}: {needs}; choose 'fast' or 'plain'")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise TinyGPTQError(f"{where}: checkpoint_format {self.checkpoint_format!r} is not 'gptq' or 'gptq_v2'")

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def in_act_order(self) -> bool:
        """Whether columns are quantised in descending order of diag(H)."""
        return self.desc_act or self.recipe.act_order

    @property
    def grids_first(self) -> bool:
        """Whether all grids are found from the weights as they are, before any is corrected."""
        return self.static_groups or (self.recipe.act_order and not self.desc_act)

    def rows_per_group(self, in_features: int) -> int:
        """Input rows that share one scale: ``group_size``, or all of them for -1 (or a group larger than the layer)."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.rows_per_group(in_features))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "quantize_config.json") -> QuantizeConfig:
        """Parse either spelling: AutoGPTQ's names, or the older ``w_bit``/``wbits`` and ``q_group_size``."""
        raw = {**raw}
        for old, new in (("w_bit", "bits"), ("wbits", "bits"), ("q_group_size", "group_size"), ("groupsize", "group_size")):
            if raw.get(new) is None and old in raw:
                raw[new] = raw[old]
        if raw.get("checkpoint_format") is None:
            raw["checkpoint_format"] = raw.get("format")
        meta = raw.get("meta")
        for name in ("damp_percent", "static_groups", "true_sequential"):  # GPTQModel keeps these in "meta"
            if raw.get(name) is None and isinstance(meta, dict):
                raw[name] = meta.get(name)
        method = raw.get("quant_method", raw.get("method", "gptq"))
        if method != "gptq":
            raise TinyGPTQError(f"{where}: quant_method is {method!r}, only 'gptq' is supported here")
        if raw.get("bits") is None:
            raise TinyGPTQError(f"{where}: 'bits' is missing")
        raw["recipe"] = Recipe.from_meta(meta)
        known = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        try:
            return cls(**known)
        except TinyGPTQError as error:
            raise TinyGPTQError(f"{where}: {error}") from None

    def to_dict(self, model_name: str | None = None, file_base_name: str | None = "model") -> dict[str, Any]:
        """The dict AutoGPTQ 0.4-0.7 writes, which every later loader reads too."""
        stored = asdict(self)
        del stored["recipe"]
        return {
            **stored,
            "model_name_or_path": model_name,
            "model_file_base_name": file_base_name,
            "quant_method": "gptq",
        }


# ------------------------------------------------------------------------------------------------------ generating


@dataclass(frozen=True)
class GenerationConfig:
    """A folder's sampling defaults (``generation_config.json``); absent fields mean greedy decoding, as in transformers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, model: LlamaConfig) -> GenerationConfig:
        """Parse ``generation_config.json``; what it does not say is transformers' default, or ``model``'s end of text."""
        path = Path(folder) / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        where = str(path)
        sampled = _flag(raw, "do_sample", raw.get("temperature") is not None, where)
        # transformers' own defaults, for a folder that says only "do_sample": true
        return cls(
            temperature=_number(raw, "temperature", 1.0, float, low=0.0, where=where) if sampled else 0.0,
            top_k=_number(raw, "top_k", 50 if sampled else 0, int, low=0, where=where),
            top_p=_number(raw, "top_p", 1.0, float, low=0.0, high=1.0, where=where),
            repetition_penalty=_number(raw, "repetition_penalty", 1.0, float, low=1e-3, where=where),
            eos_token_ids=_ids(raw.get("eos_token_id"), "eos_token_id", where) or model.eos_token_ids,
        )
