"""Tables of bytes, computed when the site is built as `tinygptq size` does: by tinygptq.sizes, from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tinygptq.branches import BRANCHES
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.sizes import sizes

CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GB, decimal, as cards are sold
SPARE = 1.0  # GB beside weights and cache: the CUDA context, activations, workspaces
CONTEXT = 4096  # tokens of one conversation

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


def weights_gb(name: str, quantization: QuantizeConfig | None) -> float:
    return sizes(model(name), quantization).weights / 1e9


def cache_gb(name: str) -> float:
    """Keys and values of CONTEXT tokens in fp16: half of what ``tinygptq size`` says, which counts the CPU's float32."""
    return sizes(model(name), None).kv_per_1000_tokens * CONTEXT / 1000 / 2 / 1e9


def smallest_card(gb: float) -> str:
    return next((f"{card} GB" for card in CARDS if card >= gb + SPARE), f"more than {CARDS[-1]} GB")


def small_gpus() -> str:
    """Weights and cache of each model, and the smallest card that holds them."""
    settings = {"4-bit, groups of 128": QuantizeConfig(4, 128), "3-bit, groups of 128": QuantizeConfig(3, 128), "fp16": None}
    lines = ["| model | " + " | ".join(settings) + f" | cache, {CONTEXT:,} tokens | smallest card at 4 bits | smallest card in fp16 |"]
    lines.append("|---|" + "--:|" * (len(settings) + 1) + "---|---|")
    for name in SHAPES:
        found = [weights_gb(name, setting) for setting in settings.values()]
        kv = cache_gb(name)
        cells = [
            *(f"{gb:.2f} GB" for gb in found),
            f"{kv:.2f} GB",
            smallest_card(found[0] + kv),
            smallest_card(found[-1] + kv),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def what_a_card_holds() -> str:
    """For common cards, the largest model at 4 bits and the tokens of context that then fit."""
    lines = ["| card | largest model at 4 bits | tokens of cache in what is left | at 8 bits |", "|---|---|--:|---|"]
    for card in (4, 6, 8, 12, 16, 24, 48, 80):
        four, eight = _largest(card, QuantizeConfig(4, 128)), _largest(card, QuantizeConfig(8, 128))
        left = card - SPARE - weights_gb(four, QuantizeConfig(4, 128))
        tokens = int(left / (cache_gb(four) / CONTEXT)) // 1000 * 1000
        lines.append(f"| {card} GB | {four} | {tokens:,} | {eight} |")
    return "\n".join(lines)


def _largest(card: float, setting: QuantizeConfig) -> str:
    """The model of most bytes that fits with SPARE and a cache of CONTEXT tokens."""
    fitting = [name for name in SHAPES if weights_gb(name, setting) + cache_gb(name) + SPARE <= card]
    return max(fitting, key=lambda name: weights_gb(name, setting))


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
