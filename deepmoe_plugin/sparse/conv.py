"""Convolutions that run on the kept experts only."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packing, ragged
from .fold import fold_norm
from .kernels import LANES, WHOLE, Blocks, buffer, gather_kernel
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
        self._weights: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()
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
                return entry[0], False
            digest = hash(key)
            again = digest in self._seen
            self._seen[digest] = None
            self._seen.move_to_end(digest)
            if len(self._seen) > 4096:
                self._seen.popitem(last=False)
            return None, again

    def put(self, key: tuple[object, ...], weight: Tensor, memory: Tensor) -> None:
        """Store a weight and the tensor whose memory it lies in, which is what counts."""
        with self._lock:
            if key in self._weights or memory.nbytes > self.capacity:
                return
            self._weights[key] = weight, memory
            self.size += memory.nbytes
            while self.size > self.capacity:
                _, (_, freed) = self._weights.popitem(last=False)
                self.size -= freed.nbytes


class GatherConv:
    """A convolution with its norm folded in that can leave out input and output channels.

    Where the gather of `kernels` is available, what is kept of the weight is gathered into the layout that oneDNN
    computes with. Weights are stored as (T, I, O), T the positions of the kernel, so that closed inputs are not read,
    or, if all inputs are always there, as (O, T, I), so that closed outputs are not. Without that gather they are
    stored as (O, T, I): what is kept then comes out channels last.

    Args:
        conv, norm: of the network; the norm may be None.
        cache: holds gathered weights.
        reads_all: no input is ever left out.

    Raises:
        ValueError: the norm cannot be folded, or the convolution is of a kind that has no sparse form.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, cache: WeightCache, reads_all: bool = False) -> None:
        if conv.groups != 1 or conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
            raise ValueError(
                f'Sparse execution supports convolutions with groups=1 and zero padding by numbers, got {conv}.'
            )
        weight, bias = fold_norm(conv, norm)
        self.out_channels, self.in_channels, *kernel = weight.shape
        self.kernel = tuple(kernel)
        self.taps = kernel[0] * kernel[1]
        self.geometry = (tuple(conv.padding), tuple(conv.stride), tuple(conv.dilation))
        self.fused = packing.available(weight)
        whole = reads_all and self.in_channels % WHOLE == 0
        self.gather = gather_kernel(weight.dtype, whole) if self.fused else None
        self.output_first = whole or self.gather is None
        if self.output_first:
            sizes, beyond = (self.out_channels, self.taps, self.in_channels), self.taps * self.in_channels
        else:
            sizes, beyond = (self.taps, self.in_channels, self.out_channels), LANES
        room = buffer(weight.numel() + beyond, weight.dtype) if self.gather else weight.new_empty(weight.numel())
        self.stored = room[: weight.numel()].view(sizes)
        self._as_kernel(self.stored).copy_(weight)
        self.bias = bias
        self.cache = cache
        self.all_inputs = torch.ones(self.in_channels, dtype=torch.bool)
        self.all_outputs = torch.ones(self.out_channels, dtype=torch.bool)
        self.dense: tuple[packing.Form, Tensor] | None = None
        self.other: Tensor | None = None

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
            gate: factors for all outputs, (B, O), non-negative; with ragged outputs, for those of each image.
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
        if reads is None and writes is None:
            weight, bias = self._dense(x), self.bias
        else:
            weight, bias, gate = self._gathered(x, reads, writes, gate, relu)
        y = self._convolution(x, weight, bias, relu, add_to)
        return y if gate is None else y.mul_(gate.to(y.dtype)[:, :, None, None])

    def _dense(self, x: Tensor) -> Tensor:
        """All weights, for inputs of this shape."""
        kernel = self._as_kernel(self.stored)
        if not self.fused:
            return kernel
        form = self._form(x, self.in_channels, self.out_channels)
        dense = self.dense
        if dense is None or dense[0] != form:
            dense = self.dense = form, form.pack(kernel)
        return dense[1]

    def _gathered(
        self, x: Tensor, reads: Kept | None, writes: Kept | None, gate: Tensor | None, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compact weight and bias for inputs of this shape, and what is left of the gate to be applied afterwards."""
        num_inputs = self.in_channels if reads is None else len(reads)
        num_outputs = self.out_channels if writes is None else len(writes)
        form = self._form(x, num_inputs, num_outputs)
        weight, store = None, False
        if self.cache.capacity:
            key = (id(self), reads and reads.key, writes and writes.key, form)
            weight, store = self.cache.get(key)
        if weight is None and self.gather is not None:
            packed = packing.allocate(form) if store else packing.scratch(form)
            if packed is not None and self._gathers(num_inputs, packed.blocks):
                foldable = gate is not None and relu and len(x) == 1 and gate.dtype == x.dtype == torch.float32
                factors = gate.contiguous() if gate is not None and foldable and not store else None
                inputs = self.all_inputs if reads is None else reads.mask
                outputs = self.all_outputs if writes is None else writes.mask
                bias = x.new_empty(num_outputs)
                self.gather(self.stored, self.bias, inputs, outputs, factors, packed.memory, bias, packed.blocks)
                if store:
                    self.cache.put(key, packed.opaque, packed.memory)
                return packed.opaque, bias, None if factors is not None else _chosen(gate, writes)
        if weight is None:
            weight = self._selected(reads, writes)
            if store:
                self.cache.put(key, weight, weight)
        bias = self.bias if writes is None else self.bias.index_select(0, writes.index)
        return weight, bias, _chosen(gate, writes)

    def _gathers(self, num_inputs: int, blocks: Blocks) -> bool:
        """Whether the gather can write these blocks from weights in the order in which they are stored."""
        return not self.output_first or num_inputs == blocks.inputs == self.in_channels

    def _selected(self, reads: Kept | None, writes: Kept | None) -> Tensor:
        """Compact weights (kept outputs, kept inputs, kernel height, kernel width), by torch's means."""
        input_dim, output_dim = (2, 0) if self.output_first else (1, 2)
        weight = self.stored
        if writes is not None:
            weight = weight.index_select(output_dim, writes.index)
        if reads is not None:
            weight = weight.index_select(input_dim, reads.index)
        return self._as_kernel(weight)

    def _as_kernel(self, weight: Tensor) -> Tensor:
        """A view (outputs, inputs, kernel height, kernel width) of weights in the order in which they are stored."""
        if self.output_first:
            return weight.view(len(weight), *self.kernel, -1).permute(0, 3, 1, 2)
        return weight.view(*self.kernel, *weight.shape[1:]).permute(3, 2, 0, 1)

    def _form(self, x: Tensor, inputs: int, outputs: int) -> packing.Form:
        sizes = (outputs, inputs, *self.kernel)
        return packing.Form(sizes, self.geometry, tuple(x.shape), x.dtype, torch.get_num_threads())

    def by_output(self) -> Tensor:
        """All weights, (O, T, I)."""
        return self.stored if self.output_first else self._other_order()

    def by_input(self) -> Tensor:
        """All weights, (T, I, O)."""
        return self._other_order() if self.output_first else self.stored

    def _other_order(self) -> Tensor:
        """A second copy of the weights, in the order in which they are not stored."""
        if self.other is None:
            order = (1, 2, 0) if self.output_first else (2, 0, 1)
            self.other = self.stored.permute(order).contiguous()
        return self.other

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, add_to: Tensor | None) -> Tensor:
        if self.fused:
            return packing.convolve(x, weight, bias, self.geometry, relu, add_to)
        padding, stride, dilation = self.geometry
        y = F.conv2d(x, weight, bias, stride, padding, dilation)
        if add_to is not None:
            y = add_to.add_(y)
        return y.relu_() if relu else y


def _chosen(gate: Tensor | None, writes: Kept | None) -> Tensor | None:
    return gate if gate is None or writes is None else gate.index_select(1, writes.index)


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
