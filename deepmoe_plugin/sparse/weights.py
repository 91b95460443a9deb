"""A traced network as native code reads it: its weights, packed, and the experts of its layers."""

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import BLOCK, LANES, SLACK, round_up
from .memory import buffer
from .operations import Convolve, Depthwise, Respond, Trace
from .plan import LIMIT
from .winograd import tile_of


class PackedWeight:
    """A convolution's weight with its norm folded in, as native code reads it.

    Attributes:
        rows: of gated outputs: (output, kernel position, input), inputs filled up to a multiple of the pair that two
            are in bfloat16. Of closed outputs nothing is read.
        block: outputs whose weights lie together in `blocks`, in whole vectors.
        blocks: (output / block, kernel position, input, block), zeros behind the last output; in bfloat16, two
            neighbouring inputs lie side by side for each output. Of gated outputs, None until all are kept: see `fill`.
        bias: (outputs,), float32.
        block_bytes: what `blocks` takes.
    """

    def __init__(self, operation: Convolve) -> None:
        weight, bias = operation.folded()
        self.pair = 4 // weight.element_size()
        outputs, inputs, *kernel = weight.shape
        self.shape = outputs, math.prod(kernel), round_up(inputs, self.pair)
        self.block = min(BLOCK, round_up(outputs, LANES))
        self.block_bytes = round_up(outputs, self.block) * self.shape[1] * self.shape[2] * weight.element_size()
        self.bias = bias.float().contiguous()
        # Vectors of inputs may reach beyond the last row.
        self.rows: Tensor | None = buffer(math.prod(self.shape) + SLACK, weight.dtype)
        self.rows[: math.prod(self.shape)].view(self.shape)[:, :, :inputs] = weight.flatten(2).transpose(1, 2)
        self.blocks: Tensor | None = None
        self._lock = threading.Lock()
        if operation.layer is None:
            self.fill()
            self.rows = None

    def fill(self) -> None:
        """Make `blocks`."""
        with self._lock:
            if self.blocks is not None:
                return
            assert self.rows is not None
            outputs, taps, inputs = self.shape
            blocks = buffer(self.block_bytes // self.rows.element_size(), self.rows.dtype)
            target = blocks.view(-1, taps, inputs // self.pair, self.block, self.pair)
            rows = self.rows[: math.prod(self.shape)].view(outputs, taps, inputs // self.pair, self.pair)
            for block, part in enumerate(rows.split(self.block)):
                target[block, :, :, : len(part)] = part.permute(1, 2, 0, 3)
            self.blocks = blocks


class ChannelWeight:
    """A depthwise convolution and a norm over channels, as native code reads them: float32, channels in whole vectors.

    Attributes:
        taps: (kernel position, channel); None: only a norm.
        bias: (channel,).
        norm: (3, channel), the weights, the biases and, first in the last row, epsilon; None: only a convolution.
    """

    def __init__(self, operation: Depthwise) -> None:
        conv, norm = operation.conv, operation.norm
        self.taps, self.bias, self.norm = None, None, None
        if conv is not None:
            self.taps = _in_vectors(conv.weight.detach().flatten(1).t())
            self.bias = _in_vectors((conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias)[None])
        if norm is not None:
            self.norm = _in_vectors(with_epsilon(norm))


def with_epsilon(norm: Any) -> Tensor:
    """Weights, biases and epsilon of a norm, (3, channels), float32."""
    ones = torch.ones(getattr(norm, 'normalized_shape', None) or norm.weight.shape)
    rows = (ones if norm.weight is None else norm.weight, 0 * ones if norm.bias is None else norm.bias)
    return torch.stack([*(row.detach().float() for row in rows), norm.eps * ones])


def _in_vectors(rows: Tensor) -> Tensor:
    """Rows of channels (R, C) with zeros up to the end of the last vector."""
    channels = rows.shape[1]
    return torch.nn.functional.pad(rows.detach().float(), (0, round_up(channels, LANES) - channels)).contiguous()


class NativeNetwork:
    """A traced network as native code reads it.

    Args:
        trace: of the network.
        widths: experts of each gated layer.
        winograd: run convolutions with fewer products where that takes less time.

    Attributes:
        weights, channel_weights, response_weights: of operations, by the values that they write.
        layer_starts: the first expert of each layer, and the number of all.
        most_kept: experts of each layer: a group of images that keeps more runs with all of them.
    """

    def __init__(self, trace: Trace, widths: Sequence[int], winograd: bool = True) -> None:
        self.trace = trace
        self.winograd = winograd
        self.widths = np.array(widths, dtype=np.int64)
        self.layer_starts = np.array([0, *itertools.accumulate(widths)], dtype=np.int64)
        self.most_kept = np.zeros(len(widths), dtype=np.int64)
        convolutions = [op for op in trace.operations if isinstance(op, Convolve)]
        self.weights = {op.output: PackedWeight(op) for op in convolutions}
        operations = trace.operations
        self.channel_weights = {op.output: ChannelWeight(op) for op in operations if isinstance(op, Depthwise)}
        self.response_weights = {op.output: with_epsilon(op.norm) for op in operations if isinstance(op, Respond)}
        self.set_limits([LIMIT] * len(self.widths))

    def set_limits(self, limits: Sequence[float]) -> None:
        """Set, for each gated layer, the largest fraction of kept experts for which its outputs are selected."""
        # In place, as native code holds its address.
        self.most_kept[:] = [int(limit * width) for limit, width in zip(limits, self.widths, strict=True)]

    def tile(self, op: Convolve, positions: int, dtype: torch.dtype) -> int:
        """The tile of a convolution to maps of so many positions, see `tile_of`."""
        return tile_of(op, positions, dtype) if self.winograd else 0

    def kept(self, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which experts are computed for each image, (B, N), and how many of each layer, (B, layers)."""
        kept = gates > 0
        counts = np.add.reduceat(kept, self.layer_starts[:-1], axis=1, dtype=np.int64)
        many = counts > self.most_kept
        if many.any():
            kept |= np.repeat(many, self.widths, axis=1)
            counts = np.where(many, self.widths, counts)
        return kept, counts
