"""What native code reads, and the sizes that it is built with: the same records as in `native/layout.h`."""

import ctypes

import numpy as np

LANES = 16
"""Channels in a vector."""
BLOCK = 64
"""Outputs whose weights lie together, at most."""
TILES = 56
"""Tiles of `winograd` that a thread computes at a time, at most."""
MAX_INPUTS = 2**14
"""Inputs of a row of a kernel, at most: native code has as many zeros to read beyond the border of an image."""
SUMMED = 256
"""Pixels of an image, or of images together, whose sums a thread keeps in memory until it has the next weights."""
_SIZES = {'LANES': LANES, 'BLOCK': BLOCK, 'TILES': TILES, 'MAX_INPUTS': MAX_INPUTS, 'SUMMED': SUMMED}
DEFINES = tuple(f'-DDEEPMOE_{name}={size}' for name, size in _SIZES.items())
"""Flags that tell native code these sizes."""
SLACK = 64
"""Bytes behind every value, which a product may read but does not use."""

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
            *('tile', 'block', 'bias', 'weight', 'weight_bytes', 'rows', 'rows_bytes'),
        )
    ]
)
PARTS = np.dtype([(name, np.int64) for name in ('first', 'last', 'num_groups', 'first_group', 'group_major')])
GROUPS = np.dtype(
    [(name, np.int64) for name in ('first', 'count', 'first_layer', 'num_layers', 'lists', 'lists_bytes')]
)
KEPT_BYTES, MOVE_BYTES = 32, 16


class Header(ctypes.Structure):
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


def lines_bytes(threads: int) -> int:
    """What the team needs: lines of 64 bytes for its barrier, and for the tickets of each thread."""
    return 64 * (2 + 4 * threads)


def round_up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step
