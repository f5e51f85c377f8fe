"""Tables of bytes, computed when the site is built as `tinygptq size` does, from configurations alone: files by
tinygptq.folders.sizes, a GPU's memory by tinygptq.cuda.memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tinygptq.branches import BRANCHES
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.cuda.memory import predict
from tinygptq.folders.sizes import sizes

CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GB, decimal, as cards are sold
SPARE = 0.6  # GB for what the prediction leaves out: the CUDA context and the compiled kernels
CONTEXT = 4096  # tokens of one conversation
LONGEST = 131072  # tokens, beyond which the table of cards does not look

# name: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied; from the models' published config.json
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    "TinyLlama-1.1B": (2048, 5632, 22, 32, 4, 32000, False),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 49152, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "LLaMA-7B, Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "LLaMA-13B, Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
    "LLaMA-33B": (6656, 17920, 60, 52, 52, 32000, False),
    "LLaMA-65B": (8192, 22016, 80, 64, 64, 32000, False),
    "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
}


@cache
def model(name: str) -> LlamaConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*names, "vocab_size", "tie_word_embeddings")
    return LlamaConfig.from_dict({"model_type": "llama", **dict(zip(names, SHAPES[name], strict=True))})


def on_gpu(name: str, setting: QuantizeConfig | None, context: int = CONTEXT, cache_bits: int = 16) -> float:
    """GB that an engine for a model takes: weights, cache, activations, workspaces."""
    return predict(model(name), setting, context, cache_bits=cache_bits).total / 1e9


def smallest_card(gb: float) -> str:
    return next((f"{card} GB" for card in CARDS if card >= gb + SPARE), f"more than {CARDS[-1]} GB")


def small_gpus() -> str:
    """File and device memory of each model, and the smallest card that holds it."""
    four, eight = QuantizeConfig(4, 128), QuantizeConfig(8, 128)
    lines = [
        "| model | file, 4 bits | on a GPU, 4 bits | the same, 8-bit cache | smallest card at 4 bits | at 8 bits | in fp16 |"
    ]
    lines.append("|---|--:|--:|--:|---|---|---|")
    for name in SHAPES:
        sizes_gb = sizes(model(name), four).file / 1e9, on_gpu(name, four), on_gpu(name, four, cache_bits=8)
        cards = (smallest_card(on_gpu(name, setting)) for setting in (four, eight, None))
        lines.append(f"| {name} | " + " | ".join([*(f"{gb:.2f} GB" for gb in sizes_gb), *cards]) + " |")
    return "\n".join(lines)


def what_a_card_holds() -> str:
    """For common cards, the largest model at 4 bits and the context that then fits."""
    four = QuantizeConfig(4, 128)
    lines = ["| card | largest model at 4 bits | context, 16-bit cache | context, 8-bit cache | largest model at 8 bits |"]
    lines.append("|---|---|--:|--:|---|")
    for card in (4, 6, 8, 12, 16, 24, 48, 80):
        name = _largest(card, four)
        cells = [
            f"{card} GB",
            name,
            _context(card, name, 16),
            _context(card, name, 8),
            _largest(card, QuantizeConfig(8, 128)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _largest(card: float, setting: QuantizeConfig) -> str:
    """The model of most bytes that fits with SPARE and a cache of CONTEXT tokens."""
    fitting = [name for name in SHAPES if on_gpu(name, setting) + SPARE <= card]
    return max(fitting, key=lambda name: sizes(model(name), setting).weights)


def _context(card: float, name: str, cache_bits: int) -> str:
    """Tokens of room, in whole thousands, at 4 bits."""
    tokens = CONTEXT
    while tokens < LONGEST and on_gpu(name, QuantizeConfig(4, 128), tokens + 1024, cache_bits) + SPARE <= card:
        tokens += 1024
    return f"{tokens // 1000 * 1000:,}" if tokens < LONGEST else f"over {LONGEST // 1000 * 1000:,}"


def branches() -> str:
    """The published branches' files for three models."""
    names = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B")
    full = {short: next(name for name in SHAPES if short in name) for short in names}
    lines = ["| branch | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for branch, setting in BRANCHES.items():
        cells = [f"{sizes(model(full[name]), setting).file / 1e9:.2f} GB" for name in names]
        lines.append(f"| `{branch}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shards() -> str:
    """Over how many GPUs each model can be split by tensors, at groups of 128: Marlin's tiles and whole groups."""
    lines = ["| model | 2 GPUs | 4 GPUs | 8 GPUs |", "|---|---|---|---|"]
    for name in list(SHAPES)[5:]:
        lines.append(f"| {name} | " + " | ".join(_splits(model(name), gpus, 128) for gpus in (2, 4, 8)) + " |")
    return "\n".join(lines)


def _splits(config: LlamaConfig, gpus: int, group: int) -> str:
    """ "yes", or what stands against it. Inputs of o and down are cut, outputs of the others."""
    if config.num_attention_heads % gpus:
        return f"no: {config.num_attention_heads} heads"
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        inputs = config.linear_shapes()[linear][0]
        if inputs % (gpus * 128) or inputs % (gpus * group):
            return f"no: {inputs:,} / {gpus} is no multiple of 128"
    return "yes"


TABLES: dict[str, Callable[[], str]] = {
    "small-gpus": small_gpus,
    "what-a-card-holds": what_a_card_holds,
    "branches": branches,
    "shards": shards,
}
