"""Convolutions that run on the kept experts only."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ragged
from .fold import fold_norm
from .kernels import LANES, compact_kernel
from .plan import Kept
from .ragged import RaggedKept

SMALL_MAP = {True: 1024, False: 64}
"""Up to this many output positions a pointwise (True) or other (False) convolution is one matrix product: oneDNN would
first copy the weights into a layout of its own, which costs more than it gains on small maps."""


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
            with torch.inference_mode(False):  # the next call may come outside of inference mode
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
        self.by_input: Tensor | None = None
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
        reads: Kept | RaggedKept | None = None,
        writes: Kept | RaggedKept | None = None,
        gate: Tensor | None = None,
        relu: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Convolve.

        Args:
            x: (B, kept inputs, H, W).
            reads, writes: which inputs `x` holds and which outputs to compute, None for all; if each image has channels
                of its own, see `ragged`.
            gate: factors for the outputs, (B, kept outputs), non-negative.
            relu: apply ReLU (before the gate).
            add_to: added to the result before the ReLU, may be overwritten; not with a gate.

        Returns:
            (B, kept outputs, H', W'), channels last.
        """
        if isinstance(reads, RaggedKept) or isinstance(writes, RaggedKept):
            assert not isinstance(reads, Kept)
            assert not isinstance(writes, Kept)
            return ragged.convolve(self, x, reads, writes, gate, relu, add_to)
        x = x.contiguous(memory_format=torch.channels_last)
        size = self.out_size(x)
        positions = x.shape[0] * size[0] * size[1]
        bias = self.bias if writes is None else self.bias.index_select(0, writes.index)
        if reads is None and writes is None:
            return self._scaled(self._convolution(x, self.stored, bias, relu, add_to), gate)
        is_product = self.as_product and positions <= SMALL_MAP[self.taps == 1]
        if is_product and writes is None:
            weight, _ = self._gathered(reads, writes, self._input_rows)
            return self._scaled(self._product(x, weight.flatten(0, 1), bias, size, relu, add_to, 'CT'), gate)
        weight, is_scratch = self._gathered(reads, writes, self._compacted)
        if gate is not None and relu and x.shape[0] == 1 and weight.numel() < positions * len(bias):
            factor = gate[0].to(weight.dtype)
            weight = torch.mul(weight, factor[:, None, None], out=weight if is_scratch else None)
            bias = bias * factor
            gate = None
        if is_product:
            return self._scaled(self._product(x, weight.flatten(1).t(), bias, size, relu, add_to, 'TC'), gate)
        return self._scaled(self._convolution(x, weight, bias, relu, add_to), gate)

    @staticmethod
    def _scaled(y: Tensor, gate: Tensor | None) -> Tensor:
        return y if gate is None else y.mul_(gate.to(y.dtype)[:, :, None, None])

    def _gathered(
        self, reads: Kept | None, writes: Kept | None, gather: Callable[[Kept | None, Kept | None, Tensor], Tensor]
    ) -> tuple[Tensor, bool]:
        """Compact weight in the layout of `gather`, and whether it may be overwritten."""
        key = (id(self), reads and reads.key, writes and writes.key, gather.__name__)
        weight, store = self.cache.get(key)
        if weight is not None:
            return weight, False
        num_out = self.out_channels if writes is None else len(writes)
        num_in = self.in_channels if reads is None else len(reads)
        numel = num_out * self.taps * num_in
        weight = gather(reads, writes, self.stored.new_empty(numel) if store else _scratch.take(self.stored, numel))
        if store:
            self.cache.put(key, weight)
        return weight, not store

    def _compacted(self, reads: Kept | None, writes: Kept | None, out: Tensor) -> Tensor:
        """(kept outputs, T, kept inputs)."""
        num_out = self.out_channels if writes is None else len(writes)
        out = out.view(num_out, self.taps, -1)
        kernel = compact_kernel(out.dtype) if out.device.type == 'cpu' else None
        if reads is None:
            assert writes is not None
            return torch.index_select(self.stored, 0, writes.index, out=out)
        if kernel is not None:
            kernel(self.stored, self.all_rows if writes is None else writes.rows, *reads.bits, out)
            return out
        rows = self.stored if writes is None else self.stored.index_select(0, writes.index)
        return torch.index_select(rows, 2, reads.index, out=out)

    def _input_rows(self, reads: Kept | None, writes: Kept | None, out: Tensor) -> Tensor:
        """(kept inputs, T, all outputs)."""
        assert reads is not None
        rows = self.input_rows()
        return torch.index_select(rows, 0, reads.index, out=out.view(-1, *rows.shape[1:]))

    def input_rows(self) -> Tensor:
        """A second copy of the weights, (I, T, O): one contiguous row for each input."""
        if self.by_input is None:
            self.by_input = self.stored.permute(2, 1, 0).contiguous()
        return self.by_input

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
        self,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor,
        size: tuple[int, int],
        relu: bool,
        add_to: Tensor | None,
        order: str,
    ) -> Tensor:
        patches = self._patches(x, size, order)
        if add_to is None:
            y = torch.addmm(bias, patches, matrix)
        else:
            y = add_to.permute(0, 2, 3, 1).reshape(-1, matrix.shape[1])
            y = y.add_(bias).addmm_(patches, matrix)
        if relu:
            y.relu_()
        return y.view(x.shape[0], *size, -1).permute(0, 3, 1, 2)

    def _patches(self, x: Tensor, size: tuple[int, int], order: str) -> Tensor:
        """The inputs of every output position, (positions, T * C); order 'CT' puts the kernel positions innermost."""
        (ph, pw), (sh, sw), (dh, dw) = self.geometry
        x = x.permute(0, 2, 3, 1)
        if ph or pw:
            x = F.pad(x, (0, 0, pw, pw, ph, ph))
        images, _, _, channels = x.shape
        by_image, by_row, by_column, by_channel = x.stride()
        shape = (images, *size, *self.kernel, channels)
        stride = (by_image, sh * by_row, sw * by_column, dh * by_row, dw * by_column, by_channel)
        patches = x.as_strided(shape, stride)
        if order == 'CT':
            patches = patches.permute(0, 1, 2, 5, 3, 4)
        return patches.reshape(images * size[0] * size[1], self.taps * channels)


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
