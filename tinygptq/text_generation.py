"""``tinygptq.pipeline``: text generation in the form that model cards show for transformers' pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.language_model import LanguageModel, load

SETTINGS = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
            "stop", "return_full_text", "num_return_sequences")  # fmt: skip


class TextGeneration:
    """Prompts to texts; settings given here hold for every call, those of a call come first."""

    def __init__(self, model: LanguageModel, **settings: Any) -> None:
        _check(settings)
        self.model, self.settings = model, settings

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> list:
        """Continue a prompt: ``[{"generated_text": prompt and continuation}]``, or a list of such lists for several prompts.

        Args:
            do_sample: False takes the likeliest token every time, True draws; None is what the folder says.
            temperature, top_p, top_k, repetition_penalty: None is what the folder says.
            max_new_tokens, min_new_tokens, stop, seed: as for :meth:`tinygptq.LanguageModel.stream`.
            return_full_text: False leaves the prompt out. num_return_sequences: texts for a prompt, with ``do_sample``.

        Raises:
            TinyGPTQError: a setting that is unknown, out of range, or contradicts ``do_sample``.
        """
        _check(settings)
        chosen = {**self.settings, **settings}
        if not isinstance(prompt, str):
            return [self._one(one, chosen) for one in prompt]
        return self._one(prompt, chosen)

    def _one(self, prompt: str, settings: dict[str, Any]) -> list[dict[str, str]]:
        settings = dict(settings)
        count, full = settings.pop("num_return_sequences", 1), settings.pop("return_full_text", True)
        settings["temperature"] = self._temperature(settings.pop("do_sample", None), settings.get("temperature"))
        greedy = (self.model.defaults.temperature if settings["temperature"] is None else settings["temperature"]) == 0.0
        if count < 1 or (count > 1 and greedy):
            raise TinyGPTQError(f"num_return_sequences is {count}; more than one text for a prompt needs do_sample=True")
        texts = []
        for i in range(count):
            seed = settings.get("seed")
            text = self.model.generate(prompt, **{**settings, "seed": seed if seed is None else seed + i})
            texts.append({"generated_text": prompt + text if full else text})
        return texts

    def _temperature(self, do_sample: bool | None, temperature: float | None) -> float | None:
        """The temperature that says what ``do_sample`` does: 0 is greedy, None is the folder's own."""
        if do_sample is None:
            return temperature
        if not do_sample:
            return 0.0
        if temperature is None:
            return self.model.defaults.temperature or 1.0
        if temperature == 0.0:
            raise TinyGPTQError("do_sample=True and temperature 0 contradict each other")
        return temperature


def _check(settings: dict[str, Any]) -> None:
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise TinyGPTQError(f"unknown setting {unknown[0]!r} of a pipeline; known are {', '.join(SETTINGS)}")


def pipeline(model: LanguageModel | str | Path, **settings: Any) -> TextGeneration:
    """A callable that continues prompts: ``tinygptq.pipeline(model)(prompt, max_new_tokens=64, do_sample=True)``.

    Args:
        model: a loaded model, or what :func:`tinygptq.load` takes.
        settings: defaults for every call, see :meth:`TextGeneration.__call__`.
    """
    return TextGeneration(model if isinstance(model, LanguageModel) else load(model), **settings)
