"""Make a trained network cheaper: gate its channels, train on, and compare it with what it was.

    deepmoe compress resnet50 --data-dir imagenet --macs 0.5 --epochs 20
    deepmoe compress resnet20_cifar --checkpoint resnet20.safetensors --data-dir cifar10 --macs 0.35

The gates of its gated twin learn what the experts are worth and which images use the network alike
(deepmoe_plugin.warm_start), a threshold closes the least useful experts, so that the average image costs the budget,
and the network trains with these gates, taught by the logits and the stages of the dense one. The output folder gets a
checkpoint of each kind (compressed.safetensors with args.yaml, last.pth for --resume), a table (results.md,
results.json) and a picture of the experts that each class keeps (experts.png). --baselines trains others as long, on
the same images and with the same teacher.

Training images of up to 64 pixels are padded by an eighth of their side and cut at random, as is usual for CIFAR.
Larger ones get timm's random crops. All are mirrored at random.

The name of an mmseg config in the place of a network compresses a segmentor: `deepmoe compress CONFIG --help`.
"""

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.data import create_loader
from timm.data.transforms import MaybeToTensor
from timm.models import is_model, split_model_name_tag
from timm.optim import create_optimizer_v2, list_optimizers
from timm.task import LogitDistillationTask
from timm.utils import AverageMeter, random_seed
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from ..budgets import base_target, draw_budget, set_budget
from ..gating import GatingConfig
from ..hints import StageHints
from ..macs import macs_table
from ..network import DeepMoE, freeze_gating
from ..stats import gate_statistics
from ..terms import term_sources
from ..warm_start import warm_start
from .compression import GROUPS, RAMP, TEMPERATURE, add_recipe, check_recipe, each_budget, target_of, write_table
from .configs import find_config
from .evaluate import evaluate
from .figures import draw_experts, draw_times
from .images import add_image_arguments, create_dataset_of, create_images, data_config
from .networks import add_network_arguments, create_network, read_settings
from .parsing import create_parser, output_folder
from .timing import WAYS, time_rows
from .timm_options import HONOURED

