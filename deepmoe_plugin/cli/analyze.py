"""Figures of trained networks, each as a picture (.png, .svg or .pdf) and the numbers behind it (.csv).

    deepmoe analyze pareto --series dense results/dense*.json --series DeepMoE results/moe*.json
    deepmoe analyze experts RUN/args.yaml --checkpoint RUN/last.pth.tar --data-dir FOLDER --out figures

The second one writes figures/experts.png and figures/experts.csv.

`pareto` and `width` compare JSON files of `deepmoe evaluate`, one for each run; files whose names differ only in
`seedN` are averaged. The other figures look at one checkpoint and a folder of images.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import nn

from . import figures
from .beyond import beyond
from .choices import choice, pairs, where_what
from .images import add_image_arguments, class_indices, read_groups
from .networks import NETWORK_HELP, add_network_arguments
from .parsing import create_parser, output_folder
from .shuffling import Rows, group_means, shuffle_mixtures
from .subject import look

Result = tuple[Figure, Rows]
FORMATS = ('png', 'svg', 'pdf')


# Figures of runs


def read_points(args: argparse.Namespace) -> Rows:
    """The runs of all series: accuracy, MACs, width, and the setting that runs share if they differ in their seed.

    Raises:
        ValueError: a file is not what `deepmoe evaluate` writes.
    """
    points: Rows = []
    for name, *files in args.series:
        if not files:
            raise ValueError(
                f'--series {name} has no files: name it first, then give JSON files of `deepmoe evaluate`.'
            )
        for file in files:
            try:
                run = json.loads(Path(file).read_text())
                numbers = {'top1': run['top1'], 'gmacs': run['gmacs']['mean'], 'width': run['width']}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{file} is no JSON file of `deepmoe evaluate` ({error!r}).') from error
            points.append({'series': name, 'file': file, **numbers, 'setting': re.sub(r'seed\d+', 'seed', file)})
    return points


def pareto(args: argparse.Namespace) -> Result:
    """accuracy against MACs of several runs (Fig. 3)"""
    points = read_points(args)
    return figures.draw_accuracy(points), points


def width(args: argparse.Namespace) -> Result:
    """accuracy and MACs against the width of the gated layers (Fig. 5)"""
    points = read_points(args)
    for point in points:
        if point['width'] is None:
            raise ValueError(
                f'{point["file"]} does not tell how wide its network is: use the dense twins of this package '
                f'(gated=False), whose width has a name.'
            )
    return figures.draw_width(points), points


# Figures of one checkpoint


def shuffle(args: argparse.Namespace) -> Result:
    """accuracy of classes whose images get the latent mixtures of other images (Fig. 4)"""
    subject = look(args)
    classes = subject.images.classes
    groups = read_groups(args.groups, classes)
    labels = class_indices(args.classes or classes, classes)
    generator = torch.Generator().manual_seed(args.seed)
    rows = shuffle_mixtures(subject, labels, groups, args.donors, args.repeats, args.batch_size, generator)
    return figures.draw_shuffle(rows) if len(labels) == 1 else figures.draw_shuffles(group_means(rows)), rows


def experts(args: argparse.Namespace) -> Result:
    """which part of its experts each layer keeps for each class; single experts with --layers"""
    subject = look(args)
    stats = subject.stats
    classes, usage = subject.class_usage
    parts = dict(zip(stats.layers, usage.split(stats.widths, dim=1), strict=True))
    if args.layers:
        unknown = sorted(set(args.layers) - set(parts))
        if unknown:
            raise ValueError(f'There is no gated layer {unknown[0]}: --layers takes {", ".join(parts)}.')
        chosen = [parts[layer] for layer in args.layers]
        rows = [
            {'class': name, 'layer': layer, 'expert': expert, 'kept': f'{value:.6g}'}
            for layer, part in zip(args.layers, chosen, strict=True)
            for name, values in zip(classes, part.tolist(), strict=True)
            for expert, value in enumerate(values)
        ]
        widths = [part.shape[1] for part in chosen]
        return figures.draw_experts(torch.cat(chosen, 1), args.layers, widths, classes), rows
    means = torch.stack([part.mean(1) for part in parts.values()], 1)
    rows = [
        {'class': name, 'layer': layer, 'kept': f'{value:.6g}'}
        for name, values in zip(classes, means.tolist(), strict=True)
        for layer, value in zip(stats.layers, values, strict=True)
    ]
    return figures.draw_layers(means, stats.layers, classes), rows


def histogram(args: argparse.Namespace) -> Result:
    """how many experts images keep, and what they cost"""
    subject = look(args)
    kept, gmacs = subject.stats.by_image(), subject.gmacs
    rows = [
        {**subject.describe(i), 'kept_experts': f'{kept[i]:.6g}', 'gmacs': f'{gmacs[i]:.6g}'} for i in range(len(kept))
    ]
    return figures.draw_histogram(kept, gmacs, sum(subject.stats.widths)), rows


def extremes(args: argparse.Namespace) -> Result:
    """the cheapest and the most expensive images, side by side"""
    subject = look(args)
    kept, gmacs = subject.stats.by_image(), subject.gmacs
    order = gmacs.argsort(stable=True).tolist()
    count = min(args.count, len(order))
    sides = {'cheapest': order[:count], 'most expensive': order[::-1][:count]}
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (subject.images.mean, subject.images.std))
    factor, unit = figures.unit_of(gmacs)
    rows, pictures = [], []
    for side, indices in sides.items():
        line = []
        for i in indices:
            row = {'side': side, **subject.describe(i), 'kept_experts': f'{kept[i]:.6g}', 'gmacs': f'{gmacs[i]:.6g}'}
            picture = (subject.images.loader.dataset[i][0] * std + mean).clamp(0, 1).permute(1, 2, 0)
            line.append(
                (picture.numpy(), f'{row["class"]}\n{factor * gmacs[i]:.4g} {unit}\n{100 * kept[i]:.0f} % kept')
            )
            rows.append(row)
        pictures.append(line)
    return figures.draw_extremes(*pictures), rows


def embedding(args: argparse.Namespace) -> Result:
    """a map of the latent mixtures of images, coloured by class"""
    subject = look(args)
    classes = subject.images.classes
    groups = read_groups(args.groups, classes) if args.groups else classes
    labels = class_indices(args.classes or classes, classes)
    if len({groups[label] for label in labels}) > figures.MAX_KINDS:
        raise ValueError(
            f'{len(labels)} classes cannot be told apart: choose up to {figures.MAX_KINDS} with --classes, or --groups.'
        )
    chosen = torch.isin(subject.labels, torch.tensor(labels)).nonzero()[:, 0]
    mixtures = subject.mixtures[chosen].double().numpy()
    if args.method == 'pca':
        pca = PCA(2).fit(mixtures)
        points = pca.transform(mixtures)
        parts = 100 * np.nan_to_num(pca.explained_variance_ratio_)
        first, second = (
            f'principal component {i + 1} of the latent mixture ({parts[i]:.0f} % of variance)' for i in (0, 1)
        )
    else:
        perplexity = min(30, (len(mixtures) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init='random', random_state=0).fit_transform(mixtures)
        first, second = (f'latent mixture, t-SNE axis {i} (no unit)' for i in (1, 2))
    kinds = [groups[int(label)] for label in subject.labels[chosen]]
    rows = [
        {**subject.describe(int(i)), 'kind': kind, 'x': f'{x:.6g}', 'y': f'{y:.6g}'}
        for i, kind, (x, y) in zip(chosen, kinds, points, strict=True)
    ]
    return figures.draw_embedding(points, kinds, (first, second)), rows


def dead(args: argparse.Namespace) -> Result:
    """experts that no image keeps, and those that all keep, in each layer"""
    stats = look(args).stats
    always = [int(part.all(0).sum()) for part in stats.kept.split(stats.widths, dim=1)]
    rows: Rows = [
        {'layer': layer, 'experts': experts, 'dead': count, 'always_kept': kept}
        for (layer, count), experts, kept in zip(stats.dead().items(), stats.widths, always, strict=True)
    ]
    percent = [[100 * row[key] / row['experts'] for row in rows] for key in ('dead', 'always_kept')]
    return figures.draw_dead(stats.layers, *percent), rows


def similarity(args: argparse.Namespace) -> Result:
    """how alike classes are in the experts they keep more or less often than on average"""
    subject = look(args)
    classes, usage = subject.class_usage
    by_class = None
    if args.groups:
        groups = read_groups(args.groups, classes)
        order = sorted(range(len(classes)), key=lambda i: (groups[i], classes[i]))
        by_class = [groups[i] for i in order]
    else:
        order = leaves_list(linkage(usage.double().numpy(), 'ward', optimal_ordering=True)).tolist()
    classes = [classes[i] for i in order]
    directions = nn.functional.normalize(usage[order] - usage.mean(0), dim=1)
    cosine = directions @ directions.T
    rows = [
        {'class': name, **{other: f'{value:.4f}' for other, value in zip(classes, values, strict=True)}}
        for name, values in zip(classes, cosine.tolist(), strict=True)
    ]
    return figures.draw_similarity(cosine, classes, by_class), rows


# Command line

COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    command.__name__.replace('_', '-'): command
    for command in (
        *(pareto, width, shuffle, experts, histogram, extremes, embedding, dead, similarity),
        *(where_what, pairs, choice, beyond),
    )
}


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser('analyze', __doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='FIGURE')
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument(
            '--out',
            type=output_folder,
            default=Path('output/figures'),
            help=f'folder for {name}.png and {name}.csv (default: %(default)s)',
        )
        sub.add_argument('--format', choices=FORMATS, default=FORMATS[0], help='of the picture (default: %(default)s)')
        if name in ('pareto', 'width'):
            sub.add_argument(
                '--series', nargs='+', action='append', required=True, metavar=('NAME', 'JSON'), help='repeatable'
            )
            continue
        sub.add_argument('network', help=NETWORK_HELP)
        add_network_arguments(sub)
        add_image_arguments(sub)
        if name == 'experts':
            sub.add_argument('--layers', nargs='+', help='show single experts of these layers (names as in `dead`)')
        if name == 'extremes':
            sub.add_argument('--count', type=int, default=8, help='images on each side (default: %(default)s)')
        if name in ('shuffle', 'similarity', 'embedding'):
            sub.add_argument(
                '--groups', type=Path, required=name == 'shuffle', help='JSON: class to group, or as of CIFAR-100'
            )
        if name in ('shuffle', 'embedding'):
            sub.add_argument('--classes', nargs='+', help='only these (default: all; a map shows at most 50 kinds)')
        if name == 'embedding':
            sub.add_argument('--method', choices=('pca', 'tsne'), default='pca', help='(default: %(default)s)')
        if name == 'shuffle':
            sub.add_argument('--repeats', type=int, default=20, help='for each image (default: %(default)s)')
            sub.add_argument('--donors', type=int, default=5, help='classes of other groups (default: %(default)s)')
            sub.add_argument('--seed', type=int, default=0)
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        figure, rows = COMMANDS[args.command](args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    picture, table = (args.out / f'{args.command}.{ending}' for ending in (args.format, 'csv'))
    figure.savefig(picture, dpi=150, bbox_inches='tight')
    figures.plt.close(figure)
    with table.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f'{picture} and {table}')
