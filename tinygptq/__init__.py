"""tinygptq: GPTQ and LLaMA in NumPy and Numba.

    model = tinygptq.load("folder")
    for piece in model.stream("Once upon a time"): ...
    tinygptq.quantize("folder", "folder-4bit", tinygptq.QuantizeConfig(bits=4, group_size=128), dataset="text.txt")

Names are imported when first used, so that ``import tinygptq`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygptq.config import LlamaConfig, QuantizeConfig
    from tinygptq.errors import TinyGPTQError
    from tinygptq.language_model import LanguageModel, load
    from tinygptq.quantization.run import quantize
    from tinygptq.text_generation import pipeline

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "language_model",
    "LlamaConfig": "config",
    "QuantizeConfig": "config",
    "TinyGPTQError": "errors",
    "load": "language_model",
    "pipeline": "text_generation",
    "quantize": "quantization.run",
}
__all__ = ["LanguageModel", "LlamaConfig", "QuantizeConfig", "TinyGPTQError", "load", "pipeline", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"tinygptq.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in ("gptq", "packing"):
        return importlib.import_module(f"tinygptq.{name}")
    raise AttributeError(f"module 'tinygptq' has no attribute {name!r}")
