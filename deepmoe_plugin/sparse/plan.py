"""What to compute for which images: kept experts of each layer, and images that share compact weights."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ragged import RaggedBatch, RaggedKept, rounded
from .winograd import WEIGHT_COST, share

LIMIT = 0.8
"""Largest fraction of kept experts for which a layer runs on compact weights, without calibration."""
GATHER_COST, FAR_GATHER_COST, NEAR_WEIGHTS = 25, 75, 2**18
"""Gathering a weight costs about as much as this many multiply-accumulates with it; more if the convolution has more
weights than stay in the cache. Found on an EPYC (Zen 4) with 1 MiB for each core: 20 in wide ResNet-20; 75 to 100 in
batches of ResNet-50 and VGG-16, on two threads that share the memory."""

SEARCH_COST = 2 * 10**6
"""To look for a group for one image, on the host, takes as long as about this many multiply-accumulates."""

MIN_REUSE = 64
"""Multiply-accumulates per weight and image from which a batch runs ragged: with fewer, reading weights of its own for
each image takes as long on an H200 as the products with all of them (2 bytes at 5 TB/s, 2 operations at 600 T/s)."""


class Kept:
    """Experts of one gated layer that are computed for a group of images, in ascending order.

    Args:
        chosen: boolean for each expert, contiguous, shape (C_l,).
        device: of the network.
    """

    def __init__(self, chosen: np.ndarray, device: torch.device) -> None:
        self.chosen = chosen
        self.device = device
        self.count = int(np.count_nonzero(chosen))

    @functools.cached_property
    def mask(self) -> Tensor:
        """`chosen` as a tensor, on the host."""
        return torch.from_numpy(self.chosen)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Indices of the chosen experts, int64, shape (k,)."""
        return np.flatnonzero(self.chosen)

    @functools.cached_property
    def key(self) -> bytes:
        """Identifies the set."""
        return self.chosen.tobytes()

    @functools.cached_property
    def index(self) -> Tensor:
        """`rows` as a tensor on the device of the network."""
        return _sent([self.rows], self.device)[0]

    def __len__(self) -> int:
        return self.count


class Group(NamedTuple):
    """Images that run together.

    Attributes:
        images: their indices in the batch, ascending.
        where: the same as a tensor on the device of the network.
        kept: for each gated layer of the segment, the experts computed, None for all; of a ragged group, which is the
            whole batch, those of each image.
        gates: for each gated layer, the gates of all experts, (images, C_l); of a ragged group, of those computed.
    """

    images: list[int]
    where: Tensor
    kept: list[Kept | RaggedKept | None]
    gates: list[Tensor]

    @property
    def part(self) -> slice | Tensor:
        """What the batch is indexed with: neighbours need no copy."""
        first, last = self.images[0], self.images[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.images) else self.where


