"""One token through the whole model in one compiled call.

A decode step is a few hundred small products, each waiting for the one before. Forking and joining threads around each
would cost more than some of them take. So the step is written down once as a list of *tasks* (a range of a linear's tiles,
a head's attention ...), ordered in *phases*: a task may run when every task of earlier phases is done (cpu_plan.py makes
the list). All threads enter one parallel region and run :func:`run_tasks`:

    take the next ticket (one atomic add) -> wait until all earlier phases are done -> do the task -> count it as done

No thread waits for one that has not begun: what a task waits for are tasks with lower tickets, each taken by a thread that
is running it. So the step finishes with however many threads come, one alone included; and since a task computes the same
numbers whoever runs it, the result does not depend on their number.

All arguments are addresses or whole numbers; ``job``, ``task``, ``layout``, ``linear`` and ``memo`` are tables of int64.
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import cpu_sync, cpu_tiles, simd
from tinygptq.kernels.cpu_attention import attend, dot, rotate
from tinygptq.kernels.cpu_tiles import COLUMNS
from tinygptq.kernels.simd import LANES, get, inner, load_f32, put, splat, store_f32

# The job (its place 0 is for launch)
(TOKEN, POSITION, TASKS, TASK_COUNT, LINEARS, LAYOUT, NORMS, WORK, SCRATCH, SCRATCH_BYTES, MEMO, COUNTERS, KEYS, VALUES,
 COS, SIN) = range(1, 17)  # fmt: skip

# A task: what to do, and its fields
EMBED = 0  # h = row TOKEN of the embedding
PROJECT = 1  # target = x @ W
ADD = 2  # h += x @ W
GATED = 3  # target = silu(x @ W_gate) * (x @ W_up); the up linear follows the gate in the table
ROTATE = 4  # RoPE on queries and keys; keys and values into the cache
ATTEND = 5  # heads FIRST .. LAST-1 of attention
OP, WAIT, LAYER, LINEAR, FIRST, LAST, SOURCE, NORM, TARGET = range(9)
TASK_FIELDS = 9
NO_NORM = -1

# The layout: where the vectors of the workspace begin, in float32; sizes; where those of a thread's own scratch begin
H, Q, K, V, MIX, GATE, UP, DELTA, LOGITS = range(9)
HIDDEN, NORM_WIDTH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = range(9, 15)
ORDERED, PAIRS, SUMS, SCORES = range(15, 19)  # the normalised input is at 0
LAYOUT_FIELDS = 19

# A thread's memo of what its scratch holds: for which phase the normalised input and the integers were made (its WAIT), in
# which order and groups, and the integers' unit (a float32)
NORMED_FOR, INTEGERS_FOR, GATHERED_BY, GROUPED_BY, UNIT = range(5)
MEMO_FIELDS = 8  # a cache line

NEXT, DONE = 8, 24  # places of the two counters: a cache line each, nothing else near them
COUNTERS_SIZE = 40
SPINS = 2000  # looks at a counter before a waiting thread offers its core to others


@inner
def run_tasks(job, thread, eps):
    """Take and do tasks until none is left; every thread runs this."""
    upcoming, done = get(job, COUNTERS) + 8 * NEXT, get(job, COUNTERS) + 8 * DONE
    own, memo = get(job, SCRATCH) + thread * get(job, SCRATCH_BYTES), get(job, MEMO) + thread * 8 * MEMO_FIELDS
    for i in range(MEMO_FIELDS):
        put(memo, i, -1)
    while True:
        ticket = cpu_sync.fetch_add(upcoming, 1)
        if ticket >= get(job, TASK_COUNT):
            return
        task = get(job, TASKS) + 8 * TASK_FIELDS * ticket
        _wait_until(done, get(task, WAIT))
        op = get(task, OP)
        if op == ROTATE:
            _rotate_and_append(job, task)
        elif op == ATTEND:
            _attend_heads(job, task, own)
        elif op == EMBED:
            _embed(get(job, LINEARS), get(job, TOKEN), get(job, WORK) + 4 * get(get(job, LAYOUT), H))
        else:
            _multiply(job, task, own, memo, eps)
        cpu_sync.fetch_add(done, 1)


@inner
def _wait_until(counter, value):
    spins = 0
    while cpu_sync.read_shared(counter) < value:
        cpu_sync.relax()
        spins += 1
        if spins % SPINS == 0:
            cpu_sync.give_way()


@inner
def _embed(embedding, token, h):
    """Row ``token`` of the embedding to ``h``, as float32."""
    hidden, kind, start = get(embedding, cpu_tiles.INPUTS), get(embedding, cpu_tiles.KIND), get(embedding, cpu_tiles.CODES)
    if kind == cpu_tiles.FLOAT32:
        for i in range(hidden):
            simd.write_f32(h + 4 * i, simd.read_f32(start + 4 * (hidden * token + i)))
    else:
        cpu_tiles.widen(start + 2 * hidden * token, hidden, kind == cpu_tiles.BFLOAT16, h)


@inner
def _multiply(job, task, own, memo, eps):
    """A range of a linear's tiles, and what its op does with them."""
    op, first, last = get(task, OP), get(task, FIRST), get(task, LAST)
    work, layout = get(job, WORK), get(job, LAYOUT)
    target, up = work + 4 * get(task, TARGET), work + 4 * get(layout, UP)
    pairs, sums = own + 4 * get(layout, PAIRS), own + 4 * get(layout, SUMS)
    linear = get(job, LINEARS) + 8 * cpu_tiles.FIELDS * get(task, LINEAR)
    out = target
    for _ in range(2 if op == GATED else 1):
        x = _input(job, task, linear, own, memo, eps)
        cpu_tiles.tiles(linear, first, last, x, pairs, sums, simd.read_f32(memo + 8 * UNIT), out)
        linear, out = linear + 8 * cpu_tiles.FIELDS, up
    for i in range(first * COLUMNS, last * COLUMNS, LANES):
        at = target + 4 * i
        if op == ADD:
            h = work + 4 * (get(layout, H) + i)
            store_f32(h, load_f32(h) + load_f32(at))
        elif op == GATED:
            gate = load_f32(at)
            silu = simd.divide(gate, splat(1.0) + simd.exp(splat(0.0) - gate))
            store_f32(at, silu * load_f32(up + 4 * i))


