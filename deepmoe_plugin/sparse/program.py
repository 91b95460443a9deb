"""Runs a traced network on the CPU: a table of operations over planned memory, which native code works through.

`Program` holds the weights; for each shape of images it makes a `Schedule` once: where values lie, which operations
groups of images run through without meeting the others, and what runs by torch in between. For a batch, only masks,
gates and addresses are filled in; one native call then runs all operations up to the next that torch runs.

Longer than other files: records, schedule and groups are one description, that of the native code's memory.
"""

import ctypes
import dataclasses
import functools
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..experts import num_outputs
from . import build
from .conv import out_size
from .fold import geometry_of
from .memory import Workspace, buffer
from .operations import Average, Call, Convolve, Depthwise, Norms, Operation, Pool, Respond, Scale, Softmax, Trace
from .parts import Part, cut, reads_of
from .plan import LIMIT, partition
from .winograd import places, scratch_bytes, tile_of

BLOCK = 64
"""Outputs whose weights lie together, as in native code."""
LANES = 16
"""Channels in a vector, as in native code."""
SLACK = 64
"""Bytes behind every value, which a product may read but does not use."""
MAX_INPUTS = 2**14
"""Inputs of a row of a kernel, at most: native code has as many zeros to read beyond the border of an image."""
MAX_SCHEDULES = 8
DTYPES = (torch.float32, torch.bfloat16)

CONVOLVE, POOL, LOAD, WIDEN, SCALE, DEPTHWISE, NORMS, RESPOND, AVERAGE, SOFTMAX = range(10)
ABSENT, ASKED_FOR, PRESENT = range(3)
ACTIVATIONS = ('', 'relu', 'gelu')
VALUES = np.dtype([(name, np.int64) for name in ('data', 'image_bytes', 'height', 'width', 'channels', 'layer', 'pad')])
OPERATIONS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *('kind', 'input', 'output', 'residual', 'kernel_height', 'kernel_width', 'pad_height', 'pad_width'),
            *('stride_height', 'stride_width', 'dilation_height', 'dilation_width', 'image_channels', 'activation'),
            *('tile', 'bias', 'weight', 'weight_bytes', 'rows', 'rows_bytes'),
        )
    ]
)
PARTS = np.dtype([(name, np.int64) for name in ('first', 'last', 'num_groups', 'first_group', 'group_major')])
GROUPS = np.dtype(
    [(name, np.int64) for name in ('first', 'count', 'first_layer', 'num_layers', 'lists', 'lists_bytes')]
)
KEPT_BYTES, MOVE_BYTES = 32, 16

_rooms = Workspace()


