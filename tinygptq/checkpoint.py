"""Folders to weights: Hugging Face checkpoints in fp16, bf16 or fp32, and GPTQ ones. Every quirk of a file ends here.

What comes out is clean: dense linears as memory-mapped views, packed ones with rows sorted by group and true zero points.
Writing is the other half: :mod:`tinygptq.export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.packing import PackedLinear, pack, unpack
from tinygptq.tensorfile import DTYPES, TensorFile
from tinygptq.weights import DenseLinear, Linear, Weights

FLOATS = (DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"])
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Checkpoint:
    """A folder, read: its configuration, how it was quantised (None if it was not) and its weights."""

    folder: Path
    config: LlamaConfig
    quantization: QuantizeConfig | None
    weights: Weights


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a Hugging Face or GPTQ folder of a LLaMA.

    Raises:
        TinyGPTQError: not a LLaMA, a missing tensor, or a tensor of another shape or dtype than the configuration
            asks for; the message names the tensor, what was found and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TinyGPTQError(f"{folder}: no such folder")
    config = LlamaConfig.from_folder(folder)
    quantization = find_quantize_config(folder)
    tensors = Tensors(folder)
    embedding = tensors.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    if config.tie_word_embeddings:
        tensors.ignore("lm_head.weight")
        head = embedding
    else:
        head = tensors.take("lm_head.weight", (config.vocab_size, config.hidden_size))
    norms = {name: tensors.take(f"{name}.weight", (config.hidden_size,)) for name in norm_names(config)}
    linears = {
        name: _read_linear(tensors, name, *shape, quantization, config.has_bias(name))
        for name, shape in linear_names(config)
    }
    tensors.refuse_unknown()
    return Checkpoint(folder, config, quantization, Weights(embedding, head, norms, linears))


def norm_names(config: LlamaConfig) -> list[str]:
    blocks = range(config.num_hidden_layers)
    kinds = ("input_layernorm", "post_attention_layernorm")
    return ["model.norm"] + [f"model.layers.{i}.{kind}" for i in blocks for kind in kinds]


def linear_names(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """``(name, (in_features, out_features))`` of every linear of every block."""
    for i in range(config.num_hidden_layers):
        for name, shape in config.linear_shapes().items():
            yield f"model.layers.{i}.{name}", shape


def find_quantize_config(folder: Path) -> QuantizeConfig | None:
    """How a folder was quantised, from the first of the three places that says so; None for an unquantised one."""
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            return QuantizeConfig.from_dict(read_json(folder / name), str(folder / name))
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is None:
        return None
    where = f"{folder / 'config.json'} (quantization_config)"
    if not isinstance(raw, dict):
        raise TinyGPTQError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    return QuantizeConfig.from_dict(raw, where)


# ------------------------------------------------------------------------------------------------ tensors of a folder


class Tensors:
    """Every tensor of a folder by name, whether in one file or many, and which of them have been asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}  # tensor name -> the file it is in
        for file in _weight_files(folder):
            for name in file:
                if name in self._files:
                    both = f"{self._files[name].path.name} and {file.path.name}"
                    raise TinyGPTQError(f"{folder}: tensor {name} is in both {both}")
                self._files[name] = file
        self._left = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...] = FLOATS) -> np.ndarray:
        """The tensor ``name``, which must have this shape and one of these dtypes."""
        if name not in self._files:
            raise TinyGPTQError(f"{self.folder}: tensor {name} is missing (expected shape {list(shape)})")
        tensor = self._files[name][name]
        self._left.discard(name)
        if tensor.shape != tuple(shape):
            raise TinyGPTQError(f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TinyGPTQError(f"{self.folder}: tensor {name} has dtype {tensor.dtype}, expected {expected}")
        return tensor

    def ignore(self, name: str) -> None:
        self._left.discard(name)

    def refuse_unknown(self) -> None:
        """Raise if a tensor was never asked for: the folder then holds something a LLaMA has no place for."""
        unknown = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise TinyGPTQError(
                f"{self.folder}: tensor {unknown[0]} has no place in this LLaMA ({len(unknown)} such tensors); "
                "is it another architecture?"
            )


def _weight_files(folder: Path) -> list[TensorFile]:
    """The safetensors files of a folder: those an index names, or the one file there is."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        shards = read_json(indexes[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise TinyGPTQError(f"{indexes[0]}: 'weight_map' should map tensor names to file names")
        for shard in shards.values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):  # a path could leave the folder
                raise TinyGPTQError(f"{indexes[0]}: shard {shard!r} is not the plain name of a .safetensors file")
        return [TensorFile(folder / shard) for shard in sorted(set(shards.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        return [TensorFile(folder / "model.safetensors")]
    if len(files) == 1:
        return [TensorFile(files[0])]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise TinyGPTQError(f"{folder}: several .safetensors files and no index says how they belong together ({names})")
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
    hint = f"; {pickles[0]} is a PyTorch pickle, which can run code when opened: save it as safetensors" if pickles else ""
    raise TinyGPTQError(f"{folder}: no .safetensors file{hint}")


# ------------------------------------------------------------------------------------------------------------ linears


def _read_linear(
    tensors: Tensors, name: str, in_features: int, out_features: int, quantization: QuantizeConfig | None, biased: bool
) -> Linear:
    bias = None
    if biased or f"{name}.bias" in tensors:
        values = tensors.take(f"{name}.bias", (out_features,)).astype(np.float32)
        bias = values if biased or values.any() else None  # old GPTQ files carry all-zero ones that no config asks for
    if f"{name}.qweight" not in tensors:
        if quantization is not None and f"{name}.weight" not in tensors:
            raise TinyGPTQError(f"{tensors.folder}: tensor {name}.qweight is missing (the folder says it is quantised)")
        return DenseLinear(tensors.take(f"{name}.weight", (out_features, in_features)), bias)
    if quantization is None:
        raise TinyGPTQError(f"{tensors.folder}: {name}.qweight is quantised, but there is no quantize_config.json")
    parts = _take_gptq_parts(tensors, name, in_features, out_features, quantization)
    try:
        return from_gptq(parts, quantization, bias)
    except TinyGPTQError as error:
        raise TinyGPTQError(f"{tensors.folder}: {name}: {error}") from None


def _take_gptq_parts(
    tensors: Tensors, name: str, in_features: int, out_features: int, quantization: QuantizeConfig
) -> dict[str, np.ndarray]:
    bits, groups = quantization.bits, quantization.num_groups(in_features)
    for axis, size in (("input", in_features), ("output", out_features)):
        if size * bits % 32:
            raise TinyGPTQError(f"{tensors.folder}: {name}: {size} {axis} features of {bits} bits do not fill 32-bit words")
    integers = (DTYPES["I32"], DTYPES["U32"])
    parts = {
        "qweight": tensors.take(f"{name}.qweight", (in_features * bits // 32, out_features), integers),
        "qzeros": tensors.take(f"{name}.qzeros", (groups, out_features * bits // 32), integers),
        "scales": tensors.take(f"{name}.scales", (groups, out_features)),
    }
    if f"{name}.g_idx" in tensors:
        parts["g_idx"] = tensors.take(f"{name}.g_idx", (in_features,), (DTYPES["I32"], DTYPES["I64"]))
    return parts


def from_gptq(parts: Mapping[str, np.ndarray], config: QuantizeConfig, bias: np.ndarray | None = None) -> PackedLinear:
    """The tensors of one quantised linear, as files hold them, to the clean form.

    Shapes: qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales [G, N], g_idx int32 [K] (may be absent).
    """
    bits, qweight = config.bits, parts["qweight"].view(np.uint32)
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    rows = config.rows_per_group(in_features)
    scales = np.asarray(parts["scales"])
    if scales.dtype != np.float16:
        scales = scales.astype(np.float32)
    if not np.isfinite(scales).all():
        raise TinyGPTQError("scales hold NaN or infinity")
    stored = unpack(np.ascontiguousarray(parts["qzeros"].T), bits, out_features).T  # (G, N)
    zeros = np.ascontiguousarray(stored, np.uint16) + np.uint16(config.checkpoint_format == "gptq")
    perm = _row_order(parts.get("g_idx"), in_features, rows, len(scales))
    if perm is not None:
        qweight = pack(unpack(qweight, bits, in_features)[perm], bits)
    return PackedLinear(qweight, scales, zeros, bits, rows, perm, bias)


def _row_order(g_idx: np.ndarray | None, in_features: int, rows: int, groups: int) -> np.ndarray | None:
    """The permutation that brings rows of one group together, int32 [K], or None when they lie so already."""
    in_order = np.arange(in_features) // rows
    if g_idx is None or np.array_equal(g_idx, in_order):
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise TinyGPTQError(f"g_idx holds values from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}")
    if not g_idx.any():  # all zero with several groups means "no act-order" to every loader
        return None
    perm = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[perm], in_order):
        raise TinyGPTQError(f"g_idx gives groups other than {rows} rows each (the last may be shorter)")
    return perm.astype(np.int32)
