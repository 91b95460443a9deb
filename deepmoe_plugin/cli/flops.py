"""Parameters and multiply-accumulates (MACs) of networks: dense, at fractions of kept experts, and on images.

    deepmoe flops wide_deepmoe_resnet50 resnet50 --kept 0.25 0.5
    deepmoe flops deepmoe_drn50_cityscapes --shape 1024 2048
    deepmoe flops RUN/args.yaml --checkpoint RUN/last.pth.tar --images FOLDER
    deepmoe flops deepmoe_drn50_cityscapes --checkpoint work_dirs/RUN/iter_N.pth
    deepmoe flops --paper

Prints a Markdown table. One multiply-accumulate counts 1; counted are convolutions and linear layers, without biases.
GMACs are those of the base network with its classifier or decode head; the gating network has its own column, and the
paper leaves the shortcut convolutions out. No weights are needed, unless images are counted. A segmentor is counted on
the images of its config's `test_dataloader`, or on those of --images: as they are tested, windows of an image added up.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ..macs import GATING_GROUPS, GROUPS, MacsTable, count_macs
from ..network import deepmoe_networks
from ..stats import gate_statistics
from .configs import find_config, shipped_configs
from .evaluate import plus_minus, spread
from .images import add_image_arguments, create_images, data_config
from .networks import NETWORK_HELP, add_network_arguments, create_network, is_config, read_settings
from .parsing import create_parser

BASE_GROUPS = tuple(group for group in GROUPS if group not in GATING_GROUPS)
CITYSCAPES = (1024, 2048)
TIMM_ONLY = (
    *('model_kwargs', 'num_classes', 'use_ema', 'dataset', 'split', 'class_map', 'img_size', 'crop_pct', 'batch_size'),
)


class PaperNetwork(NamedTuple):
    """A network of the paper: the row's name, the model, its arguments, and (H, W) in pixels."""

    label: str
    model: str
    kwargs: dict[str, Any]
    shape: tuple[int, int]


def table_4(label: str) -> PaperNetwork:
    """A network of Table 4, widened as its training config says."""
    path = shipped_configs('timm')[f'table4_{label.lower().replace("-", "_")}']
    config = yaml.safe_load(path.read_text())
    return PaperNetwork(label, config['model'], {'widen': config['model_kwargs']['widen']}, (32, 32))


PAPER = (
    PaperNetwork('ResNet-18', 'resnet18', {}, (224, 224)),
    PaperNetwork('wide-DeepMoE-18', 'wide_deepmoe_resnet18', {}, (224, 224)),
    PaperNetwork('ResNet-34', 'resnet34', {}, (224, 224)),
    PaperNetwork('wide-DeepMoE-34', 'wide_deepmoe_resnet34', {}, (224, 224)),
    PaperNetwork('ResNet-50', 'resnet50', {}, (224, 224)),
    PaperNetwork('narrow-DeepMoE-50', 'narrow_deepmoe_resnet50', {}, (224, 224)),
    PaperNetwork('wide-DeepMoE-50 (A)', 'wide_deepmoe_resnet50', {}, (224, 224)),
    PaperNetwork('wide-DeepMoE-50 (B)', 'wide_deepmoe_resnet50b', {}, (224, 224)),
    PaperNetwork('ResNet-101', 'resnet101', {}, (224, 224)),
    PaperNetwork('ResNet-56, CIFAR-100', 'resnet56_cifar', {}, (32, 32)),
    PaperNetwork('wide-DeepMoE-56, CIFAR-100', 'wide_deepmoe_resnet56_cifar', {}, (32, 32)),
    PaperNetwork('ResNet-110, CIFAR-100', 'resnet110_cifar', {}, (32, 32)),
    PaperNetwork('wide-DeepMoE-110, CIFAR-100', 'wide_deepmoe_resnet110_cifar', {}, (32, 32)),
    PaperNetwork('VGG-16, CIFAR-100', 'vgg16_cifar', {}, (32, 32)),
    *map(table_4, ('W1-High', 'W1-Mid', 'W4-Low', 'W13-All')),
    PaperNetwork('DRN-A-50, backbone', 'drn_a_50', {'num_classes': 0}, CITYSCAPES),
    PaperNetwork('wide-DRN-A-50 (A), backbone', 'wide_deepmoe_drn_a_50', {'num_classes': 0}, CITYSCAPES),
)


