"""How kernels of a decoding step follow each other (programmatic dependent launch, compute capability 9.0).

A kernel launched as ``dependent`` may begin while the one before it still runs; what the earlier kernels write is there
only after :func:`wait_for_dependencies`. Launched in the ordinary way, and on older cards, both functions do nothing.
"""

from llvmlite import ir

from tinygptq.kernels.cuda.runtime import cuda

types, intrinsic = cuda.types, cuda.extending.intrinsic


def _instruction(text: str):
    """A function without arguments for an instruction that nothing may be moved across; nothing below 9.0."""

    @intrinsic
    def instruction(typingctx):
        def generate(context, builder, signature, args):
            from numba.cuda.core.targetconfig import ConfigStack

            if ConfigStack.top_or_none().compute_capability >= (9, 0):
                kind = ir.FunctionType(ir.VoidType(), [])
                builder.call(ir.InlineAsm(kind, text, "~{memory}", side_effect=True), [])
            return context.get_dummy_value()

        return types.void(), generate

    return instruction


wait_for_dependencies = _instruction("griddepcontrol.wait;")
begin_dependents = _instruction("griddepcontrol.launch_dependents;")
