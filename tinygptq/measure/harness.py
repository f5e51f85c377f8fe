"""The adapter for lm-evaluation-harness (0.4.13): its requests answered by a model loaded here, without torch.

Results are those of the harness's own Hugging Face backend: the same cuts between context and continuation, the same
truncation from the left, the same stop rules. What requests share is computed once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from tinygptq.errors import TinyGPTQError
from tinygptq.generate import StoppedText, batch_rows, generate_batch
from tinygptq.language_model import LanguageModel
from tinygptq.measure.scoring import MAX_BATCH, Request, Scorer, prefix_token
from tinygptq.sampling import Sampler, SamplingParams
from tinygptq.templates import FOLDER_TEMPLATE, Message, render_messages

MAX_GEN_TOKS = 256  # for tasks that do not say, as in the harness
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names for one thing, first one first


class Adapter:
    """Everything the harness asks of a model; :func:`harness_model` makes it one of the harness's own.

    Args:
        batch_size: sequences scored in one pass at most; None is as many as are worth it.
        template: name of a prompt template, or FOLDER_TEMPLATE, for when the harness applies a chat template.
    """

    tokenizer = None  # the harness would look for transformers' attributes in it
    cache_hook: Any  # the harness's cache of answers; its base class makes it

    def __init__(self, model: LanguageModel, batch_size: int | None = None, template: str = FOLDER_TEMPLATE) -> None:
        super().__init__()
        self.model, self._template = model, template
        self.scorer = Scorer(model.engine.model, max_batch=batch_size or MAX_BATCH)

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int | None:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.model.tokenizer)

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """BOS by the folder's rule (None), or with (True) or without it; a text that begins with its text gets no second."""
        tokenizer = self.model.tokenizer
        if add_special_tokens is None and string.startswith(tokenizer.token_text(self.prefix_token_id) or "\0"):
            add_special_tokens = False
        if add_special_tokens and tokenizer.bos_id is None:
            add_special_tokens = None
        return tokenizer.encode(string, bos=add_special_tokens)

    # ------------------------------------------------------------------ log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        def note(index: int, found: tuple[float, bool]) -> None:
            if requests[index][0] is not None:  # the harness's cache of answers, for runs that are cut off
                self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(found))

        cut = [self._fit(context, continuation) for _, context, continuation in requests]
        found = self.scorer.score(cut, progress=not disable_tqdm, on_result=note)
        return [(one.logprob, one.is_greedy) for one in found]

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        """The last ``max_length + 1`` tokens, of which the last is only predicted; the continuation must fit whole."""
        if len(continuation) > self.max_length:
            raise TinyGPTQError(f"an answer of {len(continuation)} tokens does not fit the context of {self.max_length}")
        kept = self.max_length + 1 - len(continuation)
        return Request(context[-kept:], continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, in windows as long as the context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = rolling_windows(ids, self.prefix_token_id, self.max_length)
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self.scorer.score(windows, progress=not disable_tqdm), strict=True):
            totals[owner] += scored.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------ generating

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings; neighbours in sorted order share their beginnings.

        On a GPU as many as the engine has rows are answered together.
        """
        ids = [self.tok_encode(request.args[0]) for request in requests]
        wanted = [self._wanted(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        alike = sorted(range(len(requests)), key=lambda index: (repr(wanted[index]), ids[index]))
        with tqdm(total=len(requests), desc="generating", unit="request", disable=disable_tqdm or None) as bar:
            for want, group in itertools.groupby(alike, key=lambda index: wanted[index]):
                some, rows = list(group), self._rows(want)
                for batch in (some[first : first + rows] for first in range(0, len(some), rows)):
                    for index, text in zip(batch, self._generate([ids[index] for index in batch], want, batch), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _wanted(self, settings: dict[str, Any]) -> _Wanted:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        given = [settings.pop(name, None) for name in LIMITS]
        most = next((int(value) for value in given if value is not None), MAX_GEN_TOKS)
        room = min(self.max_length, self.model.sequence.capacity) - most
        if room < 1:
            raise TinyGPTQError(f"a task asks for {most} new tokens, which leave no room for a prompt in a context of "
                                f"{self.max_length}; give --gen-kwargs max_gen_toks=N")  # fmt: skip
        stops = (until,) if isinstance(until, str) else tuple(until)
        return _Wanted(_sampling(settings, self.model.defaults), stops, most, room)

    def _rows(self, want: _Wanted) -> int:
        return batch_rows(self.model.sequence, [self._sampler(want, seed=0)])

    def _sampler(self, want: _Wanted, seed: int) -> Sampler:
        return Sampler(want.params, self.model.config.vocab_size, self.model.defaults.eos_token_ids, seed)

    def _generate(self, prompts: Sequence[list[int]], want: _Wanted, seeds: Sequence[int]) -> list[str]:
        # decoded as when an answer is decoded alone: LLaMA's tokenizers then drop its first space
        answers = [StoppedText(self.model.tokenizer.stream(), want.stops) for _ in prompts]
        cut, samplers = [ids[-want.room :] for ids in prompts], [self._sampler(want, seed) for seed in seeds]
        generate_batch(self.model.sequence, cut, samplers, want.most, self.model.defaults.eos_token_ids,
                       lambda number, token: answers[number].ends(token))  # fmt: skip
        return [answer.whole() for answer in answers]

    # ------------------------------------------------------------------ chat templates

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts is told apart by."""
        return f"{self.model.checkpoint.folder.name}-{self._template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's records."""
        if not chat_template:
            return None
        return self._folder_template() if self._template == FOLDER_TEMPLATE else self._template

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt; without a generation prompt it ends inside the last message, to be continued."""
        if self._template == FOLDER_TEMPLATE:
            self._folder_template()
        text = render_messages(self.model.tokenizer, self._template, chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _folder_template(self) -> str:
        if self.model.tokenizer.chat_template is None:
            raise TinyGPTQError(f"{self.model.checkpoint.folder}: the folder has no chat template; name one, as in "
                                "--apply-chat-template tulu")  # fmt: skip
        return self.model.tokenizer.chat_template


@dataclass(frozen=True)
class _Wanted:
    """How a task wants a context continued: stop strings, ``most`` new tokens after ``room`` tokens of context at most."""

    params: SamplingParams
    stops: tuple[str, ...]
    most: int
    room: int


def _sampling(settings: dict[str, Any], defaults: Any) -> SamplingParams:
    """A task's generation settings: greedy unless it says otherwise; what else it does not say is the folder's."""
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    elif settings.get("do_sample") and temperature == 0.0:
        temperature = 1.0
    names = ("top_k", "top_p", "repetition_penalty")
    chosen = {name: getattr(defaults, name) if settings.get(name) is None else settings[name] for name in names}
    return SamplingParams(temperature=temperature, **chosen)


def rolling_windows(ids: Sequence[int], first: int, length: int) -> list[Request]:
    """Windows over a text in which each token is predicted once, from as many tokens as there are and fit.

    The first window predicts from ``first`` (BOS) alone; every further one from the last token of the one before it, but
    for the text's last, which is filled up with context from the left.
    """
    windows = [Request([first], ids[:length])] if len(ids) else []
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        windows.append(Request(ids[end - length - 1 : start], ids[start:end]))
    return windows


@functools.cache
def _adapter_class() -> type:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise TinyGPTQError(f"evaluation needs lm-evaluation-harness ({error}): pip install tinygptq[eval]") from None
    return type("TinyGPTQ", (Adapter, TemplateLM), {"__doc__": Adapter.__doc__})


def harness_model(model: LanguageModel, batch_size: int | None = None, template: str = FOLDER_TEMPLATE) -> Any:
    """A model for ``lm_eval.simple_evaluate(model=...)``; see :class:`Adapter` for the arguments.

    Raises:
        TinyGPTQError: lm-evaluation-harness is not installed.
    """
    return _adapter_class()(model, batch_size, template)
