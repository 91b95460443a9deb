"""Triton kernels of ragged convolutions; `ragged` imports this module once a GPU needs it.

Every image has its own channels, packed to the front of each pixel. A convolution is one matrix product per image,
(positions) x (kernel position, kept input) x (kept output), whose left side is read from the pixels as the product
goes along (implicit GEMM). Programs and steps beyond an image's own number of channels do nothing, so that an image
costs what it keeps, whatever the others keep.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench


@triton.jit
def convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    stream_ptr,
    y_ptr,
    reads_ptr,
    writes_ptr,
    counts_in_ptr,
    counts_out_ptr,
    height,
    width,
    out_height,
    out_width,
    in_pitch,
    out_pitch,
    slot_pitch,
    by_image,
    by_output,
    by_tap,
    by_input,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PACKED: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Convolve, add the bias and the stream, apply ReLU (RELU) and gate.

    Activations are (image, row, column, channel) with `in_pitch` and `out_pitch` channels in memory. Each may be all
    channels of the convolution, or the slots of a `RaggedKept`: then the counts are given, and the experts in the slots
    of each image, `slot_pitch` apart like the gates. The weights of neighbouring outputs, kernel positions and inputs
    lie `by_output`, `by_tap` and `by_input` apart. PACKED: `pack` has gathered them already, images lie `by_image`
    apart. UPCAST multiplies in float32, for the interpreter, which takes bfloat16 for integers. Gate and stream may be
    None.
    """
    image = tl.program_id(1).to(tl.int64)
    positions = out_height * out_width
    tiles_m = (positions + BLOCK_M - 1) // BLOCK_M
    # Neighbouring programs share the weights, which are gathered, not the pixels, which are contiguous.
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    num_in = in_pitch
    num_out = out_pitch
    if counts_in_ptr is not None:
        num_in = tl.multiple_of(tl.load(counts_in_ptr + image), 16)
    if counts_out_ptr is not None:
        num_out = tl.multiple_of(tl.load(counts_out_ptr + image), 16)
    if tile_n * BLOCK_N >= num_out:
        return

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < num_out
    rows = n
    if writes_ptr is not None:
        rows = tl.load(writes_ptr + image * slot_pitch + n, mask=n_valid, other=0)
    weight_rows = rows
    if PACKED:
        weight_rows = n
        weight_ptr += image * by_image
    row_ptr = weight_ptr + weight_rows * by_output
    top = m // out_width * STRIDE_H - PAD_H
    left = m % out_width * STRIDE_W - PAD_W
    x_ptr += image * height * width * in_pitch

    sums = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    # One loop over kernel positions and channels: a loop of two or three steps inside another could not be pipelined.
    steps_k = (num_in + BLOCK_K - 1) // BLOCK_K
    for step in range(0, TAPS * steps_k):
        tap = step // steps_k
        k = step % steps_k * BLOCK_K + tl.arange(0, BLOCK_K)
        k_valid = k < num_in
        i = top + tap // KERNEL_W * DILATION_H
        j = left + tap % KERNEL_W * DILATION_W
        inside = (m < positions) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        pixels = (i * width + j) * in_pitch
        left_side = tl.load(x_ptr + pixels[:, None] + k[None, :], mask=inside[:, None] & k_valid[None, :], other=0)
        columns = k
        if reads_ptr is not None and not PACKED:
            columns = tl.load(reads_ptr + image * slot_pitch + k, mask=k_valid, other=0)
        weights = row_ptr[None, :] + (tap * by_tap + columns * by_input)[:, None]
        right_side = tl.load(weights, mask=k_valid[:, None] & n_valid[None, :], other=0)
        if UPCAST:
            left_side = left_side.to(tl.float32)
            right_side = right_side.to(tl.float32)
        sums = tl.dot(left_side, right_side, sums, input_precision=PRECISION)

    sums += tl.load(bias_ptr + rows, mask=n_valid, other=0).to(tl.float32)[None, :]
    inside = (m < positions)[:, None] & n_valid[None, :]
    target = (image * positions + m)[:, None] * out_pitch + n[None, :]
    if stream_ptr is not None:
        sums += tl.load(stream_ptr + target, mask=inside, other=0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0, 0, sums)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * slot_pitch + n, mask=n_valid, other=0)[None, :]
        sums = tl.where(gate > 0, sums * gate, 0)
    tl.store(y_ptr + target, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pack(
    weight_ptr,
    packed_ptr,
    reads_ptr,
    writes_ptr,
    counts_in_ptr,
    counts_out_ptr,
    in_channels,
    in_pitch,
    out_pitch,
    slot_pitch,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the weights (output, kernel position, input) of every image: (image, slot, kernel position, slot)."""
    slot = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    num_in = tl.multiple_of(tl.load(counts_in_ptr + image), 16)
    if slot >= tl.load(counts_out_ptr + image):
        return
    row = tl.load(writes_ptr + image * slot_pitch + slot)
    source = weight_ptr + row * TAPS * in_channels
    target = packed_ptr + (image * out_pitch + slot) * TAPS * in_pitch
    for start in range(0, num_in, BLOCK):
        k = start + tl.arange(0, BLOCK)
        columns = tl.load(reads_ptr + image * slot_pitch + k, mask=k < num_in, other=0)
        for tap in range(TAPS):
            weights = tl.load(source + tap * in_channels + columns, mask=k < num_in, other=0)
            tl.store(target + tap * in_pitch + k, weights, mask=k < num_in)


INTERPRETED = not isinstance(convolve, triton.JITFunction)


def milliseconds(launch: Callable[[], object]) -> float:
    """Median time of a launch; infinite if this device has too little memory on the chip for it."""
    try:
        return float(do_bench(launch, warmup=5, rep=20, return_mode='median'))
    except OutOfResources:
        return float('inf')
