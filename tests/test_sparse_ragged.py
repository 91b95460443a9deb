"""Ragged batches: the Triton kernels in the interpreter, on CPU tensors, and what surrounds them."""

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import SMALL, images, randomise, small
from test_sparse import STRUCTURES, assert_exact, network, random_gates, relative_error, with_gates
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.sparse import plan, ragged
from deepmoe_plugin.sparse.conv import GatherConv, WeightCache
from deepmoe_plugin.sparse.ragged import RaggedBatch, RaggedKept

pytest.importorskip('triton')


@pytest.fixture(scope='module')
def interpreted() -> Any:
    """The kernels for Triton's interpreter, beside those for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        path = importlib.util.find_spec('deepmoe_plugin.sparse.ragged_kernels').origin
        spec = importlib.util.spec_from_file_location('interpreted_kernels', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert module.INTERPRETED
    return module


@pytest.fixture
def kernels(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run ragged batches in the interpreter, in small tiles."""
    monkeypatch.setattr(ragged, 'kernels', lambda: interpreted)
    monkeypatch.setattr(ragged, 'available', lambda x: len(x) > 1)
    monkeypatch.setattr(ragged, 'TILES', ({'BLOCK_M': 16, 'BLOCK_N': 32},))
    monkeypatch.setattr(ragged, '_fastest', {})