@inner
def _input(job, task, linear, own, memo, eps):
    """The address of a product's input, normalised if the task says so and made integer if the linear is packed.

    Each thread does this for itself: that is quicker than to wait for another that does it. What is still in its scratch
    from its last task (same phase, same order and groups) is used again.
    """
    layout, phase = get(job, LAYOUT), get(task, WAIT)
    x = get(job, WORK) + 4 * get(task, SOURCE)
    if get(task, NORM) != NO_NORM:
        if get(memo, NORMED_FOR) != phase:
            weight = get(job, NORMS) + 4 * get(layout, NORM_WIDTH) * get(task, NORM)
            _rms_norm(x, weight, get(layout, HIDDEN), eps, own)
            put(memo, NORMED_FOR, phase)
        x = own
    if cpu_tiles.is_packed(linear):
        gather, group = get(linear, cpu_tiles.GATHER), get(linear, cpu_tiles.GROUP)
        known = get(memo, INTEGERS_FOR) == phase and get(memo, GATHERED_BY) == gather and get(memo, GROUPED_BY) == group
        if not known:
            ordered, pairs, sums = own + 4 * get(layout, ORDERED), own + 4 * get(layout, PAIRS), own + 4 * get(layout, SUMS)
            simd.write_f32(memo + 8 * UNIT, cpu_tiles.integer_input(linear, x, ordered, pairs, sums))
            put(memo, INTEGERS_FOR, phase)
            put(memo, GATHERED_BY, gather)
            put(memo, GROUPED_BY, group)
    return x


@inner
def _rms_norm(x, weight, hidden, eps, out):
    """ops.rms_norm of one vector; all three are padded with zeros to whole vectors."""
    scale = np.float32(1.0) / np.sqrt(dot(x, x, hidden) / np.float32(hidden) + eps)
    for i in range(0, hidden, LANES):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * splat(scale) * load_f32(weight + 4 * i))


@inner
def _rotate_and_append(job, task):
    """Rotate this token's queries (scaled for attention) and keys; append keys and values to the cache."""
    work, layout, cos, sin = get(job, WORK), get(job, LAYOUT), get(job, COS), get(job, SIN)
    dim, groups = get(layout, HEAD_DIM), get(layout, KV_HEADS)
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    for head in range(get(layout, HEADS)):
        rotate(work + 4 * (get(layout, Q) + head * dim), cos, sin, dim // 2, scale)
    for group in range(groups):
        k, v = work + 4 * (get(layout, K) + group * dim), work + 4 * (get(layout, V) + group * dim)
        rotate(k, cos, sin, dim // 2, np.float32(1.0))
        row = 4 * dim * ((get(task, LAYER) * groups + group) * get(layout, CAPACITY) + get(job, POSITION))
        for d in range(dim):
            simd.write_f32(get(job, KEYS) + row + 4 * d, simd.read_f32(k + 4 * d))
            simd.write_f32(get(job, VALUES) + row + 4 * d, simd.read_f32(v + 4 * d))


@inner
def _attend_heads(job, task, own):
    """Attention of a range of query heads over the cached positions, this token's included."""
    work, layout = get(job, WORK), get(job, LAYOUT)
    dim, groups = get(layout, HEAD_DIM), get(layout, KV_HEADS)
    share = get(layout, HEADS) // groups
    for head in range(get(task, FIRST), get(task, LAST)):
        cache = 4 * dim * get(layout, CAPACITY) * (get(task, LAYER) * groups + head // share)
        q, out = work + 4 * (get(layout, Q) + head * dim), work + 4 * (get(layout, MIX) + head * dim)
        keys, values = get(job, KEYS) + cache, get(job, VALUES) + cache
        attend(q, keys, values, get(job, POSITION) + 1, dim, own + 4 * get(layout, SCORES), out)
