"""Ragged batches: the Triton kernels in the interpreter, on CPU tensors, and what surrounds them.

Longer than other files: kernels, their interpreter on the host and the checks on a GPU need the same fixtures.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import SMALL, FixedGates, images, randomise, small
from test_sparse import assert_exact, random_gates, relative_error, with_gates
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import deepmoe_plugin
from deepmoe_plugin.sparse import plan, ragged
from deepmoe_plugin.sparse.conv import GatherConv, WeightCache
from deepmoe_plugin.sparse.engine import Settings, sparse_view
from deepmoe_plugin.sparse.fold import fold_norm, geometry_of
from deepmoe_plugin.sparse.plan import Reader, Segment
from deepmoe_plugin.sparse.ragged import RaggedBatch, RaggedKept
from deepmoe_plugin.sparse.trace import trace

pytestmark = pytest.mark.usefixtures('always_sparse')

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
    """Run ragged batches in the interpreter."""
    monkeypatch.setattr(ragged, 'kernels', lambda: interpreted)
    monkeypatch.setattr(ragged, 'available', lambda x: len(x) > 1)
    monkeypatch.setattr('deepmoe_plugin.sparse.program.available', lambda x: False)
    monkeypatch.setattr(ragged, 'TILES', ({'BLOCK_M': 256, 'BLOCK_N': 64},))
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
    monkeypatch.setattr(ragged, 'TILES', ({'BLOCK_M': 16, 'BLOCK_N': 32},))
    monkeypatch.setattr(ragged, 'PACK_POSITIONS', 0 if packs else 10**9)
    conv = nn.Conv2d(40, 33, kernel, stride, padding, dilation).to(dtype)
    sparse = GatherConv(*fold_norm(conv, None), geometry_of(conv), WeightCache(0))
    conv.float()
    gates_in, gates_out = gates_of([7, 40, 0], 40), gates_of([17, 33, 9], 33, 1)
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
@pytest.mark.parametrize('structure', [name for name in SMALL if 'grouped' not in name])  # gates are per expert here
def test_network(structure: str, kernels: Any, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, '_pays_ragged', lambda *args: True)
    model = small_network(
        structure, **({} if structure.startswith('vgg') else {'widen': 0.5 if structure == 'cifar' else 0.125})
    )
    model = with_gates(model, random_gates(model, 2, 0.4))
    for layer, image in enumerate((0, 1)[: len(model.expert_layers)]):
        model.gating.gates[layer][image] = 0
    assert_exact(model, images(2, 16 if 'cifar' in structure else 32))
    sides = {name for layer in model.expert_layers for name in (layer.conv, layer.consumer)}
    assert len(calls) == len(sides - {'', 'pre_logits.fc1'})


@torch.no_grad()
@pytest.mark.parametrize('arguments', [{'act_layer': nn.SiLU}, {'block_args': {'attn_layer': 'se'}}], ids=str)
def test_variants(
    arguments: dict[str, Any], kernels: Any, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_choice() -> None:
    """Ragged where images differ, keep little, and have enough positions for weights of their own."""
    segment = Segment(
        0, [64, 64], [Reader(64 * 64, 1, None, 0), Reader(64 * 64 * 9, 1, 0, 1), Reader(64 * 64, 1, 1, None)]
    )
    few, many = (
        [gates_of([20, 30, 10], 64, seed) for seed in (0, 1)],
        [gates_of([60, 50, 60], 64, seed) for seed in (0, 1)],
    )
    same = [gate[:1].expand(3, 64) for gate in few]

    def kept(gates: list[Tensor], positions: int) -> list[Any]:
        (group,) = plan.Plan(gates, is_ragged=True).groups(segment, positions)
        assert group.images == group.where.tolist() == [0, 1, 2]
        for experts, gate, own in zip(group.kept, group.gates, gates, strict=True):
            if not isinstance(experts, RaggedKept):
                assert torch.equal(gate, own)
            if isinstance(experts, plan.Kept):
                assert torch.equal(gate[:, experts.index].count_nonzero(1), own.count_nonzero(1))
        return group.kept

    assert all(isinstance(experts, RaggedKept) for experts in kept(few, 64))
    assert not any(isinstance(experts, RaggedKept) for experts in kept(few, 49))
    assert kept(many, 64) == [None, None]
    assert [len(experts) for experts in kept(same, 64)] == [32, 32]
    segment.ragged_limit = 0.25
    assert not any(isinstance(experts, RaggedKept) for experts in kept(few, 64))


@torch.no_grad()
@pytest.mark.parametrize('is_faster', [True, False])
def test_calibration(is_faster: bool, kernels: Any, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch) -> None:
    ran_ragged = []

    def timed(*functions: Callable[[], object]) -> bool:
        counts = []
        for function in functions:
            before = len(calls)
            function()
            counts.append(len(calls) > before)
        ran_ragged.append(counts)
        return is_faster

    monkeypatch.setattr('deepmoe_plugin.sparse.calibrate._is_faster', timed)
    monkeypatch.setattr('deepmoe_plugin.sparse.calibrate.FRACTIONS', (0.3,))
    model = small_network('vgg_cifar', layout=(16, 'M', 24))
    sparse = deepmoe_plugin.sparsify(model, calibrate=images(2, 16))
    assert [True, False] in ran_ragged
    assert not any(current for _, current in ran_ragged)
    assert sparse.settings.ragged_limit == pytest.approx(0.3 if is_faster else 0, abs=1e-5)
    assert copy.deepcopy(sparse).settings.ragged_limit == sparse.settings.ragged_limit
    model.gating = FixedGates(random_gates(model, 2, 0.25))
    sparse.settings.masked = False
    sparse.refresh()
    calls.clear()
    assert_exact(model, images(2, 16), sparse)
    assert bool(calls) is is_faster


def test_without_triton(interpreted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'triton'")

    works = ragged._runs.__wrapped__
    monkeypatch.setattr(ragged, 'kernels', lambda: interpreted)
    assert works(torch.device('cpu'))
    monkeypatch.setattr(ragged, 'kernels', missing)
    assert not works(torch.device('cpu'))
    assert 'triton' in caplog.text


class Copies(TorchDispatchMode):
    """Records copies between devices: (to, whether the host waits)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if function is torch.ops.aten._to_copy.default and args[0].device.type != result.device.type:
            self.found.append((result.device.type, not (kwargs or {}).get('non_blocking', False)))
        elif len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1:
            self.found.append((str(function), True))
        return result


