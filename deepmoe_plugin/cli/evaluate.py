"""Accuracy, kept experts and multiply-accumulates (MACs) of a checkpoint, for each image, class and layer.

    deepmoe evaluate RUN/args.yaml --checkpoint RUN/last.pth.tar --data-dir FOLDER
    deepmoe evaluate wide_deepmoe_resnet50 --checkpoint model.safetensors --data-dir FOLDER --json result.json

Images are loaded, transformed and judged as timm's validate.py does it. MACs include the gating network and the
shortcut convolutions, unless it says otherwise. The spread is the standard deviation over images.
"""

import argparse
import csv
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import deepmoe_plugin

from ..experts import expert_widths
from ..handover import Handover, measure_handover
from ..macs import MacsReport, macs_table
from ..mixture import MixtureRecord, mixture_record, specialisation_of
from ..network import deepmoe_networks
from ..stats import dynamic_share, kept_experts
from .images import Images, add_image_arguments, create_images
from .networks import NETWORK_HELP, add_network_arguments, create_network, read_settings
from .parsing import create_parser

SHOWN_CLASSES = 20


class Evaluation(NamedTuple):
    """What a network did with each image.

    Attributes:
        labels: class of each image, shape (images,).
        predicted: class with the largest logit, shape (images,).
        in_top5: whether the class is among those of the five largest logits, shape (images,).
        macs: MACs of each image, by module and by group.
        kept: fraction of experts that each image keeps in each gated layer, shape (images, layers).
        widths: experts of each gated layer, by the module name of its convolution; empty for a dense network.
        dead: number of experts of each gated layer that no image keeps.
        dynamic: fraction of experts that some images keep and others do not (see `stats.dynamic_experts`).
        mixtures: what the gates of each layer whose gates sum to one tell, in bits (see `specialisation_of`); of a
            DeepMoE network, the latent mixture.
        handover: what a DeepMoE network knows beyond its embedding; None for others.
    """

    labels: Tensor
    predicted: Tensor
    in_top5: Tensor
    macs: MacsReport
    kept: Tensor
    widths: dict[str, int]
    dead: list[int]
    dynamic: float
    mixtures: list[dict[str, float]]
    handover: Handover | None

    @property
    def experts(self) -> Tensor:
        """Fraction of all experts that each image keeps, shape (images,)."""
        widths = torch.tensor(list(self.widths.values()), dtype=torch.float64)
        return self.kept @ widths / widths.sum()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], runs: nn.Module | None = None) -> Evaluation:
    """Run a network over labelled images.

    Args:
        model: whose gates and MACs count.
        loader: batches of (images, labels).
        runs: computes the logits in place of the model, as its sparse form does.
    """
    device = next(model.parameters()).device
    network = next(deepmoe_networks(model), None)
    layers = network.expert_layers if network is not None else ()
    widths = expert_widths(network, layers) if network is not None else []
    times_kept = torch.zeros(sum(widths), dtype=torch.long)
    columns: dict[str, list[Tensor]] = {'labels': [], 'predicted': [], 'in_top5': [], 'kept': []}
    reports: list[MacsReport] = []
    records: list[MixtureRecord] = []
    for images, labels in tqdm(loader, desc='evaluate', unit='batch', ncols=100):
        images = images.to(device)
        logits = (runs or model)(images).cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        kept = torch.ones(len(images), 0, dtype=torch.bool)
        if network is not None:
            kept = kept_experts(network, images).cpu()
        reports.append(macs_table(model, (images.shape[2], images.shape[3])).report(kept))
        times_kept += kept.sum(0)
        record = mixture_record(model, images, logits.argmax(1))
        if record is not None:
            records.append(record)
        columns['labels'].append(labels)
        columns['predicted'].append(best[:, 0])
        columns['in_top5'].append((best == labels[:, None]).any(1))
        parts = [part.double().mean(1) for part in kept.split(widths, dim=1)] if widths else []
        columns['kept'].append(torch.stack(parts, 1) if parts else torch.ones(len(images), 0))
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    handover = None
    if network is not None and records:
        mixtures = torch.cat([record.gates[0] for record in records])
        handover = measure_handover(network.gating, mixtures, joined['predicted'], joined['labels'])
    return Evaluation(
        **joined,
        macs=_joined(reports),
        widths={layer.conv: width for layer, width in zip(layers, widths, strict=True)},
        dead=[int((part == 0).sum()) for part in times_kept.split(widths)] if widths else [],
        dynamic=dynamic_share(times_kept, len(joined['labels'])).item() if widths else 0.0,
        mixtures=_mixtures(records, joined['labels']),
        handover=handover,
    )


