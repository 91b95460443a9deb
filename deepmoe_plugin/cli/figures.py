"""Figures of what gates do: each function draws numbers that are given to it, and returns the figure.

Colours are told apart by colour-blind readers, too: Petroff's ten for classes and series, cividis for amounts, a
purple-to-orange scale for what has a sign.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = [entry['color'] for entry in matplotlib.style.library['petroff10']['axes.prop_cycle']]
MARKERS = 'os^Dv'
MAX_KINDS = len(COLOURS) * len(MARKERS)
"""As many kinds of points can be told apart."""
ROW = 10
"""Layers side by side, at most."""


def unit_of(gmacs: Any) -> tuple[float, str]:
    """The factor and the name of a unit in which these MACs, given in units of 1e9, are easy to read."""
    return (1.0, 'GMACs') if np.max(np.asarray(gmacs)) >= 0.1 else (1e3, 'MMACs')


def draw_accuracy(points: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against MACs, a line through the means of each series (Fig. 3).

    Args:
        points: one for each run, with `series`, `top1`, `gmacs`, and `setting`, which several seeds share.
    """
    factor, unit = unit_of([point['gmacs'] for point in points])
    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    _draw_series(axes, [{**point, 'macs': factor * point['gmacs']} for point in points], 'macs', 'top1')
    _name_series(figure, axes)
    axes.set(xlabel=f'{unit} per image, gating network included', ylabel='top-1 accuracy (%)')
    return figure


def draw_times(rows: Sequence[dict[str, Any]], accuracy: tuple[str, str]) -> Figure:
    """Accuracy against the time of one image.

    Args:
        rows: one for each network, with `name`, `ms`, `engine` and the accuracy.
        accuracy: its name in the rows, and what it is.
    """
    figure, axes = plt.subplots(figsize=(6.5, 4), layout='constrained')
    for i, row in enumerate(rows):
        style = {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i % len(MARKERS)]}
        axes.plot(row['ms'], row[accuracy[0]], linestyle='none', label=f'{row["name"]} ({row["engine"]})', **style)
    axes.set(xlabel='time of one image (ms)', ylabel=accuracy[1], xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)
    return figure


