"""Codes into 32-bit words and back, and the one clean form of a quantised linear.

A packed column is a little-endian bit stream: code ``i`` occupies bits ``i*bits .. (i+1)*bits - 1`` of the column's
32-bit words laid end to end, least significant bit first. That one sentence covers every GPTQ width: 2, 4 and 8 bits
never straddle a word, and 3 bits put 32 codes into 3 words (10 codes, 1 split, 10, 1 split, 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygptq.errors import TinyGPTQError


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along axis 0.

    Args:
        codes: integers [K, ...], each in 0 .. 2^bits - 1; ``K * bits`` must be a multiple of 32.
        bits: 1 to 16 (GPTQ uses 2, 3, 4 and 8).

    Returns:
        uint32 [K * bits / 32, ...].

    Raises:
        TinyGPTQError: a code out of range, or a count that does not fill whole words.
    """
    codes = _array(codes)
    count = codes.shape[0]
    if count * bits % 32:
        raise TinyGPTQError(f"{count} codes of {bits} bits do not fill whole 32-bit words")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise TinyGPTQError(f"codes from {codes.min()} to {codes.max()} do not fit in {bits} bits")
    words = np.zeros_like(codes, np.uint32, "C", shape=(count * bits // 32, *codes.shape[1:]))
    per_turn, words_per_turn = _turn(bits)
    for i in range(per_turn):  # every turn of the pattern has the same shifts, so one strided line packs them all
        code = codes[i::per_turn].astype(np.uint32)
        word, shift = divmod(i * bits, 32)
        words[word::words_per_turn] |= code << np.uint32(shift)
        if shift + bits > 32:  # the code's upper bits open the next word
            words[word + 1 :: words_per_turn] |= code >> np.uint32(32 - shift)
    return words


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`pack`: the first ``count`` codes of uint32/int32 words [R, ...] -> uint8/uint16 [count, ...]."""
    words = _array(words).view(np.uint32)
    per_turn, words_per_turn = _turn(bits)
    if words.shape[0] * 32 < count * bits:
        raise TinyGPTQError(f"{words.shape[0]} words hold fewer than {count} codes of {bits} bits")
    if words.shape[0] % words_per_turn:
        raise TinyGPTQError(f"{words.shape[0]} words are no whole number of {words_per_turn}-word turns of {bits} bits")
    turns = words.shape[0] // words_per_turn
    codes = np.empty_like(words, np.uint8 if bits <= 8 else np.uint16, "C", shape=(turns * per_turn, *words.shape[1:]))
    mask = np.uint32((1 << bits) - 1)
    for i in range(per_turn):
        word, shift = divmod(i * bits, 32)
        code = words[word::words_per_turn] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | words[word + 1 :: words_per_turn] << np.uint32(32 - shift)
        codes[i::per_turn] = code & mask
    return codes[:count]


def _array(values: np.ndarray) -> np.ndarray:
    """As an array of NumPy's own class; CuPy's stay where they are."""
    return values if hasattr(values, "__cuda_array_interface__") else np.asarray(values)


def _turn(bits: int) -> tuple[int, int]:
    """(codes, words) after which the bit pattern repeats: the least common multiple of ``bits`` and 32."""
    turn_bits = int(np.lcm(bits, 32))
    return turn_bits // bits, turn_bits // 32


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A quantised linear as kernels see it: every quirk of a file already undone.

    ``W[k, n] = scales[g, n] * (code[k, n] - zeros[g, n])`` and ``y = x[..., perm] @ W[sorted rows] + bias``.

    Shapes (K in features, N out features, G groups):
        qweight: uint32 [K * bits / 32, N], rows sorted by group, packed along K by :func:`pack`.
        scales:  float16 or float32 [G, N].
        zeros:   uint16 [G, N], true zero points, 0 .. 2^bits.
        perm:    int32 [K] or None: sorted row ``i`` multiplies input ``perm[i]``; None is the identity.
        sorted:  False where qweight's rows are still in the model's order; whoever reads them sorts them by perm first.
        bias:    float32 [N] or None.
    """

    qweight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int  # rows per group; the last group may be shorter
    perm: np.ndarray | None = None
    bias: np.ndarray | None = None
    sorted: bool = True

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes a matrix product has to read: codes, scales and packed zeros."""
        return self.qweight.nbytes + self.scales.nbytes + self.zeros.size * self.bits // 8

    def dequantize(self) -> np.ndarray:
        """float32 [K, N] with rows in the original input order: the definition every kernel is tested against."""
        codes = unpack(self.qweight, self.bits, self.in_features)  # (K, N)
        codes = codes if self.sorted else codes[self.perm]  # sorted rows
        group = np.arange(self.in_features) // self.group_size
        levels = codes.astype(np.float32) - self.zeros[group].astype(np.float32)
        rows = self.scales[group].astype(np.float32) * levels
        if self.perm is None:
            return rows
        weight = np.empty_like(rows)
        weight[self.perm] = rows
        return weight
