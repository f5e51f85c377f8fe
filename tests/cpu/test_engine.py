"""The engine against the definition of the forward pass: prefill, decode, position, capacity, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from random_models import config, weights

from tinygptq.config import RopeScaling
from tinygptq.engine import CpuEngine
from tinygptq.errors import TinyGPTQError
from tinygptq.model import Llama

IDS = np.random.default_rng(5).integers(0, 80, 24)


def decode_all(engine: CpuEngine, ids=IDS) -> np.ndarray:
    return np.stack([engine.decode(int(token)).copy() for token in ids])


KINDS = [2, 3, 4, 8, np.float16, ml_dtypes.bfloat16, np.float32]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decoding_gives_the_logits_of_the_definition(kind):
    model = weights(config(), kind)
    expected = Llama(config(), model).forward(IDS[None])[0]
    engine = CpuEngine(config(), model)
    logits = decode_all(engine)
    assert logits.dtype == np.float32 and engine.cache.length == len(IDS)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    engine.reset()
    np.testing.assert_allclose(engine.prefill(IDS), expected[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("group", "sym", "perm"), [(-1, False, True), (64, False, True), (32, True, True), (24, False, False)]
)
def test_decoding_with_other_groups_zeros_and_orders(group, sym, perm):
    model = weights(config(), 4, group=group, sym=sym, perm=perm)
    expected = Llama(config(), model).forward(IDS[None])[0]
    np.testing.assert_allclose(decode_all(CpuEngine(config(), model)), expected, atol=1e-4)


def test_prefill_then_decode_continues_the_sequence():
    model = weights(config(), 4)
    expected = Llama(config(), model).forward(IDS[None])[0]
    engine = CpuEngine(config(), model)
    np.testing.assert_allclose(engine.prefill(IDS[:9]), expected[8], atol=1e-4)
    np.testing.assert_allclose(engine.prefill(IDS[9:11]), expected[10], atol=1e-4)
    np.testing.assert_allclose(decode_all(engine, IDS[11:]), expected[11:], atol=1e-4)


@pytest.mark.parametrize("head_dim", [6, 10])
def test_sizes_that_fill_no_vector(head_dim):
    odd = config(vocab_size=81, hidden_size=21, intermediate_size=35, head_dim=head_dim)
    model = weights(odd, np.float32)
    expected = Llama(odd, model).forward(IDS[None])[0]
    np.testing.assert_allclose(decode_all(CpuEngine(odd, model)), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_stretched_rotary_embeddings(kind):
    scaling = RopeScaling(kind, 2.0, original_max_position_embeddings=100)
    stretched = config(rope_scaling=scaling)
    model = weights(stretched, np.float32)
    expected = Llama(stretched, model).forward(IDS[None])[0]
    np.testing.assert_allclose(decode_all(CpuEngine(stretched, model)), expected, atol=1e-4)


def test_a_reset_engine_repeats_itself_bit_for_bit():
    engine = CpuEngine(config(), weights(config(), 4))
    first = decode_all(engine)
    engine.reset()
    assert np.array_equal(decode_all(engine), first)


def test_logits_do_not_depend_on_the_number_of_threads():
    """In a process each, because Numba fixes the number at start."""
    code = (
        "from random_models import config, weights; from tinygptq.engine import CpuEngine\n"
        "engine = CpuEngine(config(), weights(config(), 4))\n"
        "print([engine.decode(token).tobytes().hex() for token in range(24)])"
    )
    outputs = set()
    for threads in ("1", "2"):
        environment = os.environ | {"NUMBA_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_a_full_context_is_one_clear_line():
    engine = CpuEngine(config(), weights(config(), 4), context=5)
    decode_all(engine, IDS[:5])
    with pytest.raises(TinyGPTQError, match="context is full: 5 tokens"):
        engine.decode(1)
    assert engine.cache.length == 5
    engine.reset()
    with pytest.raises(TinyGPTQError, match="context is full"):
        engine.prefill(IDS)


@pytest.mark.parametrize("token", [-1, 80])
def test_a_token_outside_the_vocabulary_is_one_clear_line(token):
    engine = CpuEngine(config(), weights(config(), 4))
    with pytest.raises(TinyGPTQError, match=f"token id {token} is outside the vocabulary of 80"):
        engine.decode(token)
    assert engine.cache.length == 0


def test_decoding_allocates_nothing_that_grows():
    long = config(max_position_embeddings=600)
    engine = CpuEngine(long, weights(long, 4))
    decode_all(engine, IDS[:3])
    peaks = []
    for start, end in ((3, 20), (500, 517)):
        engine.cache.advance(start - engine.cache.length)
        tracemalloc.start()
        for token in range(start, end):
            engine.decode(token % 80)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] + 512
    assert peaks[1] < 16384
