"""Products of many rows on the CPU: x @ W, and x^T x. Arguments are jobs of int64 (see cpu_launch.py), strides in bytes.

Both are tiles of HEIGHT x 16 numbers, summed in registers over panels of 16 columns that lie one after the other (Goto and
van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). A few panels stay in the second-level cache while
the rows go past them, or a block of rows while panels do, whichever is less to read. A BLAS does the same for any matrices,
which it rearranges first; here W is written as panels in the first place, and of x^T x only what is above the diagonal is
computed.
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels.cpu_tiles import COLUMNS
from tinygptq.kernels.simd import LANES, fma, get, inner, load_f32, prefetch, read_f32, splat, store_f32, write_f32

HEIGHT = 6  # rows whose sums with two vectors of columns fit in AVX2's 16 registers, beside what they are made of
DEPTH = 1536  # inputs that a tile sums up in one go: longer rows of x would not stay in the first-level cache
FEW_PANELS = 1 << 18  # bytes of panels that few rows go past, one tile's at a time: half of a second-level cache
MANY = 768  # rows of x, which go past more panels in blocks: reading them again for every few panels would take longer
PANELS, BLOCK = 2 << 20, 4 * HEIGHT  # bytes of panels, in the third-level cache; rows of a block, in the second
TOKENS = 512  # of x^T x that a tile sums up in one go
LONG = TOKENS + 2  # what a sliver of as many takes: its last token is written with numbers to spare
GRAM_COLUMNS = 48  # of x^T x whose panels stay in the second-level cache, a multiple of HEIGHT and of 16


@inner
def tile(x, row, step, w, depth, out, stride, first, add):
    """Rows ``first`` to HEIGHT of x [HEIGHT, depth] @ w [depth, 16], written or added to ``out``.

    x's rows are ``row`` bytes apart and its columns ``step``; the rows of ``out`` are ``stride`` apart.
    """
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = e0 = e1 = f0 = f1 = splat(0.0)
    x2, x4 = x + 2 * row, x + 4 * row
    for r in range(HEIGHT):
        prefetch(out + r * stride)
    for _ in range(depth):
        w0, w1 = load_f32(w), load_f32(w + 32)
        a, b = splat(read_f32(x)), splat(read_f32(x + row))
        a0, a1, b0, b1 = fma(a, w0, a0), fma(a, w1, a1), fma(b, w0, b0), fma(b, w1, b1)
        a, b = splat(read_f32(x2)), splat(read_f32(x2 + row))
        c0, c1, d0, d1 = fma(a, w0, c0), fma(a, w1, c1), fma(b, w0, d0), fma(b, w1, d1)
        a, b = splat(read_f32(x4)), splat(read_f32(x4 + row))
        e0, e1, f0, f1 = fma(a, w0, e0), fma(a, w1, e1), fma(b, w0, f0), fma(b, w1, f1)
        x, x2, x4, w = x + step, x2 + step, x4 + step, w + 4 * COLUMNS
    for y0, y1 in ((a0, a1), (b0, b1), (c0, c1), (d0, d1), (e0, e1), (f0, f1)):
        if first <= 0:
            if add:
                y0, y1 = y0 + load_f32(out), y1 + load_f32(out + 32)
            store_f32(out, y0)
            store_f32(out + 32, y1)
        first -= 1
        out += stride


# ------------------------------------------------------------------------------------------ x @ W


@inner
def product_of_rows(job, _):
    """A stretch of the rows of x @ W.

    Job: op, x [M, K], its stride, M, K, panels of W float32 [N / 16, K, 16], how many, out [M, N], its stride, the stretch's
    first row, a multiple of HEIGHT, and its end, M or another. M is at least HEIGHT: where that does not divide it, the
    last rows go through with some before them, which are not written.
    """
    x, x_stride, rows, inputs, panels = get(job, 1), get(job, 2), get(job, 3), get(job, 4), get(job, 5)
    out, stride = get(job, 7), get(job, 8)
    begin, end, parts = get(job, 9), get(job, 10), (inputs + DEPTH - 1) // DEPTH
    size, together = (PANELS, BLOCK) if rows >= MANY else (FEW_PANELS, HEIGHT)
    at_once = max(1, size // (4 * COLUMNS * (inputs // parts)))
    for part in range(parts):
        start = inputs * part // parts
        depth = inputs * (part + 1) // parts - start
        for first in range(0, get(job, 6), at_once):
            for block in range(begin, end, together):
                for n in range(first, min(first + at_once, get(job, 6))):
                    w = panels + 4 * COLUMNS * (n * inputs + start)
                    for i in range(block, min(block + together, end), HEIGHT):
                        row = min(i, rows - HEIGHT)
                        some, y = x + row * x_stride + 4 * start, out + row * stride + 4 * COLUMNS * n
                        tile(some, x_stride, 4, w, depth, y, stride, i - row, part > 0)


# ------------------------------------------------------------------------------------------ x^T x


@inner
def gram_of_tokens(job, _):
    """x^T x of a stretch of tokens: what is on and above the diagonal (:func:`mirror` fills in the rest).

    Job: op, x [T, K], its stride, T, K, out float32 [K, K], its sides rounded up to HEIGHT and 16, its stride, room for
    float32 [K rounded up to GRAM_COLUMNS, LONG] and then [GRAM_COLUMNS, TOKENS].
    """
    x, x_stride, tokens, width = get(job, 1), get(job, 2), get(job, 3), get(job, 4)
    out, stride, slivers = get(job, 5), get(job, 6), get(job, 7)
    panels = slivers + 4 * LONG * ((width + GRAM_COLUMNS - 1) // GRAM_COLUMNS * GRAM_COLUMNS)
    for start in range(0, tokens, TOKENS):
        count, some = min(TOKENS, tokens - start), x + start * x_stride
        for begin in range(0, width, GRAM_COLUMNS):
            end = min(begin + GRAM_COLUMNS, width)
            _rearrange(some, x_stride, count, begin, width, slivers + 4 * begin * LONG, panels)
            for i in range(0, end, HEIGHT):
                sliver, row = slivers + 4 * i * LONG, out + i * stride
                for j in range(max(begin, i // COLUMNS * COLUMNS), end, COLUMNS):
                    panel = panels + 4 * (j - begin) * TOKENS
                    tile(sliver, 4, 4 * HEIGHT, panel, count, row + 4 * j, stride, 0, start > 0)


@inner
def _rearrange(x, stride, tokens, begin, width, slivers, panels):
    """GRAM_COLUMNS columns of x, from ``begin``, as slivers of HEIGHT and panels of 16 columns; missing ones are zeros."""
    x += 4 * begin
    for t in range(tokens):
        sliver, panel = slivers + 4 * HEIGHT * t, panels + 4 * COLUMNS * t
        # eight numbers are read for the last six of a sliver: of the last token there may be none behind them
        if begin + GRAM_COLUMNS <= width and (t + 1 < tokens or begin + GRAM_COLUMNS + LANES <= width):
            for i in range(0, GRAM_COLUMNS, HEIGHT):  # of each eight numbers, the next token overwrites two
                store_f32(sliver + 4 * i * LONG, load_f32(x + 4 * i))
            for i in range(0, GRAM_COLUMNS, COLUMNS):
                store_f32(panel + 4 * i * TOKENS, load_f32(x + 4 * i))
                store_f32(panel + 4 * i * TOKENS + 32, load_f32(x + 4 * i + 32))
        else:
            for i in range(GRAM_COLUMNS):
                value = read_f32(x + 4 * i) if begin + i < width else np.float32(0.0)
                write_f32(sliver + 4 * (i // HEIGHT * HEIGHT * LONG + i % HEIGHT), value)
                write_f32(panel + 4 * (i // COLUMNS * COLUMNS * TOKENS + i % COLUMNS), value)
        x += stride


@inner
def mirror(job, part):
    """COLUMNS columns of a square matrix, down to the diagonal, to the rows of these numbers.

    Job: op, matrix float32, its stride, its size.
    """
    matrix, stride, first = get(job, 1), get(job, 2), part * COLUMNS
    last = min(first + COLUMNS, get(job, 3))
    for column in range(0, last, COLUMNS):
        for i in range(first, last):
            for j in range(column, min(column + COLUMNS, i)):
                write_f32(matrix + i * stride + 4 * j, read_f32(matrix + j * stride + 4 * i))
