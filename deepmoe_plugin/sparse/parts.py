"""A trace cut into parts that groups of images run through without meeting each other."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .fold import geometry_of
from .operations import Call, Convolve, Depthwise, Operation, Pool, Trace
from .plan import Reader, Segment


class Widen(Operation):
    """Kept channels in their places among all, zeros in the others."""


class Part(NamedTuple):
    """Consecutive operations without a `Call` that needs all images.

    Attributes:
        operations: in the order in which they run.
        segment: the gated layers in them; None if there are none: all images then run together.
    """

    operations: list[Operation]
    segment: Segment | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(op.conv.weight.numel() for op in self.operations if isinstance(op, Convolve))


class Cut(NamedTuple):
    """What leads to some values.

    Attributes:
        steps: parts, and calls between them, in order.
        wanted: the values, or those that hold all channels of them.
        separate: every image must run alone, as kept channels go from one part to another.
    """

    steps: list[Part | Call]
    wanted: list[str]
    separate: bool


def never(op: Convolve, positions: int) -> int:
    """The tile of a convolution that computes each product: none."""
    return 0


def cut(
    trace: Trace, widths: Sequence[int], wanted: Sequence[str], tile: Callable[[Convolve, int], int] = never
) -> Cut:
    """Cut what leads to the wanted values wherever no kept channels are needed any more.

    What needs nothing of a part that has begun, and all images together, runs before it.

    Args:
        trace: of a network.
        widths: experts of each gated layer.
        wanted: values.
        tile: of a convolution to maps of so many positions, see `winograd`.
    """
    operations = _needed(trace, wanted)
    layers = {op.output: op.layer for op in operations}
    last_use = {name: i for i, op in enumerate(operations) for name in reads_of(op)}
    steps: list[Part | Call] = []
    early: list[Operation] = []
    part: list[Operation] = []
    compact: set[str] = set()
    separate = False

    def close() -> None:
        steps.extend(op if isinstance(op, Call) else Part([op], None) for op in early)
        if part:
            steps.append(Part(list(part), _segment(part, layers, widths, tile)))
        early.clear()
        part.clear()

    for i, op in enumerate(operations):
        reads = reads_of(op)
        touched = [name for name in (*reads, op.output) if layers.get(name) is not None]
        waits = bool({*reads} & {other.output for other in part})
        is_call = isinstance(op, Call) and not op.each
        if not compact or (is_call and waits):
            separate |= bool(compact)
            close()
        if not touched and not waits:
            early.append(op)
        elif is_call:
            steps.append(op)  # type: ignore[arg-type]
        else:
            part.append(op)
        compact = {name for name in (*compact, *touched) if last_use.get(name, -1) > i}
    close()
    dense = [name if layers.get(name) is None else f'{name}_widened' for name in wanted]
    return Cut(steps, dense, separate)


def reads_of(op: Operation) -> list[str]:
    """The values that an operation reads."""
    return [*op.inputs, op.residual] if isinstance(op, Convolve) and op.residual else op.inputs


def _needed(trace: Trace, wanted: Sequence[str]) -> list[Operation]:
    """The operations that lead to the wanted values; calls that need all channels get them from a `Widen`."""
    names = set(wanted)
    needed = []
    for op in reversed(trace.operations):
        if op.output in names:
            names.update(reads_of(op))
            needed.append(op)
    layers: dict[str, int | None] = {}
    result: list[Operation] = []

    def dense(name: str) -> str:
        wide = f'{name}_widened'
        if layers.get(name) is None:
            return name
        if wide not in layers:
            result.append(Widen([name], wide))
            layers[wide] = None
        return wide

    for op in reversed(needed):
        if isinstance(op, Call) and not op.each:
            op = op.reading([dense(name) for name in op.inputs])
        result.append(op)
        layers[op.output] = op.layer
    for name in wanted:
        dense(name)
    return result


def _segment(
    part: Sequence[Operation],
    layers: dict[str, int | None],
    widths: Sequence[int],
    tile: Callable[[Convolve, int], int],
) -> Segment | None:
    found = {layers.get(name) for op in part for name in (*reads_of(op), op.output)} - {None}
    numbers: list[Any] = sorted(found)
    if not numbers:
        return None
    first, stop = numbers[0], numbers[-1] + 1
    scales: dict[str, float] = {}
    readers = []
    for op in part:
        scale = scales.get(op.inputs[0], 1.0)
        if isinstance(op, Convolve):
            scale /= op.geometry.stride[0] * op.geometry.stride[1]
            sides = (layers.get(op.inputs[0]), op.layer)
            reads, writes = (None if side is None else side - first for side in sides)
            readers.append(Reader(op.conv.weight.numel(), scale, reads, writes, functools.partial(tile, op)))
        elif isinstance(op, Pool):
            scale /= op.window[2][0] * op.window[2][1]
        elif isinstance(op, Depthwise) and op.conv is not None:
            scale /= math.prod(geometry_of(op.conv).stride)
        scales[op.output] = scale
    return Segment(first, widths[first:stop], readers)
