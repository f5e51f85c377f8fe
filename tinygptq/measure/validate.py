"""A model's forward pass beside transformers', linear by linear and block by block: which part differs, and by how much.

transformers runs in float32 and every linear's and block's input and output is kept. Each of our engines is then given the
*same* input, part by part, so that a fault shows where it is and not in all that follows; and it runs the tokens as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.kvcache import KVCache
from tinygptq.model import Llama, check_ids

TOLERANCE = 1e-3
FEW = 8  # tokens at a time in the engine that takes few rows: the CPU kernels have a way of their own for up to 16


@dataclass(frozen=True)
class Difference:
    """largest: maximum of ``|ours - torch|``. relative: that over the root mean square of torch's values."""

    largest: float
    relative: float

    @staticmethod
    def between(ours: np.ndarray, theirs: np.ndarray) -> Difference:
        """Of two arrays of one shape; NaN or infinity in ours is an infinite difference."""
        if ours.shape != theirs.shape:
            raise TinyGPTQError(f"shapes differ: ours is {list(ours.shape)}, torch's {list(theirs.shape)}")
        largest = float(np.abs(ours.astype(np.float64) - theirs).max())
        if not np.isfinite(largest):
            return Difference(np.inf, np.inf)
        size = float(np.sqrt(np.mean(theirs.astype(np.float64) ** 2)))
        return Difference(largest, largest / size if size else largest)


@dataclass(frozen=True)
class Row:
    """One line of the table. part: a linear's full name, ``model.layers.0`` (a block given torch's input), ``after block
    0`` (our own residual stream so far), or ``logits``."""

    part: str
    differences: dict[str, Difference]  # by engine


@dataclass
class Validation:
    """rows: the table. first: for each engine the first part beyond the tolerance, or None."""

    rows: list[Row]
    tolerance: float
    first: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            for engine, difference in row.differences.items():
                self.first.setdefault(engine, None)
                if self.first[engine] is None and not difference.relative <= self.tolerance:
                    self.first[engine] = row.part

    @property
    def passed(self) -> bool:
        return not any(self.first.values())


# ------------------------------------------------------------------------------------------------ torch's side


@dataclass(frozen=True)
class Reference:
    """What transformers computed for token ids int [T]: inputs and outputs float32 [T, ..] of every part, by name."""

    ids: np.ndarray
    linears: dict[str, tuple[np.ndarray, np.ndarray]]
    blocks: list[tuple[np.ndarray, np.ndarray]]
    logits: np.ndarray


def run_transformers(checkpoint: Checkpoint, ids: np.ndarray) -> Reference:
    """Run a folder through transformers in float32; a quantised one through weights dequantised here.

    Raises:
        TinyGPTQError: torch or transformers is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise TinyGPTQError(f"validation needs torch and transformers ({error}): pip install tinygptq[validate]") from None
    model = _transformers_model(checkpoint)
    linears: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    blocks: list[tuple[np.ndarray, np.ndarray]] = []

    def keep_linear(name: str) -> Callable:
        def hook(_module, inputs, output) -> None:
            linears[name] = (_array(inputs[0]), _array(output))

        return hook

    def keep_block(_module, args, kwargs, output) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        blocks.append((_array(entering), _array(output[0] if isinstance(output, tuple) else output)))

    for name, module in model.named_modules():
        if name in checkpoint.weights.linears:
            module.register_forward_hook(keep_linear(name))
    for block in model.model.layers:
        block.register_forward_hook(keep_block, with_kwargs=True)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None]), use_cache=False).logits
    return Reference(ids, linears, blocks, _array(logits))


def _array(tensor: Any) -> np.ndarray:
    """[1, T, ..] of torch -> float32 [T, ..]."""
    return tensor[0].float().numpy().copy()


def _transformers_model(checkpoint: Checkpoint) -> Any:
    import torch

    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise TinyGPTQError(f"validation needs transformers ({error}): pip install tinygptq[validate]") from None
    if checkpoint.quantization is None:
        return LlamaForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    config = LlamaConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(_state(checkpoint), strict=False)
    absent = [name for name in missing if not (name == "lm_head.weight" and checkpoint.config.tie_word_embeddings)]
    if absent or unexpected:
        raise TinyGPTQError(f"transformers' model has other tensors than ours, first {[*absent, *unexpected][0]}")
    return model


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    import torch

    def tensor(values: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(values, np.float32))

    weights = checkpoint.weights
    state = {"model.embed_tokens.weight": tensor(weights.embedding)}
    state |= {f"{name}.weight": tensor(values) for name, values in weights.norms.items()}
    for name, linear in weights.linears.items():
        state[f"{name}.weight"] = tensor(linear.dequantize().T)
        if linear.bias is not None:
            state[f"{name}.bias"] = tensor(linear.bias)
    if not checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = tensor(weights.head)
    return state


# ------------------------------------------------------------------------------------------------ our side


@dataclass(frozen=True)
class Engine:
    """One of our ways to run the model.

    model: the forward pass with that engine's functions and arrays. rows: tokens given to it at once, None for all.
    to_device, to_host: between NumPy arrays and the engine's own.
    """

    model: Llama
    rows: int | None = None
    to_device: Callable[[np.ndarray], Any] = np.asarray
    to_host: Callable[[Any], np.ndarray] = np.asarray

    def pieces(self, x: np.ndarray) -> Iterator[Any]:
        step = self.rows or len(x)
        return (self.to_device(x[start : start + step][None]) for start in range(0, len(x), step))  # (1, t, ..)

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        """float32 [T, K] -> [T, N]."""
        return np.concatenate([self.to_host(self.model.linear(layer, name, piece))[0] for piece in self.pieces(x)])

    def block(self, layer: int, h: np.ndarray) -> np.ndarray:
        """float32 [T, C] -> [T, C]; pieces after the first find the earlier ones' keys in a cache."""
        cache = KVCache(self.model.config, 1, len(h)) if self.rows else None
        done = []
        for piece in self.pieces(h):
            done.append(self.to_host(self.model.block(layer, piece, cache))[0])
            if cache is not None:
                cache.advance(piece.shape[1])
        return np.concatenate(done)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.to_host(self.model.embed(self.to_device(ids[None])))[0]

    def logits(self, h: np.ndarray) -> np.ndarray:
        return np.concatenate([self.to_host(self.model.logits(piece))[0] for piece in self.pieces(h)])


