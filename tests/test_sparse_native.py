"""Native code of sparse execution on the CPU: the gather of kept weights, and convolution in tiles."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import images
from test_sparse import assert_exact, network, random_gates, relative_error, with_gates
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.sparse import conv as sparse_conv
from deepmoe_plugin.sparse import gather, native, tiles
from deepmoe_plugin.sparse.conv import GatherConv, WeightCache
from deepmoe_plugin.sparse.gather import LANES, gather_kernel
from deepmoe_plugin.sparse.plan import Kept
from deepmoe_plugin.sparse.tiles import BLOCK, TiledWeight


def need_tiles(dtype: torch.dtype) -> None:
    if not tiles.available(dtype):
        pytest.skip("needs numba, the OpenMP library of GNU and the processor's vectors")


def tiled(weight: Tensor) -> Tensor:
    """Weights (O, I, kh, kw) as tiles read them."""
    outputs, inputs = weight.shape[:2]
    pair = tiles.pair_of(weight.dtype)
    blocks = -(-outputs // BLOCK)
    taps = weight.shape[2] * weight.shape[3]
    full = weight.new_zeros(blocks * BLOCK, inputs, taps)
    full[:outputs] = weight.flatten(2)
    return full.view(blocks, BLOCK, inputs // pair, pair, taps).permute(0, 4, 2, 1, 3).contiguous()


def gathered(kernel: Any, stored: Tensor, inputs: np.ndarray, outputs: np.ndarray, by_output: bool = False) -> None:
    """Compare what the gather writes with torch's indexing."""
    given = stored
    if by_output:
        rows = torch.cat([stored.permute(2, 0, 1), stored.new_zeros(1, *stored.shape[:2])])
        given = rows[:-1]
    channels = stored.shape[2]
    bias, gate = torch.randn(channels).to(stored.dtype), torch.rand(3, channels)
    kept = stored[:, torch.from_numpy(inputs)][:, :, torch.from_numpy(outputs)]
    num_inputs, num_outputs = kept.shape[1:]
    expected = tiled(kept.permute(2, 1, 0)[..., None]).flatten()
    written = torch.full((len(expected) + 1,), 7, dtype=stored.dtype)
    biases = torch.full((num_outputs + 1,), 7, dtype=stored.dtype)
    gates = torch.full((3 * num_outputs + 1,), 7.0)
    masks = torch.from_numpy(inputs), torch.from_numpy(outputs)
    queue, weight = native.Queue(), TiledWeight(written.data_ptr(), num_outputs, num_inputs, written)
    kernel(queue, given, bias, gate, *masks, weight, biases, gates)
    queue.run()
    assert torch.equal(written[:-1], expected)
    assert torch.equal(biases[:-1], bias[outputs])
    assert torch.equal(gates[:-1], gate[:, outputs].flatten())
    assert written[-1] == biases[-1] == gates[-1] == 7
    biases.fill_(7)
    kernel(queue, given, bias, None, *masks, weight, biases, None)
    queue.run()
    assert torch.equal(biases[:-1], bias[outputs])


def random_weights(taps: int, inputs: int, outputs: int, dtype: torch.dtype) -> Tensor:
    buffer = torch.randn(taps * inputs * outputs + LANES).to(dtype)
    return buffer[:-LANES].view(taps, inputs, outputs)


