"""Which convolutions run with fewer products, by Winograd's minimal filtering: see `native/winograd.h`."""

import torch

from .layout import BLOCK, LANES, TILES, round_up
from .operations import Convolve

MIN_POSITIONS = {4: 256, 2: 64}
"""Side of a tile of outputs to the output positions of an image from which it takes less time than a smaller one.
Transforming the weights of an image takes as long on any map: (side + 2)^2 numbers are made of nine, and then may come
from a farther cache. Found on an EPYC (Zen 4) with 1 MiB for each core, with 16 to 512 channels."""
MIN_INPUTS = 16
"""Input channels from which it pays to transform them for the sake of the products with them."""

TRANSFORMS = 0.1
"""Transforming inputs and outputs takes about as long as this part of all products: 0.04 to 0.2 on that processor."""
WEIGHT_COST = {0: 0, 2: 4, 4: 17}
"""Transforming a weight costs about as much as so many multiply-accumulates; by the side of a tile."""


def tile_of(op: Convolve, positions: int, dtype: torch.dtype) -> int:
    """Outputs along each side of a tile, for a convolution to maps of so many positions; 0: each product is computed.

    bfloat16 keeps too few bits for what transforms add and subtract.
    """
    outputs, inputs = op.conv.weight.shape[:2]
    suits = op.geometry.kernel == (3, 3) and op.geometry.stride == (1, 1) and dtype == torch.float32
    if not suits or min(inputs, outputs) < MIN_INPUTS:
        return 0
    return next((tile for tile, least in MIN_POSITIONS.items() if positions >= least), 0)


def share(tile: int) -> float:
    """What products in such tiles take, those of transforms included, of the time of each product by itself."""
    return places(tile) / (9 * tile**2) + TRANSFORMS if tile else 1.0


def places(tile: int) -> int:
    """Numbers that the inputs of a tile, and the kernel, are transformed to."""
    return (tile + 2) ** 2


def scratch_bytes(tile: int, inputs: int) -> int:
    """What a thread needs for transformed inputs, in whole vectors, and their products with a block of outputs."""
    return places(tile) * (TILES * (round_up(inputs, LANES) + BLOCK) * 4 + 2 * 64)
