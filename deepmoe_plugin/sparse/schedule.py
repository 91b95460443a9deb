"""A program for images of one shape: where values lie, what runs in which order, and the call of native code."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experts import num_outputs
from . import build
from .conv import out_size
from .fold import geometry_of
from .groups import Grouping, Groups
from .layout import (
    ABSENT,
    ASKED_FOR,
    BLOCK,
    CONVOLVE,
    OPERATIONS,
    PARTS,
    PRESENT,
    SLACK,
    SUMMED,
    VALUES,
    Header,
    lines_bytes,
    round_up,
)
from .memory import Workspace
from .operations import Average, Call, Convolve, Depthwise, Norms, Operation, Pool
from .parts import Part, cut, reads_of
from .table import Load, Shape, row_of
from .weights import NativeNetwork
from .winograd import places, scratch_bytes

_rooms = Workspace()


class Schedule:
    """A program for images of one shape: see `Program.run`."""

    def __init__(self, network: NativeNetwork, x: Tensor, gates: np.ndarray, wanted: Sequence[str]) -> None:
        self.network = network
        self.batch, self.dtype, self.pair = len(x), x.dtype, 4 // x.element_size()
        self.image = network.trace.image
        self.shapes = {self.image: Shape(*x.shape[1:])}
        self.layers: dict[str, int | None] = {self.image: None}
        self.pads: dict[str, int] = {}  # pixels of zeros around the rows of a value
        found = cut(
            network.trace, network.widths.tolist(), wanted, lambda op, positions: network.tile(op, positions, x.dtype)
        )
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
        rows = [
            row_of(op, network, self.numbers, self.shapes, self.dtype) for part in self.parts for op in part.operations
        ]
        self.operations = np.array([tuple(row.values()) for row in rows], dtype=OPERATIONS)
        self._place()
        entries = [self.shapes[part.operations[0].inputs[0]] if part.segment else None for part in self.parts]
        positions = [entry.height * entry.width if entry else 0 for entry in entries]
        always_alone = self.batch == 1 or self.separate or not len(network.widths)
        self.grouping = Grouping(network, self.parts, positions, self.in_depth, self.batch, always_alone)
        self._frames = threading.local()
        # Convolutions, and their gated layers, whose weights for all experts are still missing.
        layers = self.table['layer'][self.operations['output']]
        convolves = (self.operations['kind'] == CONVOLVE) & (self.operations['weight'] == 0)
        self.unfilled = {int(number): int(layers[number]) for number in np.flatnonzero(convolves)}
        self.whole = np.full(len(network.widths), PRESENT, dtype=np.int64)
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
        each = torch.from_numpy(gates).split(self.network.widths.tolist(), 1)
        return op.run(self.network.trace, found, each)

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
        outside = [i for i, name in enumerate(self.values) if name in by_torch or name in self.wanted]
        for i, name in enumerate(self.values):
            channels, height, width = self.shapes[name]
            layer = self.layers[name]
            pad = self.pads.get(name, 0)
            image_bytes = (pad + height * (width + pad)) * round_up(channels, self.pair) * size
            table[i] = (0, image_bytes, height, width, channels, -1 if layer is None else layer, pad)
            if i in outside:
                continue
            begin, end = times[name]
            length = round_up(image_bytes * self.batch + SLACK, 64)
            start = 0
            for _, _, low, high in sorted((t for t in taken if t[0] <= end and t[1] >= begin), key=lambda t: t[2]):
                if start + length <= low:
                    break
                start = max(start, high)
            taken.append((begin, end, start, start + length))
            table[i]['data'] = start
        self.given = [self.values[i] for i in outside if self.values[i] in self.wanted]
        self.numels = (table['image_bytes'] * self.batch // size).tolist()
        self.inside = np.array([i not in outside for i in range(len(self.values))], dtype=np.int64)
        self.arena_bytes = max((high for *_, high in taken), default=0)
        packs, scratches = [0], [0]
        for row in self.operations[self.operations['kind'] == CONVOLVE]:
            name = self.values[row['output']]
            weight = self.network.weights[name]
            tile, taps, inputs = int(row['tile']), weight.shape[1], weight.shape[2]
            if tile:
                # Transformed at every call, whether or not all are kept. Kernel positions are an input apart.
                packs.append(weight.block_bytes // (taps * inputs) * places(tile) * (inputs + 1))
                scratches.append(scratch_bytes(tile, inputs))
            elif max(table['layer'][row['output']], table['layer'][row['input']]) >= 0:
                packs.append(weight.block_bytes)
                positions = self.batch * math.prod(self.shapes[name][1:])
                scratches.append(min(positions, SUMMED) * BLOCK * 4)
        self.pack_bytes = round_up(max(packs) + SLACK, 4096)
        self.scratch_bytes = round_up(max(scratches), 4096)

    def _fill_weights(self) -> None:
        """Make the weights for all experts that native code has asked for."""
        for number, layer in list(self.unfilled.items()):
            if self.whole[layer] != ASKED_FOR:
                continue
            weight = self.network.weights[self.values[self.operations[number]['output']]]
            weight.fill()
            assert weight.blocks is not None
            self.operations['weight_bytes'][number] = weight.blocks.nbytes
            self.operations['weight'][number] = weight.blocks.data_ptr()
            self.unfilled.pop(number, None)
        self.whole[self.whole == ASKED_FOR] = PRESENT

    # ---------------------------------------------------------------------------------------------------- run

    def run(self, x: Tensor, gates: np.ndarray) -> list[Tensor]:
        """The wanted values, in order."""
        frame = self._frame(self.grouping.choose(gates))
        found: dict[str, Any] = {self.image: x}
        for name in self.given:
            found[name] = self._allocate(name, frame)
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
            while not build.run(header, lines_bytes(header.num_threads)):
                self._fill_weights()
            header.has_lists = 1
        return [self._given(name, found[name]) for name in self.wanted]

    def _frame(self, groups: Groups) -> 'Frame':
        """What native code reads: as in the call before if groups are alike and memory lies where it did."""
        threads = torch.get_num_threads()
        more = groups.lists_bytes + lines_bytes(threads) + threads * self.scratch_bytes
        memory = _rooms.take(64 + self.arena_bytes + max(2, threads) * self.pack_bytes + more)
        start = round_up(memory.data_ptr(), 64)
        frame: Frame | None = getattr(self._frames, 'last', None)
        if frame is None or (frame.groups, frame.start, frame.header.num_threads) != (groups, start, threads):
            frame = self._frames.last = Frame(self, groups, threads, start)
        return frame

    def _given(self, name: str, value: Tensor) -> Tensor:
        """A value for the caller, without what lies around its rows."""
        return value.contiguous(memory_format=torch.channels_last) if self.pads.get(name) else value

    def _allocate(self, name: str, frame: 'Frame') -> Tensor:
        number = self.numbers[name]
        # Zeros: rows may have some around them, and pixels behind the last channel, that torch does not write.
        memory = torch.zeros(self.numels[number], dtype=self.dtype)
        frame.addresses[number] = memory.data_ptr()
        return self._tensor(name, memory)

    def _view(self, name: str, frame: 'Frame') -> Tensor:
        """A value in planned memory as a tensor."""
        memory, row = _rooms.memory, self.table[self.numbers[name]]
        offset = frame.start - memory.data_ptr() + int(row['data'])
        return self._tensor(name, memory[offset : offset + self.batch * int(row['image_bytes'])].view(self.dtype))

    def _tensor(self, name: str, flat: Tensor) -> Tensor:
        """A value as a tensor (B, C, H, W) that leaves out the zeros around the rows."""
        channels, height, width = self.shapes[name]
        pitch, pad = round_up(channels, self.pair), self.pads.get(name, 0)
        strides = (len(flat) // self.batch, 1, (width + pad) * pitch, pitch)
        return flat.as_strided((self.batch, channels, height, width), strides, flat.storage_offset() + pad * pitch)

    def _call(self, op: Call, found: dict[str, Any], frame: 'Frame', gates: np.ndarray) -> None:
        """Let torch run an operation."""
        inputs = {n: found[n] if n in found else self._view(n, frame) for n in op.inputs}
        if op.each:
            self._call_each(op, next(iter(inputs.values())), self._view(op.output, frame), self.network.kept(gates)[1])
            return
        result = self._called(op, inputs, gates)
        number = self.numbers.get(op.output)
        if number is None:
            found[op.output] = result
            return
        # In the order that native code reads, and nobody else's memory.
        kept = self._allocate(op.output, frame)
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
        pad, pitch = self.pads.get(name, 0), round_up(count, self.pair)
        start = value.storage_offset() - pad * value.stride(3) + image * value.stride(0)
        if clear:
            value.as_strided(((pad + height * (width + pad)) * pitch,), (1,), start).zero_()
        return value.as_strided((1, pitch, height, width), (1, 1, (width + pad) * pitch, pitch), start + pad * pitch)


class Frame:
    """What native code reads of a batch: tables with addresses in the memory of a thread.

    Args:
        schedule: of the images.
        groups: of the images.
        threads: that the program runs on.
        start: of the thread's memory.

    Attributes:
        values, table: of the schedule and of the groups.
        addresses: of the values.
        parts: where those of the groups lie.
        header: all but what belongs to one call.
    """

    def __init__(self, schedule: Schedule, groups: Groups, threads: int, start: int) -> None:
        network = schedule.network
        rooms = start + schedule.arena_bytes
        self.start = start
        self.values = schedule.table.copy()
        self.addresses = self.values['data']
        self.addresses += start * schedule.inside
        self.table = groups.table.copy()
        scratch = rooms + max(2, threads) * schedule.pack_bytes
        lines = scratch + threads * schedule.scratch_bytes
        self.table['lists'] += lines + lines_bytes(threads)
        self.groups = groups
        self.parts = groups.parts.ctypes.data
        self.header = Header(
            values=self.values.ctypes.data,
            operations=schedule.operations.ctypes.data,
            groups=self.table.ctypes.data,
            num_groups=len(self.table),
            images=groups.images.ctypes.data,
            batch=schedule.batch,
            layer_starts=network.layer_starts.ctypes.data,
            num_layers=len(network.widths),
            most_kept=network.most_kept.ctypes.data,
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