class Cost(NamedTuple):
    """One row of the table; parameters and MACs are whole numbers.

    Attributes:
        name: of the network.
        shape: (H, W) in pixels.
        params: of the network without its gating network.
        gating_params: of the gating network.
        dense: MACs with all experts kept.
        without_shortcuts: the same without shortcut convolutions.
        head: MACs of the classifier or the decode head, contained in both.
        gating: MACs of the gating network, contained in none.
        kept: fraction of experts to MACs at that fraction; empty for a dense network.
    """

    name: str
    shape: tuple[int, int]
    params: int
    gating_params: int
    dense: int
    without_shortcuts: int
    head: int
    gating: int
    kept: dict[float, int]


def cost_of(model: nn.Module, name: str, shape: tuple[int, int], fractions: Sequence[float] = ()) -> Cost:
    """Count one network, which may be on the meta device."""
    table = MacsTable(model, shape)
    gating = sum(p.numel() for network in deepmoe_networks(model) for p in network.gating.parameters())
    dense = table.dense(BASE_GROUPS)
    return Cost(
        name,
        shape,
        sum(p.numel() for p in model.parameters()) - gating,
        gating,
        dense,
        dense - table.dense(('shortcut',)),
        table.dense(('head',)),
        table.dense(GATING_GROUPS),
        {fraction: macs_at(table, fraction) for fraction in fractions} if table.widths else {},
    )


def macs_at(table: MacsTable, fraction: float) -> int:
    """MACs without the gating network when every layer keeps this fraction of its experts, rounded."""
    parts = [torch.arange(width) < round(width * fraction) for width in table.widths]
    by_group = table.report(torch.cat(parts)[None]).by_group
    return sum(int(by_group[group]) for group in BASE_GROUPS)


def format_costs(costs: Sequence[Cost], fractions: Sequence[float]) -> str:
    """The Markdown table."""
    columns = ['network', 'input', 'params (M)', 'gating params (M)', 'GMACs', 'head', 'without shortcuts']
    columns += [f'{100 * fraction:g} % kept' for fraction in fractions] + ['gating GMACs']
    lines = ['| ' + ' | '.join(columns) + ' |', '|---|---' + '|--:' * (len(columns) - 2) + '|']
    for cost in costs:
        cells = [cost.name, f'{cost.shape[0]}x{cost.shape[1]}', f'{cost.params / 1e6:.3f}']
        cells += [f'{cost.gating_params / 1e6:.3f}' if cost.gating_params else '']
        cells += [giga(cost.dense), giga(cost.head), giga(cost.without_shortcuts)]
        cells += [giga(cost.kept[fraction]) if cost.kept else '' for fraction in fractions]
        lines.append('| ' + ' | '.join([*cells, giga(cost.gating) if cost.gating else '']) + ' |')
    return '\n'.join(lines)


def giga(macs: float) -> str:
    """The MACs in units of 1e9, to four digits or more."""
    value = macs / 1e9
    if value < 0.01:
        return f'{value:.2g}'
    return f'{value:.1f}' if value >= 1000 else f'{value:#.5g}' if value >= 100 else f'{value:#.4g}'


def measure(model: nn.Module, loader: Iterable[Any], passes: Callable[[Any], Sequence[Tensor]]) -> dict[str, Any]:
    """Mean, spread and range of the GMACs of images, gating included, and of the fraction of experts they keep.

    Args:
        loader: batches of images.
        passes: what the network runs on for a batch: the images, or one window of each after the other.
    """
    columns: dict[str, list[Tensor]] = {'gmacs': []}
    gated = any(True for _ in deepmoe_networks(model))
    for batch in tqdm(loader, desc='images', unit='batch', ncols=100):
        parts = passes(batch)
        reports = [count_macs(model, part) for part in parts]
        row = {'gmacs': torch.stack([report.total for report in reports]).sum(0) / 1e9}
        if hasattr(model, 'decode_head'):
            heads = torch.stack([report.by_group['head'] for report in reports]).sum(0) / 1e9
            row['backbone_gmacs'] = row['gmacs'] - heads
        if gated:
            row['kept_experts'] = torch.stack([gate_statistics(model, part).by_image() for part in parts]).mean(0)
        for name, values in row.items():
            columns.setdefault(name, []).append(values.cpu())
    measured: dict[str, Any] = {name: spread(torch.cat(parts)) for name, parts in columns.items()}
    return {'images': sum(len(part) for part in columns['gmacs']), **measured}


def windows(segmentor: Any, batch: Any) -> list[Tensor]:
    """What a segmentor runs on when it tests a batch: the images, or one window of each after the other."""
    data = segmentor.data_preprocessor(batch, False)
    seen: list[Tensor] = []

    def look(window: Tensor, _: Any) -> Tensor:
        seen.append(window)
        return window.new_zeros(len(window), segmentor.out_channels, *window.shape[2:])

    segmentor.encode_decode = look
    try:
        segmentor.inference(data['inputs'], [sample.metainfo for sample in data['data_samples']])
    finally:
        del segmentor.encode_decode
    return seen


