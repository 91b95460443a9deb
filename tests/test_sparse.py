"""Sparse execution computes what the masked network computes, whatever the gates (invariant 1)."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import FixedGates, images, randomise
from timm.layers import BlurPool2d
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.experts import expert_widths
from deepmoe_plugin.sparse import SparseNetwork, build

pytestmark = pytest.mark.usefixtures('always_sparse')

_CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(24, 40, 33, 48))
# Wide enough for layers to run on compact weights.
STRUCTURES = {
    'basic': ('wide_deepmoe_resnet18', dict(layers=(1, 2, 1, 1), widen=(1, 1.3, 1, 0.5, 0.3))),
    'bottleneck_a': ('wide_deepmoe_resnet50', dict(layers=(2, 1, 1, 1), widen=0.5)),
    'bottleneck_b': ('wide_deepmoe_resnet50b', dict(layers=(1, 1, 1, 1), widen=1)),
    'grouped': ('wide_deepmoe_resnet50', dict(layers=(1, 1, 1, 1), widen=0.5, experts_per_gate=16)),
    'dilated': ('wide_deepmoe_drn_a_50', dict(layers=(1, 1, 1, 2), widen=0.5)),
    'cifar': ('wide_deepmoe_resnet20_cifar', dict(layers=(1, 1, 2), widen=3)),
    'convnext': ('wide_deepmoe_convnext_tiny', dict(_CONVNEXT, widen=(2, 1, 0.5, 1.3))),
    'convnext_conv': ('wide_deepmoe_convnext_tiny', dict(_CONVNEXT, conv_mlp=True)),
    'convnextv2': ('wide_deepmoe_convnextv2_tiny', dict(_CONVNEXT)),
    'vgg': ('wide_deepmoe_vgg11_bn', dict(layout=(24, 'M', 40, 'M', 48, 64, 'M'), mlp_ratio=1 / 32)),
    'vgg_cifar': ('wide_deepmoe_vgg16_cifar', dict(layout=(24, 'M', 40, 33, 'M'))),
}
HEAVY = ('101', 'resnet34', 'vgg11', 'vgg13', 'vgg16_bn', 'vgg19', 'resnet110', 'drn', '_tiny', '_small', '_base')


def network(structure: str, seed: int = 1, **kwargs: Any) -> nn.Module:
    name, arguments = STRUCTURES[structure]
    return randomise(timm.create_model(name, **{'num_classes': 10, **arguments, **kwargs}), seed).eval()


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@torch.no_grad()
def assert_exact(model: nn.Module, x: Tensor, sparse: nn.Module | None = None) -> None:
    sparse = sparse or deepmoe_plugin.sparsify(model, cache_mb=0)
    expected = model(x)
    result = sparse(x)
    assert result.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    assert relative_error(result, expected) < (1e-12 if x.dtype == torch.float64 else 1e-5)


def random_gates(model: nn.Module, batch: int, kept: float, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gates = []
    for width in expert_widths(model, model.expert_layers):
        chosen = torch.rand(batch, width, generator=generator) < kept
        gates.append(chosen * torch.rand(batch, width, generator=generator).add(0.5) * scale)
    return gates


def with_gates(model: nn.Module, gates: list[Tensor]) -> nn.Module:
    model.gating = FixedGates(gates)
    return model


def compact_layers(sparse: Any, gates: list[Tensor]) -> int:
    """Layers that run on compact weights with these gates."""
    plan = deepmoe_plugin.sparse.plan.Plan(gates)
    found = sparse.executor.by_torch().segments()
    return sum(kept is not None for segment in found for group in plan.groups(segment, 4096) for kept in group.kept)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=pytest.mark.slow if any(part in name for part in HEAVY) else ())
        for name in timm.list_models('*deepmoe*')
    ],
)
def test_registered_model(name: str) -> None:
    model = randomise(timm.create_model(name, num_classes=7)).eval()
    size = 32 if 'cifar' in name else 64
    assert_exact(model, images(2, size))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batch', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_any_batch(structure: str, batch: int, dtype: torch.dtype) -> None:
    model = network(structure, dtype=dtype)
    gates = [gate.to(dtype) for gate in random_gates(model, batch, 0.4)]
    model = with_gates(model, gates)
    sparse = deepmoe_plugin.sparsify(model)
    assert compact_layers(sparse, gates) > 0
    assert_exact(model, images(batch, 33, dtype=dtype), sparse)


@pytest.mark.parametrize('size', [(32, 32), (35, 61), (97, 40)])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_any_size(structure: str, size: tuple[int, int]) -> None:
    model = network(structure)
    assert_exact(with_gates(model, random_gates(model, 2, 0.4)), torch.randn(2, 3, *size))


@pytest.mark.parametrize('count', [0, 1, None], ids=['none kept', 'one kept', 'all kept'])
@pytest.mark.parametrize('everywhere', [False, True])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_extreme_gates(structure: str, everywhere: bool, count: int | None) -> None:
    model = network(structure)
    gates = random_gates(model, 2, 0.4)
    for layer in range(len(gates)) if everywhere else (len(gates) // 2,):
        gates[layer] = torch.full_like(gates[layer], 0.7)
        if count is not None:
            gates[layer][:, count:] = 0
    assert_exact(with_gates(model, gates), images(2, 40))


@pytest.mark.parametrize('structure', STRUCTURES)
def test_images_that_share_experts(structure: str) -> None:
    model = network(structure)
    gates = random_gates(model, 2, 0.3)
    gates = [torch.cat([gate, 2 * gate, 0.5 * gate[1:]]) for gate in gates]
    sparse = deepmoe_plugin.sparsify(with_gates(model, gates))
    plan = deepmoe_plugin.sparse.plan.Plan(gates)
    partitions = [
        [group.images for group in plan.groups(segment, 4096)] for segment in sparse.executor.by_torch().segments()
    ]
    assert [[0, 2], [1, 3, 4]] in partitions
    assert_exact(model, images(5, 40), sparse)


@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_any_gate_scale(structure: str, scale: float) -> None:
    model = network(structure)
    assert_exact(with_gates(model, random_gates(model, 2, 0.4, scale=scale)), images(2, 40))


@pytest.mark.parametrize('structure', ['bottleneck_a', 'vgg'])
def test_gates_of_the_gating_network(structure: str) -> None:
    model = network(structure)
    with torch.no_grad():
        model.gating.gates.weight.sub_(0.1)
    assert_exact(model, images(3, 64))


@pytest.mark.parametrize(
    'arguments',
    [
        {'stem_type': 'deep', 'stem_width': 16},
        {'avg_down': True},
        {'replace_stem_pool': True},
        {'act_layer': nn.SiLU},
        {'block_args': {'attn_layer': 'se'}},
        {'aa_layer': nn.AvgPool2d},
        {'aa_layer': BlurPool2d},
        {'output_stride': 16},
    ],
    ids=str,
)
@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a'])
def test_variants_of_timm(structure: str, arguments: dict[str, Any]) -> None:
    model = network(structure, **arguments)
    assert_exact(with_gates(model, random_gates(model, 2, 0.4)), images(2, 64))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    structure=st.sampled_from(['cifar', 'bottleneck_a', 'bottleneck_b']),
    more=st.integers(0, 2),
    widen=st.floats(0.1, 0.4),
    arguments=st.sampled_from([{}, {'act_layer': nn.SiLU}, {'block_args': {'attn_layer': 'se'}}]),
    batch=st.integers(1, 4),
    size=st.tuples(st.integers(32, 50), st.integers(32, 50)),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_random_resnet(
    structure: str,
    more: int,
    widen: float,
    arguments: dict[str, Any],
    batch: int,
    size: tuple[int, int],
    kept: float,
    seed: int,
) -> None:
    layers = [1, 1, 1] if structure == 'cifar' else [1, 1, 1, 1]
    layers[more] += 1
    widen = 10 * widen if structure == 'cifar' else widen
    model = network(structure, seed, layers=layers, widen=widen, dtype=torch.float64, **arguments)
    gates = [gate.double() for gate in random_gates(model, batch, kept, seed)]
    generator = torch.Generator().manual_seed(seed)
    assert_exact(with_gates(model, gates), torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    layout=st.lists(st.one_of(st.integers(1, 70), st.just('M')), min_size=1, max_size=5),
    cifar=st.booleans(),
    batch=st.integers(1, 4),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_random_vgg(layout: list[int | str], cifar: bool, batch: int, kept: float, seed: int) -> None:
    structure = 'vgg_cifar' if cifar else 'vgg'
    layout = [17, *layout, 'M']
    model = network(structure, seed, layout=layout, dtype=torch.float64, **({} if cifar else {'mlp_ratio': 1 / 64}))
    gates = [gate.double() for gate in random_gates(model, batch, kept, seed)]
    size = max(32, model.feature_info[-1]['reduction'])
    assert_exact(with_gates(model, gates), images(batch, size, seed=seed, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize('structure', STRUCTURES)
def test_features(structure: str) -> None:
    model = network(structure)
    model = with_gates(model, random_gates(model, 2, 0.4))
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2, 48)
    assert relative_error(sparse.forward_features(x), model.forward_features(x)) < 1e-5
    for arguments in ({}, {'indices': [1], 'stop_early': True}, {'indices': 2, 'intermediates_only': True}):
        expected = model.forward_intermediates(x, **arguments)
        result = sparse.forward_intermediates(x, **arguments)
        if 'intermediates_only' not in arguments:
            assert relative_error(result[0], expected[0]) < 1e-5
            result, expected = result[1], expected[1]
        for feature, reference in zip(result, expected, strict=True):
            assert relative_error(feature, reference) < 1e-5
    features = sparse.forward_features(x)
    assert relative_error(sparse.forward_head(features), model(x)) < 1e-5


@torch.no_grad()
def test_features_only() -> None:
    model = network('bottleneck_a', features_only=True)
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2, 64)
    results, expected = sparse(x), model(x)
    assert isinstance(sparse.model, SparseNetwork)
    assert len(results) == len(expected) == 5
    for feature, reference in zip(results, expected, strict=True):
        assert relative_error(feature, reference) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('structure', STRUCTURES)
def test_without_compiler(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, 'compiler', lambda: None)
    monkeypatch.setattr(build, '_found', build._found.__wrapped__)
    assert build.library() is None
    model = network(structure)
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 2, 0.4)))
    for _ in range(3):  # the third time from the cache
        assert_exact(model, images(2, 40), sparse)


@torch.no_grad()
def test_bfloat16() -> None:
    model = network('bottleneck_a')
    gates = random_gates(model, 2, 0.4)
    expected = with_gates(copy.deepcopy(model), gates)(images(2, 64))
    low = with_gates(model.bfloat16(), gates)
    features = deepmoe_plugin.sparsify(low).forward_features(images(2, 64, dtype=torch.bfloat16))
    low.float()
    reference = low.forward_features(images(2, 64))
    assert features.dtype == torch.bfloat16
    assert relative_error(features.float(), reference) < 0.03
    assert torch.isfinite(expected).all()


@torch.no_grad()
def test_two_threads() -> None:
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model, cache_mb=0.05)
    inputs = [images(1 + seed % 2, 40 + seed % 3, seed=seed) * 3 for seed in range(24)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(sparse, inputs * 2))
    for result, reference in zip(results, expected * 2, strict=True):
        assert relative_error(result, reference) < 1e-5


@torch.no_grad()
def test_image_does_not_depend_on_the_others() -> None:
    model = network('bottleneck_a', dtype=torch.float64)
    gates = [gate.double() for gate in random_gates(model, 4, 0.3)]
    gates = [torch.cat([gate, gate[:2]]) for gate in gates]
    x = images(6, 48, dtype=torch.float64)
    together = deepmoe_plugin.sparsify(with_gates(model, gates))(x)
    for i in range(6):
        alone = deepmoe_plugin.sparsify(with_gates(model, [gate[i : i + 1] for gate in gates]))(x[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-12
