"""Small writers of every generation of GPTQ folder, from one random model. NumPy only, and nothing of tinygptq: what they
have in common with the package is the description of the formats.

A :class:`Quantized` model holds codes, scales, zero points and groups; :data:`WRITERS` maps a name to a function
``(model, folder)`` and says which models it can express.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SHAPES = {  # name: (in features, out features)
    "self_attn.q_proj": (96, 96), "self_attn.k_proj": (96, 32), "self_attn.v_proj": (96, 32), "self_attn.o_proj": (96, 96),
    "mlp.gate_proj": (96, 160), "mlp.up_proj": (96, 160), "mlp.down_proj": (160, 96),
}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint16": "BF16"}  # bfloat16 is kept as its bits

# ------------------------------------------------------------------------------------------------------------ a model


@dataclass(frozen=True)
class Linear:
    """codes [K, N], scales float32 [G, N], zeros [G, N], g_idx [K]; W[k, n] = scales[g, n] * (codes[k, n] - zeros[g, n])."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray

    def weight(self) -> np.ndarray:
        return self.scales[self.g_idx] * (self.codes - self.zeros[self.g_idx]).astype(np.float32)


@dataclass(frozen=True)
class Quantized:
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    static_groups: bool
    linears: dict[str, Linear]
    dense: dict[str, np.ndarray]  # float16


def random_model(
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    static_groups: bool = False,
    seed: int = 0,
    least_zero: int = 1,
) -> Quantized:
    """Scales have 7 bits after the point and fit fp16's range, so that fp16, bf16 and fp32 hold the same values."""
    rng = np.random.default_rng([seed, bits])
    linears = {}
    for name, (inputs, outputs) in SHAPES.items():
        rows = inputs if group_size == -1 else group_size
        groups = -(-inputs // rows)
        g_idx = np.arange(inputs) // rows
        if desc_act and not static_groups:
            g_idx = rng.permutation(g_idx)
        zeros = np.full((groups, outputs), 2 ** (bits - 1))
        if not sym:
            zeros = rng.integers(least_zero, 2**bits, (groups, outputs))
        scales = rng.integers(128, 256, (groups, outputs)).astype(np.float32) * np.float32(2.0**-14)
        codes = rng.integers(0, 2**bits, (inputs, outputs))
        linears[f"model.layers.0.{name}"] = Linear(codes, scales, zeros, g_idx)
    shapes = {"model.embed_tokens": (64, 96), "lm_head": (64, 96), "model.norm": (96,),
              "model.layers.0.input_layernorm": (96,), "model.layers.0.post_attention_layernorm": (96,)}  # fmt: skip
    dense = {f"{name}.weight": rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    return Quantized(bits, group_size, sym, desc_act, static_groups, linears, dense)


# ------------------------------------------------------------------------------------------------------------ packing


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] -> int32 [K * bits / 32, N]: the bits of a column's codes end to end, least significant first."""
    inputs, outputs = codes.shape
    stream = (codes[:, None, :] >> np.arange(bits)[None, :, None] & 1).reshape(inputs * bits, outputs)
    octets = np.packbits(stream.astype(np.uint8), axis=0, bitorder="little")  # (K * bits / 8, N)
    words = octets.reshape(-1, 4, outputs).astype(np.uint32) << (8 * np.arange(4, dtype=np.uint32))[None, :, None]
    return words.sum(axis=1, dtype=np.uint32).view(np.int32)


def pack_columns(values: np.ndarray, bits: int) -> np.ndarray:
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray(values.T), bits).T)


