"""Convolutions that run on the kept experts only."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import fold_norm
from .kernels import LANES, compact_kernel
from .plan import Kept

SMALL_MAP = 64
"""Up to this many output positions a convolution is one matrix product, which spares oneDNN's copy of the weights."""


class WeightCache:
    """Compact weights of gates that came more than once, least recently used first out; shared by threads.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._weights: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> tuple[Tensor | None, bool]:
        """The weights of this key if they are stored, and whether they should be: at the second request."""
        if not self.capacity:
            return None, False
        with self._lock:
            weight = self._weights.get(key)
            if weight is not None:
                self._weights.move_to_end(key)
                return weight, False
            digest = hash(key)
            again = digest in self._seen
            self._seen[digest] = None
            self._seen.move_to_end(digest)
            if len(self._seen) > 4096:
                self._seen.popitem(last=False)
            return None, again

    def put(self, key: tuple[object, ...], weight: Tensor) -> None:
        size = weight.numel() * weight.element_size()
        with self._lock:
            if key in self._weights or size > self.capacity:
                return
            self._weights[key] = weight
            self.size += size
            while self.size > self.capacity:
                _, old = self._weights.popitem(last=False)
                self.size -= old.numel() * old.element_size()


class _Scratch(threading.local):
    """A buffer of each thread for weights that are used once: it stays in the processor's cache."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def take(self, like: Tensor, numel: int) -> Tensor:
        if like.device.type != 'cpu':
            return like.new_empty(numel)
        buffer = self.buffers.get(like.dtype)
        if buffer is None or buffer.numel() < numel:
            buffer = self.buffers[like.dtype] = like.new_empty(numel)
        return buffer[:numel]


_scratch = _Scratch()