def draw_width(points: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and MACs against the width of the gated layers (Fig. 5); `points` as above, with `width`."""
    factor, unit = unit_of([point['gmacs'] for point in points])
    points = [{**point, 'macs': factor * point['gmacs']} for point in points]
    figure, (accuracy, macs) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    _draw_series(accuracy, points, 'width', 'top1')
    _draw_series(macs, points, 'width', 'macs')
    _name_series(figure, accuracy)
    accuracy.set(xlabel='width of the gated layers (times the base)', ylabel='top-1 accuracy (%)')
    macs.set(xlabel='width of the gated layers (times the base)', ylabel=f'{unit} per image', ylim=(0, None))
    return figure


def _draw_series(axes: Any, points: Sequence[dict[str, Any]], x: str, y: str) -> None:
    names = list(dict.fromkeys(point['series'] for point in points))
    for i, name in enumerate(names):
        style = {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i % len(MARKERS)]}
        own = sorted((point for point in points if point['series'] == name), key=lambda point: str(point['setting']))
        runs = [[(point[x], point[y]) for point in group] for _, group in groupby(own, lambda p: str(p['setting']))]
        means = sorted(tuple(np.mean(run, axis=0)) for run in runs)
        axes.plot(*zip(*means, strict=True), **style, label=name)
        if any(len(run) > 1 for run in runs):
            axes.scatter(*np.concatenate(runs).T, **style, s=14, alpha=0.5)
    axes.grid(alpha=0.3)


def _name_series(figure: Figure, axes: Any) -> None:
    """One legend for all panels, above them."""
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper center', ncols=3, frameon=False)


def draw_shuffle(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of one class with the latent mixtures of others (Fig. 4).

    Args:
        rows: one for each class that gives its mixtures, with `donor`, `group`, `accuracy` and `std`.
    """
    kinds = list(dict.fromkeys(row['group'] for row in rows))
    figure, axes = plt.subplots(figsize=(max(5.5, 1.5 + 0.5 * len(rows)), 4), layout='constrained')
    for kind, colour in zip(kinds, COLOURS, strict=False):
        own = [(i, row) for i, row in enumerate(rows) if row['group'] == kind]
        heights = [row['accuracy'] for _, row in own]
        errors = [row['std'] for _, row in own]
        axes.bar([i for i, _ in own], heights, yerr=errors, capsize=3, color=colour, label=kind)
    axes.set_xticks(range(len(rows)), [row['donor'] for row in rows], rotation=60, ha='right')
    axes.set(
        xlabel='class whose latent mixtures are used',
        ylabel=f'accuracy of {rows[0]["class"]} (%)',
    )
    axes.set_ylim(bottom=0)
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def draw_shuffles(points: Sequence[tuple[str, float, float]]) -> Figure:
    """Accuracy of many classes with mixtures of their own group against mixtures of other groups.

    Args:
        points: class, accuracy in-group, accuracy out-of-group.
    """
    figure, axes = plt.subplots(figsize=(5, 5), layout='constrained')
    inside, outside = (np.array([point[i] for point in points]) for i in (1, 2))
    limit = min(100, 1.1 * max(inside.max(), outside.max(), 1))
    axes.plot([0, limit], [0, limit], color='grey', linewidth=1, label='no difference')
    axes.scatter(outside, inside, s=16, color=COLOURS[0], alpha=0.7, clip_on=False, label=f'{len(points)} classes')
    axes.scatter(
        outside.mean(), inside.mean(), s=160, color=COLOURS[1], marker='*', clip_on=False, zorder=3, label='mean'
    )
    axes.set(
        xlabel='accuracy with mixtures from other groups (%)',
        ylabel='accuracy with mixtures from the own group (%)',
        xlim=(0, limit),
        ylim=(0, limit),
        aspect='equal',
    )
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def draw_experts(usage: Tensor, layers: Sequence[str], widths: Sequence[int], classes: Sequence[str]) -> Figure:
    """How often the images of each class keep each expert, experts of a layer sorted by their use.

    Args:
        usage: shape (classes, experts), 0..1, all layers side by side.
        layers: name of each layer.
        widths: experts of each layer.
        classes: name of each class.
    """
    rows = -(-len(layers) // ROW)
    figure = plt.figure(figsize=(12, rows * _height(classes)), layout='constrained')
    figure.suptitle('Experts kept in each gated layer (percentage: average), by the class of the image')
    panels = [*zip(layers, usage.split(list(widths), dim=1), strict=True)]
    for number, place in enumerate(figure.subfigures(rows, squeeze=False)[:, 0]):
        row = panels[number * len(panels) // rows : (number + 1) * len(panels) // rows]
        experts = [part.shape[1] for _, part in row]
        axes = place.subplots(1, len(row), sharey=True, width_ratios=experts, squeeze=False)
        for axis, (layer, part) in zip(axes[0], row, strict=True):
            order = part.mean(0).argsort(descending=True)
            image = axis.imshow(
                100 * part[:, order].numpy(), aspect='auto', cmap='cividis', vmin=0, vmax=100, interpolation='none'
            )
            # Narrow layers leave no room for their names beside each other.
            axis.set_title(f'{layer}, {100 * part.mean():.0f} %', fontsize=9, rotation=40, ha='left')
            bins = max(1, round(12 * len(order) / sum(experts)))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True))
        _name_rows(axes[0, 0], classes)
        place.supxlabel('experts of the layer, by use', fontsize='medium')
        place.colorbar(image, ax=axes, label='images that keep the expert (%)')
    return figure


def draw_layers(usage: Tensor, layers: Sequence[str], classes: Sequence[str]) -> Figure:
    """Which part of its experts each layer keeps for the images of each class.

    Args:
        usage: shape (classes, layers), 0..1.
        layers: name of each layer.
        classes: name of each class.
    """
    size = (max(5, 3 + 0.35 * len(layers)), 1 + _height(classes))
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    image = axes.imshow(100 * usage.numpy(), aspect='auto', cmap='cividis', interpolation='none')
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    axes.set_xlabel('gated layer')
    _name_rows(axes, classes)
    figure.colorbar(image, ax=axes, label='experts kept (%)')
    return figure


def _height(classes: Sequence[str]) -> float:
    return max(4, 0.13 * len(classes))


def _name_rows(axes: Any, classes: Sequence[str]) -> None:
    axes.set_yticks(range(len(classes)), classes, fontsize=8 if len(classes) <= 30 else 6)
    axes.set_ylabel('class of the image')


def draw_histogram(kept: Tensor, gmacs: Tensor, num_experts: int) -> Figure:
    """How many images keep how many experts, and what they cost.

    Args:
        kept: fraction of experts that each image keeps.
        gmacs: MACs of each image in units of 1e9.
        num_experts: of all layers together.
    """
    factor, unit = unit_of(gmacs)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout='constrained')
    counts = (kept * num_experts).round().numpy()
    step = max(1, round(np.ptp(counts) / 30))  # bars of unequal numbers of counts would look like peaks
    edges = np.arange(counts.min() - 0.5, counts.max() + step, step)
    panels[0].hist(100 * counts / num_experts, bins=100 * edges / num_experts, color=COLOURS[0])
    panels[1].hist(factor * gmacs.numpy(), bins=30, color=COLOURS[0])
    for axes, values, label in zip(panels, (100 * kept, factor * gmacs), ('%', unit), strict=True):
        axes.axvline(values.mean().item(), color=COLOURS[1], label=f'mean {values.mean():.4g} {label}')
        axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), frameon=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(xlabel='experts kept (%)', ylabel='images')
    panels[1].set_xlabel(f'{unit} per image')
    return figure