def gates_of(counts: list[int], width: int, seed: int = 0) -> Tensor:
    """Gates (B, width) of which a given number, different for each image, is not zero."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(len(counts), width, generator=generator).argsort(1).argsort(1)
    kept = rank < torch.tensor(counts)[:, None]
    return kept * torch.rand(len(counts), width, generator=generator).add(0.5)


def masked(conv: nn.Conv2d, x: Tensor, gates_in: Tensor | None, gates_out: Tensor | None = None) -> Tensor:
    """What a ragged convolution computes, image by image, on all channels: those not kept are zero."""
    outputs = []
    for i in range(len(x)):
        y = x[i] if gates_in is None else x[i] * (gates_in[i] > 0)[:, None, None]
        y = conv(y[None].float())
        outputs.append(y if gates_out is None else y.relu() * gates_out[i][:, None, None])
    return torch.cat(outputs)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
GEOMETRIES = [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2)]


@torch.no_grad()
@pytest.mark.parametrize(
    ('geometry', 'packs', 'dtype'),
    [
        *((geometry, False, torch.float32) for geometry in GEOMETRIES),
        ((3, 2, 1, 1), True, torch.float32),
        ((3, 1, 2, 2), True, torch.bfloat16),
        ((1, 1, 0, 1), True, torch.float16),
        ((1, 1, 0, 1), False, torch.bfloat16),
        ((1, 1, 0, 1), False, torch.float16),
    ],
    ids=str,
)
def test_convolution(
    geometry: tuple[int, int, int, int], packs: bool, dtype: torch.dtype, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, stride, padding, dilation = geometry
    monkeypatch.setattr(ragged, 'PACK_POSITIONS', 0 if packs else 10**9)
    conv = nn.Conv2d(40, 33, kernel, stride, padding, dilation).to(dtype)
    sparse = GatherConv(conv, None, WeightCache(0))
    conv.float()
    gates_in, gates_out = gates_of([1, 0, 40], 40), gates_of([33, 17, 0], 33, 1)
    (reads, writes), (scale_in, scale_out) = RaggedBatch([gates_in, gates_out]).kept(slice(2))
    x = torch.randn(3, 40, 5, 6).to(dtype)
    compact = x.gather(1, reads.experts.long()[:, :, None, None].expand(-1, -1, 5, 6)).float()
    # What lies beyond an image's own slots must not be read, and what is in the unused ones of these must not matter.
    compact[(torch.arange(compact.shape[1]) >= reads.counts[:, None])] = torch.nan
    compact[(scale_in == 0) & (torch.arange(compact.shape[1]) < reads.counts[:, None])] = 0
    compact = compact.to(dtype)
    for given, gates, kept in ((x, None, None), (compact, gates_in, reads)):
        result = sparse(given, kept, writes, scale_out, relu=True)
        assert result.dtype == dtype
        assert result.shape[1] == writes.num_slots
        result = writes.widened(result, 33).float()
        assert relative_error(result, masked(conv, x, gates, gates_out)) < TOLERANCE[dtype]
    expected = masked(conv, x, gates_in)
    assert relative_error(sparse(compact, reads).float(), expected) < TOLERANCE[dtype]
    stream = torch.randn_like(expected).to(dtype)
    result = sparse(compact, reads, relu=True, add_to=stream)
    assert relative_error(result.float(), (stream.float() + expected).relu()) < TOLERANCE[dtype]


def test_slots() -> None:
    gates = [gates_of([3, 0, 20], 20), gates_of([1, 2, 16], 64), gates_of([0, 0, 0], 5)]
    batch = RaggedBatch(gates)
    assert batch.counts.tolist() == [[3, 0, 20], [1, 2, 16], [0, 0, 0]]
    for union, gate in zip(batch.union, gates, strict=True):
        assert union.tolist() == (gate > 0).any(0).tolist()
    kept, slots = batch.kept(slice(3))
    assert [k.num_slots for k in kept] == [32, 16, 16]
    assert kept[0].counts.tolist() == [16, 0, 32]
    for gate, experts, scale in zip(gates, kept, slots, strict=True):
        assert experts.experts.dtype == experts.counts.dtype == torch.int32
        for i in range(3):
            chosen = gate[i].nonzero()[:, 0]
            assert experts.experts[i, : len(chosen)].tolist() == chosen.tolist()
            assert torch.equal(scale[i, : len(chosen)], gate[i, chosen])
            assert not scale[i, len(chosen) :].any()
            assert experts.experts.max() < gate.shape[1]
    x = torch.randn(3, 32, 2, 2)
    wide = kept[0].widened(x, 20)
    assert torch.equal(wide[0, gates[0][0].nonzero()[:, 0]], x[0, :3])
    assert not wide[1].any()


def small_network(structure: str, **kwargs: Any) -> nn.Module:
    return randomise(small(structure, **kwargs)).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[GatherConv]:
    """Convolutions that ran ragged."""
    found = []
    original = ragged.convolve

    def convolve(conv: GatherConv, *args: Any) -> Tensor:
        found.append(conv)
        return original(conv, *args)

    monkeypatch.setattr(ragged, 'convolve', convolve)
    return found


@torch.no_grad()
@pytest.mark.parametrize('structure', SMALL)
def test_network(structure: str, kernels: Any, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, 'TILES', ({'BLOCK_M': 256, 'BLOCK_N': 64},))
    monkeypatch.setattr(plan, '_pays_ragged', lambda *args: True)
    model = small_network(structure)
    model = with_gates(model, random_gates(model, 3, 0.4))
    for layer, image in enumerate((0, 1, 2)[: len(model.expert_layers)]):
        model.gating.gates[layer][image] = 0
    assert_exact(model, images(3, 32))
    sides = {layer.conv for layer in model.expert_layers} | {layer.consumer for layer in model.expert_layers}
    assert len(calls) == len(sides - {'', 'pre_logits.fc1'})


@torch.no_grad()
@pytest.mark.parametrize('arguments', [{'act_layer': nn.SiLU}, {'block_args': {'attn_layer': 'se'}}], ids=str)
def test_variants(
    arguments: dict[str, Any], kernels: Any, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, 'TILES', ({'BLOCK_M': 256, 'BLOCK_N': 64},))
    monkeypatch.setattr(plan, '_pays_ragged', lambda *args: True)
    model = small_network('cifar', layers=(1, 1, 1), **arguments)
    assert_exact(with_gates(model, random_gates(model, 2, 0.4)), images(2, 16))
    assert calls


@torch.no_grad()
def test_features(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, '_pays_ragged', lambda *args: True)
    model = small_network('vgg_cifar')
    model = with_gates(model, random_gates(model, 2, 0.4))
    result, tapped = deepmoe_plugin.sparsify(model).forward_intermediates(images(2, 16))
    expected, references = model.forward_intermediates(images(2, 16))
    assert relative_error(result, expected) < 1e-5
    for feature, reference in zip(tapped, references, strict=True):
        assert relative_error(feature, reference) < 1e-5
