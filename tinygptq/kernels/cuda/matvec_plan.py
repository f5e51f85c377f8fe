"""How the matvec divides a product of up to 16 rows of x among blocks and warps: by what was fastest on an H100."""

import functools
from dataclasses import dataclass, replace

from tinygptq.kernels.cuda.activations import ring_bytes
from tinygptq.kernels.cuda.block_sums import PITCH
from tinygptq.kernels.cuda.layout import ROWS as CHUNK

MOST_WARPS = 16  # of a block
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each block


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    Attributes:
        warps: of a block; each has one chunk at least.
        resident: blocks that must fit on a multiprocessor at once, which bounds the registers.
        sets: of registers for weights. Two that take turns have two chunks under way; one is half the code.
        short: no warp has more than two chunks, and there is no code for more, which is less to fetch before it can run.
        slots: chunks in a warp's ring of x. In one of three there is a free slot, which can be filled at once; in one of two
            all lanes must have read theirs before.
        strips: of a block, side by side, no more than W has: each warp has the weights of all of them for a chunk of x. With
            16 rows x costs more than weights of 2 bits do, and a warp with more to do between waits needs fewer beside it.
    """

    warps: int
    resident: int = 1
    sets: int = 2
    short: bool = False
    slots: int = 3
    strips: int = 1

    def dynamic_bytes(self, row_tiles: int) -> int:
        """Dynamic shared memory of a block: the rings of x, and after them the warps' sums."""
        sums = 4 * self.strips * self.warps * 8 * row_tiles * PITCH
        return ring_bytes(self.warps, row_tiles, self.slots) + sums

    def shared_bytes(self, row_tiles: int) -> int:
        """What a block takes of a multiprocessor's shared memory."""
        return self.dynamic_bytes(row_tiles) + RESERVED


@functools.lru_cache(maxsize=4096)
def plan(strips: int, inner: int, row_tiles: int, bits: int, group_size: int, multiprocessors: int, shared: int) -> Plan:
    """How to divide a product of so many strips by ``inner`` rows of W, by what was fastest on an H100.

    Args: row_tiles, bits, group_size: as for :func:`~.matvec.matvec_kernel`; shared: bytes of a multiprocessor's memory.
    """
    each, chunks = -(-strips // multiprocessors), -(-inner // CHUNK)  # blocks of a multiprocessor; chunks of a strip
    sets = 1 if group_size % (CHUNK // 2) else 2
    if each == 1:
        if chunks <= 2 * MOST_WARPS and (row_tiles, sets) != (2, 1):
            found = Plan(MOST_WARPS, short=True, slots=2)
        elif row_tiles == 2:
            found = Plan(12, sets=1) if bits < 4 else Plan(8, sets=sets)
        else:
            found = Plan(8 if bits == 8 else MOST_WARPS, sets=sets)
    else:
        if bits == 8 or (row_tiles == 2 and (group_size % CHUNK or each <= 3)):  # much code for a chunk
            sets = 1
        threes = Plan(8, 1, 1, strips=3) if each == 3 else Plan(4, 2, 1, strips=3)
        no_more = 3 * -(-strips // (3 * multiprocessors)) <= each  # strips for a multiprocessor, three to a block
        has_room = threes.resident * threes.shared_bytes(row_tiles) <= shared
        if (row_tiles, bits) == (2, 2) and group_size % CHUNK == 0 and no_more and has_room:
            found = threes
        elif each <= 3:
            found = Plan(5 if (bits, row_tiles, sets) == (4, 1, 2) else 4, 3, sets)
        else:
            found = Plan(4, 3, sets) if bits == 8 else Plan(2, 6, sets)
    return _fitting(replace(found, warps=min(found.warps, chunks)), chunks, row_tiles, shared)


def _fitting(plan: Plan, chunks: int, row_tiles: int, shared: int) -> Plan:
    """The same with fewer slots, and then with fewer warps, where a multiprocessor has less memory than it would take."""
    if plan.resident * plan.shared_bytes(row_tiles) > shared:
        plan = replace(plan, slots=2)
    while plan.shared_bytes(row_tiles) > shared:
        plan = replace(plan, warps=plan.warps - 1)
    return replace(plan, short=plan.short and chunks <= 2 * plan.warps)
