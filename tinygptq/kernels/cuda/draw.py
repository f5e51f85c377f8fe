"""The next token on the device: penalties, temperature, top-k, top-p and one draw, as tinygptq/sampling.py does them.

A block serves one sequence. Greedy is an argmax. For top-k, each thread knows the largest of its own logits; the k-th
largest of these is reached by k logits at least, and in practice by few more, which are gathered. The rest of the work is
on these candidates. The uniform numbers come from the host's generator, so that the same seed draws the same tokens on
every device, for equal logits.
"""

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import bits_from_float
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL

THREADS = 1024
MOST = 1024  # candidates, one for each thread: the largest top-k served here
AT_ONCE = 8  # logits that a thread reads before it looks at the first
NOTHING = np.float32(-np.inf)
BROKEN = -1  # the token where the logits hold NaN or infinity
SIGN, EVERY_BIT = np.uint32(0x80000000), np.uint32(0xFFFFFFFF)
SLACK = np.uint32(0x10000)  # ranks: wider than what dividing by the temperature makes equal


@device_function
def _read(values, logits, row, first):
    """This thread's logits from place ``first`` on, 1,024 apart; beyond the vocabulary its last."""
    for j in range(AT_ONCE):
        values[j] = logits[row, min(first + j * THREADS, logits.shape[1] - 1)]


@device_function
def _process(logits, row, seen, ends, penalty, too_early):
    """Repetition penalty, and no end of text yet, in place.

    Returns this thread's largest logit, its place (the first of equal ones) and 1 where one is NaN.
    """
    values, marks = cuda.local.array(AT_ONCE, np.float32), cuda.local.array(AT_ONCE, np.bool_)
    best, place, broken = NOTHING, 0, 0
    for first in range(cuda.threadIdx.x, logits.shape[1], AT_ONCE * THREADS):
        _read(values, logits, row, first)
        for j in range(AT_ONCE):
            marks[j] = seen[row, min(first + j * THREADS, logits.shape[1] - 1)]
        for j in range(AT_ONCE):
            i, value = first + j * THREADS, values[j]
            if i < logits.shape[1]:
                if marks[j]:
                    value = value / penalty if value > np.float32(0) else value * penalty
                    logits[row, i] = value
                if too_early and ends[i]:
                    value = NOTHING
                    logits[row, i] = value
                if value != value:
                    broken = 1
                if value > best:
                    best, place = value, i
    return best, place, broken


@device_function
def _better(best, place, other, there):
    """The larger of two, the earlier of equal ones."""
    if other > best or (other == best and there < place):
        return other, there
    return best, place


@device_function
def _warp_best(best, place):
    """The largest of a warp, the earlier of equal ones, and its place."""
    distance = 16
    while distance:
        other, there = cuda.shfl_xor_sync(ALL, best, distance), cuda.shfl_xor_sync(ALL, place, distance)
        best, place = _better(best, place, other, there)
        distance //= 2
    return best, place


@device_function
def _largest(best, place, broken, values, places):
    """The block's largest logit and its place; NaN where any logit is."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    best, place = _warp_best(best, place)
    if lane == 0:
        values[warp], places[warp] = best, place
    broken = cuda.syncthreads_or(broken)
    best, place = _warp_best(values[lane], places[lane])
    cuda.syncthreads()
    return (np.float32(np.nan) if broken else best), place


@device_function
def _rank(value):
    """A uint32 that orders as the float32 does."""
    bits = bits_from_float(value)
    return bits ^ (EVERY_BIT if bits & SIGN else SIGN)


@device_function
def _lower_bound(best, k):
    """A rank that k logits reach at least, and few more where they lie scattered: just below the k-th largest of the
    threads' best, of which 16 bits are found, from the top."""
    rank, found = _rank(best), np.uint32(0)
    for i in range(16):
        trial = found | (SIGN >> np.uint32(i))
        if cuda.syncthreads_count(np.int32(rank >= trial)) >= k:
            found = trial
    return max(found, SLACK) - SLACK


@device_function
def _bound_of_all(logits, row, k, counter):
    """A rank that k logits reach at least, and MOST at most, or if equal ones forbid that, the k-th largest: for when too
    many reach the lower bound. Found bit by bit, each a pass over the logits."""
    held, found = cuda.local.array(AT_ONCE, np.float32), np.uint32(0)
    for bit in range(32):
        trial, count = found | (SIGN >> np.uint32(bit)), 0
        if cuda.threadIdx.x == 0:
            counter[0] = 0
        cuda.syncthreads()
        for first in range(cuda.threadIdx.x, logits.shape[1], AT_ONCE * THREADS):
            _read(held, logits, row, first)
            for j in range(AT_ONCE):
                count += first + j * THREADS < logits.shape[1] and _rank(held[j]) >= trial
        distance = 16
        while distance:
            count += cuda.shfl_xor_sync(ALL, count, distance)
            distance //= 2
        if cuda.threadIdx.x & 31 == 0:
            cuda.atomic.add(counter, 0, count)
        cuda.syncthreads()
        reached = counter[0]
        cuda.syncthreads()
        if reached >= k:
            found = trial
            if reached <= MOST:
                break
    return found


