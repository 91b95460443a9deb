"""Weights in the layouts that oneDNN computes with, in memory of our own.

oneDNN copies plain weights into a blocked layout at every call, which for small maps takes as long as the convolution.
It leaves weights alone that are described as having the layout it wants. Which one that is depends on shapes and
processor: oneDNN's own reorder shows it, and a layout counts as known if it reproduces, element by element, what oneDNN
wrote. From then on the weights of that shape are gathered straight into place.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Blocks, buffer

BLOCKS = (64, 48, 32, 16, 24, 8)
FORMS = 4096
"""Shapes whose layouts are remembered."""
ALIGNMENT = 4096
"""Bytes: of weights in memory that they share."""
_MKLDNN_LAYOUT = 3  # c10::Layout::Mkldnn


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
        padding, stride, dilation = self.geometry
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, padding, stride, dilation, 1, list(self.input_shape)
        )


class Layout(NamedTuple):
    """How weights of a form lie in memory.

    Attributes:
        blocks: the order of the elements.
        num_bytes: memory that they take.
        descriptor: the same in oneDNN's words.
    """

    blocks: Blocks
    num_bytes: int
    descriptor: Tensor


class PackedWeight(NamedTuple):
    """Weights in oneDNN's layout: `opaque` is what torch's operators take, the elements are those in `memory`."""

    opaque: Tensor
    memory: Tensor
    blocks: Blocks

    @classmethod
    def over(cls, memory: Tensor, form: Form, layout: Layout) -> 'PackedWeight':
        """Weights that lie at the start of a buffer."""
        dtype = getattr(_library(), f'aoti_torch_dtype_{str(form.dtype).split(".")[1]}')()
        sizes = (ctypes.c_int64 * 4)(*form.sizes)
        handle = ctypes.c_void_p()
        error = _library().aoti_torch_create_tensor_from_blob_v2(
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_int64(4),
            sizes,
            sizes,  # strides, which opaque tensors have none of
            ctypes.c_int64(0),
            ctypes.c_int32(dtype),
            ctypes.c_int32(0),
            ctypes.c_int32(0),
            ctypes.byref(handle),
            ctypes.c_int32(_MKLDNN_LAYOUT),
            ctypes.c_void_p(layout.descriptor.data_ptr()),
            ctypes.c_int64(layout.descriptor.numel()),
        )
        if error:
            raise RuntimeError(f'torch could not describe weights {form} to oneDNN.')
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        opaque: Any = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle.value, None, None))
        opaque.memory = memory  # which it does not own: whoever holds it, holds both
        return cls(opaque, memory, layout.blocks)


@functools.cache
def _library() -> Any:
    """torch's own library, for the function that makes a tensor of described memory (of its ahead-of-time compiler)."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / 'lib/libtorch_cpu.so'))


@functools.cache
def _describes() -> bool:
    """Whether this torch takes weights that are described to it; nothing that this needs is promised by its manual."""
    form = Form((16, 16, 1, 1), ((0, 0), (1, 1), (1, 1)), (1, 16, 4, 4), torch.float32, torch.get_num_threads())
    weight = torch.arange(256.0).view(form.sizes)
    x, bias = torch.arange(256.0).view(form.input_shape), torch.zeros(16)
    try:
        packed = form.pack(weight)
        memory = _read(packed)
        layout = Layout(Blocks(0, 0, 0), len(memory), torch.ops.mkldnn._get_mkldnn_serialized_md(packed))
        described = PackedWeight.over(memory, form, layout)
        return torch.equal(convolve(x, described.opaque, bias, form.geometry), convolve(x, packed, bias, form.geometry))
    except (AttributeError, OSError, RuntimeError):
        return False


@functools.lru_cache(FORMS)
def layout_of(form: Form) -> Layout | None:
    """The layout of oneDNN's weights, None if it is none that we know."""
    if not _describes():
        return None
    outputs, inputs, *kernel = form.sizes
    taps = kernel[0] * kernel[1]
    numbers = torch.arange(outputs * inputs * taps, dtype=torch.int32)
    if form.dtype == torch.bfloat16:
        numbers = (numbers % 32507).short()  # finite; a prime, so that no stride is a multiple of it
    numbers = numbers.view(form.sizes)
    packed = form.pack(numbers.view(form.dtype))
    written = _read(packed).view(numbers.dtype)
    pair = 4 // written.element_size()
    for block in BLOCKS:
        count = -(-outputs // block)
        pitch, rest = divmod(len(written), count * block * taps)
        if rest or pitch < inputs or pitch % pair:
            continue
        plain = written.view(count, taps, pitch // pair, block, pair).permute(0, 3, 2, 4, 1).reshape(-1, pitch, taps)
        if torch.equal(plain[:outputs, :inputs], numbers.flatten(2)):
            descriptor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
            return Layout(Blocks(block, pitch, pair), written.nbytes, descriptor)
    return None


def _read(packed: Tensor) -> Tensor:
    """A copy of what lies in memory, bytes."""
    copy = torch.empty(torch.ops.mkldnn._nbytes(packed), dtype=torch.uint8)
    ctypes.memmove(copy.data_ptr(), torch.ops.mkldnn.data_ptr(packed), len(copy))
    return copy


def allocate(form: Form) -> PackedWeight | None:
    """Weights to be written, all of them; None if their layout is not known."""
    layout = layout_of(form)
    if layout is None:
        return None
    return PackedWeight.over(torch.empty(layout.num_bytes, dtype=torch.uint8), form, layout)


class _Scratch(threading.local):
    """The memory of a thread for weights that are used once: shared, so that it stays in the processor's cache."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.weights: dict[Form, PackedWeight | None] = {}


_scratch = _Scratch()


def scratch(form: Form) -> PackedWeight | None:
    """The same as `allocate`, in memory that the next call of this thread takes for other weights."""
    weights = _scratch.weights
    if form in weights:
        return weights[form]
    layout = layout_of(form)
    if layout is not None and layout.num_bytes > len(_scratch.memory):
        _scratch.memory = buffer(layout.num_bytes, torch.uint8)
        weights.clear()
    elif len(weights) >= FORMS:
        weights.clear()
    weight = None
    if layout is not None:
        # Around the middle: the half that a thread writes then stays in the cache of its core, whatever the size.
        start = (len(_scratch.memory) - layout.num_bytes) // 2 // ALIGNMENT * ALIGNMENT
        weight = PackedWeight.over(_scratch.memory[start:], form, layout)
    weights[form] = weight
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
    padding, stride, dilation = geometry
    if add_to is None:
        unary = 'relu' if relu else 'none'
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, 1, unary, [], '')
    after = 'relu' if relu else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        add_to, x, weight, bias, padding, stride, dilation, 1, 'add', None, after, [], ''
    )
