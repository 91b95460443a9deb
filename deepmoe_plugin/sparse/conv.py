"""Convolutions that run on the kept experts only, by torch."""

import threading
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ragged
from .fold import Geometry
from .plan import Kept
from .ragged import RaggedKept


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
            entry = self._weights.get(key)
            if entry is not None:
                self._weights.move_to_end(key)
                return entry, False
            digest = hash(key)
            again = digest in self._seen
            self._seen[digest] = None
            self._seen.move_to_end(digest)
            if len(self._seen) > 4096:
                self._seen.popitem(last=False)
            return None, again

    def put(self, key: tuple[object, ...], weight: Tensor) -> None:
        """Store a weight."""
        with self._lock:
            if key in self._weights or weight.nbytes > self.capacity:
                return
            self._weights[key] = weight
            self.size += weight.nbytes
            while self.size > self.capacity:
                _, freed = self._weights.popitem(last=False)
                self.size -= freed.nbytes


class GatherConv:
    """A convolution with its norm folded in that can leave out input and output channels.

    Weights are stored as (O, T, I), T the positions of the kernel: what torch's indexing keeps then comes out channels
    last, as torch's convolution likes it.

    Args:
        weight, bias: (O, I, kh, kw) and (O,), what follows the convolution folded in.
        geometry: how the kernel moves, over zeros beyond the border.
        cache: holds gathered weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry, cache: WeightCache) -> None:
        self.bias = bias
        self.out_channels, self.in_channels, *kernel = weight.shape
        self.kernel = tuple(kernel)
        self.taps = kernel[0] * kernel[1]
        self.geometry = geometry[1:]
        self.stored = weight.permute(0, 2, 3, 1).reshape(self.out_channels, self.taps, self.in_channels).contiguous()
        self.cache = cache
        self.other: Tensor | None = None

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Output (H, W) for an input (B, C, H, W)."""
        return out_size((x.shape[2], x.shape[3]), self.kernel, *self.geometry)

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
            gate: factors for all outputs, (B, O); with ragged outputs, for those of each image.
            relu: apply ReLU (before the gate).
            add_to: added to the result before the ReLU; not with a gate.

        Returns:
            (B, kept outputs, H', W'), channels last.
        """
        if isinstance(reads, RaggedKept) or isinstance(writes, RaggedKept):
            assert not isinstance(reads, Kept)
            assert not isinstance(writes, Kept)
            return ragged.convolve(self, x, reads, writes, gate, relu, add_to)
        weight, bias, gate = self._chosen(reads, writes, None if gate is None else gate.to(x.dtype))
        padding, stride, dilation = self.geometry
        y = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, stride, padding, dilation)
        if add_to is not None:
            y = y.add_(add_to)
        if relu:
            y = y.relu_()
        return y if gate is None else y.mul_(gate[:, :, None, None])

    def _chosen(
        self, reads: Kept | None, writes: Kept | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compact weight, bias and gate."""
        if reads is None and writes is None:
            return self._as_kernel(self.stored), self.bias, gate
        key = (id(self), reads and reads.key, writes and writes.key)
        weight, store = self.cache.get(key)
        if weight is None:
            weight = self.stored if writes is None else self.stored.index_select(0, writes.index)
            weight = self._as_kernel(weight if reads is None else weight.index_select(2, reads.index))
            if store:
                self.cache.put(key, weight)
        if writes is None:
            return weight, self.bias, gate
        gate = None if gate is None else gate.index_select(1, writes.index)
        return weight, self.bias.index_select(0, writes.index), gate

    def _as_kernel(self, weight: Tensor) -> Tensor:
        """A view (outputs, inputs, kernel height, kernel width) of weights in the order in which they are stored."""
        return weight.view(len(weight), *self.kernel, -1).permute(0, 3, 1, 2)

    def by_output(self) -> Tensor:
        """All weights, (O, T, I)."""
        return self.stored

    def by_input(self) -> Tensor:
        """All weights, (T, I, O): a second copy of them."""
        if self.other is None:
            self.other = self.stored.permute(1, 2, 0).contiguous()
        return self.other


def out_size(
    size: tuple[int, int],
    kernel: tuple[int, ...],
    pad: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, int]:
    """Output (H, W) of a kernel that moves over an input (H, W).

    Raises:
        ValueError: the input is smaller than the kernel.
    """
    height, width = ((size[i] + 2 * pad[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    if height < 1 or width < 1:
        raise ValueError(f'A {kernel[0]}x{kernel[1]} kernel cannot run on {size[0]}x{size[1]} pixels.')
    return height, width
