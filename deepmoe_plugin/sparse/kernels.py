"""Gather of kept input channels at memory speed on the CPU, on torch's own threads; needs numba, and AVX-512.

A convolution weight stored as rows of `(kernel position, input channel)` loses the channels that are not kept. The
kept channels come in ascending order, so the gather is a stream compaction: AVX-512 compacts a whole vector of
channels with one instruction, which leaves memory as the only limit. The work runs in the OpenMP pool that torch has
started already: a second pool would fight it for the cores.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

LANES = 16

Compact = Callable[[Tensor, np.ndarray, np.ndarray, np.ndarray, Tensor], None]


def bit_words(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Describe kept channels for `compact`.

    Args:
        kept: boolean, shape (I,).

    Returns:
        For every `LANES` channels: their bits (uint16, channel 0 lowest) and the number of kept channels before them
        (int64).
    """
    padded = np.zeros(-(-len(kept) // LANES) * LANES, dtype=bool)
    padded[: len(kept)] = kept
    words = np.packbits(padded, bitorder='little').view(np.uint16)
    counts = padded.reshape(-1, LANES).sum(1)
    return words, np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


@functools.cache
def compact_kernel(dtype: torch.dtype) -> Compact | None:
    """The gather for weights of this type, compiled on first use; None where it is not available.

    The kernel takes `(stored, rows, words, starts, out)`: `stored` (O, T, I) contiguous, with room to read `LANES`
    elements beyond its end, the row indices (int64, shape (k,)), what `bit_words` returns, and `out` (k, T, number of
    kept channels).
    """
    bits = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16, torch.float64: 64}.get(dtype)
    openmp = _torch_openmp()
    if bits is None or openmp is None:
        return None
    try:
        compiled = _compile(bits)
    except ImportError:
        _logger.info('numba is not installed: sparse execution on the CPU gathers its weights more slowly.')
        return None
    if compiled is None:
        return None
    address = compiled.address

    def compact(stored: Tensor, rows: np.ndarray, words: np.ndarray, starts: np.ndarray, out: Tensor) -> None:
        num_rows, taps, kept = out.shape
        threads = max(1, min(torch.get_num_threads(), num_rows))
        args = np.array(
            [
                stored.data_ptr(),
                rows.ctypes.data,
                words.ctypes.data,
                starts.ctypes.data,
                out.data_ptr(),
                num_rows,
                taps,
                stored.shape[2],
                kept,
                4 * threads,
                0,
                0,
            ],
            dtype=np.int64,
        )
        args[10] = args.ctypes.data + 88
        if threads == 1:
            compiled.ctypes(args.ctypes.data)
        else:
            openmp.GOMP_parallel(address, args.ctypes.data, threads, 0)

    return compact


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


@functools.cache
def _compile(bits: int) -> Any:
    import llvmlite.binding
    from llvmlite import ir
    from numba import carray, cfunc, extending, types

    features = llvmlite.binding.get_host_cpu_features()
    if not features.get('avx512f') or (bits == 16 and not features.get('avx512vbmi2')):
        return None
    intrinsic: Any = extending.intrinsic
    element = ir.IntType(bits)
    vector = ir.VectorType(element, LANES)

    @intrinsic
    def take_ticket(typingctx: Any, address: Any) -> Any:
        """Add one to the counter at `address`, return what it was: threads take shares until none is left."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw('add', pointer, ir.Constant(ir.IntType(64), 1), 'monotonic')

        return types.int64(types.int64), codegen

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

        return types.voidptr(types.int64), codegen

    @intrinsic
    def compress_store(typingctx: Any, source: Any, target: Any, word: Any) -> Any:
        """Write the lanes of the vector at `source` whose bits are set in `word` side by side to `target`."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target, word = args
            value = builder.load(builder.inttoptr(source, vector.as_pointer()), align=bits // 8)
            mask = builder.bitcast(word, ir.VectorType(ir.IntType(1), LANES))
            pointer = builder.inttoptr(target, element.as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [vector, element.as_pointer(), mask.type])
            name = f'llvm.masked.compressstore.v{LANES}i{bits}'
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [value, pointer, mask])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.uint16), codegen

    size = bits // 8

    @cfunc(types.void(types.voidptr))
    def compact(data: Any) -> None:
        args = carray(data, (11,), np.int64)
        num_rows, taps, channels, kept, shares = args[5], args[6], args[7], args[8], args[9]
        blocks = (channels + LANES - 1) // LANES
        rows = carray(pointer(args[1]), (num_rows,), np.int64)
        words = carray(pointer(args[2]), (blocks,), np.uint16)
        starts = carray(pointer(args[3]), (blocks,), np.int64)
        share = take_ticket(args[10])
        while share < shares:
            for row in range(num_rows * share // shares, num_rows * (share + 1) // shares):
                for tap in range(taps):
                    source = args[0] + (rows[row] * taps + tap) * channels * size
                    target = args[4] + (row * taps + tap) * kept * size
                    for block in range(blocks):
                        compress_store(source + block * LANES * size, target + starts[block] * size, words[block])
            share = take_ticket(args[10])

    return compact