def format_measured(name: str, measured: dict[str, Any]) -> str:
    """One line for each quantity."""
    lines = [f'{name}, {measured["images"]} images (mean ± standard deviation, range):']
    titles = {
        'gmacs': 'GMACs per image, gating included',
        'backbone_gmacs': 'without decode heads, as GateStatisticsHook logs',
        'kept_experts': 'kept experts (0..1)',
    }
    for key, title in titles.items():
        if key in measured:
            values = measured[key]
            lines.append(f'  {title}: {plus_minus(values)}, {values["min"]:.4g} to {values["max"]:.4g}')
    return '\n'.join(lines)


def paper_costs(fractions: Sequence[float]) -> list[Cost]:
    """The networks whose parameters or MACs the paper states."""
    costs = []
    for row in PAPER:
        model = timm.create_model(row.model, device='meta', **row.kwargs)
        costs.append(cost_of(model, row.label, row.shape, fractions))
    return costs


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser('flops', __doc__)
    parser.add_argument('networks', nargs='*', help=f'{NETWORK_HELP}; or a config of mmseg, likewise')
    parser.add_argument('--paper', action='store_true', help='the networks whose costs the paper states')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='(default: of the model)')
    parser.add_argument('--kept', type=float, nargs='+', default=[0.25, 0.5], help='fractions (%(default)s)')
    add_network_arguments(parser)
    add_image_arguments(
        parser, '--images', required=False, help='folder of images; for mmseg also a data root (default: of the config)'
    )
    parser.add_argument('--json', type=Path, help='writes all numbers to this file')
    args = parser.parse_args(argv)
    if bool(args.networks) == args.paper:
        parser.error('name networks, or give --paper')
    if any(not 0 <= fraction <= 1 for fraction in args.kept):
        parser.error(f'--kept takes fractions between 0 and 1, got {args.kept}')
    args.networks = [_resolve(name) for name in args.networks]
    segmentors = [name for name in args.networks if name.endswith('.py')]
    if (args.data_dir or args.checkpoint) and len(args.networks) != 1:
        parser.error('--images and --checkpoint need a single network')
    if args.checkpoint and not args.data_dir and not segmentors:
        parser.error('--checkpoint needs --images: apart from images, costs do not depend on the weights')
    given = [name for name in TIMM_ONLY if getattr(args, name) != parser.get_default(name)]
    if given and segmentors and segmentors == args.networks:
        parser.error(f'--{given[0].replace("_", "-")} is for timm networks: change the config of mmseg instead')
    return parser, args


def _resolve(network: str) -> str:
    """The path of an mmseg config that is given by its name; anything else as it is."""
    path = find_config(network, 'mmseg') if is_config(network) else None
    return str(path) if path is not None else network


def count(network: str, args: argparse.Namespace) -> tuple[Cost, dict[str, Any] | None]:
    """The costs of one network of the command line, and what was measured on images, if any were given.

    Raises:
        FileNotFoundError, ValueError: an argument names something that is not there or does not fit.
    """
    if network.endswith('.py'):
        from .segmentors import create_scenes, create_segmentor

        measured = args.data_dir or args.checkpoint
        if args.shape is None and not measured:
            raise ValueError(f'--shape HEIGHT WIDTH is needed: {network} does not tell how large its images are.')
        scenes: Any = create_scenes(network, args.data_dir, args.workers) if measured else None
        model = create_segmentor(network, args.checkpoint, args.device if scenes else 'cpu')
        height, width = args.shape or scenes.dataset[0]['inputs'].shape[1:]
        cost = cost_of(model, Path(network).stem, (height, width), args.kept)
        return cost, measure(model, scenes, partial(windows, model)) if scenes else None
    settings = read_settings(network, args)
    images = create_images(args, settings) if args.data_dir else None
    model = create_network(settings, args, None if images else 'meta')
    height, width = args.shape or data_config(settings)['input_size'][1:]
    cost = cost_of(model, settings['model'], (height, width), args.kept)
    return cost, measure(model, images.loader, lambda batch: [batch[0].to(args.device)]) if images else None


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser, args = parse_args(argv)
    try:
        counted = [count(network, args) for network in args.networks]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    costs = paper_costs(args.kept) if args.paper else [cost for cost, _ in counted]
    print(format_costs(costs, args.kept))
    rows = [cost._asdict() for cost in costs]
    for row, (cost, measured) in zip(rows, counted, strict=False):
        if measured is not None:
            print('\n' + format_measured(cost.name, measured))
            row['measured'] = measured
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + '\n')
    return rows
