"""Gather of kept channels at memory speed on the CPU, on torch's own threads; needs numba.

A convolution weight is stored as (kernel position, input, output). What is kept of it is written straight into the
blocked layout that oneDNN computes with (`packing`): whole rows of closed inputs are never read, closed outputs are
squeezed out of the rows that are. Kept channels come in ascending order, so squeezing is a stream compaction, one
instruction for a vector of channels with AVX-512. Of convolutions that read all inputs, weights are stored as (output,
kernel position, input): rows of closed outputs are never read then, and those that are come out transposed.

The work runs in the OpenMP pool that torch has started already: a second pool would fight it for the cores. Each thread
writes a range of output blocks of its own, in the order in which oneDNN divides them among the same threads: cores that
share no cache then have little to send each other.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

LANES = 16
"""Channels that are squeezed at a time; a stored weight ends with as many unused elements."""
STEP = 8
"""Channels that are copied at a time; blocks are multiples of it."""
WHOLE = 2 * LANES
"""Inputs that are transposed at a time, in 32 or 16 bits."""
ROWS = 8
"""Rows that are squeezed before they are copied, so that neighbours in the blocked layout are written together."""
SHARES = 4
"""Parts of the work of each thread: a thread that comes late leaves its parts to the others."""
AHEAD = 8
"""Rows between the one that is squeezed and the one that is fetched, or lines of those transposed."""
NUM_ARGS = 18
"""Numbers that a kernel is called with; behind them are the counters of the threads."""
COUNTER_PITCH = 8
"""Numbers between the counters of two threads: each has a cache line of its own."""
HUGE_PAGE = 2 * 2**20


class Blocks(NamedTuple):
    """Weights as oneDNN's matrix kernels read them: (O / outputs, T, inputs / pair, outputs, pair).

    Attributes:
        outputs: output channels of a block, a multiple of `STEP`; the last block is filled up with zeros.
        inputs: input channels, filled up with zeros to what oneDNN wants.
        pair: neighbouring inputs side by side: 2 for 16-bit types, else 1.
    """

    outputs: int
    inputs: int
    pair: int


def buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, on huge pages where the system has them: a gather jumps from row to row, each on a page of its own."""
    size = numel * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, 'MADV_HUGEPAGE'):
        return torch.zeros(numel, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


Gather = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Blocks], None]


