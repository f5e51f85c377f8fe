"""The loop that generates, over an engine made of a table; and stop strings however a text is cut into pieces."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinygptq.errors import TinyGPTQError
from tinygptq.generate import PrefixEngine, StoppedText, StopStrings, generate_batch, generate_ids
from tinygptq.sampling import Sampler, SamplingParams

VOCAB = 10


class CountingEngine:
    """After token t the likeliest is t + 1 (mod VOCAB); keeps what it was fed, so that tests can look."""

    def __init__(self, capacity: int = 100) -> None:
        self.capacity, self.fed, self.calls = capacity, [7, 7, 7], []

    def reset(self) -> None:
        self.fed = []
        self.calls.append("reset")

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append("prefill")
        self.fed += ids.tolist()
        return self._logits()

    def decode(self, token: int) -> np.ndarray:
        self.calls.append("decode")
        self.fed.append(token)
        return self._logits()

    def _logits(self) -> np.ndarray:
        assert len(self.fed) <= self.capacity
        return np.eye(VOCAB, dtype=np.float32)[(self.fed[-1] + 1) % VOCAB]


class ThreeAtOnce(CountingEngine):
    """The same for up to three sequences together."""

    rows = 3

    def truncate(self, length: int) -> None:
        del self.fed[length:]

    def can_draw(self, sampler: Sampler) -> bool:
        return sampler.params.temperature == 0.0

    def draw_ahead(self, sampler: Sampler, most: int):
        for step in range(most):
            yield (self.fed[-1] + 1 + step) % VOCAB

    def generate_batch(self, prompts, samplers, most, eos_token_ids, ended=None) -> list[list[int]]:
        assert len(prompts) <= self.rows
        self.calls.append(f"batch of {len(prompts)}")
        found: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for step in range(most):
            for row in sorted(running):
                token = (prompts[row][-1] + 1 + step) % VOCAB
                if token not in eos_token_ids:
                    found[row].append(token)
                if token in eos_token_ids or (ended is not None and ended(row, token)):
                    running.discard(row)
        return found


def run(prompt, max_new_tokens, eos=(), capacity=100, engine=None, **params) -> list[int]:
    engine = engine or CountingEngine(capacity)
    sampler = Sampler(SamplingParams(**params), VOCAB, eos, seed=0)
    return list(generate_ids(engine, prompt, sampler, max_new_tokens, eos))


def test_greedy_counts_on():
    engine = CountingEngine()
    assert run([3, 4], 8, engine=engine) == [5, 6, 7, 8, 9, 0, 1, 2]
    assert engine.fed == [3, 4, 5, 6, 7, 8, 9, 0, 1]  # the last token drawn need not be decoded
    assert engine.calls == ["reset", "prefill"] + ["decode"] * 7


@pytest.mark.parametrize("eos", [(8,), (9, 8), [8]])
def test_end_of_text_ends_it_and_is_not_yielded(eos):
    assert run([3, 4], 100, eos=eos) == [5, 6, 7]


def test_min_new_tokens_steps_over_the_end():
    # where 8 would come, every other token is equally likely (0), and the first of them is drawn
    assert run([3, 4], 100, eos=(8,), min_new_tokens=4) == [5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
def test_max_new_tokens(max_new_tokens):
    assert run([0], max_new_tokens) == [(1 + i) % VOCAB for i in range(max_new_tokens)]


@given(prompt=st.integers(1, 12), capacity=st.integers(1, 12), wanted=st.integers(0, 20))
def test_prompt_and_answer_never_exceed_the_context(prompt, capacity, wanted):
    if prompt >= capacity:
        with pytest.raises(TinyGPTQError, match=f"the prompt's {prompt} tokens fill the context of {capacity}"):
            run([0] * prompt, wanted, capacity=capacity)
    else:
        assert len(run([0] * prompt, wanted, capacity=capacity)) == min(wanted, capacity - prompt)


@pytest.mark.parametrize(
    ("prompt", "wanted", "message"),
    [([], 5, "the prompt holds no tokens"), ([0, VOCAB], 5, f"token id {VOCAB} is outside the vocabulary"),
     ([-1], 5, "token id -1 is outside"), ([0], -1, "max_new_tokens is -1, expected at least 0")],
)  # fmt: skip
def test_refusals(prompt, wanted, message):
    engine = CountingEngine()
    with pytest.raises(TinyGPTQError, match=message):
        run(prompt, wanted, engine=engine)
    assert "prefill" not in engine.calls


def test_an_engine_can_be_used_again():
    engine = CountingEngine()
    assert run([3], 4, engine=engine) == run([3], 4, engine=engine) == [4, 5, 6, 7]


def test_tokens_come_one_at_a_time():
    engine = CountingEngine()
    tokens = generate_ids(engine, [3], Sampler(SamplingParams(), VOCAB, (), None), 100, ())
    assert next(tokens) == 4
    assert engine.calls == ["reset", "prefill"]  # nothing is decoded before it is asked for


# ---------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize(("temperature", "batches"), [(0.0, ["batch of 3", "batch of 2"]), (1e-4, [])])
def test_prompts_are_answered_together_where_the_engine_can(temperature, batches):
    """With a temperature this engine cannot draw, so that the prompts take turns; the answers are the same."""
    inner = ThreeAtOnce()
    engine = PrefixEngine(inner, SimpleNamespace(rope_scaling=None))
    samplers = [Sampler(SamplingParams(temperature=temperature), VOCAB, (), seed=n) for n in range(5)]
    heard: list[tuple[int, int]] = []

    def ended(number: int, token: int) -> bool:
        heard.append((number, token))
        return number == 4 and token == 1

    found = generate_batch(engine, [[1], [2, 3], [4], [5], [8]], samplers, 4, (6,), ended)
    assert found == [[2, 3, 4, 5], [4, 5], [5], [], [9, 0, 1]]
    assert [call for call in inner.calls if call.startswith("batch")] == batches
    assert [token for number, token in heard if number == 4] == [9, 0, 1]


class Letters:
    """A decoder that holds every other letter back."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        self.held += chr(token)
        if len(self.held) < 2:
            return ""
        text, self.held = self.held, ""
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_a_stopped_text_is_what_comes_before_the_first_stop(text, stops):
    answer = StoppedText(Letters(), stops)
    ended = [answer.ends(ord(letter)) for letter in text]
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    assert answer.whole() == text[:cut]
    assert answer.whole() == text[:cut]  # asking twice changes nothing
    assert cut is not None or not any(ended)


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """What comes out of StopStrings, used as the streaming loop uses it."""
    cutter, out = StopStrings(stops), []
    for piece in pieces:
        out.append(cutter.push(piece))
        if cutter.found:
            return "".join(out), True
    out.append(cutter.flush())
    return "".join(out), cutter.found


LETTERS = st.text("ab\u00e9\n", max_size=4)  # few letters, so that stops occur, overlap and almost occur


@given(pieces=st.lists(LETTERS, max_size=12), stops=st.lists(LETTERS, max_size=4))
@example(pieces=["ab", "c"], stops=["abc", "b"])  # "b" is complete first, "abc" begins first
@example(pieces=["ab", "d"], stops=["abc", "b"])
@example(pieces=["aab"], stops=["ab"])
@example(pieces=["a", "a", "b"], stops=["aab", "ab"])
@example(pieces=["aa", "ab", "aabb"], stops=["aabb"])
def test_text_ends_where_the_first_stop_begins_however_it_is_cut(pieces, stops):
    text = "".join(pieces)
    at = min((text.find(stop) for stop in stops if stop and stop in text), default=None)
    assert stopped(pieces, stops) == (text if at is None else text[:at], at is not None)


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_only_what_could_begin_a_stop_is_held_back(text, stops):
    cutter, out = StopStrings(stops), ""
    for i, letter in enumerate(text, 1):
        out += cutter.push(letter)
        if cutter.found:
            return
        assert text.startswith(out)
        held = text[len(out) : i]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
