"""GPTQ: from a linear's weights and its inputs' Hessian to codes, scales and zero points. Arrays in, arrays out."""

from tinygptq.gptq.hessian import Hessian
from tinygptq.gptq.solver import Factor, Solution, prepare, round_to_nearest, solve

__all__ = ["Factor", "Hessian", "Solution", "prepare", "round_to_nearest", "solve"]
