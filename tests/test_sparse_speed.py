"""Wall-clock time of sparse execution, by hand on a quiet machine.

`OMP_NUM_THREADS=2 pytest -m slow -n0 -rP tests/test_sparse_speed.py` prints all ratios on two threads.
"""

import statistics
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.cli.benchmark import measure
from deepmoe_plugin.cli.peers import SyntheticGates
from deepmoe_plugin.experts import expert_widths
from deepmoe_plugin.sparse import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def with_random_gates(name: str, kept: float, batch: int, size: int) -> tuple[nn.Module, SyntheticGates]:
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    widths = expert_widths(model, model.expert_layers)
    model.gating = SyntheticGates(widths, torch.randn(batch, 3, size, size), kept)
    return model, model.gating


def ratio(slow: nn.Module, fast: nn.Module, gates: SyntheticGates, repeats: int) -> float:
    """How many times as long the first takes: median of runs in turn, each pair on gates of its own."""

    def seconds(model: nn.Module, images: Tensor) -> float:
        return measure(lambda: model(images), 'wall')

    ratios = []
    for repetition in range(-3, repeats):
        gates.draw()
        times = [seconds(model, gates.images) for model in (slow, fast)]
        if repetition >= 0:
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'kept', 'batch', 'size'),
    [
        ('wide_deepmoe_resnet20_cifar', 0.5, 1, 32),
        ('wide_deepmoe_resnet20_cifar', 1, 8, 32),
        ('wide_deepmoe_resnet18', 1, 1, 224),
        ('wide_deepmoe_resnet18', 0.9, 1, 224),
        ('wide_deepmoe_resnet18', 0.9, 4, 224),
        ('wide_deepmoe_resnet50', 1, 1, 224),
    ],
)
def test_calibrated_is_never_slower(name: str, kept: float, batch: int, size: int) -> None:
    model, gates = with_random_gates(name, kept, batch, size)
    sparse = deepmoe_plugin.sparsify(model, calibrate=gates.images, cache_mb=0)
    assert ratio(model, sparse, gates, 60 if size == 32 else 15) > 0.97


FAMILIES = {
    'wide_deepmoe_resnet20_cifar': 32,
    'narrow_deepmoe_resnet20_cifar': 32,
    'wide_deepmoe_vgg16_cifar': 32,
    'wide_deepmoe_resnet18': 64,
    'wide_deepmoe_resnet50': 64,
    'wide_deepmoe_resnet50b': 64,
    'wide_deepmoe_drn_a_50': 64,
    'wide_deepmoe_vgg11_bn': 64,
    'wide_deepmoe_convnext_tiny': 64,
    'wide_deepmoe_convnextv2_tiny': 64,
}
"""One model of each family, and a size that is small for it: what surrounds a convolution then weighs most."""


@torch.no_grad()
@pytest.mark.parametrize('kept', [0.5, 1])
@pytest.mark.parametrize('batch', [1, 8, 64])
@pytest.mark.parametrize('name', FAMILIES)
def test_never_slower_without_calibration(name: str, batch: int, kept: float) -> None:
    model, gates = with_random_gates(name, kept, batch, FAMILIES[name])
    repeats = 200 // batch + 10 if FAMILIES[name] == 32 else 9
    found = ratio(model, deepmoe_plugin.sparsify(model, cache_mb=0), gates, repeats)
    print(f'{name}, batch {batch}, {kept:g} kept: {found:.2f}')
    assert found > 0.97


@torch.no_grad()
def test_half_of_the_experts_take_clearly_less_time() -> None:
    if build.library() is None:
        pytest.skip('needs a C++ compiler and the OpenMP library of GNU')
    model, gates = with_random_gates('wide_deepmoe_resnet50', 0.5, 1, 224)
    assert ratio(model, deepmoe_plugin.sparsify(model, cache_mb=0), gates, 15) > 2