class NoKernels:
    """Launches that do nothing."""

    INTERPRETED = False

    def __getattr__(self, name: str) -> Any:
        return {(grid, batch): lambda *args, **kwargs: None for grid in range(1, 999) for batch in (1, 3)}


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')
@pytest.mark.parametrize(('batch', 'is_ragged'), [(1, False), (3, True), (3, False)])
@pytest.mark.parametrize('structure', ['bottleneck_a', 'vgg'])
def test_host_waits_once(structure: str, batch: int, is_ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values that claim to lie on a GPU: what copies a value, or needs one, shows."""
    shape = {'layout': (48, 'M', 64, 40, 'M')} if structure == 'vgg' else {'widen': 1}
    gates = random_gates(small_network(structure, **shape), batch, 0.4)
    # Two images share a group.
    gates = [torch.cat([gate[:1], gate[:-1]]) if batch > 1 else gate for gate in gates]
    if is_ragged:
        known = RaggedBatch(gates)
        host = np.concatenate([known.counts.flatten(), *known.union]).astype(np.int32)
    else:
        host = np.concatenate(plan.Plan(gates).kept, axis=1)
    monkeypatch.setattr(FakeTensor, 'numpy', lambda self: host)
    monkeypatch.setattr(Tensor, 'pin_memory', lambda self: self)
    monkeypatch.setattr(torch.cuda, 'device_of', nullcontext)
    monkeypatch.setattr(ragged, 'kernels', NoKernels)
    monkeypatch.setattr(ragged, 'TILES', ragged.TILES[:1])
    monkeypatch.setattr(ragged, 'available', lambda x: is_ragged)
    monkeypatch.setattr(plan, 'MIN_REUSE', 0)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = small(structure, device='cuda', **shape).eval()
            model = with_gates(model, [gate.to('cuda') for gate in gates])
            view, executor = sparse_view(model, trace(model), Settings(), WeightCache(0))
            x = torch.empty(batch, 3, 32, 32, device='cuda')
            view(x)
            with Copies() as copies:
                view(x)
    finally:
        ragged._layout.cache_clear()
    found = copies.found
    assert found.pop(0) == ('cpu', True)
    groups_sent = len(executor.by_torch().segments()) if batch > 1 else 1
    assert found == [] if is_ragged else found == [('cuda', False)] * groups_sent


LISTS = {'reads': ('reads', 'counts_in'), 'writes': ('writes', 'counts_out')}


@pytest.mark.parametrize(
    ('dtype', 'lists', 'packs', 'taps', 'precision', 'tile'),
    [
        ('bf16', ('reads', 'writes'), False, 9, 'ieee', 0),
        ('bf16', ('reads', 'writes'), True, 9, 'ieee', 1),
        ('fp16', ('writes',), False, 1, 'ieee', 2),
        ('fp32', ('reads',), False, 1, 'tf32', 0),
        ('fp32', ('reads', 'writes'), False, 9, 'ieee', 3),
    ],
)
def test_compiles_for_an_h200(
    dtype: str,
    lists: tuple[str, ...],
    packs: bool,
    taps: int,
    precision: str,
    tile: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To machine code, on tensor cores but for exact float32, with copies that do not block."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deepmoe_plugin.sparse import ragged_kernels

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    options = dict(ragged.TILES[tile])
    writes = 'writes' in lists
    pointers = dict.fromkeys(['x', 'weight', 'bias', 'y'], dtype)
    pointers |= {'gate': 'fp32'} if writes else {'stream': dtype}
    pointers |= {name: 'i32' for side in lists for name in LISTS[side]}
    side = 3 if taps == 9 else 1
    constants = {
        **dict.fromkeys(('PAD_H', 'PAD_W'), side // 2),
        **dict.fromkeys(('STRIDE_H', 'STRIDE_W', 'DILATION_H', 'DILATION_W'), 1),
        **{name: options.pop(name) for name in ('BLOCK_M', 'BLOCK_N')},
        **{'TAPS': taps, 'KERNEL_W': side, 'PACKED': packs, 'RELU': True, 'PRECISION': precision},
        **{'UPCAST': False, 'BLOCK_K': 32 if dtype == 'fp32' else 64},
        'by_input' if writes else 'by_output': 1,
    }
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(ragged_kernels.convolve.arg_names):
        pointer = pointers.get(name.removesuffix('_ptr')) if name.endswith('_ptr') else None
        if name in constants or (name.endswith('_ptr') and pointer is None):
            signature[name], values[name] = 'constexpr', constants.get(name)
            continue
        signature[name] = 'i32' if pointer is None else f'*{pointer}'
        if pointer is not None or name.endswith('_pitch') or name.startswith('by_'):
            hints[(i,)] = [['tt.divisibility', 16]]
    source = ASTSource(ragged_kernels.convolve, signature, values, hints)
    built = build(source, target=GPUTarget('cuda', 90, 32), options=options)
    assert built.asm['cubin']
    assert ('wgmma.mma_async' in built.asm['ptx']) is (precision == 'tf32' or dtype != 'fp32')
    assert 'cp.async' in built.asm['ptx']
    assert built.metadata.shared <= 227 * 1024


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]


@torch.no_grad()
@pytest.mark.parametrize('dtype', [pytest.param(dtype, marks=needs_gpu) for dtype in TOLERANCE])
@pytest.mark.parametrize('structure', SMALL)
def test_network_on_a_gpu(
    structure: str, dtype: torch.dtype, calls: list[GatherConv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, '_pays_ragged', lambda *args: True)
    monkeypatch.setattr(torch.backends.cudnn.conv, 'fp32_precision', 'ieee')
    model = small_network(structure).to(dtype)
    x = images(5, 64, dtype=dtype)
    gates = random_gates(model, 5, 0.4)
    expected = with_gates(copy.deepcopy(model).float(), gates)(x.float())
    model = with_gates(model, [gate.cuda() for gate in gates]).cuda()
    result = deepmoe_plugin.sparsify(model)(x.cuda())
    assert calls
    assert relative_error(result.cpu().float(), expected) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize('batch', [pytest.param(batch, marks=needs_gpu) for batch in (1, 5)])
def test_gpu_is_waited_for_once(batch: int) -> None:
    model = small_network('bottleneck_a', widen=1).cuda()
    sparse = deepmoe_plugin.sparsify(model)
    x = images(batch, 128).cuda()
    sparse(x)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            sparse(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([warning for warning in found if 'synchroniz' in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ('arguments', 'bar'),
    [
        pytest.param(('wide_deepmoe_resnet50', '--batch', '64'), 1.5, marks=needs_gpu),
        pytest.param(('wide_deepmoe_drn_a_50', '--size', '1024', '2048'), 2.2, marks=needs_gpu),
    ],
    ids=str,
)
def test_speed_on_a_gpu(arguments: tuple[str, ...], bar: float, tmp_path: Path, capfd: Any) -> None:
    """The bars of docs/results/sparse.md, which are for an H200."""
    options = ('--device', 'cuda', '--dtype', 'bfloat16', '--calibrate', '--out', str(tmp_path / 'result'))
    command = [sys.executable, '-m', 'deepmoe_plugin', 'benchmark', *arguments, *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with capfd.disabled():
        print(done.stdout)
    (row,) = json.loads((tmp_path / 'result' / 'benchmark.json').read_text())['rows']
    assert row['speedup'] >= bar