def _definition(checkpoint: Checkpoint) -> Engine:
    return Engine(Llama(checkpoint.config, checkpoint.weights))


def _cpu(checkpoint: Checkpoint, rows: int | None = None) -> Engine:
    from tinygptq.kernels import cpu

    cpu.warm_up()
    return Engine(Llama(checkpoint.config, checkpoint.weights, cpu), rows)


ENGINES: dict[str, Callable[[Checkpoint], Engine]] = {
    "definition": _definition,
    "cpu": _cpu,
    "cpu, few rows": lambda checkpoint: _cpu(checkpoint, FEW),
}
"""Every engine that can be validated part by part: a further device adds its own here."""


def _decoded(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Logits float32 [T, vocab] of the CPU engine that takes one token at a time, which has no parts to look into."""
    from tinygptq.engine import CpuEngine

    engine = CpuEngine(checkpoint.config, checkpoint.weights, context=len(ids))
    return np.stack([engine.decode(int(token)).copy() for token in ids])


DECODERS: dict[str, Callable[[Checkpoint, np.ndarray], np.ndarray]] = {"cpu, token by token": _decoded}
"""Engines that compute a whole token in one call: only their logits can be compared."""


# ------------------------------------------------------------------------------------------------ beside each other


def validate(
    folder: str | Path, ids: np.ndarray, tolerance: float = TOLERANCE, reference: str | Path | None = None,
    engines: dict[str, Callable[[Checkpoint], Engine]] | None = None,
) -> Validation:  # fmt: skip
    """Compare every engine with transformers on token ids int [T].

    Args:
        reference: the folder that transformers runs, where it is not the same: an original beside a doubtful copy.
        engines: some of ENGINES; None is all of them, and DECODERS.

    Raises:
        TinyGPTQError: torch is missing, a folder cannot be loaded, or the two are different models.
    """
    checkpoint = load_checkpoint(folder)
    other = checkpoint if reference is None else load_checkpoint(reference)
    for what in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        ours, theirs = getattr(checkpoint.config, what), getattr(other.config, what)
        if ours != theirs:
            raise TinyGPTQError(f"{folder} and {reference} are different models: {what} is {ours} and {theirs}")
    check_ids(ids[None], checkpoint.config.vocab_size)
    kept = run_transformers(other, ids)
    running = {name: make(checkpoint) for name, make in (ENGINES if engines is None else engines).items()}
    rows = [*_blocks(running, kept)]
    decoded = {} if engines is not None else {name: run(checkpoint, ids) for name, run in DECODERS.items()}
    rows[-1].differences.update({name: Difference.between(found, kept.logits) for name, found in decoded.items()})
    return Validation(rows, tolerance)


def _blocks(engines: dict[str, Engine], kept: Reference) -> Iterator[Row]:
    """The table's rows: for each block its linears, the block itself, and the residual stream so far; last, the logits."""

    def row(part: str, found: dict[str, np.ndarray], expected: np.ndarray) -> Row:
        return Row(part, {name: Difference.between(ours, expected) for name, ours in found.items()})

    streams = {name: engine.embed(kept.ids) for name, engine in engines.items()}
    config = next(iter(engines.values())).model.config
    for layer, (entering, leaving) in enumerate(kept.blocks):
        for name in config.linear_shapes():
            x, y = kept.linears[f"model.layers.{layer}.{name}"]
            found = {key: engine.linear(layer, name, x) for key, engine in engines.items()}
            yield row(f"model.layers.{layer}.{name}", found, y)
        yield row(f"model.layers.{layer}", {key: engine.block(layer, entering) for key, engine in engines.items()}, leaving)
        streams = {key: engine.block(layer, streams[key]) for key, engine in engines.items()}
        yield row(f"after block {layer}", streams, leaving)
    yield row("logits", {key: engine.logits(streams[key]) for key, engine in engines.items()}, kept.logits)