def _mixtures(records: Sequence[MixtureRecord], labels: Tensor) -> list[dict[str, float]]:
    """What the gates of each layer tell of all images."""
    if not records:
        return []
    predicted = torch.cat([record.predicted for record in records])
    layers = [torch.cat(gates) for gates in zip(*(record.gates for record in records), strict=True)]
    return [
        {'experts': gates.shape[1], **{k: v.item() for k, v in specialisation_of(gates, predicted, labels).items()}}
        for gates in layers
    ]


def _joined(reports: Sequence[MacsReport]) -> MacsReport:
    """The reports of several batches as one."""
    first = reports[0]
    return first._replace(
        by_module={name: torch.cat([report.by_module[name] for report in reports]) for name in first.by_module},
        by_group={name: torch.cat([report.by_group[name] for report in reports]) for name in first.by_group},
    )


def spread(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation, smallest and largest value."""
    values = values.double()
    return {
        'mean': values.mean().item(),
        'std': values.std(correction=0).item(),
        'min': values.min().item(),
        'max': values.max().item(),
    }


def summarise(result: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """The numbers of the JSON: accuracies in percent, MACs in units of 1e9, kept experts as a fraction."""

    def numbers(chosen: Tensor) -> dict[str, Any]:
        experts = {'kept_experts': spread(result.experts[chosen])} if result.widths else {}
        return {
            'images': int(chosen.sum()),
            'top1': hits[chosen].double().mul(100).mean().item(),
            'top5': result.in_top5[chosen].double().mul(100).mean().item(),
            'gmacs': spread(result.macs.total[chosen] / 1e9),
            **experts,
        }

    hits = result.predicted == result.labels
    everything = numbers(torch.ones_like(hits))
    if result.widths:
        everything['dynamic_experts'] = result.dynamic
    macs = result.macs
    everything['gmacs'] |= {
        'dense': macs.dense_total / 1e9,
        'without_shortcuts': macs.without_shortcuts.double().mean().item() / 1e9,
        'by_group': {group: column.double().mean().item() / 1e9 for group, column in macs.by_group.items()},
    }
    everything['by_class'] = {
        name: numbers(result.labels == label) for label, name in enumerate(classes) if (result.labels == label).any()
    }
    everything['by_layer'] = {
        layer: {
            'experts': width,
            'dead': dead,
            'kept_experts': spread(kept),
            'gmacs': spread(macs.by_module[layer] / 1e9),
        }
        for (layer, width), dead, kept in zip(result.widths.items(), result.dead, result.kept.unbind(1), strict=True)
    }
    everything['mixtures'] = result.mixtures
    if result.handover is not None:
        everything['handover'] = result.handover.numbers()
    return everything


def format_summary(summary: dict[str, Any]) -> str:
    """The numbers as Markdown: all images, then a table of the layers, then one of the classes."""
    gmacs = summary['gmacs']
    lines = [
        f'{summary["images"]} images: top-1 {summary["top1"]:.2f} %, top-5 {summary["top5"]:.2f} %',
        f'GMACs per image {plus_minus(gmacs)}, from {gmacs["min"]:.4g} to {gmacs["max"]:.4g}; all experts kept '
        f'{gmacs["dense"]:.4g}; without shortcuts {gmacs["without_shortcuts"]:.4g}',
        'of these: ' + ', '.join(f'{group} {value:.4g}' for group, value in gmacs['by_group'].items()),
    ]
    lines += [
        f'mixture of {row["experts"]} experts, bits: H_s {row["gate_entropy"]:.3f}, H_u {row["use_entropy"]:.3f}, '
        f'I(E;Y) {row["prediction_information"]:.3f}, of the true class {row["class_information"]:.3f}'
        for row in summary['mixtures']
    ]
    if not summary['by_layer']:
        return '\n'.join(lines + _class_table(summary))
    lines.append(
        f'kept experts {plus_minus(summary["kept_experts"], 100)} %; kept by some images and not by others '
        f'{100 * summary["dynamic_experts"]:.4g} %'
    )
    lines += _handover_line(summary)
    lines += ['', '| layer | experts | dead | kept (%) | GMACs |', '|---|--:|--:|--:|--:|']
    lines += [
        f'| {layer} | {row["experts"]} | {row["dead"]} | {plus_minus(row["kept_experts"], 100)} | '
        f'{plus_minus(row["gmacs"])} |'
        for layer, row in summary['by_layer'].items()
    ]
    return '\n'.join(lines + _class_table(summary))


def _handover_line(summary: dict[str, Any]) -> list[str]:
    handover = summary.get('handover')
    if handover is None:
        return []
    reader = 'a linear read-out of its mixture' if handover['is_fitted'] else 'its classifier'
    right = handover['right_where_wrong']
    beyond = '' if right is None else f'; where it is wrong, the network is right on {100 * right:.2f} %'
    return [
        f'embedding alone ({reader}): top-1 {100 * handover["embedding_right"]:.2f} %, the network agrees on '
        f'{100 * handover["agreement"]:.2f} %{beyond}'
    ]


def _class_table(summary: dict[str, Any]) -> list[str]:
    classes = summary['by_class']
    if len(classes) > SHOWN_CLASSES:
        return ['', f'{len(classes)} classes: see --json.']
    lines = ['', '| class | images | top-1 (%) | kept (%) | GMACs |', '|---|--:|--:|--:|--:|']
    for name, row in classes.items():
        kept = plus_minus(row['kept_experts'], 100) if 'kept_experts' in row else ''
        lines.append(f'| {name} | {row["images"]} | {row["top1"]:.1f} | {kept} | {plus_minus(row["gmacs"])} |')
    return lines


def plus_minus(values: dict[str, float], unit: float = 1) -> str:
    """Mean and standard deviation to four and two digits."""
    return f'{unit * values["mean"]:.4g} ± {unit * values["std"]:.2g}'


def width_factor(model: Any, settings: dict[str, Any]) -> float | None:
    """How many times as many experts the gated layers have as in the unwidened network; None for other networks."""
    if not hasattr(model, 'expert_layers'):
        return None
    unwidened: Any = timm.create_model(settings['model'], device='meta', **{**settings['model_kwargs'], 'widen': 1})
    return sum(expert_widths(model, model.expert_layers)) / sum(expert_widths(unwidened, unwidened.expert_layers))


def write_images(path: Path, result: Evaluation, images: Images) -> None:
    """One row for each image."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'class', 'predicted', 'kept_experts', 'gmacs'])
        experts = result.experts.tolist() if result.widths else [1.0] * len(result.labels)
        rows = zip(result.labels, result.predicted, experts, (result.macs.total / 1e9).tolist(), strict=True)
        for i, (label, predicted, kept, gmacs) in enumerate(rows):
            names = [images.classes[c] if c < len(images.classes) else int(c) for c in (label, predicted)]
            writer.writerow([images.files[i] if images.files else i, *names, f'{kept:.6g}', f'{gmacs:.6g}'])


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser('evaluate', __doc__)
    parser.add_argument('network', help=NETWORK_HELP)
    add_network_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument(
        '--macs',
        type=float,
        metavar='FRACTION',
        help="budget by the curve in the checkpoint, of the base network's MACs (default: the one it is at)",
    )
    parser.add_argument('--sparse', action='store_true', help='compute the logits with deepmoe_plugin.sparsify')
    parser.add_argument('--json', type=Path, help='writes all numbers to this file')
    parser.add_argument('--csv', type=Path, help='writes one row for each image to this file')
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser, args = parse_args(argv)
    try:
        settings = read_settings(args.network, args)
        images = create_images(args, settings)
        model = create_network(settings, args)
        if args.macs is not None:
            deepmoe_plugin.set_budget(model, macs=args.macs)
        runs = deepmoe_plugin.sparsify(model) if args.sparse else None
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for path in (args.json, args.csv):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    result = evaluate(model, images.loader, runs)
    summary = {
        'network': settings['model'],
        'model_kwargs': settings['model_kwargs'],
        'width': width_factor(model, settings),
        'checkpoint': args.checkpoint,
        'data': args.data_dir,
        'split': settings.get('val_split') or 'validation',
        'budget': args.macs,
        'sparse': args.sparse,
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()},
        **summarise(result, images.classes),
    }
    print(format_summary(summary))
    if args.json is not None:
        args.json.write_text(json.dumps(summary, indent=2) + '\n')
    if args.csv is not None:
        write_images(args.csv, result, images)
    return summary