class _Header(ctypes.Structure):
    """`Program` of native code."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('values', 'operations', 'parts', 'num_parts', 'groups', 'num_groups')),
        *((name, ctypes.c_int64) for name in ('images', 'batch', 'layer_starts', 'num_layers', 'most_kept', 'whole')),
        *((name, ctypes.c_int64) for name in ('gates', 'has_lists', 'source')),
        ('source_strides', ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ('rooms', 'room_bytes', 'pack_bytes', 'scratch', 'scratch_bytes')),
        *((name, ctypes.c_int64) for name in ('num_threads', 'is_bfloat16', 'thread_number', 'thread_count')),
        *((name, ctypes.c_int64) for name in ('lines', 'lacks')),
    ]


HEADER_BYTES = ctypes.sizeof(_Header)


def available(x: Tensor) -> bool:
    """Whether a native program can run these images."""
    return (
        x.device.type == 'cpu'
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled('cpu')
        and build.library() is not None
    )


def fits(trace: Trace) -> bool:
    """Whether a native program can run these operations."""
    widths = [op.conv.weight.shape[1] * op.geometry.kernel[1] for op in trace.operations if isinstance(op, Convolve)]
    return max(widths, default=0) <= MAX_INPUTS


class PackedWeight:
    """A convolution's weight with its norm folded in, as native code reads it.

    Attributes:
        rows: of gated outputs: (output, kernel position, input), inputs filled up to a multiple of the pair that two
            are in bfloat16. Of closed outputs nothing is read.
        blocks: (output / BLOCK, kernel position, input, BLOCK), zeros behind the last output; in bfloat16, two
            neighbouring inputs lie side by side for each output. Of gated outputs, None until all are kept: see `fill`.
        bias: (outputs,), float32.
        block_bytes: what `blocks` takes.
    """

    def __init__(self, operation: Convolve) -> None:
        weight, bias = operation.folded()
        self.pair = 4 // weight.element_size()
        outputs, inputs, *kernel = weight.shape
        self.shape = outputs, math.prod(kernel), _round_up(inputs, self.pair)
        self.block_bytes = _round_up(outputs, BLOCK) * self.shape[1] * self.shape[2] * weight.element_size()
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
            target = blocks.view(-1, taps, inputs // self.pair, BLOCK, self.pair)
            rows = self.rows[: math.prod(self.shape)].view(outputs, taps, inputs // self.pair, self.pair)
            for block, part in enumerate(rows.split(BLOCK)):
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
            self.norm = _in_vectors(_with_epsilon(norm))


def _with_epsilon(norm: Any) -> Tensor:
    """Weights, biases and epsilon of a norm, (3, channels), float32."""
    ones = torch.ones(getattr(norm, 'normalized_shape', None) or norm.weight.shape)
    rows = (ones if norm.weight is None else norm.weight, 0 * ones if norm.bias is None else norm.bias)
    return torch.stack([*(row.detach().float() for row in rows), norm.eps * ones])


def _in_vectors(rows: Tensor) -> Tensor:
    """Rows of channels (R, C) with zeros up to the end of the last vector."""
    channels = rows.shape[1]
    return torch.nn.functional.pad(rows.detach().float(), (0, _round_up(channels, LANES) - channels)).contiguous()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Load(Operation):
    """The images as native code reads them."""


class Shape(NamedTuple):
    """Of one image of a value."""

    channels: int
    height: int
    width: int


class Program:
    """The operations of a network with their weights.

    Args:
        trace: of the network.
        widths: experts of each gated layer.
        winograd: run convolutions with fewer products where that takes less time.
    """

    def __init__(self, trace: Trace, widths: Sequence[int], winograd: bool = True) -> None:
        self.trace = trace
        self.winograd = winograd
        self.widths = np.array(widths, dtype=np.int64)
        self.layer_starts = np.array([0, *itertools.accumulate(widths)], dtype=np.int64)
        self.most_kept = np.zeros(len(widths), dtype=np.int64)
        self.set_limits([LIMIT] * len(self.widths))
        self.library = build.library()
        convolutions = [op for op in trace.operations if isinstance(op, Convolve)]
        self.weights = {op.output: PackedWeight(op) for op in convolutions}
        operations = trace.operations
        self.channel_weights = {op.output: ChannelWeight(op) for op in operations if isinstance(op, Depthwise)}
        self.response_weights = {op.output: _with_epsilon(op.norm) for op in operations if isinstance(op, Respond)}
        self._schedules: OrderedDict[tuple[object, ...], Schedule] = OrderedDict()
        self._lock = threading.Lock()

    def set_limits(self, limits: Sequence[float]) -> None:
        """Set, for each gated layer, the largest fraction of kept experts for which its outputs are selected."""
        # In place, as native code holds its address.
        self.most_kept[:] = [int(limit * width) for limit, width in zip(limits, self.widths, strict=True)]

    def run(self, x: Tensor, gates: Sequence[Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The wanted values, all channels, for images (B, C, H, W) and their gates, each (B, C_l)."""
        packed = torch.cat(list(gates), 1).detach().float() if gates else torch.zeros(len(x), 0)
        return self.run_packed(x, packed.numpy(), wanted)

    def run_packed(self, x: Tensor, gates: np.ndarray, wanted: Sequence[str]) -> list[Tensor]:
        """The same with the gates of all layers side by side, (B, N), float32, contiguous."""
        if not len(x):
            one = self.run_packed(x.new_zeros(1, *x.shape[1:]), np.ones((1, gates.shape[1]), np.float32), wanted)
            return [value[:0] for value in one]
        key = (x.shape, tuple(wanted))
        with self._lock:
            schedule = self._schedules.get(key)
            if schedule is None:
                schedule = self._schedules[key] = Schedule(self, x, gates, wanted)
                if len(self._schedules) > MAX_SCHEDULES:
                    self._schedules.popitem(last=False)
            self._schedules.move_to_end(key)
        return schedule.run(x, gates)


