"""Which images of a batch run together in each part of a program."""

from collections.abc import Sequence

import numpy as np

from .layout import GROUPS, KEPT_BYTES, MOVE_BYTES, PARTS, round_up
from .parts import Part
from .plan import partition
from .weights import NativeNetwork


class Grouping:
    """Chooses groups of images.

    Args:
        network: that runs.
        parts: of its program.
        positions: pixels of the input of each part.
        in_depth: for each part, whether a group runs through all operations before the next.
        batch: number of images.
        always_alone: every image must run alone.
    """

    def __init__(
        self,
        network: NativeNetwork,
        parts: Sequence[Part],
        positions: Sequence[int],
        in_depth: Sequence[bool],
        batch: int,
        always_alone: bool,
    ) -> None:
        self.network, self.parts, self.positions, self.in_depth = network, parts, positions, in_depth
        self.batch, self.always_alone = batch, always_alone
        each = [[image] for image in range(batch)]
        self.last = Groups(self, [each if part.segment else [] for part in parts])  # of the call before

    def choose(self, gates: np.ndarray) -> 'Groups':
        """Images that run together in each part: those that share so much that one gather for all of them pays."""
        if self.always_alone:
            return self.last
        kept, _ = self.network.kept(gates)
        starts = self.network.layer_starts
        chosen: list[list[list[int]]] = []
        for part, positions, in_depth in zip(self.parts, self.positions, self.in_depth, strict=True):
            if part.segment is None:
                chosen.append([])
                continue
            layers = range(part.segment.layers.start, part.segment.layers.stop)
            masks = [kept[:, starts[layer] : starts[layer + 1]] for layer in layers]
            found = partition(part.segment, masks, positions)
            if in_depth:  # where nothing is gathered, images alone do better: their activations stay in the cache
                mine = kept[:, starts[layers.start] : starts[layers.stop]]
                found = [
                    own
                    for images in found
                    for own in ([[i] for i in images] if len(images) > 1 and mine[images].all() else [images])
                ]
            chosen.append(found)
        if self.last.chosen != chosen:  # seldom: images mostly run alone, or all keep the same
            self.last = Groups(self, chosen)
        return self.last


class Groups:
    """Which images run together in each part, as native code reads it.

    Args:
        grouping: of the images.
        chosen: for each part the images of each group; none for a part without gates, which all images run together.

    Attributes:
        images: all groups' images.
        table: of the groups; addresses are offsets.
        parts: of the schedule.
        lists_bytes: memory for what native code lists of kept channels.
    """

    def __init__(self, grouping: Grouping, chosen: Sequence[Sequence[Sequence[int]]]) -> None:
        self.chosen = chosen
        starts = grouping.network.layer_starts
        images = list(range(grouping.batch))
        rows = [(0, grouping.batch, 0, 0, 0, 0)]
        rows_of_parts = []
        self.lists_bytes = 0
        first = last = 0
        for part, groups, in_depth in zip(grouping.parts, chosen, grouping.in_depth, strict=True):
            first, last = last, last + len(part.operations)
            if part.segment is None:
                rows_of_parts.append((first, last, 1, 0, 0))
                continue
            rows_of_parts.append((first, last, len(groups), len(rows), int(in_depth)))
            layers = part.segment.layers
            begin, end = int(starts[layers.start]), int(starts[layers.stop])
            needs = round_up((layers.stop - layers.start) * KEPT_BYTES + (end - begin + 2) * (4 + MOVE_BYTES), 64)
            for group in groups:
                rows.append((len(images), len(group), layers.start, len(part.segment.widths), self.lists_bytes, needs))
                images += group
                self.lists_bytes += needs
        self.images = np.array(images, dtype=np.int64)
        self.table = np.array(rows, dtype=GROUPS)
        self.parts = np.array(rows_of_parts, dtype=PARTS)