@device_function
def _gather(logits, row, bound, temperature, values, places, counter):
    """Logits over the temperature, of those whose rank reaches ``bound``, and their places, in any order, MOST at most;
    returns how many reach it."""
    held = cuda.local.array(AT_ONCE, np.float32)
    if cuda.threadIdx.x == 0:
        counter[0] = 0
    cuda.syncthreads()
    for first in range(cuda.threadIdx.x, logits.shape[1], AT_ONCE * THREADS):
        _read(held, logits, row, first)
        for j in range(AT_ONCE):
            i = first + j * THREADS
            if i < logits.shape[1] and _rank(held[j]) >= bound and held[j] > NOTHING:
                at = cuda.atomic.add(counter, 0, 1)
                if at < MOST:
                    values[at], places[at] = held[j] / temperature, i
    cuda.syncthreads()
    count = counter[0]
    cuda.syncthreads()
    return count


@device_function
def _candidates(logits, row, k, best, temperature, values, places, order, counter):
    """The k largest logits over the temperature, and those equal to the k-th, in the order of their places, among others
    that are -inf; returns how many in all. ``best``: this thread's largest logit.

    ``order``: their numbers, from the least likely to the likeliest, equal ones by place. MOST candidates at most: of equal
    ones at the edge, whichever come first.
    """
    count = _gather(logits, row, _lower_bound(best, k), temperature, values, places, counter)
    if count > MOST:
        bound = _bound_of_all(logits, row, k, counter)
        count = min(_gather(logits, row, bound, temperature, values, places, counter), MOST)
    mine, value, place = cuda.threadIdx.x, NOTHING, 0
    before, above, below = 0, 0, 0
    if mine < count:
        value, place = values[mine], places[mine]
        for j in range(count):
            earlier = places[j] < place
            before += earlier
            above += values[j] > value
            below += values[j] < value or (values[j] == value and earlier)
    cuda.syncthreads()
    if mine < count:
        values[before], places[before], order[below] = value if above < k else NOTHING, place, before
    cuda.syncthreads()
    return count


@device_function
def _sum_up(weights, count):
    """Each weight to the sum of all up to it, one after the other as on the CPU; returns the whole sum."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        upto = 0.0
        for j in range(count):
            upto += weights[j]
            weights[j] = upto
    cuda.syncthreads()
    return weights[count - 1]


@device_function
def _cut_top_p(values, weights, order, count, top_p):
    """-inf for candidates whose probability, with all less likely ones, is within 1 - top_p; the likeliest stays.

    As in sampling.keep_top_p: sums run over the candidates in ascending order, equal ones by place.
    """
    mine = cuda.threadIdx.x
    if mine < count:
        weights[mine] = np.float64(cuda.libdevice.expf(values[order[mine]] - values[order[count - 1]]))
    whole = _sum_up(weights, count)
    if mine < count - 1 and weights[mine] / whole <= 1.0 - np.float64(top_p):
        values[order[mine]] = NOTHING
    cuda.syncthreads()


@device_function
def _pick(values, weights, places, count, largest, uniform, counter):
    """The candidate at which the running sum of probabilities passes ``uniform``, in float64."""
    mine = cuda.threadIdx.x
    if mine == 0:
        counter[0] = count
    if mine < count:
        weights[mine] = cuda.libdevice.exp(np.float64(values[mine]) - np.float64(largest))
    whole = _sum_up(weights, count)
    if mine < count and (weights[mine] > uniform * whole or weights[mine] == whole):  # the latter: rounding's last resort
        cuda.atomic.min(counter, 0, mine)
    cuda.syncthreads()
    return places[counter[0]]


def _draw(logits, settings, top_ks, minima, ends, seen, uniforms, drawn, tokens, positions, history, last):
    values = cuda.shared.array(MOST, np.float32)
    places = cuda.shared.array(MOST, np.int32)
    order = cuda.shared.array(MOST, np.int32)
    weights = cuda.shared.array(MOST, np.float64)
    counter = cuda.shared.array(1, np.int32)
    row = cuda.blockIdx.x
    begin_dependents()
    wait_for_dependencies()
    temperature, top_p, penalty = settings[row, 0], settings[row, 1], settings[row, 2]
    number = drawn[row]
    best, place, broken = _process(logits, row, seen, ends, penalty, number < minima[row])
    largest, token = _largest(best, place, broken, values, places)
    if temperature > np.float32(0):
        largest = largest / temperature
    if not NOTHING < largest < np.float32(np.inf):
        token = BROKEN
    elif temperature > np.float32(0):
        count = _candidates(logits, row, top_ks[row], best, temperature, values, places, order, counter)
        if top_p < np.float32(1):
            _cut_top_p(values, weights, order, count, top_p)
        token = _pick(values, weights, places, count, largest, uniforms[row, number], counter)
    if cuda.threadIdx.x == 0:
        if token >= 0:
            seen[row, token] = True
        history[row, number] = token
        drawn[row] = number + 1
        tokens[row] = max(token, 0)
        positions[row] = min(positions[row] + 1, last)


draw = Kernel(_draw, THREADS)
"""``(logits, settings, top_ks, minima, ends, seen, uniforms, drawn, tokens, positions, history, last)``: draws one token
for each of R sequences.

Shapes: logits float32 [R, vocab], overwritten; settings float32 [R, 3]: temperature (0 is greedy), top_p, repetition
penalty; top_ks int32 [R], 1 to 1024; minima int32 [R]: tokens before the end of text may come; ends bool [vocab]: tokens
that end it; seen bool [R, vocab]; uniforms float64 [R, most tokens] in [0, 1); drawn int32 [R], how many were; tokens int32
[R], the result (history int32 [R, most tokens] too, BROKEN where the logits are not finite; it may be the host's memory);
positions int32 [R], moved on by 1, up to ``last``. Grid (R), block 1024. Probabilities are float32 for top-p, float64
for the draw, as on the CPU.
"""