def draw_extremes(cheapest: Sequence[tuple[Any, str]], dearest: Sequence[tuple[Any, str]]) -> Figure:
    """Pictures (H, W, channels) with their captions: the cheapest above, the most expensive below."""
    rows = (('cheapest', cheapest), ('most expensive', dearest))
    figure, grid = plt.subplots(
        2, len(cheapest), figsize=(1.6 * len(cheapest), 4.4), layout='constrained', squeeze=False
    )
    for line, (title, pictures) in zip(grid, rows, strict=True):
        for axes, (picture, caption) in zip(line, pictures, strict=True):
            axes.imshow(picture, cmap='gray')
            axes.set_title(caption, fontsize=8)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=11)
    return figure


def draw_embedding(points: np.ndarray, kinds: Sequence[str], axis_labels: tuple[str, str]) -> Figure:
    """A map of the latent mixtures of images, coloured by kind.

    Args:
        points: shape (images, 2).
        kinds: class or group of each image, at most `MAX_KINDS` different ones.
        axis_labels: what the axes are.
    """
    names = sorted(set(kinds))
    columns = -(-len(names) // 22)
    figure, axes = plt.subplots(figsize=(6 + 1.5 * columns, 5.5), layout='constrained')
    size = np.clip(12000 / len(points), 5, 30)
    for i, kind in enumerate(names):
        chosen = points[[name == kind for name in kinds]]
        style = {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, alpha=0.7, linewidths=0, label=kind, **style)
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=(40 / size) ** 0.5, ncols=columns)
    return figure


def draw_dead(layers: Sequence[str], dead: Sequence[float], always: Sequence[float]) -> Figure:
    """Part of each layer's experts (%) that no image keeps, and that every image keeps."""
    figure, axes = plt.subplots(figsize=(max(6, 2.5 + 0.45 * len(layers)), 4), layout='constrained')
    places = np.arange(len(layers))
    for shift, values, colour, label in (
        (-0.2, dead, COLOURS[1], 'kept by no image (dead)'),
        (0.2, always, COLOURS[0], 'kept by every image'),
    ):
        bars = axes.bar(places + shift, values, width=0.4, color=colour, label=label)
        axes.bar_label(bars, fmt='%.0f', fontsize=7)
    axes.set_xticks(places, layers, rotation=90, fontsize=8)
    axes.set(xlabel='gated layer', ylabel='experts of the layer (%)', ylim=(0, 105), xlim=(-0.6, len(layers) - 0.4))
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def draw_beyond(classes: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Images of each class (%) that are classified rightly, by whom and which of them; NaN where there are none.

    Args:
        shares: for each kind of bar, a number for each class.
    """
    figure, axes = plt.subplots(figsize=(max(6, 2.5 + 0.6 * len(classes)), 4), layout='constrained')
    places = np.arange(len(classes))
    width = 0.8 / len(shares)
    for i, (label, values) in enumerate(shares.items()):
        axes.bar(places + (i - (len(shares) - 1) / 2) * width, values, width=width, color=COLOURS[i], label=label)
    axes.set_xticks(places, classes, rotation=60, ha='right', fontsize=8)
    axes.set(ylabel='classified rightly (%)', ylim=(0, 105))
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    return figure


def draw_similarity(similarity: Tensor, classes: Sequence[str], groups: Sequence[str] | None) -> Figure:
    """Similarity of classes, -1..1; lines between groups, whose classes must stand together."""
    size = 2 + _height(classes)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout='constrained')
    image = axes.imshow(similarity.numpy(), cmap='PuOr_r', vmin=-1, vmax=1, interpolation='none')
    fontsize = 8 if len(classes) <= 30 else 6
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=fontsize)
    axes.set_yticks(range(len(classes)), classes, fontsize=fontsize)
    for i in range(1, len(classes) if groups else 0):
        if groups and groups[i] != groups[i - 1]:
            axes.axhline(i - 0.5, color='black', linewidth=0.5)
            axes.axvline(i - 0.5, color='black', linewidth=0.5)
    figure.colorbar(
        image, ax=axes, label='cosine of the experts kept more or less often than on average', shrink=0.8, pad=0.02
    )
    return figure