class Schedule:
    """A program for images of one shape: see `Program.run`."""

    def __init__(self, program: Program, x: Tensor, gates: np.ndarray, wanted: Sequence[str]) -> None:
        self.program = program
        self.batch, self.dtype, self.pair = len(x), x.dtype, 4 // x.element_size()
        self.image = program.trace.image
        self.shapes = {self.image: Shape(*x.shape[1:])}
        self.layers: dict[str, int | None] = {self.image: None}
        self.pads: dict[str, int] = {}  # pixels of zeros around the rows of a value
        found = cut(program.trace, program.widths.tolist(), wanted)
        self.wanted, self.separate = found.wanted, found.separate
        self.steps: list[list[Part] | Call] = []  # parts that one native call runs, or a call of torch
        self._fill(found.steps, x[:1], gates[:1])
        self.parts = [part for step in self.steps if isinstance(step, list) for part in step]
        # With more activations than weights, a group does best to go through all operations before the next.
        self.in_depth = [
            part.weights < sum(math.prod(self.shapes[op.output]) for op in part.operations) for part in self.parts
        ]
        self.values = [name for name in self.layers if name in self.shapes and name != self.image]
        self.numbers = {name: i for i, name in enumerate(self.values)}
        rows = [self._row(op) for part in self.parts for op in part.operations]
        self.operations = np.array([tuple(row.values()) for row in rows], dtype=OPERATIONS)
        self._place()
        self.always_alone = self.batch == 1 or self.separate or not len(program.widths)
        self.groups = self._alone()  # of the call before
        self._frames = threading.local()
        # Convolutions, and their gated layers, whose weights for all experts are still missing.
        layers = self.table['layer'][self.operations['output']]
        convolves = (self.operations['kind'] == CONVOLVE) & (self.operations['weight'] == 0)
        self.unfilled = {int(number): int(layers[number]) for number in np.flatnonzero(convolves)}
        self.whole = np.full(len(program.widths), PRESENT, dtype=np.int64)
        self.whole[list(self.unfilled.values())] = ABSENT

    # ---------------------------------------------------------------------------------- operations and shapes

    def _fill(self, steps: Sequence[Part | Call], x: Tensor, gates: np.ndarray) -> None:
        """Find the shapes of all values, by running the calls once, and bring in the images."""
        results: dict[str, Any] = {self.image: x}
        for step in steps:
            if isinstance(step, Call):
                found = {name: results[name] if name in results else self._zeros(name) for name in step.inputs}
                result = self._called(step, found, gates)
                if isinstance(result, Tensor) and result.ndim == 4 and result.dtype == self.dtype:
                    self._note(step, Shape(*result.shape[1:]))
                else:
                    results[step.output] = result
                self.steps.append(step)
                continue
            operations: list[Operation] = []
            for op in step.operations:
                if isinstance(op, Call):  # image by image: each must be alone in its group
                    self.separate = True
                    self._append(Part(operations, step.segment))
                    operations = []
                    self._note(op, Shape(*op.function(self._zeros(op.inputs[0])).shape[1:]))
                    self.steps.append(op)
                    continue
                op = dataclasses.replace(op, inputs=[self._load() if n == self.image else n for n in op.inputs])
                if isinstance(op, Convolve) and op.residual == self.image:
                    op.residual = self._load()
                if isinstance(op, Convolve | Depthwise) and op.conv is not None:
                    pad = geometry_of(op.conv).padding[1]
                    self.pads[op.inputs[0]] = max(self.pads.get(op.inputs[0], 0), pad)
                self._note(op, self._shape(op))
                operations.append(op)
            self._append(Part(operations, step.segment))

    def _append(self, part: Part) -> None:
        if not part.operations:
            return
        if not self.steps or isinstance(self.steps[-1], Call):
            self.steps.append([])
        parts = self.steps[-1]
        assert isinstance(parts, list)
        parts.append(part)

    def _note(self, op: Operation, shape: Shape) -> None:
        self.layers[op.output] = op.layer
        self.shapes[op.output] = shape

    def _load(self) -> str:
        """The images as native code reads them."""
        name = f'{self.image}_loaded'
        if name not in self.shapes:
            op = Load([], name)
            self._note(op, self.shapes[self.image])
            self._append(Part([op], None))
        return name

    def _shape(self, op: Operation) -> Shape:
        channels, height, width = self.shapes[op.inputs[0]]
        if isinstance(op, Convolve):
            size = out_size((height, width), *op.geometry)
            return Shape(num_outputs(op.conv), *size)
        if isinstance(op, Norms | Average):
            return Shape(channels, 1, 1)
        if isinstance(op, Depthwise) and op.conv is not None:
            return Shape(channels, *out_size((height, width), *geometry_of(op.conv)))
        if isinstance(op, Pool):
            return Shape(channels + op.extra_channels, *out_size((height, width), *op.window))
        return Shape(channels, height, width)

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros(1, *self.shapes[name], dtype=self.dtype)

    def _called(self, op: Call, found: dict[str, Any], gates: np.ndarray) -> Any:
        each = torch.from_numpy(gates).split(self.program.widths.tolist(), 1)
        return op.run(self.program.trace, found, each)

    # -------------------------------------------------------------------------------------------------- table

    def _row(self, op: Operation) -> dict[str, int]:
        row = dict.fromkeys(OPERATIONS.names or (), 0)
        row.update(output=self.numbers[op.output], residual=-1)
        row['input'] = self.numbers[op.inputs[0]] if op.inputs else -1
        if isinstance(op, Convolve):
            weight = self.program.weights[op.output]
            row.update(kind=CONVOLVE, **_geometry(*op.geometry))
            row.update(activation=ACTIVATIONS.index(op.activation), bias=weight.bias.data_ptr())
            if weight.blocks is not None:
                row.update(weight=weight.blocks.data_ptr(), weight_bytes=weight.blocks.nbytes)
            if weight.rows is not None:
                row.update(rows=weight.rows.data_ptr(), rows_bytes=weight.rows.nbytes)
            if op.residual:
                row['residual'] = self.numbers[op.residual]
            if self.program.winograd:
                row['tile'] = tile_of(op, math.prod(self.shapes[op.output][1:]), self.dtype)
        elif isinstance(op, Norms | Average | Softmax):
            row['kind'] = NORMS if isinstance(op, Norms) else AVERAGE if isinstance(op, Average) else SOFTMAX
        elif isinstance(op, Respond):
            rows = self.program.response_weights[op.output]
            row.update(kind=RESPOND, residual=self.numbers[op.inputs[1]])
            row.update(weight=rows.data_ptr(), weight_bytes=rows.nbytes)
        elif isinstance(op, Depthwise):
            own = self.program.channel_weights[op.output]
            row.update(kind=DEPTHWISE)
            if own.taps is not None and own.bias is not None:
                row.update(**_geometry(*geometry_of(op.conv)), bias=own.bias.data_ptr())
                row.update(weight=own.taps.data_ptr(), weight_bytes=own.taps.nbytes)
            if own.norm is not None:
                row.update(rows=own.norm.data_ptr(), rows_bytes=own.norm.nbytes)
        elif isinstance(op, Pool):
            row.update(kind=POOL, **_geometry(*op.window))
        elif isinstance(op, Load):
            row.update(kind=LOAD, image_channels=self.shapes[self.image].channels)
        else:
            row['kind'] = SCALE if isinstance(op, Scale) else WIDEN
        return row

    def _times(self) -> dict[str, tuple[int, int]]:
        """When each value is written and last read, in parts and calls."""
        times: dict[str, tuple[int, int]] = {}
        flat = [part for step in self.steps for part in (step if isinstance(step, list) else [step])]
        for time, step in enumerate(flat):
            for op in step.operations if isinstance(step, Part) else [step]:
                for name in (*reads_of(op), op.output):
                    times[name] = (times.get(name, (time, time))[0], time)
        return times

    def _place(self) -> None:
        """Decide where values lie: in memory of torch, or at an offset that they share with values of other times."""
        by_torch = {step.output for step in self.steps if isinstance(step, Call) and not step.each}
        times = self._times()
        table = self.table = np.zeros(len(self.values), dtype=VALUES)
        size = self.dtype.itemsize
        taken: list[tuple[int, int, int, int]] = []  # first and last time, start and end
        self.outside = [i for i, name in enumerate(self.values) if name in by_torch or name in self.wanted]
        for i, name in enumerate(self.values):
            channels, height, width = self.shapes[name]
            layer = self.layers[name]
            pad = self.pads.get(name, 0)
            image_bytes = (pad + height * (width + pad)) * _round_up(channels, self.pair) * size
            table[i] = (0, image_bytes, height, width, channels, -1 if layer is None else layer, pad)
            if i in self.outside:
                continue
            begin, end = times[name]
            length = _round_up(image_bytes * self.batch + SLACK, 64)
            start = 0
            for _, _, low, high in sorted((t for t in taken if t[0] <= end and t[1] >= begin), key=lambda t: t[2]):
                if start + length <= low:
                    break
                start = max(start, high)
            taken.append((begin, end, start, start + length))
            table[i]['data'] = start
        self.inside = np.array([i not in self.outside for i in range(len(self.values))], dtype=np.int64)
        self.arena_bytes = max((high for *_, high in taken), default=0)
        packs, scratches = [0], [0]
        for row in self.operations[self.operations['kind'] == CONVOLVE]:
            weight = self.program.weights[self.values[row['output']]]
            tile, taps, inputs = int(row['tile']), weight.shape[1], weight.shape[2]
            if tile:
                # Transformed at every call, whether or not all are kept. Kernel positions are an input apart.
                packs.append(weight.block_bytes // (taps * inputs) * places(tile) * (inputs + 1))
                scratches.append(scratch_bytes(tile, inputs, BLOCK))
            elif max(table['layer'][row['output']], table['layer'][row['input']]) >= 0:
                packs.append(weight.block_bytes)
        self.pack_bytes = _round_up(max(packs) + SLACK, 4096)
        self.scratch_bytes = _round_up(max(scratches), 4096)

    # ------------------------------------------------------------------------------------------------- groups

    def _alone(self) -> 'Groups':
        """Each image by itself."""
        each = [[image] for image in range(self.batch)]
        return Groups(self, [each if part.segment else [] for part in self.parts])

    def _choose_groups(self, gates: np.ndarray) -> 'Groups':
        """Images that run together in each part: those that share so much that one gather for all of them pays."""
        if self.always_alone:
            return self.groups
        kept, _ = self._kept(gates)
        starts = self.program.layer_starts
        chosen: list[list[list[int]]] = []
        for part, in_depth in zip(self.parts, self.in_depth, strict=True):
            if part.segment is None:
                chosen.append([])
                continue
            layers = range(part.segment.layers.start, part.segment.layers.stop)
            masks = [kept[:, starts[layer] : starts[layer + 1]] for layer in layers]
            entry = self.shapes[part.operations[0].inputs[0]]
            found = partition(part.segment, masks, entry.height * entry.width)
            if in_depth:  # where nothing is gathered, images alone do better: their activations stay in the cache
                mine = kept[:, starts[layers.start] : starts[layers.stop]]
                found = [
                    own
                    for images in found
                    for own in ([[i] for i in images] if len(images) > 1 and mine[images].all() else [images])
                ]
            chosen.append(found)
        groups = self.groups
        if groups.chosen != chosen:  # seldom: images mostly run alone, or all keep the same
            groups = self.groups = Groups(self, chosen)
        return groups

    def _kept(self, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which experts are computed for each image, (B, N), and how many of each layer, (B, layers)."""
        program = self.program
        kept = gates > 0
        counts = np.add.reduceat(kept, program.layer_starts[:-1], axis=1, dtype=np.int64)
        many = counts > program.most_kept
        if many.any():
            kept |= np.repeat(many, program.widths, axis=1)
            counts = np.where(many, program.widths, counts)
        return kept, counts

    def _fill_weights(self) -> None:
        """Make the weights for all experts that native code has asked for."""
        for number, layer in list(self.unfilled.items()):
            if self.whole[layer] != ASKED_FOR:
                continue
            weight = self.program.weights[self.values[self.operations[number]['output']]]
            weight.fill()
            assert weight.blocks is not None
            self.operations['weight_bytes'][number] = weight.blocks.nbytes
            self.operations['weight'][number] = weight.blocks.data_ptr()
            self.unfilled.pop(number, None)
        self.whole[self.whole == ASKED_FOR] = PRESENT

    # ---------------------------------------------------------------------------------------------------- run

    def run(self, x: Tensor, gates: np.ndarray) -> list[Tensor]:
        """The wanted values, in order."""
        frame = self._frame(self._choose_groups(gates))
        found: dict[str, Any] = {self.image: x}
        for i in self.outside:
            if self.values[i] in self.wanted:
                found[self.values[i]] = self._allocate(self.values[i], frame.values[i])
        header = frame.header
        header.gates, header.source, header.source_strides = gates.ctypes.data, x.data_ptr(), x.stride()
        header.has_lists = 0
        first = 0
        for step in self.steps:
            if isinstance(step, Call):
                self._call(step, found, frame, gates)
                continue
            header.parts = frame.parts + first * PARTS.itemsize
            header.num_parts = len(step)
            first += len(step)
            while not _run(self.program.library, header):
                self._fill_weights()
            header.has_lists = 1
        return [self._given(name, found[name]) for name in self.wanted]

    def _frame(self, groups: 'Groups') -> '_Frame':
        """What native code reads: as in the call before if groups are alike and memory lies where it did."""
        threads = torch.get_num_threads()
        more = groups.lists_bytes + _lines_bytes(threads) + threads * self.scratch_bytes
        memory = _rooms.take(64 + self.arena_bytes + max(2, threads) * self.pack_bytes + more)
        start = _round_up(memory.data_ptr(), 64)
        frame: _Frame | None = getattr(self._frames, 'last', None)
        if frame is None or (frame.groups, frame.start, frame.header.num_threads) != (groups, start, threads):
            frame = self._frames.last = _Frame(self, groups, threads, start)
        return frame

    def _given(self, name: str, value: Tensor) -> Tensor:
        """A value for the caller, without what lies around its rows."""
        return value.contiguous(memory_format=torch.channels_last) if self.pads.get(name) else value

    def _allocate(self, name: str, row: Any) -> Tensor:
        # Zeros: rows may have some around them, and pixels behind the last channel, that torch does not write.
        memory = torch.zeros(self.batch * int(row['image_bytes']) // self.dtype.itemsize, dtype=self.dtype)
        row['data'] = memory.data_ptr()
        return self._tensor(name, memory)

    def _view(self, name: str, frame: '_Frame') -> Tensor:
        """A value in planned memory as a tensor."""
        memory, row = _rooms.memory, self.table[self.numbers[name]]
        offset = frame.start - memory.data_ptr() + int(row['data'])
        return self._tensor(name, memory[offset : offset + self.batch * int(row['image_bytes'])].view(self.dtype))

    def _tensor(self, name: str, flat: Tensor) -> Tensor:
        """A value as a tensor (B, C, H, W) that leaves out the zeros around the rows."""
        channels, height, width = self.shapes[name]
        pitch, pad = _round_up(channels, self.pair), self.pads.get(name, 0)
        strides = (len(flat) // self.batch, 1, (width + pad) * pitch, pitch)
        return flat.as_strided((self.batch, channels, height, width), strides, flat.storage_offset() + pad * pitch)

    def _call(self, op: Call, found: dict[str, Any], frame: '_Frame', gates: np.ndarray) -> None:
        """Let torch run an operation."""
        inputs = {n: found[n] if n in found else self._view(n, frame) for n in op.inputs}
        if op.each:
            self._call_each(op, next(iter(inputs.values())), self._view(op.output, frame), self._kept(gates)[1])
            return
        result = self._called(op, inputs, gates)
        number = self.numbers.get(op.output)
        if number is None:
            found[op.output] = result
            return
        # In the order that native code reads, and nobody else's memory.
        kept = self._allocate(op.output, frame.values[number])
        kept.copy_(result)
        found[op.output] = kept

    def _call_each(self, op: Call, source: Tensor, target: Tensor, counts: np.ndarray) -> None:
        """The same image by image, on kept channels only."""
        for image, count in enumerate(counts[:, op.layer].tolist()):
            given = self._compact(op.inputs[0], source, image, count)
            written = self._compact(op.output, target, image, count, clear=True)
            written[:, :count] = op.function(given[:, :count])

    def _compact(self, name: str, value: Tensor, image: int, count: int, clear: bool = False) -> Tensor:
        """The memory of one image of a value (B, C, H, W), filled with so many channels, (1, C', H, W)."""
        _, _, height, width = value.shape
        pad, pitch = self.pads.get(name, 0), _round_up(count, self.pair)
        start = value.storage_offset() - pad * value.stride(3) + image * value.stride(0)
        if clear:
            value.as_strided(((pad + height * (width + pad)) * pitch,), (1,), start).zero_()
        return value.as_strided((1, pitch, height, width), (1, 1, (width + pad) * pitch, pitch), start + pad * pitch)


class Groups:
    """Which images run together in each part, as native code reads it.

    Args:
        schedule: of the images.
        chosen: for each part the images of each group; none for a part without gates, which all images run together.

    Attributes:
        images: all groups' images.
        table: of the groups; addresses are offsets.
        parts: of the schedule.
        lists_bytes: memory for what native code lists of kept channels.
    """

    def __init__(self, schedule: Schedule, chosen: Sequence[Sequence[Sequence[int]]]) -> None:
        batch, program = schedule.batch, schedule.program
        self.chosen = chosen
        images = list(range(batch))
        rows = [(0, batch, 0, 0, 0, 0)]
        parts = []
        self.lists_bytes = 0
        first = last = 0
        for part, groups, in_depth in zip(schedule.parts, chosen, schedule.in_depth, strict=True):
            first, last = last, last + len(part.operations)
            if part.segment is None:
                parts.append((first, last, 1, 0, 0))
                continue
            parts.append((first, last, len(groups), len(rows), int(in_depth)))
            layers = part.segment.layers
            begin, end = int(program.layer_starts[layers.start]), int(program.layer_starts[layers.stop])
            needs = _round_up((layers.stop - layers.start) * KEPT_BYTES + (end - begin + 2) * (4 + MOVE_BYTES), 64)
            for group in groups:
                rows.append((len(images), len(group), layers.start, len(part.segment.widths), self.lists_bytes, needs))
                images += group
                self.lists_bytes += needs
        self.images = np.array(images, dtype=np.int64)
        self.table = np.array(rows, dtype=GROUPS)
        self.parts = np.array(parts, dtype=PARTS)


class _Frame:
    """What native code reads of a batch: tables with addresses in the memory of a thread.

    Args:
        schedule: of the images.
        groups: of the images.
        threads: that the program runs on.
        start: of the thread's memory.

    Attributes:
        values, table: of the schedule and of the groups.
        parts: where those of the groups lie.
        header: all but what belongs to one call.
    """

    def __init__(self, schedule: Schedule, groups: Groups, threads: int, start: int) -> None:
        program = schedule.program
        rooms = start + schedule.arena_bytes
        self.start = start
        self.values = schedule.table.copy()
        self.values['data'] += start * schedule.inside
        self.table = groups.table.copy()
        scratch = rooms + max(2, threads) * schedule.pack_bytes
        lines = scratch + threads * schedule.scratch_bytes
        self.table['lists'] += lines + _lines_bytes(threads)
        self.groups = groups
        self.parts = groups.parts.ctypes.data
        self.header = _Header(
            values=self.values.ctypes.data,
            operations=schedule.operations.ctypes.data,
            groups=self.table.ctypes.data,
            num_groups=len(self.table),
            images=groups.images.ctypes.data,
            batch=schedule.batch,
            layer_starts=program.layer_starts.ctypes.data,
            num_layers=len(program.widths),
            most_kept=program.most_kept.ctypes.data,
            whole=schedule.whole.ctypes.data,
            rooms=rooms,
            room_bytes=schedule.pack_bytes,
            pack_bytes=schedule.pack_bytes,
            scratch=scratch,
            scratch_bytes=schedule.scratch_bytes,
            num_threads=threads,
            is_bfloat16=schedule.pair == 2,
            lines=lines,
        )


@functools.cache
def _entries(library: Any) -> tuple[int, int, int]:
    """Where the native program starts, and OpenMP's functions for the number of a thread and of all threads."""
    openmp = build.openmp()
    functions = library.deepmoe_run, openmp.omp_get_thread_num, openmp.omp_get_num_threads
    start, number, count = map(build.address_of, functions)
    return start, number, count


def _run(library: Any, header: _Header) -> bool:
    """Run the native program on torch's threads; false if weights that it asks for were not there: nothing ran."""
    ctypes.memset(header.lines, 0, _lines_bytes(header.num_threads))  # the call before has left its own
    header.lacks = 0
    if header.num_threads == 1:
        library.deepmoe_run(ctypes.byref(header))
    else:
        start, header.thread_number, header.thread_count = _entries(library)
        build.openmp().GOMP_parallel(start, ctypes.byref(header), header.num_threads, 0)
    return not header.lacks


def _lines_bytes(threads: int) -> int:
    """What the team needs: lines of 64 bytes for its barrier, and for the tickets of each thread."""
    return 64 * (2 + 4 * threads)


def _geometry(
    kernel: tuple[int, int], pad: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> dict[str, int]:
    pairs = {'kernel': kernel, 'pad': pad, 'stride': stride, 'dilation': dilation}
    return {f'{name}_{side}': pair[i] for name, pair in pairs.items() for i, side in enumerate(('height', 'width'))}