class Reader(NamedTuple):
    """One convolution of a segment, for the cost of a group.

    Attributes:
        weights: number of weights.
        positions: output positions for each input position of the segment.
        reads, writes: gated layer (counted inside the segment) at its input and output, None if dense.
        tile: of an output of so many positions, see `winograd`.
    """

    weights: int
    positions: float
    reads: int | None
    writes: int | None
    tile: Callable[[int], int] = lambda positions: 0


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
        self._widths = np.array(self.widths, dtype=np.int64)
        self.steps = np.array([max(16, 2 ** round(math.log2(width / 32))) for width in widths], dtype=np.int64)
        self._reads, self._writes = (
            np.array([len(self.widths) if layer is None else layer for layer in layers], dtype=np.int64)
            for layers in ([reader.reads for reader in readers], [reader.writes for reader in readers])
        )
        self._known: dict[int, np.ndarray] = {}
        self.limits = [LIMIT] * len(self.widths)
        """Largest fraction of kept experts for which a layer runs on compact weights."""
        self.ragged_limit = LIMIT
        """Largest fraction of kept experts, on average over images and layers, for which a batch runs ragged."""

    @property
    def layers(self) -> slice:
        """Its gated layers among those of the network."""
        return slice(self.first, self.first + len(self.widths))

    def rounded(self, counts: np.ndarray) -> np.ndarray:
        """Experts to compute in each layer when `counts`, (..., layers), are kept: repeated shapes reuse kernels."""
        return np.minimum(self._widths, np.maximum(self.steps, -(-counts // self.steps) * self.steps))

    def cost(self, counts: np.ndarray, images: np.ndarray | int, positions: int, gathers: bool = True) -> np.ndarray:
        """What groups take that compute `counts` experts of each layer, in multiply-accumulates, shape (...).

        Args:
            counts: shape (..., layers).
            images: number of images of each group, shape (...).
            positions: of the segment's input.
            gathers: count the gathering too.
        """
        computed = self.rounded(counts)
        fractions = np.ones((*counts.shape[:-1], len(self.widths) + 1))  # and one for what no gate thins
        np.divide(
            computed, self._widths, out=fractions[..., :-1], where=computed <= np.array(self.limits) * self._widths
        )
        part = fractions[..., self._reads] * fractions[..., self._writes]
        products, gathering, transforms = self._costs(positions)
        total = part @ products * images
        # Weights are transformed even where all are kept.
        return total + (part * (part < 1)) @ gathering + part @ transforms if gathers else total

    def _costs(self, positions: int) -> np.ndarray:
        """What each convolution costs with all experts, (3, R): products of an image, gathering, transforming."""
        if positions in self._known:
            return self._known[positions]
        rows = []
        for reader in self.readers:
            outputs = positions * reader.positions
            tile = reader.tile(round(outputs))
            gathering = GATHER_COST if reader.weights <= NEAR_WEIGHTS else FAR_GATHER_COST
            rows.append([reader.weights * cost for cost in (outputs * share(tile), gathering, WEIGHT_COST[tile])])
        found = self._known[positions] = np.array(rows, dtype=np.float64).reshape(-1, 3).T.copy()
        return found


class Plan:
    """The gates of a batch, of which the host is told once, and the groups of images for each segment.

    A batch for which the kernels of `ragged` are available runs as one group: ragged, or if images keep much the same
    experts, nearly all of them, or too few positions for weights of their own, on the experts that any image keeps.
    Else images are put into groups by what they share.

    Args:
        gates: for each gated layer (B, C_l), non-negative.
        segments: all of the network; what is kept of a single image is then worked out, and sent to a GPU, at once.
        is_ragged: see `ragged.available`.
    """

    def __init__(self, gates: Sequence[Tensor], segments: Sequence[Segment] = (), is_ragged: bool = False) -> None:
        self.gates = gates
        self.ragged = RaggedBatch(gates) if gates and is_ragged else None
        self.kept: list[np.ndarray] = []
        if gates and self.ragged is None:
            kept = (torch.cat(list(gates), 1) > 0).cpu().numpy()
            ends = itertools.accumulate(gate.shape[1] for gate in gates)
            self.kept = [
                np.ascontiguousarray(kept[:, end - gate.shape[1] : end]) for gate, end in zip(gates, ends, strict=True)
            ]
        self._ready: dict[int, Group] = {}
        if gates and len(gates[0]) == 1:
            gated = [segment for segment in segments if segment.widths]
            groups = _groups([self._draft(segment, [0]) for segment in gated])
            self._ready = {id(segment): group for segment, group in zip(gated, groups, strict=True)}

    def groups(self, segment: Segment, positions: int) -> list[Group]:
        """Partition the batch for a segment whose input has this many positions (H * W)."""
        if not segment.widths:
            return []
        if id(segment) in self._ready:
            return [self._ready[id(segment)]]
        if self.ragged is None:
            grouped = partition(segment, self.kept[segment.layers], positions)
            return _groups([self._draft(segment, images) for images in grouped])
        images = list(range(len(self.gates[0])))
        if not _pays_ragged(segment, self.ragged, positions):
            return _groups([self._draft(segment, images)])
        kept, gates = self.ragged.kept(segment.layers)
        return [Group(images, torch.arange(len(images), device=gates[0].device), [*kept], gates)]

    def _draft(self, segment: Segment, images: list[int]) -> '_Draft':
        if self.ragged is not None:
            unions = self.ragged.union[segment.layers]
        else:
            masks = self.kept[segment.layers]
            unions = [np.asarray(mask[images[0]] if len(images) == 1 else mask[images].any(0)) for mask in masks]
        gates = self.gates[segment.layers]
        kept_counts = [int(np.count_nonzero(union)) for union in unions]
        counts = segment.rounded(np.array(kept_counts)).tolist()
        choices = [
            _choice(segment, layer, *choice, gates[0].device)
            for layer, choice in enumerate(zip(unions, kept_counts, counts, strict=True))
        ]
        return _Draft(images, choices, gates)


class _Draft(NamedTuple):
    """A group on the host; `gates` are those of the whole batch and of all experts."""

    images: list[int]
    kept: list[Kept | None]
    gates: Sequence[Tensor]


def _pays_ragged(segment: Segment, batch: RaggedBatch, positions: int) -> bool:
    counts = batch.counts[segment.layers]
    if counts.sum() > segment.ragged_limit * sum(segment.widths) * counts.shape[1]:
        return False
    weights = sum(reader.weights for reader in segment.readers)
    products = sum(reader.weights * reader.positions for reader in segment.readers) * positions
    if products < MIN_REUSE * weights:
        return False
    together = [int(np.count_nonzero(union)) for union in batch.union[segment.layers]]
    return any(rounded(all_) > rounded(most) for all_, most in zip(together, counts.max(axis=1).tolist(), strict=True))


def partition(segment: Segment, kept: list[np.ndarray], positions: int) -> list[list[int]]:
    """Put images into the group where they cost least, or into one of their own if that is cheaper, or all into one.

    Images that keep the same never part: nothing is gathered twice. Others are compared one by one only where that can
    save more than it costs.
    """
    num_images = len(kept[0])
    everybody = [list(range(num_images))]
    if num_images == 1 or all(mask.all() for mask in kept):
        return everybody
    alone = segment.cost(np.stack([mask.sum(1) for mask in kept], axis=1), 1, positions)
    all_together = segment.cost(np.array([[mask.any(0).sum() for mask in kept]]), num_images, positions)[0]
    whole = alone.sum() - all_together
    flat = np.concatenate(kept, axis=1)
    alike: dict[bytes, list[int]] = {}
    for image, row in enumerate(np.packbits(flat, axis=1)):
        alike.setdefault(row.tobytes(), []).append(image)
    members = list(alike.values())
    least = SEARCH_COST if len(members) == num_images else 0
    # No two images together cost less than the dearer one of them.
    pair = _best_pair(segment, kept, alone, positions) if alone.max() > least else 0
    # Where maps are small and some image keeps nearly every expert, all together may cost less than anything between.
    if whole >= 0 and whole >= num_images * pair:
        return everybody
    if pair <= least:
        return [[image] for image in range(num_images)]
    flat = flat[[images[0] for images in members]]
    ends = np.cumsum([0, *segment.widths])[:-1]
    sizes = np.array([len(images) for images in members])
    alone = segment.cost(np.add.reduceat(flat, ends, axis=1, dtype=np.int64), sizes, positions)
    partition = [members[0]]
    unions, costs = flat[:1].copy(), alone[:1].copy()
    for number, images in enumerate(members[1:], start=1):
        joined = unions | flat[number]
        counts = np.add.reduceat(joined, ends, axis=1, dtype=np.int64)
        together = segment.cost(counts, np.array([len(group) for group in partition]) + len(images), positions)
        best = int(np.argmin(together - costs))
        if together[best] <= costs[best] + alone[number]:
            partition[best] = sorted(partition[best] + images)
            unions[best], costs[best] = joined[best], together[best]
        else:
            partition.append(images)
            unions, costs = np.append(unions, flat[number : number + 1], axis=0), np.append(costs, alone[number])
    return everybody if all_together <= costs.sum() else partition


def _best_pair(segment: Segment, kept: list[np.ndarray], alone: np.ndarray, positions: int) -> float:
    """What any two images cost less together than `alone`, at most; 0 if they do not. Most batches need little time."""
    shared = np.stack([(mask := kept_in_layer.astype(np.float32)) @ mask.T for kept_in_layer in kept])
    counts = shared.diagonal(axis1=1, axis2=2)
    unions = counts[:, :, None] + counts[:, None] - shared
    each = np.arange(len(alone))
    unions[:, each, each] = np.inf
    # The products of any two are no fewer than with the fewest experts that any two need in each layer.
    if segment.cost(unions.min((1, 2))[None], 2, positions, gathers=False)[0] > 2 * alone.max():
        return 0
    first, second = np.triu_indices(len(alone), 1)
    together = segment.cost(unions[:, first, second].T, 2, positions)
    return max(0, (alone[first] + alone[second] - together).max())


def _choice(
    segment: Segment, layer: int, union: np.ndarray, kept_count: int, count: int, device: torch.device
) -> Kept | None:
    """What a layer computes if its images keep `kept_count` experts: `count`, or all."""
    if count > segment.limits[layer] * segment.widths[layer]:
        return None
    if count > kept_count:
        # Rounded up with closed experts: their gate of zero leaves the result as it is.
        union = union.copy()
        union[np.flatnonzero(~union)[: count - kept_count]] = True
    return Kept(union, device)


def _groups(drafts: Sequence[_Draft]) -> list[Group]:
    """Bring groups to the device in one transfer."""
    if not drafts:
        return []
    batch, device = drafts[0].gates[0].shape[0], drafts[0].gates[0].device
    arrays = [np.array(draft.images) for draft in drafts]
    chosen = [kept for draft in drafts for kept in draft.kept if kept is not None and device.type != 'cpu']
    indices = _sent(arrays + [kept.rows for kept in chosen], device)
    for experts, index in zip(chosen, indices[len(drafts) :], strict=True):
        experts.index = index
    groups = []
    for draft, images in zip(drafts, indices, strict=False):
        first, count = draft.images[0], len(draft.images)
        gates = [
            gate if count == batch else gate[first : first + 1] if count == 1 else gate.index_select(0, images)
            for gate in draft.gates
        ]
        groups.append(Group(draft.images, images, [*draft.kept], gates))
    return groups


def _sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Indices on the device, by one transfer that nobody waits for."""
    if device.type == 'cpu':
        return [torch.from_numpy(array) for array in arrays]
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == 'cuda':
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([len(array) for array in arrays]))