class GatherConv:
    """A convolution with its norm folded in that can leave out input and output channels.

    The weight is stored as (O, T, I), T the positions of the kernel: rows of kept outputs are contiguous, kept inputs
    are compacted (`kernels`), and what comes out is the channels-last layout that the convolution wants.

    Args:
        conv, norm: of the network; the norm may be None.
        cache: holds gathered weights.

    Raises:
        ValueError: the norm cannot be folded, or the convolution is of a kind that has no sparse form.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, cache: WeightCache) -> None:
        if conv.groups != 1 or conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
            raise ValueError(
                f'Sparse execution supports convolutions with groups=1 and zero padding by numbers, got {conv}.'
            )
        weight, bias = fold_norm(conv, norm)
        self.out_channels, self.in_channels, *kernel = weight.shape
        self.kernel = tuple(kernel)
        self.taps = kernel[0] * kernel[1]
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation))
        # The kernel reads whole vectors, at the end of the last row beyond the weights.
        buffer = weight.new_zeros(weight.numel() + LANES)
        self.stored = buffer[: weight.numel()].view(self.out_channels, self.taps, self.in_channels)
        self.stored.view(self.out_channels, *kernel, self.in_channels).copy_(weight.permute(0, 2, 3, 1))
        self.bias = bias
        self.all_rows = np.arange(self.out_channels)
        self.cache = cache
        self.packed: Tensor | None = None
        is_cpu = weight.device.type == 'cpu'
        has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
        self.fused = is_cpu and has_onednn and weight.dtype in (torch.float32, torch.bfloat16)
        self.as_product = is_cpu and weight.dtype in (torch.float32, torch.float64)

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Output (H, W) for an input (B, C, H, W)."""
        (ph, pw), (sh, sw), (dh, dw) = self.geometry
        height = (x.shape[2] + 2 * ph - dh * (self.kernel[0] - 1) - 1) // sh + 1
        width = (x.shape[3] + 2 * pw - dw * (self.kernel[1] - 1) - 1) // sw + 1
        return height, width

    def __call__(
        self,
        x: Tensor,
        reads: Kept | None = None,
        writes: Kept | None = None,
        gate: Tensor | None = None,
        relu: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Convolve.

        Args:
            x: (B, kept inputs, H, W).
            reads, writes: which inputs `x` holds and which outputs to compute, None for all.
            gate: factors for the outputs, (B, kept outputs), non-negative.
            relu: apply ReLU (before the gate).
            add_to: overwritten with its sum with the result, before the ReLU; not with a gate.

        Returns:
            (B, kept outputs, H', W'), channels last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = self.out_size(x)
        positions = x.shape[0] * height * width
        bias = self.bias if writes is None else self.bias.index_select(0, writes.index)
        if reads is None and writes is None:
            weight = self.stored
        else:
            weight, is_scratch = self._gathered(reads, writes)
            if gate is not None and relu and x.shape[0] == 1 and weight.numel() < positions * len(bias):
                factor = gate[0].to(weight.dtype)
                weight = torch.mul(weight, factor[:, None, None], out=weight if is_scratch else None)
                bias = bias * factor
                gate = None
        if self.as_product and positions <= SMALL_MAP and not (reads is None and writes is None):
            y = self._product(x, weight, bias, (height, width), relu, add_to)
        else:
            y = self._convolution(x, weight, bias, relu, add_to)
        if gate is not None:
            y.mul_(gate.to(y.dtype)[:, :, None, None])
        return y

    def _gathered(self, reads: Kept | None, writes: Kept | None) -> tuple[Tensor, bool]:
        """Compact weight (kept outputs, T, kept inputs), and whether it may be overwritten."""
        key = (id(self), reads and reads.key, writes and writes.key)
        weight, store = self.cache.get(key)
        if weight is not None:
            return weight, False
        num_out = self.out_channels if writes is None else len(writes)
        num_in = self.in_channels if reads is None else len(reads)
        shape = (num_out, self.taps, num_in)
        numel = num_out * self.taps * num_in
        weight = (self.stored.new_empty(numel) if store else _scratch.take(self.stored, numel)).view(shape)
        kernel = compact_kernel(self.stored.dtype) if self.stored.device.type == 'cpu' else None
        if reads is None:
            assert writes is not None
            torch.index_select(self.stored, 0, writes.index, out=weight)
        elif kernel is not None:
            kernel(self.stored, self.all_rows if writes is None else writes.rows, *reads.bits, weight)
        else:
            rows = self.stored if writes is None else self.stored.index_select(0, writes.index)
            torch.index_select(rows, 2, reads.index, out=weight)
        if store:
            self.cache.put(key, weight)
        return weight, not store

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, add_to: Tensor | None) -> Tensor:
        padding, stride, dilation = self.geometry
        kernel = weight.view(weight.shape[0], *self.kernel, weight.shape[2]).permute(0, 3, 1, 2)
        if not self.fused:
            y = F.conv2d(x, kernel, bias, stride, padding, dilation)
            if add_to is not None:
                y = add_to.add_(y)
            return y.relu_() if relu else y
        if weight is self.stored:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                    kernel, padding, stride, dilation, 1, list(x.shape)
                )
            kernel = self.packed
        geometry = (padding, stride, dilation, 1)
        unary = 'relu' if relu else 'none'
        if add_to is None:
            return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *geometry, unary, [], '')
        after = 'relu' if relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            add_to, x, kernel, bias, *geometry, 'add', None, after, [], ''
        )

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], relu: bool, add_to: Tensor | None
    ) -> Tensor:
        patches = self._patches(x, size)
        flat = weight.view(weight.shape[0], -1).t()
        if add_to is None:
            y = torch.addmm(bias, patches, flat)
        else:
            y = add_to.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
            y = y.add_(bias).addmm_(patches, flat)
        if relu:
            y.relu_()
        return y.view(x.shape[0], *size, -1).permute(0, 3, 1, 2)

    def _patches(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The inputs of every output position, (positions, T * C)."""
        (ph, pw), (sh, sw), (dh, dw) = self.geometry
        x = x.permute(0, 2, 3, 1)
        if ph or pw:
            x = F.pad(x, (0, 0, pw, pw, ph, ph))
        images, _, _, channels = x.shape
        by_image, by_row, by_column, by_channel = x.stride()
        shape = (images, *size, *self.kernel, channels)
        stride = (by_image, sh * by_row, sw * by_column, dh * by_row, dw * by_column, by_channel)
        return x.as_strided(shape, stride).reshape(images * size[0] * size[1], self.taps * channels)


class FoldedSequence(nn.Module):
    """Modules that run one after the other, each convolution fused with the norm and the ReLU that follow it."""

    def __init__(self, modules: list[nn.Module], cache: WeightCache) -> None:
        super().__init__()
        self.steps: list[Callable[[Tensor], Tensor]] = []
        while modules:
            module, *modules = modules
            if not isinstance(module, nn.Conv2d) or module.groups != 1:
                self.steps.append(module)
                continue
            norm = None
            if modules and hasattr(modules[0], 'running_mean'):
                norm, *modules = modules
            relu = bool(modules) and isinstance(modules[0], nn.ReLU)
            if relu:
                modules = modules[1:]
            self.steps.append(_Step(GatherConv(module, norm, cache), relu))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class _Step:
    def __init__(self, conv: GatherConv, relu: bool) -> None:
        self.conv, self.relu = conv, relu

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(x, relu=self.relu)
