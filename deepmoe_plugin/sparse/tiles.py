"""Convolution on the CPU, tile by tile in the processor's cache.

A tile is a few pixels by `BLOCK` outputs. It is the sum of matrix products, one for each position of the kernel, which
oneDNN's micro-kernels compute at the peak of the processor; torch has them in `at::native::cpublas::brgemm`. Bias,
residual sum, ReLU and gate are applied while the tile is in the cache. oneDNN's own convolution is as fast once it
runs, but torch describes every operand to it anew, which takes about 0.1 ms in a network.
"""

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .native import COUNTER_PITCH, NUM_COMMON, Kernel, Queue, Workspace, features, intrinsics, openmp

BLOCK = 64
"""Outputs of a tile."""
LANES = 16
"""Outputs that are finished at a time."""
ROW = 56
"""Pixels of a tile, at most, where the kernel has one position and pixels can be counted through."""
TILE = 112
"""Pixels of a tile, at most, where it is a rectangle: whole rows or a part of one."""
CACHED = 2**18
"""Bytes: of inputs that stay in the second-level cache while tiles of all outputs are computed from them."""
NUM_ARGS = NUM_COMMON + 29
"""Numbers that the kernel is called with."""

_PRODUCTS = {
    torch.float32: '_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb',
    torch.bfloat16: '_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb',
}
_RELEASE = '_ZN2at6native7cpublas14brgemm_releaseEb'
_NEEDS = {torch.float32: {'avx2'}, torch.bfloat16: {'avx512bw', 'avx512vl', 'avx512dq', 'avx512bf16'}}
_BFLOAT16_ISAS = ('BF16', 'FP16', 'AMX', 'AVX10', 'DEFAULT', 'ALL')
"""What names the limits of ONEDNN_MAX_CPU_ISA that leave oneDNN its products in bfloat16."""

_rooms = Workspace()


