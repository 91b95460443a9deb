"""Runs a traced network operation by operation on torch's own convolutions, and on a GPU on ragged kernels.

What `program` cannot run runs here: GPUs, other number types, machines without a compiler.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.deepmoe_convnext import response_norm
from . import ragged
from .conv import GatherConv, WeightCache
from .operations import Call, Convolve, Depthwise, Norms, Operation, Pool, Respond, Scale, Trace
from .parts import Cut, Part, Widen, cut
from .plan import LIMIT, Group, Kept, Plan, Segment
from .ragged import RaggedKept


class Interpreter:
    """The operations of a network with their weights.

    Args:
        trace: of the network.
        widths: experts of each gated layer.
        cache: holds gathered weights.
    """

    def __init__(self, trace: Trace, widths: Sequence[int], cache: WeightCache) -> None:
        self.trace, self.widths, self.cache = trace, list(widths), cache
        self.limits, self.ragged_limit = [LIMIT] * len(widths), LIMIT
        self.convs = {
            op.output: GatherConv(*op.folded(), op.geometry, cache)
            for op in trace.operations
            if isinstance(op, Convolve)
        }
        self.layers = {op.output: op.layer for op in trace.operations}
        self._cuts: dict[tuple[str, ...], Cut] = {}

    def set_limits(self, limits: Sequence[float], ragged_limit: float | None = None) -> None:
        """Set, for each gated layer, the largest fraction of kept experts for which it runs on compact weights.

        `ragged_limit`: the largest fraction, on average, for which a batch runs ragged.
        """
        self.limits, self.ragged_limit = list(limits), LIMIT if ragged_limit is None else ragged_limit
        for found in self._cuts.values():
            self._limit(found)

    def _limit(self, found: Cut) -> None:
        for segment in _segments(found):
            segment.ragged_limit = self.ragged_limit
            segment.limits = self.limits[segment.layers]

    def cut(self, wanted: Sequence[str]) -> Cut:
        """The parts that lead to these values."""
        key = tuple(wanted)
        if key not in self._cuts:
            found = cut(self.trace, self.widths, wanted)
            self._limit(found)
            self._cuts[key] = found
        return self._cuts[key]

    def segments(self) -> list[Segment]:
        """Those on the way to the features, in the order in which they run."""
        return _segments(self.cut([self.trace.result]))

    def run(self, x: Tensor, gates: Sequence[Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The wanted values, all channels, for images (B, C, H, W) and their gates, each (B, C_l)."""
        found = self.cut(wanted)
        if found.separate and len(x) > 1:
            each = [self.run(x[i : i + 1], [gate[i : i + 1] for gate in gates], wanted) for i in range(len(x))]
            return [torch.cat(values) for values in zip(*each, strict=True)]
        plan = Plan(gates, _segments(found), ragged.available(x))
        values: dict[str, Any] = {self.trace.image: x}
        for step in found.steps:
            if isinstance(step, Call):
                values[step.output] = step.run(self.trace, values, gates)
            else:
                self._part(step, plan, values, found)
        return [values[name] for name in found.wanted]

    def _part(self, part: Part, plan: Plan, values: dict[str, Any], found: Cut) -> None:
        entry = values[part.operations[0].inputs[0]]
        groups: Sequence[Group | None] = [None]
        if part.segment is not None:
            groups = plan.groups(part.segment, entry.shape[2] * entry.shape[3])
        if len(groups) == 1:
            for op in part.operations:
                values[op.output] = self._operation(op, groups[0], part.segment, values)
            return
        # Operation by operation, so that groups in turn find the weights in the cache, or group by group, so that
        # operations in turn find the activations there: whichever is larger.
        batches = [groups] if part.weights > entry.numel() else [[group] for group in groups]
        for batch in batches:
            inside: list[dict[str, Any]] = [_Inside(values, group) for group in batch]
            for op in part.operations:
                for group, mine in zip(batch, inside, strict=True):
                    result = mine[op.output] = self._operation(op, group, part.segment, mine)
                    if op.layer is None and group is not None:
                        whole = values.get(op.output)
                        if whole is None:
                            whole = values[op.output] = result.new_empty(len(entry), *result.shape[1:])
                        whole[group.part] = result

    def _operation(self, op: Operation, group: Group | None, segment: Segment | None, values: dict[str, Any]) -> Any:
        inputs = [values[name] for name in op.inputs]
        kept_in = _kept(op.inputs[0], group, segment, self.layers) if op.inputs else None
        kept_out = None
        gate = None
        if op.layer is not None:
            assert group is not None
            assert segment is not None
            kept_out, gate = group.kept[op.layer - segment.first], group.gates[op.layer - segment.first]
        if isinstance(op, Convolve):
            residual = values[op.residual] if op.residual else None
            if op.activation == 'relu':
                return self.convs[op.output](inputs[0], kept_in, kept_out, gate, relu=True, add_to=residual)
            result = self.convs[op.output](inputs[0], kept_in, kept_out, add_to=residual)
            if op.activation == 'gelu':
                result = F.gelu(result)
                return result if gate is None else _scaled(result, kept_out, gate)
            return result
        if isinstance(op, Depthwise):
            result = inputs[0] if op.conv is None else op.conv(inputs[0])
            if op.norm is None:
                return result
            norm = op.norm
            result = F.layer_norm(result.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            return result.permute(0, 3, 1, 2)
        if isinstance(op, Norms):
            return _without_unused(inputs[0], kept_in).norm(p=2, dim=(2, 3), keepdim=True)
        if isinstance(op, Respond):
            assert gate is not None
            return _responded(op.norm, inputs[0], inputs[1], kept_in, gate)
        if isinstance(op, Pool):
            kernel, padding, stride, dilation = op.window
            pooled = F.max_pool2d(inputs[0], kernel, stride, padding, dilation)
            return F.pad(pooled, (0, 0, 0, 0, 0, op.extra_channels)) if op.extra_channels else pooled
        if isinstance(op, Scale):
            assert gate is not None
            return _scaled(inputs[0], kept_out, gate)
        if isinstance(op, Widen):
            layer = self.layers[op.inputs[0]]
            assert layer is not None
            return _widened(inputs[0], kept_in, self.widths[layer])
        assert isinstance(op, Call)
        return op.function(*inputs)


class _Inside(dict[str, Any]):
    """Values of a group of images; those from outside its part are cut out of the batch's."""

    def __init__(self, values: dict[str, Any], group: Group | None) -> None:
        self.outside, self.group = values, group

    def __missing__(self, name: str) -> Any:
        assert self.group is not None
        value = self[name] = self.outside[name][self.group.part]
        return value


def _segments(found: Cut) -> list[Segment]:
    return [step.segment for step in found.steps if isinstance(step, Part) and step.segment is not None]


def _kept(
    name: str, group: Group | None, segment: Segment | None, layers: dict[str, int | None]
) -> Kept | RaggedKept | None:
    layer = layers.get(name)
    if layer is None or group is None or segment is None:
        return None
    return group.kept[layer - segment.first]


def _scaled(x: Tensor, kept: Kept | RaggedKept | None, gate: Tensor) -> Tensor:
    """Kept channels times their gates."""
    if isinstance(kept, Kept):
        gate = gate.index_select(1, kept.index)
    return x * gate.to(x.dtype)[:, :, None, None]


def _without_unused(x: Tensor, kept: Kept | RaggedKept | None) -> Tensor:
    """Zeros in slots that hold no expert of an image."""
    if not isinstance(kept, RaggedKept):
        return x
    unused = torch.arange(kept.num_slots, device=x.device) >= kept.counts[:, None]
    return x.masked_fill(unused.reshape(*unused.shape, *[1] * (x.ndim - 2)), 0)


def _responded(norm: Any, x: Tensor, norms: Tensor, kept: Kept | RaggedKept | None, gate: Tensor) -> Tensor:
    """GRN of kept channels."""
    weight, bias = norm.weight.detach()[None], norm.bias.detach()[None]
    if isinstance(kept, RaggedKept):
        gate = _without_unused(gate, kept)
        weight, bias = (part[0, kept.experts.long()] for part in (weight, bias))
    elif isinstance(kept, Kept):
        gate, weight, bias = (part.index_select(1, kept.index) for part in (gate, weight, bias))
    return response_norm(x, norms, gate, weight, bias, len(norm.weight), norm.eps, channels_last=False)


def _widened(x: Tensor, kept: Kept | RaggedKept | None, width: int) -> Tensor:
    """All channels of compact features: those not computed are zero."""
    if kept is None:
        return x
    if isinstance(kept, RaggedKept):
        return kept.widened(x, width)
    out = x.new_zeros(x.shape[0], width, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
    return out.index_copy_(1, kept.index, x)
