"""The next token on the device: penalties, temperature, top-k, top-p and one draw, as tinygptq/sampling.py does them.

A block serves one sequence. Greedy is an argmax. Else the k-th largest logit is found by its bits, 8 at a time from the top
(radix selection), what reaches it is gathered, and the rest of the work is on those few candidates. The uniform numbers come
from the host's generator, so that the same seed draws the same tokens on every device, for equal logits.
"""

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import bits_from_float
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL

THREADS = 1024
MOST = 1024  # candidates: the largest top-k served here
NOTHING = np.float32(-np.inf)
BROKEN = -1  # the token where the logits hold NaN or infinity


@device_function
def _rank(value):
    """A uint32 that orders as the float32 does."""
    bits = bits_from_float(value)
    return bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))


@device_function
def _process(logits, row, seen, ends, penalty, temperature, too_early):
    """Logits as the draw sees them, in place: repetition penalty, no end of text yet, temperature.

    Returns this thread's largest, its place (the first of equal ones) and 1 where one is NaN.
    """
    best, place, broken = NOTHING, 0, 0
    for i in range(cuda.threadIdx.x, logits.shape[1], THREADS):
        value = logits[row, i]
        if seen[row, i]:
            value = value / penalty if value > np.float32(0) else value * penalty
        if too_early and ends[i]:
            value = NOTHING
        if temperature > np.float32(0):
            value = value / temperature
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
def _largest(best, place, broken, values, places):
    """The place of the block's largest logit; BROKEN unless it is finite and no logit is NaN."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    broken = cuda.syncthreads_or(broken)
    distance = 16
    while distance:
        other, there = cuda.shfl_xor_sync(ALL, best, distance), cuda.shfl_xor_sync(ALL, place, distance)
        best, place = _better(best, place, other, there)
        distance //= 2
    if lane == 0:
        values[warp], places[warp] = best, place
    cuda.syncthreads()
    for w in range(THREADS // 32):
        best, place = _better(best, place, values[w], places[w])
    cuda.syncthreads()
    if broken or not NOTHING < best < np.float32(np.inf):
        place = BROKEN
    return place


@device_function
def _kth_largest(logits, row, k, counts, totals, chosen):
    """The rank of the k-th largest logit, k from 1; its 32 bits are found 8 at a time."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    prefix, mask = np.uint32(0), np.uint32(0)
    for turn in range(4):
        shift = np.uint32(24 - 8 * turn)
        if cuda.threadIdx.x < 256:
            counts[cuda.threadIdx.x] = 0
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, logits.shape[1], THREADS):
            rank = _rank(logits[row, i])
            if rank & mask == prefix:
                cuda.atomic.add(counts, (rank >> shift) & np.uint32(255), 1)
        cuda.syncthreads()
        digit, count, upto = 255 - cuda.threadIdx.x, 0, 0
        if cuda.threadIdx.x < 256:  # thread i sums up the 256 bins from the highest to the i-th
            count = counts[digit]
            upto = count
            distance = 1
            while distance < 32:
                other = cuda.shfl_up_sync(ALL, upto, distance)
                if lane >= distance:
                    upto += other
                distance *= 2
            if lane == 31:
                totals[warp] = upto
        cuda.syncthreads()
        if cuda.threadIdx.x < 256:
            for w in range(warp):
                upto += totals[w]
            if upto - count < k <= upto:
                chosen[0], chosen[1] = digit, k - (upto - count)
        cuda.syncthreads()
        prefix |= np.uint32(chosen[0]) << shift
        mask |= np.uint32(255) << shift
        k = chosen[1]
        cuda.syncthreads()
    return prefix


@device_function
def _gather(logits, row, threshold, values, places, chosen):
    """Candidates in the order of their places; at most MOST (of equal ones at the edge, whichever come first)."""
    if cuda.threadIdx.x == 0:
        chosen[0] = 0
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, logits.shape[1], THREADS):
        if _rank(logits[row, i]) >= threshold and logits[row, i] > NOTHING:
            at = cuda.atomic.add(chosen, 0, 1)
            if at < MOST:
                places[at] = i
    cuda.syncthreads()
    count = min(chosen[0], MOST)
    mine, before = 0, 0
    if cuda.threadIdx.x < count:
        mine = places[cuda.threadIdx.x]
        for j in range(count):
            before += places[j] < mine
    cuda.syncthreads()
    if cuda.threadIdx.x < count:
        places[before] = mine
        values[before] = logits[row, mine]
    cuda.syncthreads()
    return count


