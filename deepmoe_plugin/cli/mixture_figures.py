"""Figures of gates that sum to one: each function draws numbers that are given to it, and returns the figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .figures import COLOURS, plt


def draw_where_what(layers: Sequence[tuple[Tensor, Tensor, dict[str, float]]], classes: Sequence[str]) -> Figure:
    """A line for each layer: a map of shifts for each expert, then its mean gates by class.

    Args:
        layers: of each, the mean gates by shift (experts, shifts in y, shifts in x) and by class (classes, experts),
            and what the chosen expert tells about 'shift' and 'class', in bits.
    """
    columns = max(len(by_place) for by_place, _, _ in layers)
    ratios = [1] * columns + [0.8 + 0.12 * columns]
    size = (1.9 * sum(ratios), 2.5 * len(layers))
    figure, axes = plt.subplots(
        len(layers), columns + 1, figsize=size, squeeze=False, layout='constrained', width_ratios=ratios
    )
    for number, (line, (by_place, by_class, about)) in enumerate(zip(axes, layers, strict=True), 1):
        low, high = float(np.nanmin(by_place)), float(np.nanmax(by_place))
        reach = by_place.shape[1] // 2
        extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
        for axis in line[:-1]:
            axis.set_visible(False)
        for expert, values in enumerate(by_place):
            axis = line[expert]
            axis.set_visible(True)
            image = axis.imshow(values, cmap='cividis', vmin=low, vmax=high, extent=extent)
            axis.set(title=f'layer {number}, expert {expert}', xlabel='shift right (px)')
            axis.set(xticks=(-reach, 0, reach), yticks=(-reach, 0, reach))
        line[0].set_ylabel('shift down (px)')
        figure.colorbar(image, ax=line[: len(by_place)], label='mean gate', shrink=0.8)
        axis = line[-1]
        image = axis.imshow(by_class, cmap='cividis', aspect='auto')
        axis.set(title=f'tells {about["shift"]:.2f} bits of the shift,\n{about["class"]:.2f} of the class')
        axis.set_xticks(range(by_class.shape[1]))
        axis.set_yticks(range(len(classes)), classes)
        axis.set(xlabel='expert', ylabel='class')
        figure.colorbar(image, ax=axis, label='mean gate')
    return figure


def draw_pairs(use: Tensor, pictures: Sequence[Sequence[Sequence[Any]]]) -> Figure:
    """For each pair of experts of two layers the images with the largest product of gates, and its mean over all.

    Args:
        use: mean product, shape (experts of the first layer, experts of the second).
        pictures: of each pair, some images, each (H, W).
    """
    rows, columns = use.shape
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.9 * rows), squeeze=False, layout='constrained')
    side = round(max(len(images) for line in pictures for images in line) ** 0.5 + 0.499)
    for i in range(rows):
        for j in range(columns):
            axis = axes[i][j]
            height, width = pictures[i][j][0].shape
            canvas = np.full((side * height, side * width), np.nan)
            for k, image in enumerate(pictures[i][j]):
                top, left = k // side * height, k % side * width
                canvas[top : top + height, left : left + width] = image
            axis.imshow(canvas, cmap='gray')
            axis.set(xticks=(), yticks=(), title=f'{i} and {j}: {use[i, j]:.3f}')
    figure.supxlabel('expert of layer 2')
    figure.supylabel('expert of layer 1')
    return figure


def draw_choice(layers: Sequence[tuple[Tensor, Tensor, dict[str, float]]], classes: Sequence[str]) -> Figure:
    """A line for each layer: how often each class chooses each expert, and the entropies of the gates of the images.

    Args:
        layers: of each, shares (classes, experts), entropies in bits (images,), and the numbers of `specialisation_of`.
    """
    height = max(2.6, 0.22 * len(classes))
    figure, axes = plt.subplots(len(layers), 2, figsize=(8, height * len(layers)), squeeze=False, layout='constrained')
    for number, ((left, right), (use, entropies, numbers)) in enumerate(zip(axes, layers, strict=True), 1):
        image = left.imshow(use, cmap='cividis', aspect='auto', vmin=0, vmax=1)
        left.set_xticks(range(use.shape[1]))
        left.set_yticks(range(len(classes)), classes)
        left.set(xlabel=f'expert of layer {number}', ylabel='class')
        figure.colorbar(image, ax=left, label='part of its images')
        most = float(np.log2(use.shape[1]))
        right.hist(entropies, bins=np.linspace(0, most, 41), color=COLOURS[0])
        right.set(xlabel='entropy of the gates (bits)', ylabel='images', xlim=(0, most))
        right.set_title(
            f'H_s {numbers["gate_entropy"]:.3f}, H_u {numbers["use_entropy"]:.3f}, '
            f'I(E;Y) {numbers["prediction_information"]:.3f} bits',
            fontsize='medium',
        )
    return figure