BASELINES = ('dense', 'torch-pruning')
# Dense networks whose gated twin has a name of its own; of all others it is `narrow_deepmoe_NAME`.
_TWINS = {'wide_resnet50_2': 'wide_deepmoe_resnet50', 'wide_resnet101_2': 'wide_deepmoe_resnet101'}
CALIBRATION_BATCHES = 16
"""Training batches that the last threshold is set on."""
SMALL = 64
"""Images up to this side are padded by an eighth of it and cut at random, as CIFAR's usually are. timm enlarges its
crops, which blurs small images, and the gates would react to the blur."""


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser('compress', __doc__)
    parser.add_argument('network', help="timm's name of the dense network, as resnet50, whose gated twin is trained")
    add_network_arguments(parser, default='those of --pretrained')
    add_image_arguments(parser, help='folder with train/CLASS/* and val/CLASS/*')
    parser.set_defaults(batch_size=128)
    parser.add_argument('--epochs', type=int, default=20, help='(default: %(default)s)')
    parser.add_argument(
        '--opt',
        default='sgd',
        metavar='NAME',
        help="optimizer, by timm's name (default: %(default)s); best the one that the dense network was trained with",
    )
    parser.add_argument('--lr', type=float, default=0.01, help='falls along a cosine (default: %(default)s, for SGD)')
    parser.add_argument('--weight-decay', type=float, default=5e-4, help='(default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--channels-last', action='store_true', help='memory format of the networks')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument(
        '--output', type=output_folder, default=Path('output/compress'), help='folder (default: %(default)s)'
    )
    add_recipe(parser, BASELINES)
    parser.add_argument(
        '--time',
        nargs='*',
        choices=WAYS,
        help='time one image as well, gated networks sparsely, dense ones on the fastest of these (default: of all '
        'that are installed); draws time.png',
    )
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    given = list(sys.argv[1:] if argv is None else argv)
    if given and _is_segmentor(given[0]):
        from .compress_segmentor import main as compress_segmentor  # mmseg need not be installed

        return compress_segmentor(given)
    parser, args = parse_args(given)
    check_recipe(parser, args)
    if args.epochs < 1:
        parser.error(f'--epochs must be at least 1, got {args.epochs}')
    if args.opt not in list_optimizers():
        close = get_close_matches(args.opt, list_optimizers(), n=3)
        parser.error(f'--opt: timm has no optimizer {args.opt!r}. Similar: {", ".join(close) or "none"}.')
    try:
        settings = read_settings(args.network, args)
        gated_name = gated_twin(settings['model'])
        images = create_images(args, settings)
        args.pretrained |= args.checkpoint is None
        dense = _trained(settings, args)
        loader = training_loader(args, settings)
        plain = training_loader(args, settings, augment=False)
        budget = Budget(args, dense, gated_name, settings)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [judge('dense', dense, images.loader)]
    compared = {'dense': dense}
    for name in [*args.baselines, 'gated']:
        random_seed(args.seed)
        model = {'torch-pruning': budget.prune, 'gated': budget.gate}.get(name, copy.deepcopy)(dense)
        train(name, model, dense, loader, plain, args)
        for title in each_budget(budget.targets, f'{name}, {args.epochs} epochs', model, loader):
            rows.append(judge(title, model, images.loader))
            if args.time is not None:
                compared[title] = copy.deepcopy(model)  # one of several budgets changes
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.output / 'compressed.safetensors')
    arguments = gated_arguments(gated_name, settings)
    _write_args(args.output, {**settings, 'model': gated_name, 'model_kwargs': arguments})
    summary = {'network': gated_name, 'model_kwargs': arguments, 'macs': args.macs, 'results': rows}
    if args.time is not None:
        summary['time'] = time_rows(rows, compared, images.loader, args.time or WAYS, args.device)
        draw_times(rows, ('top1', 'top-1 accuracy (%)')).savefig(args.output / 'time.png', dpi=120)
    table = write_table(args.output, summary, ('top1', 'top-1 (%)'), 'MMACs')
    labels = torch.cat([labels for _, labels in images.loader])
    stats = gate_statistics(model, images.loader)
    figure = draw_experts(stats.by_class(labels), stats.layers, stats.widths, images.classes)
    figure.savefig(args.output / 'experts.png', dpi=120)
    print(
        f'\n{table}\n\nTable, weights and experts.png are in {args.output}/. As a network of timm:\n'
        f'deepmoe evaluate {args.output}/args.yaml --checkpoint {args.output}/compressed.safetensors --data-dir '
        f'{args.data_dir}'
    )
    return summary


def _write_args(folder: Path, settings: dict[str, Any]) -> None:
    """Write the options that evaluate the result, as timm's train.py leaves them (args.yaml)."""
    options = {name: value for name, value in settings.items() if name in HONOURED and value is not None}
    (folder / 'args.yaml').write_text(yaml.safe_dump(options, sort_keys=False))


def _is_segmentor(name: str) -> bool:
    """Whether a name means a config of mmseg."""
    path = find_config(name, 'mmseg')
    return name.endswith('.py') or (path is not None and path.suffix == '.py')


def gated_twin(name: str) -> str:
    """Name of the gated network of a dense one; of a gated one its own. A tag of weights says nothing of the network.

    Raises:
        ValueError: there is none.
    """
    name = split_model_name_tag(name)[0]
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
    return create_network({**settings, 'model_kwargs': arguments}, args)


