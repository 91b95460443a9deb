"""Gather of kept channels at memory speed on the CPU.

A convolution weight is stored as (kernel position, input, output). What is kept of it is written straight into the
blocked layout that `tiles` computes with: whole rows of closed inputs are never read, closed outputs are squeezed out
of the rows that are. Kept channels come in ascending order, so squeezing is a stream compaction, one instruction for a
vector of channels with AVX-512. Of convolutions that read all inputs, weights are stored as (output, kernel position,
input): rows of closed outputs are never read then, and those that are come out transposed.

Each thread writes a range of output blocks of its own, those that `tiles` gives it to compute with: cores that share no
cache then have little to send each other.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .native import COUNTER_PITCH, NUM_COMMON, Kernel, Queue, Workspace, features, intrinsics
from .tiles import BLOCK, TiledWeight, pair_of

LANES = 16
"""Channels that are squeezed at a time; a stored weight ends with as many unused elements."""
STEP = 8
"""Channels that are copied at a time."""
WHOLE = 2 * LANES
"""Inputs that are transposed at a time, in 32 or 16 bits."""
ROWS = 8
"""Rows that are squeezed before they are copied, so that neighbours in the blocked layout are written together."""
SHARES = 4
"""Parts of the work of each thread: a thread that comes late leaves its parts to the others."""
AHEAD = 8
"""Rows between the one that is squeezed and the one that is fetched, or lines of those transposed."""
NUM_ARGS = NUM_COMMON + 15
"""Numbers that a kernel is called with."""

Gather = Callable[[Queue, Tensor, Tensor, Tensor | None, Tensor, Tensor, TiledWeight, Tensor, Tensor | None], None]

_rooms = Workspace()


@functools.cache
def gather_kernel(dtype: torch.dtype, by_output: bool = False) -> Gather:
    """The gather for weights of a type for which tiles are available, compiled on first use.

    The kernel takes `(queue, stored, bias, gate, inputs, outputs, kept_weight, kept_bias, kept_gate)`. `stored` is
    (T, I, O) contiguous, with room to read `LANES` elements beyond its end; `bias` (O,); `gate` None or (B, O)
    contiguous, float32; `inputs` (I,) and `outputs` (O,) tell which channels are kept, boolean, one input or more. When
    the queue runs, kept weights, biases (k,) and gates (B, k) are written.

    `by_output`: `stored` is (O, T, I) contiguous, I a multiple of `WHOLE`, with a row of zeros beyond its end, and all
    inputs are kept. Of closed outputs nothing is read then.
    """
    run = Kernel(_compile(pair_of(dtype))[by_output])

    def gather(
        queue: Queue,
        stored: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        inputs: Tensor,
        outputs: Tensor,
        kept_weight: TiledWeight,
        kept_bias: Tensor,
        kept_gate: Tensor | None,
    ) -> None:
        if by_output:
            out_channels, taps, in_channels = stored.shape
        else:
            taps, in_channels, out_channels = stored.shape
        # For each thread: squeezed rows, and the kept channels of both sides.
        pitch = -(-(out_channels + BLOCK + LANES) // LANES) * LANES
        room = ROWS * pitch * stored.element_size() + 8 * (in_channels + 3 * out_channels)
        room = -(-room // 64) * 64
        rooms = _rooms.take(torch.get_num_threads() * room)
        queue.add(
            run,
            stored.data_ptr(),
            inputs.data_ptr(),
            outputs.data_ptr(),
            kept_weight.address,
            bias.data_ptr(),
            kept_bias.data_ptr(),
            0 if gate is None else gate.data_ptr(),
            0 if kept_gate is None else kept_gate.data_ptr(),
            0 if gate is None else gate.shape[0],
            rooms,
            taps,
            in_channels,
            out_channels,
            pitch,
            room,
            holds=(stored, bias, gate, inputs, outputs, kept_weight, kept_bias, kept_gate, _rooms.memory),
        )

    return gather


def _has_compaction(pair: int) -> bool:
    """Whether the processor squeezes vectors of 32 (pair 1) or 16 bits (pair 2) in a register."""
    return features().issuperset(('avx512f',) if pair == 1 else ('avx512vl', 'avx512vbmi2'))


def _compile(pair: int) -> Any:
    from llvmlite import ir
    from numba import carray, cfunc, extending, njit, types

    intrinsic: Any = extending.intrinsic
    shared = intrinsics()
    load, store, take_ticket, call, pointer = shared.load, shared.store, shared.take_ticket, shared.call, shared.pointer
    element = ir.IntType(32 // pair)
    vector = ir.VectorType(element, LANES)
    part = ir.VectorType(element, STEP)
    size = 4 // pair
    bias_type = np.float32 if pair == 1 else np.uint16
    compacts = _has_compaction(pair)

    @intrinsic
    def squeeze(typingctx: Any, source: Any, target: Any, word: Any) -> Any:
        """Write the lanes at `source` whose bits are set in `word` side by side to `target`, and zeros behind them.

        In a register, then as a whole: compaction into memory is very slow on some processors (Zen 4).
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            mask = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), LANES))
            kind = ir.FunctionType(vector, [vector, vector, mask.type])
            name = f'llvm.x86.avx512.mask.compress.v{LANES}i{element.width}'
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            zeros = ir.Constant(vector, None)
            store(builder, builder.call(function, [load(builder, args[0], vector), zeros, mask]), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.uint16), codegen

    def fetch(builder: Any, address: Any) -> None:
        """Ask for a cache line, in the second-level cache: that one waits for more lines at a time."""
        place = builder.inttoptr(address, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        name = 'llvm.prefetch.p0'
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [place, number(0), number(2), number(1)])

    @intrinsic
    def prefetch(typingctx: Any, source: Any) -> Any:
        """See `fetch`."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            fetch(builder, args[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    @intrinsic
    def transpose(
        typingctx: Any, rows: Any, offset: Any, next_rows: Any, next_offset: Any, target: Any, pitch: Any
    ) -> Any:
        """Write `LANES` times 32 bits of each of `STEP` rows: column by column, `pitch` bytes apart.

        `rows` and `next_rows` are addresses of addresses: of the rows, and of those to be fetched.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, next_rows, next_offset, target, pitch = args
            address = ir.IntType(64)
            units = ir.VectorType(ir.IntType(32), LANES)
            groups = []
            for row in range(STEP):
                entry = load(builder, builder.add(next_rows, address(8 * row)), address)
                fetch(builder, builder.add(entry, next_offset))
                entry = load(builder, builder.add(rows, address(8 * row)), address)
                groups.append([load(builder, builder.add(entry, offset), units)])
            # Each group holds some rows, column by column; two groups make one of twice as many rows.
            while len(groups) > 1:
                width, columns = STEP // len(groups), LANES * len(groups) // STEP // 2
                pairs = zip(groups[::2], groups[1::2], strict=True)
                groups = [
                    [
                        merge(builder, *vectors, width, half * columns, columns)
                        for vectors in zip(*both, strict=True)
                        for half in (0, 1)
                    ]
                    for both in pairs
                ]
            for index, vector in enumerate(groups[0]):
                for half in (0, 1):
                    lanes = ir.Constant(
                        ir.VectorType(ir.IntType(32), STEP), [half * STEP + lane for lane in range(STEP)]
                    )
                    place = builder.add(target, builder.mul(pitch, address(2 * index + half)))
                    store(builder, builder.shuffle_vector(vector, vector, lanes), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    def merge(builder: Any, first: Any, second: Any, width: int, start: int, columns: int) -> Any:
        """Columns of two groups of `width` rows, as columns of one group."""
        order = [
            side * LANES + column * width + row
            for column in range(start, start + columns)
            for side in (0, 1)
            for row in range(width)
        ]
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))

    @intrinsic
    def clear(typingctx: Any, target: Any) -> Any:
        """Write `STEP` zeros."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store(builder, ir.Constant(part, None), args[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    def copier(kind: Any) -> Any:
        @intrinsic
        def copy(typingctx: Any, source: Any, target: Any) -> Any:
            """Write what is at `source`, of this kind."""

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                store(builder, load(builder, args[0], kind), args[1])
                return context.get_dummy_value()

            return types.void(types.int64, types.int64), codegen

        return copy

    copy_one, copy_step = copier(element), copier(part)

    @intrinsic
    def copy_pair(typingctx: Any, first: Any, second: Any, target: Any) -> Any:
        """Write `STEP` outputs of two rows, interleaved."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows = load(builder, args[0], part), load(builder, args[1], part)
            order = [lane + STEP * row for lane in range(STEP) for row in (0, 1)]
            indices = ir.Constant(ir.VectorType(ir.IntType(32), 2 * STEP), order)
            store(builder, builder.shuffle_vector(*rows, indices), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @njit
    def list_kept(kept: Any, rows: Any) -> int:
        """Write the indices of kept channels to `rows`, return their number."""
        count = 0
        for channel in range(len(kept)):
            rows[count] = channel
            count += kept[channel]
        return count

    @njit
    def write_factors(
        bias: int, kept_bias: int, gate: int, kept_gate: int, images: int, width: int, out_rows: Any, kept_out: int
    ) -> None:
        """Write kept biases and gates."""
        biases = carray(pointer(bias), (width,), bias_type)
        kept_biases = carray(pointer(kept_bias), (kept_out,), bias_type)
        for k in range(kept_out):
            kept_biases[k] = biases[out_rows[k]]
        if images:
            gates = carray(pointer(gate), (images, width), np.float32)
            kept_gates = carray(pointer(kept_gate), (images, kept_out), np.float32)
            for image in range(images):
                for k in range(kept_out):
                    kept_gates[image, k] = gates[image, out_rows[k]]

    @cfunc(types.void(types.voidptr))
    def squeeze_rows(data: Any) -> None:
        args = carray(data, (NUM_ARGS,), np.int64)
        threads, thread_number, counters = args[:NUM_COMMON]
        stored, inputs, outputs, target, bias, kept_bias, gate, kept_gate = args[NUM_COMMON : NUM_COMMON + 8]
        images, rooms, taps, in_channels, out_channels, pitch, room = args[NUM_COMMON + 8 :]
        slot = call(thread_number)
        rows = rooms + slot * room
        lists = rows + ROWS * pitch * size
        in_rows = carray(pointer(lists), (in_channels,), np.int64)
        out_rows = carray(pointer(lists + 8 * in_channels), (out_channels,), np.int64)
        out_words = (out_channels + LANES - 1) // LANES
        starts = carray(pointer(lists + 8 * (in_channels + out_channels)), (out_words,), np.int64)
        words = carray(pointer(lists + 8 * (in_channels + 2 * out_channels)), (out_words,), np.uint16)
        kept_in = list_kept(carray(pointer(inputs), (in_channels,), np.uint8), in_rows)
        kept_out = list_kept(carray(pointer(outputs), (out_channels,), np.uint8), out_rows)
        if slot == 0:
            write_factors(bias, kept_bias, gate, kept_gate, images, out_channels, out_rows, kept_out)
        count = 0
        for word in range(out_words):
            starts[word] = count
            bits = 0
            while count < kept_out and out_rows[count] < (word + 1) * LANES:
                bits |= 1 << (out_rows[count] - word * LANES)
                count += 1
            words[word] = bits
        batches = (kept_in + ROWS - 1) // ROWS
        blocks = (kept_out + BLOCK - 1) // BLOCK
        items = taps * batches
        for turn in range(threads):
            owner = (slot + turn) % threads
            first_block, last_block = blocks * owner // threads, blocks * (owner + 1) // threads
            if first_block == last_block:
                continue
            first_word = out_rows[first_block * BLOCK] // LANES
            last_word = out_rows[min(last_block * BLOCK, kept_out) - 1] // LANES + 1
            counter = counters + owner * COUNTER_PITCH * 8
            share = take_ticket(counter)
            while share < SHARES:
                for item in range(items * share // SHARES, items * (share + 1) // SHARES):
                    tap, first = item // batches, item % batches * ROWS
                    count = min(ROWS, kept_in - first)
                    for member in range(count):
                        weights = stored + (tap * in_channels + in_rows[first + member]) * out_channels * size
                        squeezed = rows + member * pitch * size
                        following = first + member + AHEAD
                        ahead = (tap + following // kept_in) * in_channels + in_rows[following % kept_in]
                        ahead = stored + ahead * out_channels * size
                        if compacts:
                            for word in range(first_word, last_word):
                                prefetch(ahead + word * LANES * size)
                                squeeze(weights + word * LANES * size, squeezed + starts[word] * size, words[word])
                        else:
                            for k in range(first_block * BLOCK, min(last_block * BLOCK, kept_out)):
                                copy_one(weights + out_rows[k] * size, squeezed + k * size)
                        for k in range(kept_out, last_block * BLOCK, STEP):
                            clear(squeezed + k * size)
                    for b in range(first_block, last_block):
                        place = target + ((b * taps + tap) * kept_in + first) * BLOCK * size
                        for member in range(0, count, pair):
                            for k in range(0, BLOCK, STEP):
                                taken = rows + (member * pitch + b * BLOCK + k) * size
                                if pair == 1:
                                    copy_step(taken, place + k * size)
                                else:
                                    copy_pair(taken, taken + pitch * size, place + k * pair * size)
                            place += pair * BLOCK * size
                share = take_ticket(counter)

    @cfunc(types.void(types.voidptr))
    def transpose_rows(data: Any) -> None:
        args = carray(data, (NUM_ARGS,), np.int64)
        threads, thread_number, counters = args[:NUM_COMMON]
        stored, _, outputs, target, bias, kept_bias, gate, kept_gate = args[NUM_COMMON : NUM_COMMON + 8]
        images, rooms, taps, in_channels, out_channels, pitch, room = args[NUM_COMMON + 8 :]
        slot = call(thread_number)
        rows = rooms + slot * room
        out_rows = carray(pointer(rows + 8 * pitch), (out_channels,), np.int64)
        kept_out = list_kept(carray(pointer(outputs), (out_channels,), np.uint8), out_rows)
        if slot == 0:
            write_factors(bias, kept_bias, gate, kept_gate, images, out_channels, out_rows, kept_out)
        blocks = (kept_out + BLOCK - 1) // BLOCK
        addresses = carray(pointer(rows), (blocks * BLOCK,), np.int64)
        for k in range(blocks * BLOCK):
            row = out_rows[k] if k < kept_out else out_channels
            addresses[k] = stored + row * taps * in_channels * size
        line = LANES * pair * size
        lines = taps * in_channels * size // line
        for turn in range(threads):
            owner = (slot + turn) % threads
            start, stop = blocks * owner // threads * lines, blocks * (owner + 1) // threads * lines
            counter = counters + owner * COUNTER_PITCH * 8
            share = take_ticket(counter)
            while share < SHARES:
                for item in range(
                    start + (stop - start) * share // SHARES, start + (stop - start) * (share + 1) // SHARES
                ):
                    following = min(item + AHEAD, blocks * lines - 1)
                    for k in range(0, BLOCK, STEP):
                        transpose(
                            rows + (item // lines * BLOCK + k) * 8,
                            item % lines * line,
                            rows + (following // lines * BLOCK + k) * 8,
                            following % lines * line,
                            target + (item * LANES * BLOCK + k) * pair * size,
                            BLOCK * pair * size,
                        )
                share = take_ticket(counter)

    return squeeze_rows, transpose_rows
