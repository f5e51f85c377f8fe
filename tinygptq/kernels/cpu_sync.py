"""What threads that share a job say to each other: instructions for compiled code, in the way of :mod:`.simd`."""

from __future__ import annotations

import platform
import sys

from llvmlite import ir
from numba import types

from tinygptq.kernels.simd import instruction

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@instruction(types.int64, types.int64, types.int64)
def fetch_add(builder, address, amount):
    """Add to the int64 at an address as one indivisible step, and return what it was before."""
    return builder.atomic_rmw("add", builder.inttoptr(address, _I64.as_pointer()), amount, "seq_cst")


@instruction(types.int64, types.int64)
def read_shared(builder, address):
    """The int64 at an address that other threads change; what they wrote before they changed it is then visible."""
    return builder.load_atomic(builder.inttoptr(address, _I64.as_pointer()), "acquire", 8)


@instruction(types.void)
def relax(builder):
    """Tell the core that this is a waiting loop (x86's ``pause``; nothing elsewhere)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])), [])


@instruction(types.void)
def give_way(builder):
    """Let another thread have the core (POSIX ``sched_yield``; nothing on Windows)."""
    if sys.platform != "win32":
        module = builder.module
        function = module.globals.get("sched_yield") or ir.Function(module, ir.FunctionType(_I32, []), "sched_yield")
        builder.call(function, [])