def training_loader(args: argparse.Namespace, settings: dict[str, Any], augment: bool = True) -> DataLoader:
    """The training images, shuffled; shifted or cut, and mirrored at random, or as they are tested."""
    config = data_config(settings)
    dataset = create_dataset_of(args.data_dir, config, {**settings, 'val_split': 'train'})
    height, width = config['input_size'][1:]
    is_small = max(height, width) <= SMALL
    no_jitter: dict[str, Any] = {'color_jitter': None}
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=not augment or is_small,
        use_prefetcher=False,
        num_workers=args.workers,
        interpolation=config['interpolation'],
        **{name: config[name] for name in ('input_size', 'mean', 'std')},
        **no_jitter,
    )
    if augment and is_small:
        steps = dataset.transform.transforms
        position = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        crop = transforms.RandomCrop((height, width), padding=(width // 8, height // 8))
        steps[position:position] = [crop, transforms.RandomHorizontalFlip()]
    return loader


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
        self.targets = {fraction: base_target(fraction, self.dense_macs, table) for fraction in args.macs}
        steps = len(self.loader) * args.epochs
        self.build = lambda: timm.create_model(
            name, target_macs=target_of(self.targets), target_steps=max(1, int(RAMP * steps)), **arguments
        )

    def gate(self, dense: nn.Module) -> nn.Module:
        """The gated twin, warmed up; or as `--resume` finds it."""
        model = self.build()
        model.load_state_dict(dense.state_dict())
        model.to(self.args.device)
        if not (self.args.resume and _checkpoint(self.args, 'gated').is_file()):
            warm_start(model, self.loader, nn.CrossEntropyLoss(), dynamic_experts=self.args.dynamic_experts)
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
            max_pruning_ratio=0.9,  # no layer vanishes
        )
        for _ in range(steps):
            pruner.step()
            if torch_pruning.utils.count_ops_and_params(model, example)[0] <= self.args.macs[0] * self.dense_macs:
                break
        return model


def _checkpoint(args: argparse.Namespace, name: str) -> Path:
    return args.output / name / 'last.pth'


def train(
    name: str, model: nn.Module, teacher: nn.Module, loader: DataLoader, plain: DataLoader, args: argparse.Namespace
) -> None:
    """Train with timm's distillation task, whose loss gets the terms of gated networks; saved after each epoch.

    Args:
        loader: training images.
        plain: training images, prepared as in tests; the last threshold is set on them.
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
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    path = _checkpoint(args, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    if args.resume and path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        start = state['epoch']
    frozen_from = args.epochs - math.floor(args.stage2 * args.epochs)
    hints = StageHints(model, teacher, None if args.hint else ())
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
            if isinstance(model, DeepMoE) and model.gating.frozen:
                draw_budget(model, epoch * len(loader) + step)
            with hints, torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                result = task(images.to(device, memory_format=memory_format), labels.to(device))
                loss = result['loss'] + args.hint * hints.take()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(loss.item(), len(images))
            shown = {n: f'{result[n].item():.2f}' for n in ('kept_experts', 'dynamic_experts') if n in result}
            progress.set_postfix(loss=f'{meter.avg:.3f}', **shown)
        if isinstance(model, DeepMoE) and model.gating.frozen:
            draw_budget(model)
        elif isinstance(model, DeepMoE) and epoch + 1 == args.epochs:  # without stage 2
            calibrate(model, plain)
        _save(path, model, optimizer, epoch + 1)
    for source in term_sources(model):
        source.finish_training()
    model.eval()


def calibrate(model: DeepMoE, loader: DataLoader) -> None:
    """Set the threshold once more: in training it follows single batches, and their images are augmented."""
    budget = model.gating.budget
    assert budget is not None
    batches = [images for _, (images, _) in zip(range(CALIBRATION_BATCHES), loader, strict=False)]
    set_budget(model, batches, macs=budget.target)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write the state beside the old one and exchange them, so that a killed run leaves one of the two complete."""
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
    row: dict[str, Any] = {
        'name': name,
        'top1': 100 * (result.predicted == result.labels).double().mean().item(),
        'gmacs': gmacs.mean().item(),
        'gmacs_std': gmacs.std(correction=0).item(),
    }
    if result.handover is not None:
        row |= {'kept_experts': result.experts.mean().item(), 'dynamic_experts': result.dynamic}
        row |= result.handover.numbers() | result.mixtures[0]
    return row