def minus_one(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Format v1; zeros of at least 1."""
    return pack_columns(zeros - 1, bits)


def minus_one_by_or(zeros: np.ndarray, bits: int) -> np.ndarray:
    """As AutoGPTQ 0.3-0.7 packs 2, 4 and 8 bits: zero - 1 as a 32-bit number, shifted and ORed in without a mask."""
    fields = 32 // bits
    values = (zeros - 1).astype(np.uint32)  # 0 becomes 0xFFFFFFFF
    words = np.zeros((zeros.shape[0], zeros.shape[1] // fields), np.uint32)
    for i in range(fields):
        words |= values[:, i::fields] << np.uint32(bits * i)
    return words.view(np.int32)


def minus_one_by_borrow(zeros: np.ndarray, bits: int) -> np.ndarray:
    """As GPTQModel 7.7 makes v1 of v2: 1 is subtracted from every field of a 32-bit word at once, so that a 0 borrows; at 3
    bits, where fields straddle words, from each field alone."""
    if bits == 3:
        return pack_columns((zeros - 1) % 8, bits)
    ones = pack_columns(np.ones_like(zeros), bits)
    return (pack_columns(zeros, bits).view(np.uint32) - ones.view(np.uint32)).view(np.int32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves of its words, exact for values that bfloat16 holds."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# ------------------------------------------------------------------------------------------------------------- writing


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file by hand: header length, JSON header, data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}  # fmt: skip
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def save_sharded(folder: Path, tensors: dict[str, np.ndarray], base: str = "model") -> None:
    names = list(tensors)
    weight_map = {}
    for i, members in enumerate((names[::2], names[1::2]), 1):
        shard = f"{base}-{i:05}-of-00002.safetensors"
        save(folder / shard, {name: tensors[name] for name in members})
        weight_map |= dict.fromkeys(members, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(
    model: Quantized,
    *,
    zeros: Callable[[np.ndarray, int], np.ndarray] = minus_one,
    scales: Callable[[np.ndarray], np.ndarray] = np.float16,
    g_idx: bool = True,
    zero_bias: bool = False,
) -> dict[str, np.ndarray]:
    tensors = dict(model.dense)
    for name, linear in model.linears.items():
        tensors[f"{name}.qweight"] = pack_rows(linear.codes, model.bits)
        tensors[f"{name}.qzeros"] = zeros(linear.zeros, model.bits)
        tensors[f"{name}.scales"] = scales(linear.scales)
        if g_idx:
            tensors[f"{name}.g_idx"] = linear.g_idx.astype(np.int32)
        if zero_bias:
            tensors[f"{name}.bias"] = np.zeros(linear.codes.shape[1], np.float16)
    return tensors


def float_zero_tensors(model: Quantized) -> dict[str, np.ndarray]:
    tensors = dict(model.dense)
    for name, linear in model.linears.items():
        tensors[f"{name}.qweight"] = pack_rows(linear.codes, model.bits)
        tensors[f"{name}.zeros"] = (linear.zeros * linear.scales).astype(np.float32).T  # (N, 1)
        tensors[f"{name}.scales"] = linear.scales.T
        tensors[f"{name}.bias"] = np.zeros(linear.codes.shape[1], np.float32)
    return tensors


def write_configs(
    folder: Path, quantize: dict | None = None, name: str = "quantize_config.json", inside: dict | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG if inside is None else {**CONFIG, "quantization_config": inside}
    (folder / "config.json").write_text(json.dumps(config))
    if quantize is not None:
        (folder / name).write_text(json.dumps(quantize))


def facts(model: Quantized, **more) -> dict:
    return {"bits": model.bits, "group_size": model.group_size, "damp_percent": 0.01, "desc_act": model.desc_act,
            "sym": model.sym, "true_sequential": True, **more}  # fmt: skip


def autogptq_name(model: Quantized) -> str:
    return f"gptq_model-{model.bits}bit-{model.group_size}g.safetensors"


# --------------------------------------------------------------------------------------------------------- generations


def gptq_for_llama_1st(model: Quantized, folder: Path) -> None:
    write_configs(folder)
    save(folder / f"llama-7b-{model.bits}bit.safetensors", float_zero_tensors(model))


def gptq_for_llama_2nd(model: Quantized, folder: Path) -> None:
    write_configs(folder)
    tensors = tensors_of(model, scales=np.float32, g_idx=False, zero_bias=True)
    save(folder / f"{model.bits}bit-{model.group_size}g.safetensors", tensors)


def gptq_for_llama_3rd(model: Quantized, folder: Path) -> None:
    write_configs(folder)
    save(folder / "model.safetensors", tensors_of(model, scales=np.float32))


def gptq_for_llama_1st_with_config(model: Quantized, folder: Path) -> None:
    write_configs(folder, {"bits": model.bits, "group_size": -1})
    save(folder / "4bit.safetensors", float_zero_tensors(model))


def gptq_for_llama_2nd_with_config(model: Quantized, folder: Path) -> None:
    write_configs(folder, {"wbits": model.bits, "groupsize": model.group_size, "sym": model.sym})
    save(folder / "4bit-128g.safetensors", tensors_of(model, scales=np.float32, g_idx=False))


def autogptq_03(model: Quantized, folder: Path) -> None:
    write_configs(folder, facts(model, model_name_or_path=None, model_file_base_name=None))
    save(folder / autogptq_name(model), tensors_of(model, zero_bias=True))


def autogptq_04(model: Quantized, folder: Path) -> None:
    base = autogptq_name(model).removesuffix(".safetensors")
    more = {"static_groups": model.static_groups, "model_name_or_path": "x", "model_file_base_name": base}
    write_configs(folder, facts(model, **more))
    save(folder / f"{base}.safetensors", tensors_of(model))
    save(folder / "other.safetensors", {"not.looked.at": np.zeros(1, np.float16)})


def autogptq_06(model: Quantized, folder: Path) -> None:
    said = facts(model, static_groups=model.static_groups, quant_method="gptq", model_file_base_name="model")
    write_configs(folder, said, inside=said)
    save(folder / "model.safetensors", tensors_of(model, scales=bfloat16_bits))


def autogptq_07(model: Quantized, folder: Path) -> None:
    said = facts(model, static_groups=model.static_groups, quant_method="gptq", checkpoint_format="gptq")
    write_configs(folder, said, inside=said)
    save_sharded(folder, tensors_of(model), base=autogptq_name(model).removesuffix(".safetensors"))


def gptqmodel_facts(model: Quantized, form: str) -> dict:
    meta = {"quantizer": ["gptqmodel:7.7.0"], "uri": "https://github.com/modelcloud/gptqmodel", "damp_percent": 0.05,
            "static_groups": model.static_groups, "true_sequential": True, "mse": 0.0}  # fmt: skip
    return {"bits": model.bits, "group_size": model.group_size, "desc_act": model.desc_act, "sym": model.sym,
            "method": "gptq", "quant_method": "gptq", "format": form, "checkpoint_format": form, "lm_head": False,
            "pack_dtype": "int32", "meta": meta}  # fmt: skip


def gptqmodel_v1(model: Quantized, folder: Path) -> None:
    said = gptqmodel_facts(model, "gptq")
    write_configs(folder, said, inside=said)
    save(folder / "model.safetensors", tensors_of(model, zeros=minus_one_by_borrow))


def gptqmodel_v2(model: Quantized, folder: Path) -> None:
    said = gptqmodel_facts(model, "gptq_v2")
    del said["checkpoint_format"], said["quant_method"]
    write_configs(folder, said)
    save_sharded(folder, tensors_of(model, zeros=pack_columns))


def optimum(model: Quantized, folder: Path) -> None:
    said = facts(model, quant_method="gptq", dataset="wikitext2", use_exllama=True, block_name_to_quantize="model.layers")
    write_configs(folder, inside=said | {"static_groups": model.static_groups})
    save(folder / "model.safetensors", tensors_of(model))


def older_spelling(model: Quantized, folder: Path) -> None:
    said = {"w_bit": model.bits, "q_group_size": model.group_size, "desc_act": model.desc_act, "sym": model.sym,
            "static_groups": model.static_groups}  # fmt: skip
    write_configs(folder, said, "quant_config.json")
    save(folder / "anything.safetensors", tensors_of(model))


def v1_labelled_v2(model: Quantized, folder: Path) -> None:
    write_configs(folder, facts(model, checkpoint_format="gptq_v2", static_groups=model.static_groups))
    save(folder / "model.safetensors", tensors_of(model))


def v2_labelled_v1(model: Quantized, folder: Path) -> None:
    write_configs(folder, facts(model, checkpoint_format="gptq", static_groups=model.static_groups))
    save(folder / "model.safetensors", tensors_of(model, zeros=pack_columns))


@dataclass(frozen=True)
class Writer:
    """Who is expected to be named, and which models the format can express."""

    write: Callable[[Quantized, Path], None]
    tool: str
    one_group_only: bool = False
    in_order_only: bool = False
    sym_only: bool = False

    def can_hold(self, model: Quantized) -> bool:
        dynamic = model.desc_act and not model.static_groups
        return not (
            (self.one_group_only and model.group_size != -1)
            or (self.in_order_only and dynamic and model.group_size != -1)
            or (self.sym_only and not model.sym)
        )


WRITERS = {
    "gptq-for-llama 1": Writer(gptq_for_llama_1st, "GPTQ-for-LLaMa, first generation", one_group_only=True),
    "gptq-for-llama 2": Writer(gptq_for_llama_2nd, "GPTQ-for-LLaMa, second generation", in_order_only=True),
    "gptq-for-llama 3": Writer(gptq_for_llama_3rd, "GPTQ-for-LLaMa, third generation"),
    "gptq-for-llama 1 with config": Writer(gptq_for_llama_1st_with_config, "unknown", one_group_only=True),
    "gptq-for-llama 2 with config": Writer(gptq_for_llama_2nd_with_config, "unknown", in_order_only=True),
    "autogptq 0.3": Writer(autogptq_03, "AutoGPTQ 0.3 or earlier"),
    "autogptq 0.4": Writer(autogptq_04, "AutoGPTQ 0.4"),
    "autogptq 0.6": Writer(autogptq_06, "AutoGPTQ 0.5 or 0.6"),
    "autogptq 0.7": Writer(autogptq_07, "tinygptq, or AutoGPTQ 0.7"),
    "gptqmodel v1": Writer(gptqmodel_v1, "GPTQModel"),
    "gptqmodel v2": Writer(gptqmodel_v2, "GPTQModel"),
    "optimum": Writer(optimum, "transformers with optimum"),
    "older spelling": Writer(older_spelling, "AutoGPTQ 0.4"),
    "v1 labelled v2": Writer(v1_labelled_v2, "tinygptq, or AutoGPTQ 0.7", sym_only=True),
    "v2 labelled v1": Writer(v2_labelled_v1, "tinygptq, or AutoGPTQ 0.7", sym_only=True),
}
