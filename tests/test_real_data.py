"""Short training runs on real images. `DEEPMOE_DATA` names a folder with `cifar100/` and `imagenette/`, each an image
folder with `train/CLASS/*` and `val/CLASS/*`; without it these tests skip."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor, nn
from torch.nn import functional

import deepmoe_plugin
from deepmoe_plugin.macs import MacsTable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


class Run(NamedTuple):
    losses: list[float]
    top1: float
    embed_top1: float
    kept: float
    spent: float
    class_spread: float
    dynamic: float


def load(name: str, split: str, size: int, per_class: int) -> Split:
    root = Path(os.environ.get('DEEPMOE_DATA', '')) / name / split
    if not os.environ.get('DEEPMOE_DATA') or not root.is_dir():
        pytest.skip(f'DEEPMOE_DATA does not name a folder with {name}/{split}')
    dataset = ImageDataset(str(root))
    seen: dict[int, int] = {}
    images, labels = [], []
    for index in range(len(dataset)):
        label = dataset.reader.samples[index][1]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= per_class:
            image = dataset[index][0].resize((size, size), Image.Resampling.BILINEAR)
            images.append(np.asarray(image))
            labels.append(label)
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels))


def prepared(model: nn.Module, images: Tensor) -> Tensor:
    """Pixels as the network takes them."""
    cfg = model.pretrained_cfg
    mean, std = (255 * torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def train(model: nn.Module, data: Split, val: Split, epochs: int, lr: float, batch_size: int = 64) -> Run:
    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last)
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    heads = model.gating.gates.weight
    rest = [parameter for parameter in model.parameters() if parameter is not heads]
    groups: list[dict[str, Any]] = [{'params': rest, 'weight_decay': 5e-4}, {'params': [heads]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    steps = epochs * (len(data.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    losses = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.labels))
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            images = data.images[batch]
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            pad = images.shape[-1] // 8
            top, left = torch.randint(2 * pad + 1, (2,)).tolist()
            images = functional.pad(images, (pad, pad, pad, pad))
            images = images[:, :, top : top + data.images.shape[2], left : left + data.images.shape[3]]
            loss = criterion(model(prepared(model, images)), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            extra = sum(criterion.terms[name] for name in ('loss_gate', 'loss_embed') if name in criterion.terms)
            losses.append(loss.item() - float(extra))
    return validate(model, [prepared(model, part) for part in val.images.split(250)], val.labels, losses)


@torch.inference_mode()
def validate(model: nn.Module, batches: list[Tensor], labels: Tensor, losses: list[float]) -> Run:
    model.eval()
    gating = model.gating
    hits = torch.cat([model(images).argmax(1) for images in batches]) == labels
    embed_top1 = 0.0
    if gating.class_scores is not None:
        logits = torch.cat([gating.class_scores(gating.embedding(images)) for images in batches])
        embed_top1 = (logits.argmax(1) == labels).float().mean().item()
    stats = deepmoe_plugin.gate_statistics(model, batches)
    by_class = stats.by_class(labels)
    spent = MacsTable(model, tuple(batches[0].shape[2:])).spent(stats.kept).mean().item()
    spread = by_class.std(0).mean().item()
    run = Run(losses, hits.float().mean().item(), embed_top1, stats.kept_experts, spent, spread, stats.dynamic_experts)
    print(f'{model.pretrained_cfg["architecture"]}: {run._replace(losses=losses[:: max(1, len(losses) // 10)])}')
    return run


@pytest.fixture(scope='module')
def cifar100() -> tuple[Split, Split]:
    return load('cifar100', 'train', 32, 100), load('cifar100', 'val', 32, 20)


def falls(losses: list[float]) -> bool:
    tenth = len(losses) // 10
    return np.mean(losses[-tenth:]) < 0.9 * np.mean(losses[:tenth])


QUARTER = (16, 16, 'M', 32, 32, 'M', 64, 64, 64, 'M', 128, 128, 128, 'M', 128, 128, 128, 'M')


@pytest.mark.parametrize(
    ('name', 'small', 'weight', 'lr', 'epochs', 'batch_size'),
    # The more experts, the smaller the share of each in the mean: the same lambda closes them more slowly.
    [
        ('wide_deepmoe_resnet20_cifar', {'layers': (1, 1, 1)}, 2.7, 0.1, 6, 64),
        ('narrow_deepmoe_vgg16_cifar', {'layout': QUARTER}, 9.5, 0.02, 3, 32),
    ],
)
def test_training_on_cifar100(
    cifar100, name: str, small: dict[str, Any], weight: float, lr: float, epochs: int, batch_size: int
) -> None:
    kept = []
    for gate_loss_weight in (0.001, weight):
        torch.manual_seed(0)
        arguments = {'gate_loss_weight': gate_loss_weight, 'embed_loss_weight': 1.0, 'num_latent_experts': 32}
        model = timm.create_model(name, **small, **arguments)
        run = train(model, *cifar100, epochs, lr, batch_size)
        if not kept:  # a large lambda competes with L_e for the embedding
            assert run.embed_top1 > 0.03  # chance is 0.01, its standard deviation 0.002
        kept.append(run.kept)
        assert falls(run.losses)
        assert run.top1 > 0.05
        assert run.kept > 0.02
    assert kept[1] < kept[0]


@pytest.mark.parametrize('target', [{'target_kept': 0.5}, {'target_macs': 0.4}])
def test_target_is_met_on_cifar100(cifar100, target: dict[str, float]) -> None:
    torch.manual_seed(0)
    small = {'layers': (1, 1, 1), 'embed_loss_weight': 1.0}
    model = timm.create_model('wide_deepmoe_resnet20_cifar', **small, **target)
    run = train(model, *cifar100, epochs=8, lr=0.1)
    reached = run.kept if 'target_kept' in target else run.spent
    assert reached == pytest.approx(next(iter(target.values())), abs=0.02)
    assert run.class_spread > 0.05


def test_warm_start_on_imagenette() -> None:
    """From a dense network to gates that close two fifths of its MACs, other ones for other images."""
    data, val = load('imagenette', 'train', 32, 150), load('imagenette', 'val', 32, 50)
    name, small = 'wide_deepmoe_resnet20_cifar', {'layers': (1, 1, 1), 'num_classes': 10}
    torch.manual_seed(0)
    first = timm.create_model(name, gate_loss_weight=0.0, **small)
    dense = train(first, data, val, epochs=12, lr=0.1)
    assert dense.kept == 1
    assert dense.top1 > 0.2
    epochs, steps = 10, len(data.labels) // 64
    budget = {'target_macs': 0.6, 'target_steps': epochs * steps // 2}
    model = timm.create_model(name, num_latent_experts=8, **budget, **small)
    model.load_state_dict({key: value for key, value in first.state_dict().items() if not key.startswith('gating.')})
    batches = [(prepared(model, data.images[part]), data.labels[part]) for part in torch.randperm(1500).split(64)]
    deepmoe_plugin.warm_start(model, batches, nn.CrossEntropyLoss(), epochs=8, progress=False)
    run = train(model, data, val, epochs, lr=0.05)
    assert run.losses[0] < 0.8 * dense.losses[0]
    assert run.top1 > dense.top1 - 0.05
    assert run.spent == pytest.approx(0.6, abs=0.03)
    assert run.dynamic > 0.1