@device_function
def _cut_top_p(values, weights, order, count, top_p):
    """-inf for candidates whose probability, with all less likely ones, is within 1 - top_p; the likeliest stays.

    As in sampling.keep_top_p: sums run over the candidates in ascending order, equal ones by place.
    """
    mine = cuda.threadIdx.x
    if mine < count:
        rank = 0
        for j in range(count):
            rank += values[j] < values[mine] or (values[j] == values[mine] and j < mine)
        order[rank] = mine
    cuda.syncthreads()
    if mine < count:
        weights[mine] = np.float64(cuda.libdevice.expf(values[order[mine]] - values[order[count - 1]]))
    cuda.syncthreads()
    if mine == 0:
        whole = 0.0
        for j in range(count):
            whole += weights[j]
        below = 0.0
        for j in range(count - 1):
            below += weights[j] / whole
            if below <= 1.0 - np.float64(top_p):
                values[order[j]] = NOTHING
    cuda.syncthreads()


@device_function
def _pick(values, weights, places, count, uniform):
    """The candidate at which the running sum of probabilities passes ``uniform``, in float64."""
    mine = cuda.threadIdx.x
    largest = NOTHING
    if mine < count:
        for j in range(count):
            largest = max(largest, values[j])
        weights[mine] = cuda.libdevice.exp(np.float64(values[mine]) - np.float64(largest))
    cuda.syncthreads()
    token = BROKEN
    if mine == 0:
        whole = 0.0
        for j in range(count):
            whole += weights[j]
        upto = 0.0
        for j in range(count):
            if weights[j] > 0.0:
                upto += weights[j]
                token = places[j]
                if upto > uniform * whole:
                    break
    return token


def _draw(logits, settings, top_ks, minima, ends, seen, uniforms, drawn, tokens, positions, history, last):
    values = cuda.shared.array(MOST, np.float32)
    places = cuda.shared.array(MOST, np.int32)
    order = cuda.shared.array(MOST, np.int32)
    weights = cuda.shared.array(MOST, np.float64)
    counts, totals = cuda.shared.array(256, np.int32), cuda.shared.array(8, np.int32)
    chosen = cuda.shared.array(2, np.int32)
    row = cuda.blockIdx.x
    begin_dependents()
    wait_for_dependencies()
    temperature, top_p, penalty = settings[row, 0], settings[row, 1], settings[row, 2]
    number = drawn[row]
    best, place, broken = _process(logits, row, seen, ends, penalty, temperature, number < minima[row])
    token = _largest(best, place, broken, values, places)
    if temperature > np.float32(0) and token >= 0:
        threshold = _kth_largest(logits, row, top_ks[row], counts, totals, chosen)
        count = _gather(logits, row, threshold, values, places, chosen)
        if top_p < np.float32(1):
            _cut_top_p(values, weights, order, count, top_p)
        token = _pick(values, weights, places, count, uniforms[row, number])
    if cuda.threadIdx.x == 0:
        if token >= 0:
            seen[row, token] = True
        history[row, number] = token
        drawn[row] = number + 1
        tokens[row] = max(token, 0)
        positions[row] = min(positions[row] + 1, last)


draw = Kernel(_draw, THREADS)
"""``(logits, settings, top_ks, minima, ends, seen, uniforms, drawn, tokens, positions, history, last)``: draws one token for
each of R sequences.

Shapes: logits float32 [R, vocab], overwritten; settings float32 [R, 3]: temperature (0 is greedy), top_p, repetition
penalty; top_ks int32 [R], 1 to 1024; minima int32 [R]: tokens before the end of text may come; ends bool [vocab]: tokens
that end it; seen bool [R, vocab]; uniforms float64 [R, most tokens] in [0, 1); drawn int32 [R], how many were; tokens int32
[R], the result (history int32 [R, most tokens] too, BROKEN where the logits are not finite); positions int32 [R], moved on
by 1, up to ``last``. Grid (R), block 1024. Probabilities are float32 for top-p, float64 for the draw, as on the CPU.
"""
