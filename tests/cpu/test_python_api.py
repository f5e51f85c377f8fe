"""What a Python user calls beside load and stream: log-likelihoods, perplexity, the pipeline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, save_byte_tokenizer

import tinygptq
from tinygptq.errors import TinyGPTQError
from tinygptq.measure.scoring import Request, encode_pair, log_likelihood

OPENING = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def model(embedded: Path) -> tinygptq.LanguageModel:
    return tinygptq.load(embedded)


# ------------------------------------------------------------------------------------------------ log-likelihoods


@pytest.mark.parametrize("context", [OPENING, OPENING + " ", ""])
def test_a_log_likelihood_is_read_off_a_plain_forward_pass(model, context):
    found = model.loglikelihood(context, " girl named Lily.")
    whole = context + " girl named Lily."
    ids = model.tokenizer.encode(whole)
    start = len(model.tokenizer.encode(context.rstrip())) if context else 1
    logits = model.forward(np.array([ids]))[0].astype(np.float64)
    nats = sum(
        math.log(np.exp(logits[i - 1] - logits[i - 1][ids[i]]).sum()) for i in range(start, len(ids))
    )  # fmt: skip
    assert found.logprob == pytest.approx(-nats, abs=1e-3)


def test_likely_and_unlikely(model):
    likely, unlikely = model.loglikelihoods([(OPENING, " girl"), (OPENING, " theorem")])
    assert likely.logprob > unlikely.logprob + 2
    greedy = model.generate(OPENING, max_new_tokens=4, temperature=0.0, repetition_penalty=1.0)
    assert model.loglikelihood(OPENING, greedy).is_greedy
    assert not unlikely.is_greedy


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
    assert encode_pair(model.tokenizer, OPENING + " ", "girl") == encode_pair(model.tokenizer, OPENING, " girl")


def test_a_chain_of_continuations_is_the_likelihood_of_the_whole(model):
    ids = model.tokenizer.encode(OPENING)
    whole = log_likelihood(model.engine.model, Request(ids[:1], ids[1:])).logprob
    parts = [log_likelihood(model.engine.model, Request(ids[:i], ids[i : i + 1])).logprob for i in range(1, len(ids))]
    assert sum(parts) == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize(("context", "continuation"), [("Once", ""), ("", ""), ("x" * 5000, "y")])
def test_what_cannot_be_scored_is_refused(model, context, continuation):
    with pytest.raises(TinyGPTQError, match=r"no token of its own|do not fit the context of 512"):
        model.loglikelihood(context, continuation)


def test_a_tokenizer_without_bos_and_eos_has_no_empty_context(tmp_path):
    random_llama_folder(tmp_path, vocab_size=260)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(TinyGPTQError, match="an empty context needs a BOS or EOS token"):
        tinygptq.load(tmp_path).loglikelihood("", "abc")


def test_perplexity_is_the_exponential_of_minus_the_mean_log_likelihood(model):
    text = "Once upon a time, there was a little girl. She liked to play in the park."
    ids = model.tokenizer.encode(text)
    result = model.perplexity(text)
    whole = log_likelihood(model.engine.model, Request(ids[:1], ids[1:]))
    assert result.tokens == len(ids) - 1
    assert result.perplexity == pytest.approx(math.exp(-whole.logprob / result.tokens), rel=1e-5)
    assert model.perplexity(text, seqlen=8, stride=4).tokens == len(ids) - 1


# ------------------------------------------------------------------------------------------------ pipeline


def test_the_pipeline_returns_what_model_cards_print(model):
    pipe = tinygptq.pipeline(model, max_new_tokens=8)
    (found,) = pipe(OPENING, do_sample=False)
    assert found == {"generated_text": OPENING + model.generate(OPENING, max_new_tokens=8, temperature=0.0)}
    (short,) = pipe(OPENING, do_sample=False, max_new_tokens=3, return_full_text=False)
    assert found["generated_text"][len(OPENING) :].startswith(short["generated_text"])


def test_a_batch_is_what_each_prompt_gets_alone(model):
    prompts = ["Once upon a time", "The cat", "Lily wanted"]
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 20}
    texts = model.generate_batch(prompts, seed=5, stop=["."], **settings)
    assert texts == [model.generate(prompt, seed=5 + n, stop=["."], **settings) for n, prompt in enumerate(prompts)]
    with pytest.raises(TinyGPTQError, match="'heat' is no setting"):
        model.generate_batch(prompts, heat=1.0)


def test_sampling_settings_arrive(model):
    settings = dict(max_new_tokens=24, temperature=0.9, top_p=0.9, top_k=30, repetition_penalty=1.2, seed=3)
    pipe = tinygptq.pipeline(model)
    expected = model.generate(OPENING, **settings)
    assert pipe(OPENING, do_sample=True, **settings) == [{"generated_text": OPENING + expected}]
    assert pipe(OPENING, do_sample=True, **{**settings, "top_k": 1})[0]["generated_text"] != OPENING + expected
    assert pipe(OPENING, **settings)[0]["generated_text"] == OPENING + expected
    first, second = pipe(OPENING, do_sample=True, num_return_sequences=2, **settings)
    assert first["generated_text"] == OPENING + expected != second["generated_text"]


def test_several_prompts_give_a_list_each(model):
    pipe = tinygptq.pipeline(model, do_sample=False, max_new_tokens=2)
    assert pipe([OPENING, "The cat"]) == [pipe(OPENING), pipe("The cat")]


def test_do_sample_without_a_temperature_draws_at_the_folders_own_or_at_1(tmp_path):
    random_llama_folder(tmp_path, vocab_size=260)
    save_byte_tokenizer(tmp_path)
    pipe = tinygptq.pipeline(tmp_path, max_new_tokens=12)
    drawn = pipe("hello", do_sample=True, seed=1)
    assert drawn == pipe("hello", do_sample=True, seed=1, temperature=1.0)
    assert drawn != pipe("hello")  # the folder says nothing: greedy
    assert pipe("hello") == pipe("hello", do_sample=False, temperature=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 4}, "unknown setting 'beams' of a pipeline"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True and temperature 0 contradict"),
        ({"do_sample": False, "num_return_sequences": 2}, "needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_refusals(model, settings, message):
    with pytest.raises(TinyGPTQError, match=message):
        tinygptq.pipeline(model)(OPENING, **settings)


def test_wrong_kinds_of_arguments_are_named(embedded, tmp_path):
    model = tinygptq.load(embedded, context=64)
    for call, said in (
        (lambda: tinygptq.QuantizeConfig(recipe="fast"), "recipe is 'fast', expected a Recipe"),
        (lambda: tinygptq.quantize(embedded, tmp_path / "out", {"bits": 4}), "config is dict, expected a QuantizeConfig"),
        (lambda: tinygptq.quantize(embedded, tmp_path / "out", nsamples=2.0), "nsamples is 2.0, expected a whole number"),
        (lambda: model.generate_batch("Hi"), "generate_batch takes a list of prompts"),
        (lambda: list(model.stream(b"Hi")), "a prompt is text or a list of token ids, not bytes"),
        (lambda: list(model.stream([1.5])), "a prompt is text or a list of token ids, not list with 1.5"),
        (lambda: list(model.stream("Hi", temperature="x")), "temperature is 'x'"),
    ):
        with pytest.raises(TinyGPTQError) as caught:
            call()
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
