"""Reading a network for inference: norms folded into convolutions, evaluation mode without touching the original."""

import operator
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..gating.frozen import FrozenNorm
from ..plain import BATCH_NORMS, REMEDY, is_plain, oddity

Module = TypeVar('Module', bound=nn.Module)


class Geometry(NamedTuple):
    """How the kernel of a convolution moves: each (vertical, horizontal)."""

    kernel: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]


def geometry_of(conv: Any) -> Geometry:
    """How the kernel of a convolution moves, or of the 1x1 convolution that a linear layer is."""
    if isinstance(conv, nn.Linear):
        return Geometry((1, 1), (0, 0), (1, 1), (1, 1))
    return Geometry(conv.kernel_size, conv.padding, conv.stride, conv.dilation)


def folds(norm: Any) -> bool:
    """Whether a norm can be folded: a batch norm that keeps running statistics."""
    return is_plain(norm, *BATCH_NORMS, FrozenNorm) and norm.running_mean is not None


def fold_norm(conv: Any, norm: Any, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight (O, I, kh, kw) and bias (O,) of the convolution that computes `norm(conv(x)) * factors`.

    Running statistics are used. A linear layer is taken for a 1x1 convolution.

    The arithmetic is done in float64, so that folding adds no error of its own.

    Raises:
        ValueError: the norm depends on the image, so that it cannot be folded, or either is not as its class has it.
    """
    odd = oddity(conv, nn.Conv2d, nn.Linear)
    if odd:
        raise ValueError(f'Sparse execution reads the weights of convolutions, but one {odd}: {REMEDY}.')
    weight = conv.weight.detach().double()
    weight = weight[:, :, None, None] if isinstance(conv, nn.Linear) else weight
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach().double()
    if norm is not None and not isinstance(norm, nn.Identity):
        if not folds(norm):
            raise ValueError(
                f'Sparse execution folds norms into convolutions, which {type(norm).__name__} does not allow: '
                'create the model with a batch norm that keeps running statistics.'
            )
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * factor
        if norm.weight is not None:
            factor, shift = factor * norm.weight.detach().double(), shift * norm.weight.detach().double()
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        weight, bias = weight * factor[:, None, None, None], bias * factor + shift
    if factors is not None:
        weight, bias = weight * factors.detach().double()[:, None, None, None], bias * factors.detach().double()
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def eval_view(module: Module) -> Module:
    """A copy of the module tree in evaluation mode that shares every parameter and buffer with the original.

    Raises:
        ValueError: `forward` of a module was replaced by a function that may hold the original.
    """
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            view.__dict__[name] = MethodType(value.__func__, view)
    forward = view.__dict__.get('forward')
    if forward is not None and getattr(forward, '__self__', None) is not view:
        raise ValueError(
            f'forward of a {type(module).__name__} was replaced by {forward!r}, which may hold the module itself, with '
            'its training mode: sparsify the model before it is wrapped.'
        )
    for name in ('_parameters', '_buffers'):
        view.__dict__[name] = dict(module.__dict__[name])
    view.__dict__['_modules'] = {
        name: None if child is None else eval_view(child) for name, child in module._modules.items()
    }
    view.__dict__['training'] = False
    return view


def fingerprint(module: nn.Module) -> Callable[[], bool]:
    """Remember the module tree and its tensors; the function returned tells whether all are as they were.

    Seen are assignments of modules and tensors, hooks, moves, and in-place changes of tensors, except those made
    through `.data` and those of inference tensors, which torch does not count.
    """
    kinds = ('_modules', '_parameters', '_buffers')
    parts = list(module.modules())
    hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    # Looking costs time, as little of this is in the cache: nothing reads `num_batches_tracked` in evaluation mode.
    held = [
        (part.__dict__[kind], key)
        for part in parts
        for kind in kinds
        for key in part.__dict__[kind]
        if key != 'num_batches_tracked'
    ]
    holders, keys = [holder for holder, _ in held], [key for _, key in held]
    values = list(map(dict.get, holders, keys))
    counted = [value for value in values if isinstance(value, Tensor) and not value.is_inference()]
    moved = [value for value in values if isinstance(value, nn.Parameter)]  # `.to` and `.data` leave the object
    version = operator.attrgetter('_version')
    versions, pointers = list(map(version, counted)), list(map(Tensor.data_ptr, moved))
    bare, hooked = [found for found in hooks if not found], [(found, len(found)) for found in hooks if found]

    def unchanged() -> bool:  # asked for every batch: loops in C
        return (
            all(map(operator.is_, map(dict.get, holders, keys), values))
            and list(map(version, counted)) == versions
            and list(map(Tensor.data_ptr, moved)) == pointers
            and not any(bare)
            and all(len(found) == count for found, count in hooked)
        )

    return unchanged
