"""Convolutions that run on the kept experts only."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plain import BATCH_NORMS, is_plain
from . import ragged, tiles
from .fold import fold_norm
from .gather import LANES, WHOLE, gather_kernel
from .native import Queue, Workspace, buffer
from .plan import Kept
from .ragged import RaggedKept
from .tiles import TiledWeight

MIN_INPUTS = 16
"""Inputs below which a convolution does not run in tiles: their products would be too thin."""

_weights = Workspace()


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

    Where `tiles` are available, what is kept of the weight is gathered into the layout that they compute with. Weights
    are stored as (T, I, O), T the positions of the kernel, so that closed inputs are not read, or, if all inputs are
    always there, as (O, T, I), so that closed outputs are not. Elsewhere they are stored as (O, T, I): what torch's
    indexing keeps then comes out channels last, as torch's convolution likes it.

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
        self.pair = tiles.pair_of(weight.dtype)
        self.tiled = weight.device.type == 'cpu' and self.in_channels >= MIN_INPUTS and tiles.available(weight.dtype)
        whole = self.tiled and reads_all and self.in_channels % WHOLE == 0
        self.gather = gather_kernel(weight.dtype, whole) if self.tiled else None
        if self.tiled:
            tiles.compiled(weight.dtype)  # now rather than before the first image
        self.output_first = whole or not self.tiled
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
        self.dense: TiledWeight | None = None
        self.other: Tensor | None = None

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Output (H, W) for an input (B, C, H, W)."""
        return tiles.out_size(x.shape[2], x.shape[3], self.kernel, self.geometry)

    def __call__(
        self,
        x: Tensor,
        reads: Kept | RaggedKept | None = None,
        writes: Kept | RaggedKept | None = None,
        gate: Tensor | None = None,
        relu: bool = False,
        add_to: Tensor | None = None,
        queue: Queue | None = None,
    ) -> Tensor:
        """Convolve.

        Args:
            x: (B, kept inputs, H, W).
            reads, writes: which inputs `x` holds and which outputs to compute, None for all; if each image has channels
                of its own, see `ragged`.
            gate: factors for all outputs, (B, O); with ragged outputs, for those of each image.
            relu: apply ReLU (before the gate).
            add_to: added to the result before the ReLU, may be overwritten; not with a gate.
            queue: what writes `x` may be in it; the result is there when it has run. Without, it is there at once.

        Returns:
            (B, kept outputs, H', W'), channels last.
        """
        if isinstance(reads, RaggedKept) or isinstance(writes, RaggedKept):
            assert not isinstance(reads, Kept)
            assert not isinstance(writes, Kept)
            if queue is not None:
                queue.run()
            return ragged.convolve(self, x, reads, writes, gate, relu, add_to)
        if gate is not None:
            gate = gate.to(x.dtype)
        if self._runs_tiled(x.dtype, reads):
            calls = Queue() if queue is None else queue
            compact, bias, gate = self._tiled(calls, reads, writes, gate)
            y = tiles.convolve(calls, x, compact, bias, self.kernel, self.geometry, relu, gate, add_to)
            if queue is None:
                calls.run()
            return y
        if queue is not None:
            queue.run()
        weight, bias, gate = self._plain(reads, writes, gate)
        padding, stride, dilation = self.geometry
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, bias, stride, padding, dilation)
        if add_to is not None:
            y = add_to.add_(y)
        if relu:
            y = y.relu_()
        return y if gate is None else y.mul_(gate[:, :, None, None])

    def _runs_tiled(self, dtype: torch.dtype, reads: Kept | None) -> bool:
        """Whether this convolution runs in tiles on inputs of a type."""
        if not self.tiled or dtype != self.stored.dtype or (reads is not None and self.output_first):
            return False
        if self.pair == 1:
            return True
        _, num_inputs = self._sizes(reads, None)
        return num_inputs % self.pair == 0 and torch._C._get_mkldnn_enabled()

    def _sizes(self, reads: Kept | None, writes: Kept | None) -> tuple[int, int]:
        """Numbers of outputs and inputs computed with."""
        outputs = self.out_channels if writes is None else writes.count
        return outputs, self.in_channels if reads is None else reads.count

    def _tiled(
        self, queue: Queue, reads: Kept | None, writes: Kept | None, gate: Tensor | None
    ) -> tuple[TiledWeight, Tensor, Tensor | None]:
        """Compact weight, bias and gate for tiles."""
        gate = None if gate is None else gate.float().contiguous()
        if reads is None and writes is None:
            if self.dense is None:
                calls = Queue()
                dense = self._gathered(calls, None, None, None, stays=True)[0]
                calls.run()
                self.dense = dense
            return self.dense, self.bias, gate
        key = (id(self), reads and reads.key, writes and writes.key)
        memory, store = self.cache.get(key)
        if memory is not None:
            return TiledWeight(memory.data_ptr(), *self._sizes(reads, writes), memory), *self._chosen(writes, gate)
        weight, bias, gate = self._gathered(queue, reads, writes, gate, store)
        if store:
            queue.then(self.cache.put, key, weight.memory)
        return weight, bias, gate

    def _gathered(
        self, queue: Queue, reads: Kept | None, writes: Kept | None, gate: Tensor | None, stays: bool
    ) -> tuple[TiledWeight, Tensor, Tensor | None]:
        """Compact weight, in memory of its own or for one use, bias and gate for tiles."""
        outputs, inputs = self._sizes(reads, writes)
        num_bytes = TiledWeight.num_bytes(outputs, self.taps, inputs, self.stored.dtype)
        if stays:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
            weight = TiledWeight(memory.data_ptr(), outputs, inputs, memory)
        else:
            address = _weights.take(num_bytes)
            weight = TiledWeight(address, outputs, inputs, _weights.memory)
        bias = self.bias.new_empty(outputs)
        kept_gate = None if gate is None else gate.new_empty(gate.shape[0], outputs)
        inputs_mask = self.all_inputs if reads is None else reads.mask
        outputs_mask = self.all_outputs if writes is None else writes.mask
        assert self.gather is not None
        self.gather(queue, self.stored, self.bias, gate, inputs_mask, outputs_mask, weight, bias, kept_gate)
        return weight, bias, kept_gate

    def _plain(
        self, reads: Kept | None, writes: Kept | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compact weight, bias and gate as torch's convolution takes them."""
        if reads is None and writes is None:
            return self._as_kernel(self.stored), self.bias, gate
        key = (id(self), reads and reads.key, writes and writes.key, 'plain')
        weight, store = self.cache.get(key)
        if weight is None:
            weight = self._selected(reads, writes)
            if store:
                self.cache.put(key, weight)
        return weight, *self._chosen(writes, gate)

    def _chosen(self, writes: Kept | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bias and gate of the outputs computed."""
        if writes is None:
            return self.bias, gate
        return self.bias.index_select(0, writes.index), None if gate is None else gate.index_select(1, writes.index)

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


class FoldedSequence(nn.Module):
    """Modules that run one after the other, each convolution fused with the norm and the ReLU that follow it.

    What is not as its class has it (see `plain`) runs as it is.
    """

    def __init__(self, modules: list[nn.Module], cache: WeightCache) -> None:
        super().__init__()
        self.steps: list[Callable[[Tensor], Tensor]] = []
        while modules:
            module, *modules = modules
            if not isinstance(module, nn.Conv2d) or not is_plain(module, nn.Conv2d) or module.groups != 1:
                self.steps.append(module)
                continue
            norm = None
            if modules and is_plain(modules[0], *BATCH_NORMS):
                norm, *modules = modules
            relu = bool(modules) and is_plain(modules[0], nn.ReLU)
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
