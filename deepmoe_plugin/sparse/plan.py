"""What to compute for which images: kept experts of each layer, and images that share compact weights."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernels import bit_words

GATHER_COST = 50
"""Gathering a weight costs about as much as this many multiply-accumulates with it."""


class Kept:
    """Experts of one gated layer that are computed for a group of images, in ascending order.

    Attributes:
        rows: their indices, int64, shape (k,).
        index: the same as a tensor on the device of the network.
        key: identifies the set.
    """

    def __init__(self, chosen: np.ndarray, device: torch.device) -> None:
        self.chosen = chosen
        self.rows = np.flatnonzero(chosen)
        self.index = torch.from_numpy(self.rows).to(device)
        self.key = chosen.tobytes()

    @functools.cached_property
    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """See `kernels.bit_words`."""
        return bit_words(self.chosen)

    def __len__(self) -> int:
        return len(self.rows)


class Group(NamedTuple):
    """Images that run together.

    Attributes:
        images: their indices in the batch, ascending.
        kept: for each gated layer of the segment, the experts computed, None for all.
        gates: for each gated layer, the gates of the experts computed, (images, k).
    """

    images: list[int]
    kept: list[Kept | None]
    gates: list[Tensor]


class Reader(NamedTuple):
    """One convolution of a segment, for the cost of a group.

    Attributes:
        weights: number of weights.
        positions: output positions for each input position of the segment.
        reads, writes: gated layer (counted inside the segment) at its input and output, None if dense.
    """

    weights: int
    positions: float
    reads: int | None
    writes: int | None


class Segment:
    """Consecutive gated layers that a group of images runs through without meeting the other images.

    Args:
        first: index of the first gated layer.
        widths: experts of each gated layer.
        readers: the convolutions of the segment.
    """

    def __init__(self, first: int, widths: Sequence[int], readers: Sequence[Reader]) -> None:
        self.first = first
        self.widths = list(widths)
        self.readers = list(readers)
        self.steps = [max(16, 2 ** round(math.log2(width / 32))) for width in widths]
        self.limits = [0.8] * len(self.widths)
        """Largest fraction of kept experts for which a layer runs on compact weights."""

    def rounded(self, layer: int, count: int) -> int:
        """Experts to compute when `count` are kept: repeated shapes let oneDNN reuse its kernels."""
        step = self.steps[layer]
        return min(self.widths[layer], max(step, -(-count // step) * step))

    def cost(self, counts: Sequence[int] | np.ndarray, images: int, positions: int) -> float:
        """Multiply-accumulates, gathering included, when `counts` experts of each layer are computed."""
        fractions = []
        for layer, width in enumerate(self.widths):
            fraction = self.rounded(layer, int(counts[layer])) / width
            fractions.append(fraction if fraction <= self.limits[layer] else 1.0)
        total = 0.0
        for reader in self.readers:
            part = 1.0 if reader.reads is None else fractions[reader.reads]
            part *= 1.0 if reader.writes is None else fractions[reader.writes]
            total += part * reader.weights * (images * positions * reader.positions + GATHER_COST * (part < 1))
        return total


class Plan:
    """The gates of a batch, brought to the host once, and the groups of images for each segment.

    Args:
        gates: for each gated layer (B, C_l), non-negative.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        self.gates = gates
        widths = [gate.shape[1] for gate in gates]
        kept = (torch.cat(list(gates), 1) > 0).cpu().numpy() if gates else np.zeros((0, 0), dtype=bool)
        ends = np.cumsum(widths)
        self.kept = np.split(kept, ends[:-1], axis=1) if gates else []

    def groups(self, segment: Segment, positions: int) -> list[Group]:
        """Partition the batch for a segment whose input has this many positions (H * W)."""
        layers = range(segment.first, segment.first + len(segment.widths))
        if not layers:
            return []
        kept = [self.kept[layer] for layer in layers]
        gates = [self.gates[layer] for layer in layers]
        partition = _partition(segment, kept, positions)
        return [_group(segment, kept, gates, images) for images in partition]


def _partition(segment: Segment, kept: list[np.ndarray], positions: int) -> list[list[int]]:
    """Put an image into the group that it shares most with, if running them together is cheaper."""
    num_images = len(kept[0])
    if num_images == 1:
        return [[0]]
    ends = np.cumsum([0, *segment.widths])[:-1]
    flat = np.concatenate(kept, axis=1)
    unions: list[np.ndarray] = []
    costs: list[float] = []
    partition: list[list[int]] = []
    for image in range(num_images):
        own = flat[image]
        alone = segment.cost(np.add.reduceat(own, ends, dtype=np.int64), 1, positions)
        if unions:
            best = int(np.argmin([np.count_nonzero(union ^ own) for union in unions]))
            union = unions[best] | own
            counts = np.add.reduceat(union, ends, dtype=np.int64)
            together = segment.cost(counts, len(partition[best]) + 1, positions)
            if together <= costs[best] + alone:
                partition[best].append(image)
                unions[best], costs[best] = union, together
                continue
        partition.append([image])
        unions.append(own)
        costs.append(alone)
    return partition


def _group(segment: Segment, kept: list[np.ndarray], gates: list[Tensor], images: list[int]) -> Group:
    chosen: list[Kept | None] = []
    scales: list[Tensor] = []
    for layer, (mask, gate) in enumerate(zip(kept, gates, strict=True)):
        if len(images) < len(gate):
            gate = gate[images]
        union = np.logical_or.reduce(mask[images], axis=0)
        kept_count = int(np.count_nonzero(union))
        count = segment.rounded(layer, kept_count)
        if count > segment.limits[layer] * segment.widths[layer]:
            chosen.append(None)
            scales.append(gate)
            continue
        if count > kept_count:
            # Rounded up with closed experts: their gate of zero leaves the result as it is.
            union = union.copy()
            union[np.flatnonzero(~union)[: count - kept_count]] = True
        own = Kept(union, gate.device)
        chosen.append(own)
        scales.append(gate.index_select(1, own.index))
    return Group(images, chosen, scales)