class TiledWeight(NamedTuple):
    """Weights as products read them.

    Attributes:
        address: of (ceil(outputs / BLOCK), T, inputs / pair, BLOCK, pair) contiguous, T the positions of the kernel;
            behind the last output are zeros. Products read `pair` neighbouring inputs at once: 2 in bfloat16.
        memory: what lies there.
    """

    address: int
    outputs: int
    inputs: int
    memory: Tensor

    @staticmethod
    def num_bytes(outputs: int, taps: int, inputs: int, dtype: torch.dtype) -> int:
        """Memory that such weights take."""
        return -(-outputs // BLOCK) * BLOCK * taps * inputs * dtype.itemsize


def pair_of(dtype: torch.dtype) -> int:
    """Neighbouring inputs that products read at once."""
    return 4 // dtype.itemsize


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this torch has products of this type for this processor, and a pool that we can run them in."""
    if dtype not in _PRODUCTS or platform.machine() not in ('x86_64', 'AMD64') or openmp() is None:
        return False
    if not features() >= _NEEDS[dtype] or not all(hasattr(_library(), name) for name in (_PRODUCTS[dtype], _RELEASE)):
        return False
    limits = [os.environ.get(f'{name}_MAX_CPU_ISA', 'DEFAULT').upper() for name in ('ONEDNN', 'DNNL')]
    return dtype == torch.float32 or all(any(isa in limit for isa in _BFLOAT16_ISAS) for limit in limits)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(str(Path(torch.__file__).parent / 'lib/libtorch_cpu.so'))


def _address(name: str) -> int:
    return ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0


def convolve(
    queue: Queue,
    x: Tensor,
    weight: TiledWeight,
    bias: Tensor,
    kernel: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    relu: bool = False,
    gate: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Convolve, add, apply ReLU, multiply by the gate: as soon as the queue runs.

    Args:
        queue: what writes the arguments may be in it already.
        x: (B, inputs, H, W).
        weight, bias: of the type of `x`; the bias has shape (outputs,).
        kernel: (height, width).
        geometry: padding, stride, dilation, each (vertical, horizontal).
        gate: factors, (B, outputs), float32.
        add_to: (B, outputs, H', W'), may be overwritten.

    Returns:
        (B, outputs, H', W'), channels last.

    Raises:
        ValueError: `x` does not have the channels of the weight, or is smaller than the kernel.
    """
    shape, room, numbers = _schedule(x.shape, weight.outputs, weight.inputs, kernel, geometry)
    x = x.contiguous(memory_format=torch.channels_last)
    if add_to is None:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    else:
        out = add_to.contiguous(memory_format=torch.channels_last)
    run, product, release = compiled(x.dtype)
    rooms = _rooms.take(torch.get_num_threads() * room)
    queue.add(
        run,
        x.data_ptr(),
        weight.address,
        bias.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        out.data_ptr(),
        rooms,
        room,
        product,
        release,
        add_to is not None,
        relu,
        *numbers,
        holds=(x, weight, bias, gate, out, _rooms.memory),
    )
    return out


@functools.lru_cache(4096)
def _schedule(
    shape: tuple[int, ...],
    outputs: int,
    inputs: int,
    kernel: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The shape of the result, memory for a tile, and what the kernel is told of shapes."""
    (ph, pw), (sh, sw), (dh, dw) = geometry
    batch, channels, height, width = shape
    out_height, out_width = out_size(height, width, kernel, geometry)
    if channels != inputs or out_height < 1 or out_width < 1:
        raise ValueError(f'A {kernel[0]}x{kernel[1]} convolution of {inputs} channels cannot run on {tuple(shape)}.')
    out_shape = batch, outputs, out_height, out_width
    pixels = out_height * out_width
    if kernel == (1, 1) and (ph, pw, sh, sw) == (0, 0, 1, 1):
        batch, height, width, out_height, out_width = 1, 1, batch * pixels, 1, batch * pixels
        tile = 1, _even(out_width, ROW)
    elif out_width <= TILE:
        tile = _even(out_height, TILE // out_width), out_width
    else:
        tile = 1, _even(out_width, TILE)
    numbers = (batch, height, width, channels, out_height, out_width, outputs, pixels, *kernel)
    return out_shape, tile[0] * tile[1] * BLOCK * 4, (*numbers, ph, pw, sh, sw, dh, dw, *tile)


def out_size(
    height: int, width: int, kernel: tuple[int, ...], geometry: tuple[tuple[int, ...], ...]
) -> tuple[int, int]:
    """Output (H, W) of a convolution for an input of this size; see `convolve` for the rest."""
    (ph, pw), (sh, sw), (dh, dw) = geometry
    return (height + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1


def _even(length: int, most: int) -> int:
    """The length of parts that are as equal and as few as can be, none longer than `most`."""
    return -(-length // max(1, -(-length // most)))


@functools.cache
def compiled(dtype: torch.dtype) -> tuple[Kernel, int, int]:
    """The kernel, compiled on first use, and the addresses of what it calls."""
    pair = pair_of(dtype)
    release = _address(_RELEASE) if dtype == torch.bfloat16 else 0
    return Kernel(_compile(pair)), _address(_PRODUCTS[dtype]), release


def _compile(pair: int) -> Any:
    from llvmlite import ir
    from numba import carray, cfunc, extending, njit, types

    intrinsic: Any = extending.intrinsic
    shared = intrinsics()
    load, store, take_ticket, call = shared.load, shared.store, shared.take_ticket, shared.call
    number = ir.IntType(64)
    size = 4 // pair

    @intrinsic
    def multiply(
        typing_context: Any,
        product: Any,
        m: Any,
        n: Any,
        k: Any,
        a_pitch: Any,
        b_pitch: Any,
        c_pitch: Any,
        adds: Any,
        a: Any,
        b: Any,
        c: Any,
    ) -> Any:
        """C (m, n) = A (m, k) B (k, n), plus C if `adds`; booleans take as much room as numbers in a call."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [number] * 11)
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*args[1:], number(pair - 1)])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    @intrinsic
    def release_products(typing_context: Any, function: Any) -> Any:
        """Leave the processor as other code expects it (AMX tiles)."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [number])
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), [number(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    @intrinsic
    def clear(typing_context: Any, target: Any) -> Any:
        """Write `LANES` zeros, float32."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store(builder, ir.Constant(ir.VectorType(ir.FloatType(), LANES), None), args[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    def finisher(lanes: int) -> Any:
        floats, integers = ir.VectorType(ir.FloatType(), lanes), ir.VectorType(ir.IntType(32), lanes)
        halves = ir.VectorType(ir.IntType(16), lanes)
        zeros = ir.Constant(floats, None)

        def integer(value: int) -> Any:
            return ir.Constant(integers, [value] * lanes)

        def read(builder: Any, address: Any) -> Any:
            """Values of the convolution's type, as float32."""
            if pair == 1:
                return load(builder, address, floats)
            wide = builder.zext(load(builder, address, halves), integers)
            return builder.bitcast(builder.shl(wide, integer(16)), floats)

        def write(builder: Any, value: Any, address: Any) -> None:
            """To the nearest value of the convolution's type, even if there are two."""
            if pair == 2:
                bits = builder.bitcast(value, integers)
                odd = builder.and_(builder.lshr(bits, integer(16)), integer(1))
                rounded = builder.add(builder.add(bits, integer(0x7FFF)), odd)
                nan = builder.fcmp_unordered('uno', value, value)
                rounded = builder.select(nan, integer(0x7FC00000), rounded)
                value = builder.trunc(builder.lshr(rounded, integer(16)), halves)
            store(builder, value, address)

        def given(builder: Any, condition: Any, change: Any, value: Any) -> Any:
            """`change(value)` if the condition is not zero, which is the same for all pixels."""
            before = builder.block
            with builder.if_then(builder.icmp_signed('!=', condition, number(0))):
                changed, inside = change(value), builder.block
            result = builder.phi(floats)
            result.add_incoming(value, before)
            result.add_incoming(changed, inside)
            return result

        @intrinsic
        def finish(
            typing_context: Any, source: Any, bias: Any, gate: Any, target: Any, adds: Any, relu: Any, skip: Any
        ) -> Any:
            """Write outputs of a pixel; `gate` is 0 if there is none, `skip` is in elements, from where all start."""

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                source, bias, gate, target, adds, relu, skip = args

                def at(start: Any, width: int) -> Any:
                    return builder.add(start, builder.mul(skip, number(width)))

                target = at(target, size)
                value = builder.fadd(load(builder, at(source, 4), floats), read(builder, at(bias, size)))
                value = given(builder, adds, lambda value: builder.fadd(value, read(builder, target)), value)
                value = given(
                    builder,
                    relu,
                    lambda value: builder.select(builder.fcmp_ordered('<', value, zeros), zeros, value),
                    value,
                )
                value = given(
                    builder, gate, lambda value: builder.fmul(value, load(builder, at(gate, 4), floats)), value
                )
                write(builder, value, target)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 7), codegen

        return finish

    finish_block, finish_lanes, finish_one = finisher(BLOCK), finisher(LANES), finisher(1)

    @njit
    def ceil_divide(a: int, b: int) -> int:
        return -(-a // b)

    @cfunc(types.void(types.voidptr))
    def convolve_tiles(data: Any) -> None:
        args = carray(data, (NUM_ARGS,), np.int64)
        threads, thread_number, counters = args[:NUM_COMMON]
        x, weight, bias, gate, out, rooms, room_size = args[NUM_COMMON : NUM_COMMON + 7]
        product, release, adds, relu = args[NUM_COMMON + 7 : NUM_COMMON + 11]
        batch, height, width, channels, out_height, out_width, outputs, pixels = args[NUM_COMMON + 11 : NUM_COMMON + 19]
        kh, kw, ph, pw, sh, sw, dh, dw, tile_height, tile_width = args[NUM_COMMON + 19 :]
        slot = call(thread_number)
        room = rooms + slot * room_size
        taps = kh * kw
        sums = taps > 1 or ph > 0 or pw > 0
        blocks = ceil_divide(outputs, BLOCK)
        rows, columns = ceil_divide(out_height, tile_height), ceil_divide(out_width, tile_width)
        tiles = batch * rows * columns
        # Block by block, so that weights stay in the cache of the core that gathered them; or if inputs are larger, as
        # many tiles at a time as stay there with their inputs.
        group = tiles
        inputs = batch * height * width * channels
        if inputs > blocks * BLOCK * taps * channels:
            group = max(1, CACHED * tiles // (inputs * size))
        items = blocks * tiles
        for turn in range(threads):
            owner = (slot + turn) % threads
            start, stop = items * owner // threads, items * (owner + 1) // threads
            counter = counters + owner * COUNTER_PITCH * 8
            item = start + take_ticket(counter)
            while item < stop:
                first = item // (blocks * group) * group
                members = min(group, tiles - first)
                block = (item - first * blocks) // members
                tile = first + (item - first * blocks) % members
                image, top, left = tile // (rows * columns), tile // columns % rows, tile % columns
                top, left = top * tile_height, left * tile_width
                bottom, right = min(top + tile_height, out_height), min(left + tile_width, out_width)
                count = min(BLOCK, outputs - block * BLOCK)
                lanes = ceil_divide(count, LANES) * LANES
                if sums:
                    for k in range(0, (bottom - top) * tile_width * BLOCK, LANES):
                        clear(room + k * 4)
                for tap in range(taps):
                    down, across = tap // kw * dh - ph, tap % kw * dw - pw
                    first_column = max(left, ceil_divide(-across, sw))
                    last_column = min(right, (width - 1 - across) // sw + 1)
                    if first_column >= last_column:
                        continue
                    for row in range(top, bottom):
                        in_row = row * sh + down
                        if in_row < 0 or in_row >= height:
                            continue
                        pixel = (image * height + in_row) * width + first_column * sw + across
                        multiply(
                            product,
                            last_column - first_column,
                            lanes,
                            channels,
                            sw * channels,
                            BLOCK,
                            BLOCK,
                            sums,
                            x + pixel * channels * size,
                            weight + (block * taps + tap) * channels * BLOCK * size,
                            room + ((row - top) * tile_width + first_column - left) * BLOCK * 4,
                        )
                for row in range(top, bottom):
                    for column in range(left, right):
                        source = room + ((row - top) * tile_width + column - left) * BLOCK * 4
                        pixel = (image * out_height + row) * out_width + column
                        target = out + (pixel * outputs + block * BLOCK) * size
                        factors = gate
                        if gate:
                            factors += (pixel // pixels * outputs + block * BLOCK) * 4
                        biases = bias + block * BLOCK * size
                        if count == BLOCK:
                            finish_block(source, biases, factors, target, adds, relu, 0)
                            continue
                        whole = count // LANES * LANES
                        for k in range(0, whole, LANES):
                            finish_lanes(source, biases, factors, target, adds, relu, k)
                        for k in range(whole, count):
                            finish_one(source, biases, factors, target, adds, relu, k)
                item = start + take_ticket(counter)
        if release:
            release_products(release)

    return convolve_tiles
