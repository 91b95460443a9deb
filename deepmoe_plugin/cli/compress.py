"""Make a trained classifier cheaper: gate its channels, train on, and compare it with what it was.

    deepmoe compress resnet50 --data-dir imagenet --macs 0.5 --epochs 20
    deepmoe compress resnet20_cifar --checkpoint resnet20.safetensors --data-dir cifar10 --macs 0.35

The dense network teaches its gated twin. The gates start at what the experts are worth and at which images use them
(deepmoe_plugin.warm_start), a threshold closes the least useful experts until the average image costs the budget, and
the last epochs train with the gates as they then are (stage 2). The output folder gets a checkpoint of each kind
(compressed.safetensors, last.pth for --resume), a table (results.md, results.json) and a picture of the experts that
each class keeps (experts.png). --baselines trains others as long, on the same images and with the same teacher.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_loader
from timm.models import is_model
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from timm.utils import AverageMeter, random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..budgets import set_budget
from ..gating import GatingConfig
from ..macs import GATING_GROUPS, macs_table
from ..network import DeepMoE, freeze_gating
from ..stats import gate_statistics
from ..terms import term_sources
from ..warm_start import warm_start
from .evaluate import evaluate
from .figures import draw_experts
from .images import add_image_arguments, create_dataset_of, create_images, data_config
from .networks import add_network_arguments, create_network, read_settings

BASELINES = ('dense', 'torch-pruning')
# Dense networks whose gated twin has a name of its own; of all others it is `narrow_deepmoe_NAME`.
_TWINS = {'wide_resnet50_2': 'wide_deepmoe_resnet50', 'wide_resnet101_2': 'wide_deepmoe_resnet101'}
TEMPERATURE = 4.0
CALIBRATION_BATCHES = 16
SHARES = {
    'kept_experts': 'kept experts (%)',
    'dynamic_experts': 'dynamic (%)',
    'embedding_right': 'embedding alone (%)',
    'right_where_wrong': 'right where it is wrong (%)',
}
"""Columns of the table that hold fractions of a gated network."""
GROUPS = 8
"""Latent experts of the gated network, each of which is a group of images that keep the same."""
SMALL = 64
"""Images up to this side are cut and shifted as CIFAR's usually are; larger ones as timm does it."""


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog='deepmoe compress', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('network', help="timm's name of the dense network, as resnet50, whose gated twin is trained")
    add_network_arguments(parser)
    add_image_arguments(parser, help='folder with train/CLASS/* and val/CLASS/*')
    parser.set_defaults(batch_size=128)
    parser.add_argument('--mean', type=float, nargs='+', help='of the images (default: of the model)')
    parser.add_argument('--std', type=float, nargs='+', help='likewise')
    parser.add_argument(
        '--macs', type=float, default=0.5, help='fraction of the dense MACs, gating included (default: %(default)s)'
    )
    parser.add_argument('--epochs', type=int, default=20, help='(default: %(default)s)')
    parser.add_argument(
        '--stage2',
        type=float,
        default=1.0,
        help='share of the epochs with frozen gates, the last; in those before, the budget falls to its target step by '
        'step (default: %(default)s: experts close at once)',
    )
    parser.add_argument('--lr', type=float, default=0.02, help='of SGD, falls along a cosine (default: %(default)s)')
    parser.add_argument('--weight-decay', type=float, default=5e-4, help='(default: %(default)s)')
    parser.add_argument(
        '--distill', type=float, default=0.9, help="weight of the teacher's logits, from 0 to 1 (default: %(default)s)"
    )
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--channels-last', action='store_true', help='memory format of the networks')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument('--output', type=Path, default=Path('output/compress'), help='folder (default: %(default)s)')
    parser.add_argument('--resume', action='store_true', help='go on from last.pth of the output folder')
    parser.add_argument(
        '--baselines', nargs='*', choices=BASELINES, default=[], help='train these as long as well: %(choices)s'
    )
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser, args = parse_args(argv)
    for name, (low, high) in {'macs': (0, 1), 'stage2': (0, 1), 'distill': (0, 1)}.items():
        value = getattr(args, name)
        if not low <= value <= high or (name == 'macs' and value in (low, high)):
            parser.error(f'--{name} must be a fraction between {low} and {high}, got {value}')
    if args.epochs < 1:
        parser.error(f'--epochs must be at least 1, got {args.epochs}')
    try:
        settings = read_settings(args.network, args)
        settings.update({name: getattr(args, name) for name in ('mean', 'std') if getattr(args, name)})
        gated_name = gated_twin(settings['model'])
        images = create_images(args, settings)
        if args.checkpoint is None:
            settings['pretrained'] = True
        dense = _trained(settings, args)
        loader = training_loader(args, settings)
        plain = training_loader(args, settings, augment=False)
        budget = Budget(args, dense, gated_name, settings)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [judge('dense', dense, images.loader)]
    for name in [*args.baselines, 'gated']:
        random_seed(args.seed)
        model = {'dense': _copy, 'torch-pruning': budget.prune, 'gated': budget.gate}[name](dense)
        train(name, model, dense, loader, plain, args)
        rows.append(judge(f'{name}, {args.epochs} epochs', model, images.loader))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.output / 'compressed.safetensors')
    arguments = gated_arguments(gated_name, settings)
    summary = {'network': gated_name, 'model_kwargs': arguments, 'macs': args.macs, 'results': rows}
    (args.output / 'results.json').write_text(json.dumps(summary, indent=2) + '\n')
    table = format_table(rows)
    (args.output / 'results.md').write_text(table + '\n')
    labels = torch.cat([labels for _, labels in images.loader])
    stats = gate_statistics(model, images.loader)
    figure = draw_experts(stats.by_class(labels), stats.layers, stats.widths, images.classes)
    figure.savefig(args.output / 'experts.png', dpi=120)
    print(f'\n{table}\n\nTable, weights ({gated_name}) and experts.png are in {args.output}/')
    return summary


