"""Whether Python may look at values: the one answer for input checks, the fused gate and the record of a pass."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def is_symbolic(x: Any) -> bool:
    """Whether `x` has neither type nor device that Python could ask for: in a graph that torch.fx records."""
    return isinstance(x, fx.Proxy)


def is_transformed(x: Any) -> bool:
    """Whether `x` stands for a value inside a tracer or a function transform.

    These are torch.fx, torch.jit.trace, torch.export, the transforms of torch.func and forward-mode differentiation.
    """
    if torch.compiler.is_compiling():  # the compiler cannot trace the questions below
        return torch.compiler._is_exporting_flag  # to the compiler of torch 2.10, `is_exporting()` is always true
    if not isinstance(x, Tensor):
        return is_symbolic(x)
    return (
        isinstance(x, FakeTensor)
        or torch.jit.is_tracing()
        or torch._C._functorch.is_legacy_batchedtensor(x)  # torch.autograd.grad(is_grads_batched=True)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_traced(x: Any) -> bool:
    """Whether a tracer or transform handles `x`, torch.compile included: then the plain formulas are used."""
    return torch.compiler.is_compiling() or is_transformed(x)


def at_least_float32(x: Any) -> torch.dtype:
    """The type that gates are computed in: float64 of float64 values, float32 of others and in a symbolic graph."""
    return torch.float64 if not is_symbolic(x) and x.dtype == torch.float64 else torch.float32