@pytest.mark.parametrize('compacts', [True, False], ids=['vectors', 'one by one'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('channels', [1, 15, 16, 33, 128, 200])
def test_gather(channels: int, dtype: torch.dtype, compacts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tiles(dtype)
    if compacts and not gather._has_compaction(tiles.pair_of(dtype)):
        pytest.skip('needs AVX-512')
    monkeypatch.setattr(gather, '_has_compaction', lambda pair: compacts)
    kernel = gather_kernel.__wrapped__(dtype)
    rng = np.random.default_rng(channels)
    stored = random_weights(9, 20, channels, dtype)
    for count in {0, 1, channels // 2, channels}:
        outputs = rng.permutation(channels) < count
        inputs = rng.permutation(20) < 2 * rng.integers(1, 11)
        gathered(kernel, stored, inputs, outputs)
        if dtype == torch.float32:
            gathered(kernel, stored, rng.permutation(20) < 7, outputs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('channels', [1, 15, 64, 130])
@pytest.mark.parametrize('num_inputs', [32, 96])
def test_gather_of_all_inputs(num_inputs: int, channels: int, dtype: torch.dtype) -> None:
    need_tiles(dtype)
    rng = np.random.default_rng(channels)
    stored = random_weights(9, num_inputs, channels, dtype)
    for count in {0, 1, channels // 2, channels}:
        outputs = rng.permutation(channels) < count
        gathered(gather_kernel(dtype, True), stored, np.ones(num_inputs, dtype=bool), outputs, by_output=True)


@pytest.mark.parametrize('by_output', [False, True])
def test_gather_in_threads(by_output: bool) -> None:
    need_tiles(torch.float32)
    kernel = gather_kernel(torch.float32, by_output)
    stored = random_weights(9, 64, 64, torch.float32)

    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        inputs = rng.permutation(64) < (64 if by_output else 40)
        gathered(kernel, stored, inputs, rng.permutation(64) < 30, by_output)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(200)))


def convolve(conv: nn.Conv2d, x: Tensor, **kwargs: Any) -> Tensor:
    weight = tiled(conv.weight.detach())
    assert conv.bias is not None
    given = TiledWeight(weight.data_ptr(), conv.out_channels, conv.in_channels, weight)
    geometry = conv.padding, conv.stride, conv.dilation
    queue = native.Queue()
    y = tiles.convolve(queue, x, given, conv.bias.detach(), conv.kernel_size, geometry, **kwargs)
    queue.run()
    return y


GEOMETRIES = {
    '1x1': {'kernel_size': 1},
    '1x1, stride 2': {'kernel_size': 1, 'stride': 2},
    '1x1, padded': {'kernel_size': 1, 'padding': 1},
    '3x3': {'kernel_size': 3, 'padding': 1},
    '3x3, stride 2': {'kernel_size': 3, 'padding': 1, 'stride': 2},
    '3x3, dilation 4': {'kernel_size': 3, 'padding': 4, 'dilation': 4},
    '3x3, wide padding': {'kernel_size': 3, 'padding': 5},
    '7x1': {'kernel_size': (7, 1), 'padding': (3, 0), 'stride': (1, 3)},
}


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('batch', 'size'), [(1, (3, 1)), (1, (14, 15)), (3, (8, 7)), (1, (4, 230)), (2, (60, 60))])
@pytest.mark.parametrize(('inputs', 'outputs'), [(16, 1), (34, 75), (64, 256)])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_tiles(geometry: str, inputs: int, outputs: int, batch: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    need_tiles(dtype)
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(inputs, outputs, **GEOMETRIES[geometry]).to(dtype)
    if min(size) == 1 and geometry == '7x1':
        size = size[0], 4
    x = torch.randn(batch, inputs, *size).to(dtype)
    weight, bias = conv.weight.double(), conv.bias.double()
    y = F.conv2d(x.double(), weight, bias, conv.stride, conv.padding, conv.dilation)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    result = convolve(conv, x)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(result.double(), y) < tolerance
    gate = torch.rand(batch, outputs)
    expected = y.relu() * gate[:, :, None, None].double()
    assert relative_error(convolve(conv, x, relu=True, gate=gate).double(), expected) < tolerance
    stream = torch.randn(y.shape).to(dtype)
    expected = (y + stream.double()).relu()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        given = stream.clone(memory_format=memory_format)
        assert relative_error(convolve(conv, x, relu=True, add_to=given).double(), expected) < tolerance


@torch.no_grad()
@pytest.mark.parametrize('threads', [1, 3])
def test_tiles_on_any_number_of_threads(threads: int) -> None:
    need_tiles(torch.float32)
    conv, x = nn.Conv2d(32, 100, 3, padding=1), torch.randn(1, 32, 20, 20)
    expected = convolve(conv, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(convolve(conv, x), expected)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_tiles_let_nan_through() -> None:
    need_tiles(torch.float32)
    for dtype in filter(tiles.available, (torch.float32, torch.bfloat16)):
        x = torch.randn(1, 16, 2, 2).to(dtype)
        x[0, 3, 0, 1] = torch.nan
        y = convolve(nn.Conv2d(16, 70, 1).to(dtype), x, relu=True)
        assert y.isnan().any(1).tolist() == [[[False, True], [False, False]]]
        assert y[0, :, 0, 1].isnan().all()


@torch.no_grad()
def test_tiles_refuse_what_they_would_read_beyond() -> None:
    need_tiles(torch.float32)
    conv = nn.Conv2d(16, 16, 3)
    for shape in ((1, 8, 9, 9), (1, 16, 2, 9)):
        with pytest.raises(ValueError, match='3x3 convolution of 16 channels cannot run on'):
            convolve(conv, torch.randn(shape))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_tiles_are_available(dtype: torch.dtype) -> None:
    """Where this fails, sparse execution is right but slow: torch may have renamed its products."""
    if native.openmp() is None or not native.features() >= tiles._NEEDS[dtype]:
        pytest.skip("needs numba, the OpenMP library of GNU and the processor's vectors")
    assert tiles.available(dtype)


@pytest.mark.parametrize('limit', ['AVX2', 'avx512_core'])
def test_limited_processors_have_no_products_in_bfloat16(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN would end the process."""
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert not tiles.available.__wrapped__(torch.bfloat16)
    assert tiles.available.__wrapped__(torch.float32) == tiles.available(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize('reason', ['odd inputs', 'oneDNN off'])
def test_bfloat16_without_products(reason: str) -> None:
    conv = nn.Conv2d(33 if reason == 'odd inputs' else 34, 40, 3, padding=1).bfloat16()
    sparse = GatherConv(conv, None, WeightCache(0))
    x = torch.randn(2, conv.in_channels, 6, 6).bfloat16()
    with torch.backends.mkldnn.flags(enabled=reason == 'odd inputs'):  # type: ignore[no-untyped-call]
        assert relative_error(sparse(x).float(), conv(x).float()) < 1e-2


@torch.no_grad()
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    need_tiles(torch.bfloat16)
    conv = nn.Conv2d(64, 64, 1).bfloat16()
    conv.weight.copy_(torch.eye(64)[:, :, None, None])
    x = torch.randn(1, 64, 20, 20).bfloat16()
    assert torch.equal(convolve(conv, x), (x.float() + conv.bias.float()[:, None, None]).bfloat16())


@torch.no_grad()
def test_cache_has_no_weights_that_are_yet_to_be_gathered() -> None:
    """Another thread would compute with what happens to be in their memory."""
    need_tiles(torch.float32)
    cache = WeightCache(2**20)
    sparse = GatherConv(nn.Conv2d(32, 64, 3, padding=1), None, cache)
    x, writes = torch.randn(1, 32, 4, 4), Kept(np.arange(64) % 2 == 0, torch.device('cpu'))
    expected = sparse(x, writes=writes)
    queue = native.Queue()
    y = sparse(x, writes=writes, queue=queue)
    assert not cache.size
    queue.run()
    assert cache.size
    assert torch.equal(y, expected)
    assert torch.equal(sparse(x, writes=writes), expected)


@torch.no_grad()
def test_what_does_not_run_in_tiles_waits_for_what_does() -> None:
    need_tiles(torch.float32)
    first, second = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 4, 1)
    queue, x = native.Queue(), torch.randn(1, 32, 60, 60)
    y = GatherConv(first, None, WeightCache(0))(x, queue=queue)
    y.fill_(torch.nan)
    assert relative_error(GatherConv(second, None, WeightCache(0))(y, queue=queue), second(first(x))) < 1e-5


@torch.no_grad()
def test_workspace_is_as_large_as_the_largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    need_tiles(torch.float32)
    workspace = native.Workspace()
    monkeypatch.setattr(sparse_conv, '_weights', workspace)
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model, cache_mb=0)
    for seed in range(10):
        with_gates(model, random_gates(model, 1, 0.2 + 0.06 * seed, seed))
        assert_exact(model, images(1, 40), sparse)
    largest = max(conv.stored.nbytes for block in sparse.view().modules() for conv in getattr(block, 'convs', ()))
    assert 0 < workspace.memory.nbytes <= largest


@torch.no_grad()
@pytest.mark.parametrize('reads_all', [False, True])
@pytest.mark.parametrize('channels', [48, 64])
@pytest.mark.parametrize('size', [5, 8, 20])
@pytest.mark.parametrize('geometry', [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2)])
def test_one_convolution(geometry: tuple[int, int, int, int], size: int, channels: int, reads_all: bool) -> None:
    kernel, stride, padding, dilation = geometry
    conv = nn.Conv2d(channels, 40, kernel, stride, padding, dilation)
    sparse = GatherConv(conv, None, WeightCache(0), reads_all)
    x = torch.randn(2, channels, size, size)
    chosen_in, chosen_out = np.arange(channels) % 3 == 0, np.arange(40) % 5 < 2
    for reads in (None, Kept(chosen_in, x.device)):
        for writes in (None, Kept(chosen_out, x.device)):
            masked = x if reads is None else x * torch.from_numpy(chosen_in)[:, None, None]
            kept = slice(None) if writes is None else chosen_out
            expected = conv(masked)[:, kept]
            given = x if reads is None else x[:, chosen_in]
            gate = torch.rand(2, 40)
            assert relative_error(sparse(given, reads, writes), expected) < 1e-5
            for batch in (1, 2):
                result = sparse(given[:batch], reads, writes, gate[:batch], relu=True)
                reference = expected[:batch].relu() * gate[:batch, kept, None, None]
                assert relative_error(result, reference) < 1e-5
            stream = torch.randn_like(expected).contiguous(memory_format=torch.channels_last)
            reference = (stream + expected).relu()
            assert relative_error(sparse(given, reads, writes, relu=True, add_to=stream), reference) < 1e-5