def gated_twin(name: str) -> str:
    """Name of the gated network of a dense one; of a gated one its own.

    Raises:
        ValueError: there is none.
    """
    known = name if 'deepmoe' in name else _TWINS.get(name, f'narrow_deepmoe_{name}')
    if not is_model(known):
        names = ', '.join(sorted(n.removeprefix('narrow_deepmoe_') for n in timm.list_models('narrow_deepmoe_*')))
        raise ValueError(f'There is no gated twin of {name!r}. There are those of: {names}.')
    return known


def gated_arguments(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the gated network: few groups of images, found by an embedding half as wide as usual, do best."""
    arguments = {**settings['model_kwargs'], 'num_classes': settings['num_classes']}
    usual: Any = timm.create_model(name, device='meta', **arguments)
    channels = [max(1, layer.conv.out_channels // 2) for layer in usual.gating.embedding.layers]
    return {'num_latent_experts': GROUPS, 'embedding_channels': channels, **arguments}


def _trained(settings: dict[str, Any], args: argparse.Namespace) -> nn.Module:
    """The dense network with its trained weights."""
    arguments = dict(settings['model_kwargs'])
    GatingConfig.pop_from(arguments)  # of the gated twin alone
    if 'deepmoe' in settings['model']:
        arguments['gated'] = False
    settings = {**settings, 'model_kwargs': arguments}
    pretrained = settings.get('pretrained') and args.checkpoint is None
    settings = {**settings, 'pretrained': False}
    if pretrained:
        return timm.create_model(
            settings['model'], pretrained=True, num_classes=settings['num_classes'], **settings['model_kwargs']
        ).to(args.device)
    return create_network(settings, args)


def _copy(dense: nn.Module) -> nn.Module:
    return copy.deepcopy(dense)


def training_loader(args: argparse.Namespace, settings: dict[str, Any], augment: bool = True) -> DataLoader:
    """The training images, shuffled; cut, shifted and mirrored at random, or as they are tested."""
    config = data_config(settings)
    dataset = create_dataset_of(args.data_dir, config, {**settings, 'val_split': 'train'})
    small = max(config['input_size'][1:]) <= SMALL
    changes: dict[str, Any] = {'color_jitter': None}
    if small:
        changes.update(scale=(0.765625, 1.0), ratio=(1.0, 1.0))
    return create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=not augment,
        use_prefetcher=False,
        num_workers=args.workers,
        interpolation=config['interpolation'],
        **{name: config[name] for name in ('input_size', 'mean', 'std')},
        **changes,
    )


class Budget:
    """Makes networks that spend the budget from the dense one.

    Raises:
        ValueError: the budget cannot be reached.
    """

    def __init__(self, args: argparse.Namespace, dense: nn.Module, name: str, settings: dict[str, Any]) -> None:
        self.args = args
        self.settings = settings
        self.loader = training_loader(args, settings)
        self.size = data_config(settings)['input_size'][1:]
        self.dense_macs = macs_table(dense, self.size).dense()
        arguments = gated_arguments(name, settings)
        probe: Any = timm.create_model(name, device='meta', **arguments)
        table = macs_table(probe, self.size)
        self.gated_layers = {layer.conv for layer in probe.expert_layers}
        gating = table.dense(GATING_GROUPS)
        target = (args.macs * self.dense_macs - gating) / (table.dense() - gating)
        if target <= table.floor:
            floor = (table.floor * (table.dense() - gating) + gating) / self.dense_macs
            raise ValueError(
                f'--macs {args.macs} cannot be reached: gating and the layers without gates cost {floor:.3f} of the '
                f'dense MACs.'
            )
        steps = len(self.loader) * args.epochs
        self.build = lambda: timm.create_model(
            name, target_macs=target, target_steps=max(1, int(RAMP * steps)), **arguments
        )

    def gate(self, dense: nn.Module) -> nn.Module:
        """The gated twin, warmed up; or as `--resume` finds it."""
        model = self.build()
        model.load_state_dict(dense.state_dict())
        model.to(self.args.device)
        if not (self.args.resume and _checkpoint(self.args, 'gated').is_file()):
            warm_start(model, self.loader, nn.CrossEntropyLoss())
        return model

    def prune(self, dense: nn.Module) -> nn.Module:
        """The dense network, pruned for good by Torch-Pruning: global magnitude, the channels that gates would close.

        Raises:
            SystemExit: Torch-Pruning is not installed.
        """
        try:
            import torch_pruning
        except ImportError:
            raise SystemExit('--baselines torch-pruning needs: pip install torch-pruning') from None
        model = copy.deepcopy(dense).eval()
        example = torch.zeros(1, 3, *self.size, device=self.args.device)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        ignored = [m for n, m in layers if n not in self.gated_layers]
        steps = 400
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=steps,
            ignored_layers=ignored,
            max_pruning_ratio=0.9,
        )
        for _ in range(steps):
            pruner.step()
            if torch_pruning.utils.count_ops_and_params(model, example)[0] <= self.args.macs * self.dense_macs:
                break
        return model


RAMP = 0.2
"""Share of the training in which the budget falls from everything to the target."""


def _checkpoint(args: argparse.Namespace, name: str) -> Path:
    return args.output / name / 'last.pth'


def train(
    name: str, model: nn.Module, teacher: nn.Module, loader: DataLoader, plain: DataLoader, args: argparse.Namespace
) -> None:
    """Train with timm's distillation task, whose loss gets the terms of gated networks; saved after each epoch.

    Args:
        loader: training images.
        plain: training images as they are tested, which the last threshold is set on.
    """
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=memory_format)
    model.to(memory_format=memory_format)
    task = LogitDistillationTask(
        model,
        teacher,
        nn.CrossEntropyLoss(),
        task_loss_weight=1 - args.distill,
        distill_loss_weight=args.distill,
        temperature=TEMPERATURE,
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer_v2(model, opt='sgd', lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    path = _checkpoint(args, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    if args.resume and path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        start = state['epoch']
    frozen_from = args.epochs - math.floor(args.stage2 * args.epochs)
    for epoch in range(start, args.epochs):
        random_seed(args.seed, rank=epoch)  # a resumed epoch draws what an uninterrupted run would
        model.train()
        if isinstance(model, DeepMoE):
            # The gates know what the images use; from the task they would learn to hand over the class.
            model.gating.requires_grad_(False)
            model.gating.embedding.eval()
            if epoch == frozen_from:
                calibrate(model, plain)
            if epoch >= frozen_from:
                freeze_gating(model)
        meter = AverageMeter()
        progress = tqdm(loader, desc=f'{name}: epoch {epoch + 1}/{args.epochs}', ncols=110)
        for step, (images, labels) in enumerate(progress):
            part = (epoch + step / len(loader)) / args.epochs
            for group in optimizer.param_groups:
                group['lr'] = args.lr * group.get('lr_scale', 1) * (0.5 + 0.5 * math.cos(math.pi * part))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                result = task(images.to(device, memory_format=memory_format), labels.to(device))
            optimizer.zero_grad()
            result['loss'].backward()
            optimizer.step()
            meter.update(result['loss'].item(), len(images))
            shown = {n: f'{result[n].item():.2f}' for n in ('kept_experts', 'dynamic_experts') if n in result}
            progress.set_postfix(loss=f'{meter.avg:.3f}', **shown)
        _save(path, model, optimizer, epoch + 1)
    for source in term_sources(model):
        source.finish_training()
    model.eval()


def calibrate(model: DeepMoE, loader: DataLoader) -> None:
    """Set the threshold once more, on more images than one batch, and on images as they are tested."""
    budget = model.gating.budget
    assert budget is not None
    batches = [images for _, (images, _) in zip(range(CALIBRATION_BATCHES), loader, strict=False)]
    set_budget(model, batches, macs=budget.target)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write the state beside the old one and exchange them, so that a killed run leaves one or the other."""
    state = {
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'epoch': epoch,
    }
    torch.save(state, path.with_suffix('.new'))
    path.with_suffix('.new').replace(path)


def judge(name: str, model: nn.Module, loader: DataLoader) -> dict[str, Any]:
    """One row of the table."""
    result = evaluate(model.eval(), loader)
    gmacs = result.macs.total.double() / 1e9
    row = {
        'name': name,
        'top1': 100 * (result.predicted == result.labels).double().mean().item(),
        'gmacs': gmacs.mean().item(),
        'gmacs_std': gmacs.std(correction=0).item(),
    }
    if result.handover is not None:
        row |= {'kept_experts': result.experts.mean().item(), 'dynamic_experts': result.dynamic}
        row |= result.handover._asdict() | result.mixtures[0]
    return row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    titles = ['network', 'top-1 (%)', 'MMACs per image', *SHARES.values()]
    lines = [f'| {" | ".join(titles)} |', '|---|' + '--:|' * (len(titles) - 1)]
    for row in rows:
        shares = ['' if row.get(name) is None else f'{100 * row[name]:.1f}' for name in SHARES]
        macs = f'{1e3 * row["gmacs"]:.2f} ± {1e3 * row["gmacs_std"]:.2f}'
        cells = [row['name'], f'{row["top1"]:.2f}', macs, *shares]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)
