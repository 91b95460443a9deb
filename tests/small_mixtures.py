"""Networks of the sibling papers with every structure, small enough to train in a test."""

from typing import Any

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

import deepmoe_plugin  # noqa: F401 (registers the models)

STACKED = ['dmoe_4x100', 'dmoe_4x100_4x100', 'dmoe_4x100_4x20', 'dmoe_4x50_4x20']
DNN = ['dmoe_dnn_4x100_4x100', 'dmoe_dnn_4x100_4x20', 'dmoe_dnn_4x50_4x20']
SPECIALISED = ['moe_cifar100', 'moe_fashion_mnist', 'moe_mnist']
ALL = [*STACKED, *DNN, *SPECIALISED]

# Every structure, small enough to train in a test.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'stacked': ('dmoe_4x50_4x20', dict(hidden=(8, 6), balance_margin=1.0)),
    'stacked, phase 2': ('dmoe_4x50_4x20', dict(hidden=(8, 6))),
    'stacked, single': ('dmoe_4x50_4x20', dict(hidden=(8, 6), second_layer='single')),
    'stacked, concat': ('dmoe_4x50_4x20', dict(hidden=(8, 6), second_layer='concat')),
    'one layer': ('dmoe_4x100', dict(hidden=(8,))),
    'three layers': ('dmoe_4x50_4x20', dict(experts=(3, 4, 5), hidden=(8, 6, 4), gate_hidden=(5, 5, 5))),
    'dnn': ('dmoe_dnn_4x50_4x20', dict(hidden=(8, 6))),
    'softmax': ('moe_mnist', dict(importance_loss_weight=0.2)),
    'attentive': ('moe_mnist', dict(gate='attentive', similarity_loss_weight=(1e-3, 1e-3))),
    'single': ('moe_mnist', dict(num_experts=1)),
    'fashion': ('moe_fashion_mnist', dict(gate='attentive')),
}
cases = pytest.mark.parametrize('case', CASES)


def build(case: str, **kwargs: Any) -> nn.Module:
    name, args = CASES[case]
    torch.manual_seed(0)
    return timm.create_model(name, **{**args, **kwargs})


def batch_for(model: nn.Module, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, model.in_chans, *model.img_size, generator=generator)
    return images, torch.arange(size) % model.num_classes


def missing_gradients(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def parameters(name: str, **kwargs: Any) -> int:
    return sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = batch_for(model, seed=seed)
    result = ClassificationTask(model, nn.CrossEntropyLoss())(x, y)
    optimizer.zero_grad()
    result['loss'].backward()
    optimizer.step()
