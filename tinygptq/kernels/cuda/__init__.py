"""Matrix products on NVIDIA GPUs, written in Python for numba-cuda (extra ``[cuda]``).

Start with ``plain``: the whole computation, in Python that a simulator can run. ``layout`` brings a packed linear to the
device, ``dispatch.linear`` multiplies by it and says which kernel serves how many rows: ``matvec`` (1 to 16), ``matmul``
(some 200), on Hopper ``warpgroup`` (to 1,536), or ``dequantise`` with ``cublas`` (more). ``unpack`` and ``tables`` turn
codes, scales and zero points into what the tensor cores take, ``ptx`` and ``hopper`` hold the instructions, ``runtime``
imports numba-cuda and CuPy for all of them.
"""