@functools.cache
def gather_kernel(dtype: torch.dtype, by_output: bool = False) -> Gather | None:
    """The gather for weights of this type, compiled on first use; None where it is not available.

    The kernel takes `(stored, bias, inputs, outputs, factors, kept_weight, kept_bias, blocks)`: `stored` (T, I, O)
    contiguous, with room to read `LANES` elements beyond its end, and `bias` (O,); which channels are kept, boolean,
    shapes (I,) and (O,), one input or more; a factor for each output, kept or not (float32, shape (O,), contiguous), or
    None, always None in 16 bits. It writes the kept weights in the layout `blocks`, and the kept biases, shape (k,).

    `by_output`: `stored` is (O, T, I) contiguous, I a multiple of `WHOLE`, with a row of zeros beyond its end, and all
    inputs are kept and none filled up. Of closed outputs nothing is read then.
    """
    pair = {torch.float32: 1, torch.bfloat16: 2}.get(dtype)
    openmp = _torch_openmp()
    if pair is None or openmp is None:
        return None
    try:
        compiled = _compile(pair)[by_output]
    except ImportError:
        _logger.info('numba is not installed: sparse execution on the CPU gathers its weights more slowly.')
        return None
    entry, run = compiled.address, compiled.ctypes
    thread_number: Any = ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p).value

    def gather(
        stored: Tensor,
        bias: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        factors: Tensor | None,
        kept_weight: Tensor,
        kept_bias: Tensor,
        blocks: Blocks,
    ) -> None:
        if by_output:
            out_channels, taps, in_channels = stored.shape
        else:
            taps, in_channels, out_channels = stored.shape
        threads = torch.get_num_threads()
        # For each thread: squeezed rows, squeezed factors, and the kept channels of both sides.
        pitch = -(-(out_channels + blocks.outputs + LANES) // LANES) * LANES
        room = ROWS * pitch * stored.element_size() + 4 * pitch + 8 * (in_channels + 3 * out_channels)
        room = -(-room // 64) * 64
        rooms = torch.empty(threads * room, dtype=torch.uint8)
        args = (ctypes.c_int64 * (NUM_ARGS + threads * COUNTER_PITCH))(
            stored.data_ptr(),
            inputs.data_ptr(),
            outputs.data_ptr(),
            0 if factors is None else factors.data_ptr(),
            kept_weight.data_ptr(),
            bias.data_ptr(),
            kept_bias.data_ptr(),
            rooms.data_ptr(),
            taps,
            in_channels,
            out_channels,
            blocks.outputs,
            blocks.inputs,
            pitch,
            room,
            threads,
            thread_number,
        )
        address = ctypes.addressof(args)
        args[NUM_ARGS - 1] = address + NUM_ARGS * 8
        if threads == 1:
            run(address)
        else:
            openmp.GOMP_parallel(entry, address, threads, 0)

    return gather


@functools.cache
def _torch_openmp() -> Any:
    """The GNU OpenMP library that torch runs on, None where it uses another one."""
    try:
        with open('/proc/self/maps') as maps:
            paths = {line.split()[-1] for line in maps if 'libgomp' in line}
    except OSError:
        return None
    if len(paths) > 1:
        paths = {path for path in paths if '/torch' in path}
    if len(paths) != 1:
        return None
    library = ctypes.CDLL(paths.pop())
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _has_compaction(pair: int) -> bool:
    """Whether the processor squeezes vectors of 32 (pair 1) or 16 bits (pair 2) in a register."""
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in (('avx512f',) if pair == 1 else ('avx512vl', 'avx512vbmi2')))


def _compile(pair: int) -> Any:
    from llvmlite import ir
    from numba import carray, cfunc, extending, njit, types

    intrinsic: Any = extending.intrinsic
    element = ir.IntType(32 // pair)
    vector = ir.VectorType(element, LANES)
    part = ir.VectorType(element, STEP)
    size = 4 // pair
    bias_type = np.float32 if pair == 1 else np.uint16
    compacts = _has_compaction(pair)

    def load(builder: Any, address: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=size)

    def store(builder: Any, value: Any, address: Any) -> None:
        builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=size)

    @intrinsic
    def take_ticket(typingctx: Any, address: Any) -> Any:
        """Add one to the counter at `address`, return what it was."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw('add', counter, ir.Constant(ir.IntType(64), 1), 'monotonic')

        return types.int64(types.int64), codegen

    @intrinsic
    def call(typingctx: Any, function: Any) -> Any:
        """What the function at an address returns, an int."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [])
            result = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
            return builder.sext(result, ir.IntType(64))

        return types.int64(types.int64), codegen

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        """The address as what `carray` takes."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

        return types.voidptr(types.int64), codegen

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
        typingctx: Any, rows: Any, offset: Any, next_rows: Any, next_offset: Any, factors: Any, target: Any, pitch: Any
    ) -> Any:
        """Write `LANES` times 32 bits of each of `STEP` rows: column by column, `pitch` bytes apart.

        `rows` and `next_rows` are addresses of addresses: of the rows, and of those to be fetched; `factors` those of
        the rows, float32.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, next_rows, next_offset, factors, target, pitch = args
            address = ir.IntType(64)
            unit = ir.FloatType() if pair == 1 else ir.IntType(32)
            groups = []
            for row in range(STEP):
                entry = load(builder, builder.add(next_rows, address(8 * row)), address)
                fetch(builder, builder.add(entry, next_offset))
                entry = load(builder, builder.add(rows, address(8 * row)), address)
                units = load(builder, builder.add(entry, offset), ir.VectorType(unit, LANES))
                if pair == 1:
                    factor = load(builder, builder.add(factors, address(4 * row)), unit)
                    one = builder.insert_element(ir.Constant(units.type, ir.Undefined), factor, ir.IntType(32)(0))
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
                    units = builder.fmul(units, builder.shuffle_vector(one, one, lanes))
                groups.append([units])
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

        return types.void(*[types.int64] * 7), codegen

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

    @intrinsic
    def copy_one(typingctx: Any, source: Any, target: Any) -> Any:
        """Write one channel."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store(builder, load(builder, args[0], element), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

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

    @intrinsic
    def copy_scaled(typingctx: Any, source: Any, factors: Any, target: Any) -> Any:
        """Write `STEP` outputs times their factors, float32."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = ir.VectorType(ir.FloatType(), STEP)
            product = builder.fmul(load(builder, args[0], floats), load(builder, args[1], floats))
            store(builder, product, args[2])
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
    def list_factors(factors: int, out_channels: int, out_rows: Any, kept_out: int, scales: Any) -> None:
        """Write the factors of kept outputs to `scales`, 1 where there are none."""
        scales[:] = 1
        if factors:
            full = carray(pointer(factors), (out_channels,), np.float32)
            for k in range(kept_out):
                scales[k] = full[out_rows[k]]

    @njit
    def scale_biases(bias: int, kept_bias: int, out_channels: int, out_rows: Any, kept_out: int, scales: Any) -> None:
        """Write the biases of kept outputs, times their factors where weights are scaled."""
        biases = carray(pointer(bias), (out_channels,), bias_type)
        kept_biases = carray(pointer(kept_bias), (kept_out,), bias_type)
        for k in range(kept_out):
            kept_biases[k] = biases[out_rows[k]]
            if pair == 1:
                kept_biases[k] *= scales[k]

    @cfunc(types.void(types.voidptr))
    def squeeze_rows(data: Any) -> None:
        args = carray(data, (NUM_ARGS,), np.int64)
        stored, inputs, outputs, factors, target, bias, kept_bias, rooms = args[:8]
        taps, in_channels, out_channels, block, in_pitch, pitch, room, threads, thread_number, counters = args[8:]
        slot = call(thread_number)
        rows = rooms + slot * room
        scales = rows + ROWS * pitch * size
        in_rows = carray(pointer(scales + 4 * pitch), (in_channels,), np.int64)
        out_rows = carray(pointer(scales + 4 * pitch + 8 * in_channels), (out_channels,), np.int64)
        out_words = (out_channels + LANES - 1) // LANES
        starts = carray(pointer(scales + 4 * pitch + 8 * (in_channels + out_channels)), (out_words,), np.int64)
        words = carray(pointer(scales + 4 * pitch + 8 * (in_channels + 2 * out_channels)), (out_words,), np.uint16)
        kept_in = list_kept(carray(pointer(inputs), (in_channels,), np.uint8), in_rows)
        kept_out = list_kept(carray(pointer(outputs), (out_channels,), np.uint8), out_rows)
        factor_list = carray(pointer(scales), (pitch,), np.float32)
        list_factors(factors, out_channels, out_rows, kept_out, factor_list)
        if slot == 0:
            scale_biases(bias, kept_bias, out_channels, out_rows, kept_out, factor_list)
        count = 0
        for word in range(out_words):
            starts[word] = count
            bits = 0
            while count < kept_out and out_rows[count] < (word + 1) * LANES:
                bits |= 1 << (out_rows[count] - word * LANES)
                count += 1
            words[word] = bits
        batches = (kept_in + ROWS - 1) // ROWS
        blocks = (kept_out + block - 1) // block
        items = taps * batches
        for turn in range(threads):
            owner = (slot + turn) % threads
            first_block, last_block = blocks * owner // threads, blocks * (owner + 1) // threads
            if first_block == last_block:
                continue
            first_word = out_rows[first_block * block] // LANES
            last_word = out_rows[min(last_block * block, kept_out) - 1] // LANES + 1
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
                            for k in range(first_block * block, min(last_block * block, kept_out)):
                                copy_one(weights + out_rows[k] * size, squeezed + k * size)
                        for k in range(kept_out, last_block * block, STEP):
                            clear(squeezed + k * size)
                    if count % pair:
                        for k in range(first_block * block, last_block * block, STEP):
                            clear(rows + (count * pitch + k) * size)
                    for b in range(first_block, last_block):
                        place = target + ((b * taps + tap) * in_pitch + first) * block * size
                        for member in range(0, count, pair):
                            for k in range(0, block, STEP):
                                taken = rows + (member * pitch + b * block + k) * size
                                if pair == 1:
                                    copy_scaled(taken, scales + (b * block + k) * 4, place + k * size)
                                else:
                                    copy_pair(taken, taken + pitch * size, place + k * pair * size)
                            place += pair * block * size
                        if first + count == kept_in:
                            for k in range(0, (in_pitch - kept_in) // pair * pair * block, STEP):
                                clear(place + k * size)
                share = take_ticket(counter)

    @cfunc(types.void(types.voidptr))
    def transpose_rows(data: Any) -> None:
        args = carray(data, (NUM_ARGS,), np.int64)
        stored, _, outputs, factors, target, bias, kept_bias, rooms = args[:8]
        taps, in_channels, out_channels, block, _, pitch, room, threads, thread_number, counters = args[8:]
        slot = call(thread_number)
        rows = rooms + slot * room
        scales = rows + 8 * pitch
        out_rows = carray(pointer(scales + 4 * pitch), (out_channels,), np.int64)
        kept_out = list_kept(carray(pointer(outputs), (out_channels,), np.uint8), out_rows)
        factor_list = carray(pointer(scales), (pitch,), np.float32)
        list_factors(factors, out_channels, out_rows, kept_out, factor_list)
        if slot == 0:
            scale_biases(bias, kept_bias, out_channels, out_rows, kept_out, factor_list)
        blocks = (kept_out + block - 1) // block
        addresses = carray(pointer(rows), (blocks * block,), np.int64)
        for k in range(blocks * block):
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
                    for k in range(0, block, STEP):
                        transpose(
                            rows + (item // lines * block + k) * 8,
                            item % lines * line,
                            rows + (following // lines * block + k) * 8,
                            following % lines * line,
                            scales + (item // lines * block + k) * 4,
                            target + (item * LANES * block + k) * pair * size,
                            block * pair * size,
                        )
                share = take_ticket(counter)

    return squeeze_rows, transpose_rows
