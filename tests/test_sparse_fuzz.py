"""Random small networks, gates, sizes and batches against the masked network, in float32, which native code runs."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from small_networks import FixedGates, randomise
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.experts import expert_widths
from deepmoe_plugin.sparse import weights
from deepmoe_plugin.sparse.winograd import tile_of

pytestmark = pytest.mark.usefixtures('always_sparse')

TOLERANCE = 3e-5
BATCHES = (1, 1, 2, 3, 5, 9)
FRACTIONS = (0, 0.1, 0.3, 0.5, 0.7, 0.85, 1)


def random_network(rng: random.Random) -> nn.Module:
    """A network of any family, whose gated layers have any widths."""
    family = rng.choice(['basic', 'bottleneck', 'bottleneck_b', 'dilated', 'cifar', 'vgg', 'vgg_cifar', 'convnext'])
    arguments: dict[str, Any] = {'num_classes': rng.randint(1, 20), 'in_chans': rng.choice([1, 3, 4])}
    layers = [1, 1, 1, 1]
    layers[rng.randrange(4)] += rng.randrange(2)
    if family == 'convnext':
        dims = [rng.choice([8, 12, 17, 24]) for _ in layers]
        return timm.create_model('wide_deepmoe_convnext_tiny', depths=layers, dims=dims, widen=0.5, **arguments)
    if family.startswith('vgg'):
        layout: list[int | str] = []
        for _ in range(rng.randint(1, 3)):
            layout += [rng.randint(1, 90) for _ in range(rng.randint(1, 2))] + ['M']
        name = {'vgg': 'wide_deepmoe_vgg11_bn', 'vgg_cifar': 'wide_deepmoe_vgg16_cifar'}[family]
        more = {'mlp_ratio': 1 / 64} if family == 'vgg' else {}
        return timm.create_model(name, layout=layout, **more, **arguments)
    per_block = 2 if family in ('bottleneck', 'dilated') else 1
    layers = layers[:3] if family == 'cifar' else layers
    low, high = {'cifar': (0.1, 6), 'basic': (0.02, 0.6)}.get(family, (0.02, 0.8))
    arguments['widen'] = [rng.uniform(low, high) for _ in range(per_block * sum(layers))]
    name = {
        'basic': 'wide_deepmoe_resnet18',
        'bottleneck': 'wide_deepmoe_resnet50',
        'bottleneck_b': 'wide_deepmoe_resnet50b',
        'dilated': 'wide_deepmoe_drn_a_50',
        'cifar': 'wide_deepmoe_resnet20_cifar',
    }[family]
    return timm.create_model(name, layers=layers, **arguments)


def random_gates(widths: list[int], batch: int, rng: random.Random) -> list[Tensor]:
    """Gates of which images share none, some or all."""
    different = rng.choice([0, 0.05, 1])
    gates = []
    for width in widths:
        kept = rng.choice(FRACTIONS)
        chosen = (torch.rand(1, width) < kept).expand(batch, width)
        again = torch.rand(batch, width) < different
        chosen = torch.where(again, torch.rand(batch, width) < kept, chosen)
        gates.append(chosen * (torch.rand(batch, width) + 0.5))
    return gates


@pytest.fixture(autouse=True)
def same_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def check(seed: int) -> None:
    rng = random.Random(seed)
    torch.set_num_threads(rng.choice([1, 2, 3]))
    torch.manual_seed(seed)
    model: Any = randomise(random_network(rng), seed).eval()
    batch = rng.choice(BATCHES)
    model.gating = FixedGates(random_gates(expert_widths(model, model.expert_layers), batch, rng))
    least = max(32, model.feature_info[-1]['reduction'])
    x = torch.randn(batch, model.in_chans, rng.randint(least, least + 25), rng.randint(least, least + 25))
    if rng.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = model.forward_features(x)
    result = deepmoe_plugin.sparsify(model, cache_mb=0).forward_features(x)
    # In float64, as both may round: an activation that is all but zero would make any error a large one.
    reference = model.double().forward_features(x.double())
    scale = reference.abs().max().clamp_min(1e-30)
    error = ((result - reference).abs().max() / scale).item()
    masked = ((expected - reference).abs().max() / scale).item()
    assert error < max(TOLERANCE, 4 * masked), f'seed {seed}: {error:.1e}, masked {masked:.1e}'


@pytest.mark.parametrize('seed', range(50))
def test_random_networks(seed: int) -> None:
    check(seed)


def test_random_networks_have_every_kind_of_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def seen_tile(*arguments: Any) -> int:
        tile = tile_of(*arguments)
        seen.add(tile)
        return tile

    monkeypatch.setattr(weights, 'tile_of', seen_tile)
    for seed in range(6):
        check(seed)
    assert seen == {0, 2, 4}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_networks() -> None:
    for seed in range(2000):
        check(seed)
