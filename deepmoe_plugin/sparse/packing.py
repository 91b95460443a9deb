"""Weights in the layouts that oneDNN computes with: made by oneDNN, then filled by us with what is kept.

oneDNN copies plain weights into a blocked layout at every call, which for small maps takes as long as the convolution.
It leaves weights alone that have the layout it wants: those of its own reorder. Which layout that is depends on shapes
and processor and is found out here: a layout is used if it reproduces, element by element, what oneDNN wrote.
"""

import ctypes
import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import Blocks

BLOCKS = (64, 48, 32, 16, 24, 8)
SCRATCH_BYTES = 128 * 2**20
"""Packed weights, of shapes that came before, that each thread keeps to write the next ones into."""


def available(like: Tensor) -> bool:
    """Whether oneDNN runs convolutions on tensors like this one, and takes weights in its own layouts."""
    return (
        like.device.type == 'cpu'
        and like.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    )


class Form(NamedTuple):
    """What the layout of a convolution's weights depends on, besides the processor.

    Attributes:
        sizes: (outputs, inputs, kernel height, kernel width).
        geometry: padding, stride, dilation, each (vertical, horizontal).
        input_shape: (B, C, H, W).
        threads: that oneDNN may use.
    """

    sizes: tuple[int, ...]
    geometry: tuple[tuple[int, ...], ...]
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    threads: int

    def pack(self, weight: Tensor) -> Tensor:
        """Weights (outputs, inputs, kernel height, kernel width) in oneDNN's layout, opaque to torch."""
        padding, stride, dilation = map(list, self.geometry)
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, padding, stride, dilation, 1, list(self.input_shape)
        )

    def empty(self) -> 'PackedWeight | None':
        """Weights to be written; None if the layout is not known."""
        blocks = _blocks(self)
        if blocks is None:
            return None
        opaque = self.pack(torch.zeros(self.sizes, dtype=self.dtype))
        return PackedWeight(opaque, torch.ops.mkldnn.data_ptr(opaque), torch.ops.mkldnn._nbytes(opaque), blocks)


class PackedWeight(NamedTuple):
    """Weights in oneDNN's layout, and where and how they lie in memory."""

    opaque: Tensor
    address: int
    num_bytes: int
    blocks: Blocks


@functools.lru_cache(4096)
def _blocks(form: Form) -> Blocks | None:
    """The layout of oneDNN's weights, None if it is none that we know."""
    if not hasattr(torch.ops.mkldnn, 'data_ptr'):
        return None
    bits = torch.int32 if form.dtype == torch.float32 else torch.int16
    count = torch.Size(form.sizes).numel()
    # Patterns of finite numbers of any type; the modulus, a prime, is none of the strides.
    numbers = (
        (torch.arange(count, dtype=bits if bits == torch.int32 else torch.int32) % 32507).to(bits).view(form.sizes)
    )
    opaque = form.pack(numbers.view(form.dtype))
    written = _read(opaque, bits)
    outputs, inputs, *kernel = form.sizes
    taps = torch.Size(kernel).numel()
    pair = 4 // written.element_size()
    for block in BLOCKS:
        padded = -(-outputs // block) * block
        pitch, rest = divmod(len(written), padded * taps)
        if rest or pitch < inputs or pitch % pair:
            continue
        expected = numbers.new_zeros(padded, pitch, taps)
        expected[:outputs, :inputs] = numbers.flatten(2)
        expected = expected.view(padded // block, block, pitch // pair, pair, taps).permute(0, 4, 2, 1, 3)
        if torch.equal(expected.flatten(), written):
            return Blocks(block, pitch, pair)
    return None


def _read(opaque: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of what lies in memory, one-dimensional."""
    buffer = bytearray(ctypes.string_at(torch.ops.mkldnn.data_ptr(opaque), torch.ops.mkldnn._nbytes(opaque)))
    return torch.frombuffer(buffer, dtype=dtype)


class _Scratch(threading.local):
    """Packed weights that are used once, least recently used out first; of one thread each."""

    def __init__(self) -> None:
        self.size = 0
        self.held: OrderedDict[Form, PackedWeight | None] = OrderedDict()


_scratch = _Scratch()


def scratch(form: Form) -> PackedWeight | None:
    """Weights for the calling thread to overwrite and use until its next call; None if their layout is not known."""
    held = _scratch.held
    if form in held:
        held.move_to_end(form)
        return held[form]
    weight = held[form] = form.empty()
    _scratch.size += weight.num_bytes if weight else 0
    while _scratch.size > SCRATCH_BYTES and len(held) > 1:
        old = held.popitem(last=False)[1]
        _scratch.size -= old.num_bytes if old else 0
    return weight


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Sequence[Sequence[int]],
    relu: bool = False,
    add_to: Tensor | None = None,
) -> Tensor:
    """Convolution, sum and ReLU in one pass; `weight` plain or opaque, `add_to` is overwritten."""
    padding, stride, dilation = map(list, geometry)
    if add_to is None:
        unary = 'relu' if relu else 'none'
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, 1, unary, [], '')
    after = 'relu' if relu else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        add_to, x, weight, bias, padding, stride, dilation, 1, 'add', None, after, [], ''
    )
