"""One quantised linear as files hold it -> the clean form. Every quirk of a GPTQ tensor ends here.

Three layouts are in use, told apart by the tensors themselves (K in features, N out features, G groups):

====================  =========================================================================  =====================
layout                tensors                                                                    written by
====================  =========================================================================  =====================
``float zeros``       qweight, zeros = zero * scale float [N, 1], scales [N, 1], bias            GPTQ-for-LLaMa, first
``qzeros``            qweight, qzeros, scales [G, N]; row k is in group k // group               GPTQ-for-LLaMa, second
``qzeros and g_idx``  the same and g_idx int32 [K], the group of each row                        everything since
====================  =========================================================================  =====================

What had to be decided (which zero convention, how rows are grouped) is kept beside the result, in :class:`LinearFacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.tensor_folder import INTEGERS, Tensors
from tinygptq.folders.tensorfile import DTYPES
from tinygptq.packing import PackedLinear, pack, unpack

FLOAT_ZEROS, NO_G_IDX, WITH_G_IDX = "float zeros", "qzeros", "qzeros and g_idx"
BORROWING_TOOLS = ("GPTQModel",)  # subtract 1 from whole words of zero points, see v1_zero_points
FLOAT_ZERO_TOLERANCE = 1e-2  # zeros / scales of the first generation are whole numbers but for float32 rounding


@dataclass(frozen=True)
class LinearFacts:
    """What the tensors of one quantised linear turned out to be, and how that was seen.

    layout: one of the three above. stored_zeros: ``zero - 1``, ``zero`` or ``zero * scale``. evidence: what that rests on.
    symmetric: every zero point is 2^(bits-1). order: ``in order``, ``act-order`` or ``uneven groups``.
    scales: the stored dtype. warnings: (kind, text) of what contradicts the label; a kind is reported once a folder.
    """

    layout: str
    stored_zeros: str
    evidence: str
    symmetric: bool
    order: str
    scales: str
    warnings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ZeroPoints:
    """True zero points uint16 [G, N], and what :class:`LinearFacts` keeps about them."""

    values: np.ndarray
    stored: str
    evidence: str
    warnings: tuple[tuple[str, str], ...] = ()


def take_parts(tensors: Tensors, name: str, inputs: int, outputs: int, config: QuantizeConfig) -> dict[str, np.ndarray]:
    """The tensors of one quantised linear, of the shapes and dtypes that bits and group size ask for.

    Raises:
        TinyGPTQError: one is missing or of another shape or dtype, or sizes that do not fill 32-bit words.
    """
    bits, groups = config.bits, config.num_groups(inputs)
    old = f"{name}.zeros" in tensors and f"{name}.qzeros" not in tensors
    for axis, size in (("input", inputs),) if old else (("input", inputs), ("output", outputs)):
        if size * bits % 32:
            raise TinyGPTQError(f"{tensors.folder}: {name}: {size} {axis} features of {bits} bits do not fill 32-bit words")
    parts = {"qweight": tensors.take(f"{name}.qweight", (inputs * bits // 32, outputs), INTEGERS)}
    if old:
        if groups != 1:
            found = f"group_size is {config.group_size}, but float zeros (early GPTQ-for-LLaMa) are of one group"
            raise TinyGPTQError(f"{tensors.folder}: {name}: {found}")
        return parts | {part: tensors.take(f"{name}.{part}", (outputs, 1)) for part in ("zeros", "scales")}
    parts["qzeros"] = tensors.take(f"{name}.qzeros", (groups, outputs * bits // 32), INTEGERS)
    parts["scales"] = tensors.take(f"{name}.scales", (groups, outputs))
    if f"{name}.g_idx" in tensors:
        parts["g_idx"] = tensors.take(f"{name}.g_idx", (inputs,), (DTYPES["I32"], DTYPES["I64"]))
    return parts


def from_gptq(parts: Mapping[str, np.ndarray], config: QuantizeConfig, bias: np.ndarray | None = None) -> PackedLinear:
    """The tensors of one quantised linear to the clean form; see :func:`read_gptq`."""
    return read_gptq(parts, config, bias)[0]


def read_gptq(
    parts: Mapping[str, np.ndarray],
    config: QuantizeConfig,
    bias: np.ndarray | None = None,
    tool: str = "",
    sort_rows: bool = True,
) -> tuple[PackedLinear, LinearFacts]:
    """The tensors of one quantised linear, as files hold them, to the clean form and what was decided on the way.

    Shapes: qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales [G, N], g_idx int32 [K] (may be absent); or
    qweight with float zeros and scales [N, 1].

    Args:
        tool: who wrote the file, if known; it decides how a zero point of 0 was stored.
        sort_rows: False leaves an act-order linear's words as they are, for a device that sorts them faster.
    Raises:
        TinyGPTQError: g_idx out of range or missing where act-order needs it; scales that are not finite.
    """
    bits, qweight = config.bits, parts["qweight"].view(np.uint32)
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    scales = _finite_scales(np.asarray(parts["scales"]), bits)
    if "zeros" in parts:
        layout, scales = FLOAT_ZEROS, np.ascontiguousarray(scales.T)  # (1, N)
        zeros = float_zero_points(np.asarray(parts["zeros"], np.float32).T, scales, bits)
    else:
        layout = WITH_G_IDX if "g_idx" in parts else NO_G_IDX
        stored = unpack(np.ascontiguousarray(parts["qzeros"].T), bits, outputs).T  # (G, N)
        zeros = zero_points(stored, parts["qzeros"], config, tool)
    rows = arrange_rows(parts.get("g_idx"), inputs, len(scales), config)
    values = zeros.values
    if rows.source is not None:
        scales, values = scales[rows.source], values[rows.source]
    in_order = sort_rows or rows.perm is None
    if rows.perm is not None and sort_rows:
        qweight = pack(unpack(qweight, bits, inputs)[rows.perm], bits)
    symmetric = bool((zeros.values == 2 ** (bits - 1)).all())
    warnings = zeros.warnings + rows.warnings
    facts = LinearFacts(layout, zeros.stored, zeros.evidence, symmetric, rows.order, parts["scales"].dtype.name, warnings)
    values = np.ascontiguousarray(values)
    return PackedLinear(qweight, scales, values, bits, rows.size, rows.perm, bias, in_order), facts


def _finite_scales(scales: np.ndarray, bits: int) -> np.ndarray:
    """float16 scales as they are, others as float32 (bfloat16 fits, GPTQ-for-LLaMa wrote float32); weights stay finite."""
    if scales.dtype != np.float16:
        scales = scales.astype(np.float32)
    if not np.isfinite(scales).all():
        raise TinyGPTQError("scales hold NaN or infinity")
    largest = float(np.abs(scales).max(initial=0))
    if largest * 2**bits > float(np.finfo(np.float32).max):
        raise TinyGPTQError(f"scales reach {largest:g}, which makes weights beyond float32")
    return scales


# -------------------------------------------------------------------------------------------------------- zero points


def zero_points(stored: np.ndarray, qzeros: np.ndarray, config: QuantizeConfig, tool: str) -> ZeroPoints:
    """True zero points of packed ones, by the label unless the values contradict it.

    Format ``gptq`` (v1: GPTQ-for-LLaMa, AutoGPTQ, GPTQModel's default) stores zero - 1, ``gptq_v2`` (GPTQModel) stores
    zero. A symmetric file has one value everywhere, which tells them apart whatever the label says.

    Args: stored: codes [G, N] as unpacked from qzeros int32 [G, N*bits/32].
    """
    label, half = config.checkpoint_format, 2 ** (config.bits - 1)
    low, high = int(stored.min()), int(stored.max())
    form = label
    warnings: tuple[tuple[str, str], ...] = ()
    if not config.sym:
        evidence = f"the label says {label}; asymmetric zero points from {low} to {high} cannot tell"
    elif low == high and low in (half - 1, half):
        form = "gptq" if low == half - 1 else "gptq_v2"
        evidence = f"symmetric, and every stored value is {low} ({'2^(bits-1) - 1' if form == 'gptq' else '2^(bits-1)'})"
        if form != label:
            text = f"labelled {label}, but every stored zero point is {low}: read as {form}"
            warnings = (("mislabelled zero points", text),)
    else:
        evidence = f"the label says {label}; stored values run from {low} to {high}"
        text = f"labelled symmetric, but stored zero points run from {low} to {high}; read as they are, as {label}"
        warnings = (("zero points not symmetric", text),)
    if form == "gptq_v2":
        return ZeroPoints(stored.astype(np.uint16), "zero", evidence, warnings)
    values, wrapped = v1_zero_points(stored, qzeros, config.bits, tool)
    return ZeroPoints(values, "zero - 1", evidence, warnings + wrapped)


def v1_zero_points(
    stored: np.ndarray, qzeros: np.ndarray, bits: int, tool: str
) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    """Zero points that were stored minus 1: uint16 [G, N] and warnings.

    v1 cannot hold a zero point of 0; -1 wraps to 2^bits - 1. No quantiser makes a zero point of 2^bits (they clip to
    2^bits - 1), so that value is always a wrapped 0 and is read as 0, though ExLlama and AutoGPTQ before 0.5 take it for
    2^bits. What became of its neighbours depends on the writer:

    - GPTQModel (7.7) subtracts 1 from every field of a 32-bit word at once, and 0 borrows from the next field; adding the
      same word gives every zero point back exactly. At 3 bits it wraps each field alone.
    - GPTQ-for-LLaMa and AutoGPTQ (0.3-0.7) OR the wrapped -1 over all higher fields of its word: what those held is lost.
    """
    most = 2**bits - 1
    wrapped = int((stored == most).sum())
    if not wrapped:
        return stored.astype(np.uint16) + np.uint16(1), ()
    found = f"{wrapped} zero points are stored as {most}, which is a 0 that format gptq cannot hold; read as 0"
    if tool in BORROWING_TOOLS and bits != 3:
        outputs = stored.shape[1]
        ones = pack(np.ones((outputs, 1), np.uint8), bits).T  # (1, N*bits/32)
        words = qzeros.view(np.uint32) + ones  # wraps where the writer's subtraction did
        values = unpack(np.ascontiguousarray(words.T), bits, outputs).T
        return values.astype(np.uint16), (("zero points of 0", f"{found}, undoing {tool}'s borrow from the next one"),)
    values = (stored.astype(np.uint16) + np.uint16(1)) & np.uint16(most)
    if tool not in BORROWING_TOOLS:
        found += ". AutoGPTQ's packer overwrites others in the same word, so some of these may be wrong"
    return values, (("zero points of 0", found),)


def float_zero_points(zeros: np.ndarray, scales: np.ndarray, bits: int) -> ZeroPoints:
    """GPTQ-for-LLaMa's first generation keeps zero * scale in floats: both [1, N].

    Raises:
        TinyGPTQError: quotients that are not whole numbers in 0 .. 2^bits.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.where((scales == 0) & (zeros == 0), np.float32(0), zeros / scales.astype(np.float32))
    if not np.isfinite(quotient).all() or quotient.min() < -0.5 or quotient.max() > 2**bits + 0.5:
        raise TinyGPTQError(f"float zeros are not zero * scale with a zero point from 0 to {2**bits}")
    values = np.rint(quotient)
    worst = float(np.abs(quotient - values).max())
    if worst > FLOAT_ZERO_TOLERANCE:
        raise TinyGPTQError(f"float zeros are no whole multiples of the scales (off by {worst:.2g} of a step)")
    evidence = "float zeros, whole multiples of the scales (GPTQ-for-LLaMa's first generation)"
    return ZeroPoints(values.astype(np.uint16), "zero * scale", evidence)


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """How rows are brought together: perm int32 [K] or None; size: rows of a group; source: int [G'] which of the file's
    groups each resulting one takes its scales from, None if they are the file's own."""

    perm: np.ndarray | None
    size: int
    order: str
    source: np.ndarray | None = None
    warnings: tuple[tuple[str, str], ...] = ()


def arrange_rows(g_idx: np.ndarray | None, inputs: int, groups: int, config: QuantizeConfig) -> Rows:
    """Sort rows by group.

    Without act-order, and with static groups, g_idx is ``k // group``; with act-order it is the row's rank ``// group``.
    Both give groups of one size, the last perhaps shorter; :func:`uneven_groups` takes any other g_idx.

    Raises:
        TinyGPTQError: a group outside 0 .. G-1, or no g_idx where act-order makes it necessary.
    """
    size = config.rows_per_group(inputs)
    in_order = np.arange(inputs) // size
    dynamic = config.desc_act and not config.static_groups and groups > 1
    if g_idx is None:
        if dynamic:
            raise TinyGPTQError("g_idx is missing, and with act-order nothing else says which group a row belongs to")
        return Rows(None, size, "in order")
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise TinyGPTQError(f"g_idx holds values from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}")
    if np.array_equal(g_idx, in_order):
        return Rows(None, size, "in order")
    if not g_idx.any():  # "no act-order" to ExLlama, and no tool quantises so: it would leave groups unused
        text = f"g_idx is all zero with {groups} groups: read as row // {size}, as ExLlama does"
        return Rows(None, size, "in order", warnings=(("g_idx all zero", text),) if dynamic else ())
    perm = np.argsort(g_idx, kind="stable")
    if np.array_equal(g_idx[perm], in_order):
        return Rows(perm.astype(np.int32), size, "act-order")
    return uneven_groups(g_idx, groups)


def uneven_groups(g_idx: np.ndarray, groups: int) -> Rows:
    """Groups of several sizes, cut into finer ones of one size that repeat their group's scales; no value changes.

    Larger groups go first, so that one short group lands at the end, where it may be shorter anyway. The finer size is the
    greatest that divides every boundary.
    """
    counts = np.bincount(g_idx, minlength=groups)
    rank = np.empty(groups, np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(groups)
    perm = np.argsort(rank[g_idx], kind="stable")
    ends = np.cumsum(np.sort(counts[counts > 0])[::-1])
    size = int(np.gcd.reduce(ends[:-1])) if len(ends) > 1 else len(g_idx)
    source = g_idx[perm][::size]  # (G',)
    text = f"groups hold {counts.min()} to {counts.max()} rows: cut into {len(source)} of {size}, with the same values"
    identity = np.array_equal(perm, np.arange(len(perm)))
    return Rows(None if identity else perm.astype(np.int32), size, "uneven groups", source, (("uneven groups", text),))
