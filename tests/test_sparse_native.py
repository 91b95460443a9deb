"""Native code of sparse execution on the CPU, beside plain NumPy that says what it computes.

Tests run it with every address checked (see `build.CHECKED`). Longer than other files: every operation is compared with
NumPy by the same few helpers.
"""

import ctypes
import functools
import itertools
import logging
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import images
from test_sparse import assert_exact, network, random_gates, relative_error, with_gates
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.models.deepmoe_convnext import GatedResponseNorm
from deepmoe_plugin.sparse import build, layout, program
from deepmoe_plugin.sparse.operations import (
    Average,
    Convolve,
    Depthwise,
    Norms,
    Operation,
    Pool,
    Respond,
    Scale,
    Softmax,
    Trace,
)
from deepmoe_plugin.sparse.program import Program
from deepmoe_plugin.sparse.weights import PackedWeight

pytestmark = pytest.mark.skipif(build.library() is None, reason='needs a C++ compiler and the OpenMP library of GNU')
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


# ------------------------------------------------------------------------------------------ what it should compute


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """Sum over kernel positions of pixels times weights; (B, C, H, W), (O, C, kh, kw), (O,)."""
    (ph, pw), (sh, sw), (dh, dw) = conv.padding, conv.stride, conv.dilation  # type: ignore[misc]
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    kh, kw = weight.shape[2:]
    height, width = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    result = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for row in range(kh):
        for column in range(kw):
            part = x[:, :, row * dh :: sh, column * dw :: sw][:, :, :height, :width]
            result += np.einsum('bchw,oc->bohw', part, weight[:, :, row, column])
    return result


def depthwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, conv: nn.Conv2d) -> np.ndarray:
    """A convolution in which each channel reads itself only; weight (C, 1, kh, kw)."""
    channels = len(weight)
    own = np.eye(channels)[:, :, None, None] * weight
    return convolution(x, own, np.zeros(channels) + bias, conv)


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    """Each pixel's channels to a mean of zero and a variance of one, times weights, plus biases."""
    result = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + norm.eps)
    if norm.elementwise_affine:
        weight, bias = (part.detach().double().numpy()[:, None, None] for part in (norm.weight, norm.bias))
        result = result * weight + bias
    return result


def response_norm(x: np.ndarray, gate: np.ndarray, norm: GatedResponseNorm) -> np.ndarray:
    """GRN of gated channels: the mean of their norms is weighted by their gates (B, C), which multiply their biases."""
    weight, bias = (part.detach().double().numpy()[:, None, None] for part in (norm.weight, norm.bias))
    norms = np.sqrt((x**2).sum((2, 3), keepdims=True))
    mean = norms.sum(1, keepdims=True) / gate.sum(1)[:, None, None, None]
    return x + weight * x * norms / (mean + norm.eps) + bias * gate[:, :, None, None]


def pooling(x: np.ndarray, kernel: int, padding: int, stride: int) -> np.ndarray:
    """The largest value under the kernel."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=-np.inf)
    size = [(length - kernel) // stride + 1 for length in x.shape[2:]]
    parts = [
        x[:, :, row::stride, column::stride][:, :, : size[0], : size[1]]
        for row in range(kernel)
        for column in range(kernel)
    ]
    return np.max(parts, axis=0)


# ------------------------------------------------------------------------------------------------------- harness


def run(operations: list[Operation], x: Tensor, gates: list[Tensor], wanted: str) -> np.ndarray:
    """Run operations on images that the value `x` holds; experts are those with a gate."""
    trace = Trace(operations, 'x', wanted, {}, {}, {}, None)
    native = Program(trace, [gate.shape[1] for gate in gates])
    native.set_limits([1] * len(gates))
    return native.run(x, gates, [wanted])[0].double().numpy()


def random_conv(inputs: int, outputs: int, dtype: torch.dtype, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, **{'kernel_size': 3, 'padding': 1, **kwargs}).to(dtype).requires_grad_(False)


def arrays(conv: nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    assert conv.bias is not None
    return conv.weight.double().numpy(), conv.bias.double().numpy()


def gates_of(batch: int, width: int, kept: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, width, generator=generator) < kept
    return chosen * (torch.rand(batch, width, generator=generator) + 0.5)


def close(result: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> bool:
    return bool(np.abs(result - expected).max() <= TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-30))


GEOMETRIES = {
    '1x1': {'kernel_size': 1, 'padding': 0},
    '1x1, stride 2': {'kernel_size': 1, 'padding': 0, 'stride': 2},
    '1x1, padded': {'kernel_size': 1, 'padding': 1},
    '3x3': {},
    '3x3, stride 2': {'stride': 2},
    '3x3, dilation 4': {'padding': 4, 'dilation': 4},
    '3x3, wide padding': {'padding': 5},
    '7x1': {'kernel_size': (7, 1), 'padding': (3, 0), 'stride': (1, 3)},
}
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
LEVELS = {'this processor': '', 'AVX2': '-mno-avx512f', 'plain vectors': '-march=x86-64'}  # Arm compiles the last ones
levels = pytest.mark.parametrize('level', LEVELS, indirect=True)
_found = build._found.__wrapped__


@functools.cache
def library_with(flag: str) -> tuple[Any, str]:
    before, build.FLAGS = build.FLAGS, (*build.FLAGS, flag)
    try:
        return _found()
    finally:
        build.FLAGS = before


@pytest.fixture
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Native code for what fewer processors than this one can do."""
    if flag := LEVELS[request.param]:
        if platform.machine() != 'x86_64':
            pytest.skip('names features of x86-64')
        monkeypatch.setattr(build, '_found', lambda: library_with(flag))
        assert not build.missing()
    return request.param


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize(('batch', 'size'), [(1, (5, 4)), (3, (8, 7)), (2, (20, 30))])
@pytest.mark.parametrize('channels', [(3, 20, 1), (34, 75, 40), (20, 130, 65)])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_convolutions(
    geometry: str, channels: tuple[int, int, int], batch: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Gated outputs, then gated inputs and outputs, then gated inputs and a residual sum, against NumPy."""
    torch.manual_seed(0)
    first = random_conv(channels[0], channels[1], dtype, **GEOMETRIES[geometry])
    second = random_conv(channels[1], channels[2], dtype, **GEOMETRIES['3x3'])
    third = random_conv(channels[2], channels[1], dtype, **GEOMETRIES['1x1'])
    shortcut = random_conv(channels[0], channels[1], dtype, **GEOMETRIES[geometry])
    gates = [gates_of(batch, channels[1], 0.4, 1), gates_of(batch, channels[2], 0.6, 2)]
    x = torch.randn(batch, channels[0], *size).to(dtype)
    operations = [
        Convolve(['x'], 'shortcut', conv=shortcut),
        Convolve(['x'], 'a', 0, conv=first, activation='relu'),
        Convolve(['a'], 'b', 1, conv=second, activation='relu'),
        Convolve(['b'], 'c', conv=third, residual='shortcut', activation='relu'),
    ]
    given = x.double().numpy()
    a = np.maximum(convolution(given, *arrays(first), first), 0) * gates[0].double().numpy()[:, :, None, None]
    b = np.maximum(convolution(a, *arrays(second), second), 0) * gates[1].double().numpy()[:, :, None, None]
    c = convolution(b, *arrays(third), third) + convolution(given, *arrays(shortcut), shortcut)
    assert close(run(operations, x, gates, 'a'), a, dtype)
    assert close(run(operations, x, gates, 'b'), b, dtype)
    assert close(run(operations, x, gates, 'c'), np.maximum(c, 0), dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize(('batch', 'size'), [(1, (4, 5)), (2, (8, 8)), (1, (16, 16)), (1, (17, 16))])
@pytest.mark.parametrize('geometry', [dict(kernel_size=(5, 3), padding=(2, 1)), dict(padding=2, dilation=2)], ids=str)
def test_kernel_rows_one_by_one(
    geometry: dict[str, Any], batch: int, size: tuple[int, int], threads: int, dtype: torch.dtype
) -> None:
    """Small maps, many weights: each kernel row is gathered, then its products are added to the sums of those before.

    Up to 256 pixels wait for the next row: the largest map has more.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    first, second = random_conv(8, 50, dtype), random_conv(50, 540, dtype, **geometry)
    third = random_conv(540, 270, dtype, **geometry)
    alike = [gates_of(1, width, 0.6, seed).expand(batch, -1).clone() for seed, width in enumerate((50, 540))]
    x = torch.randn(batch, 8, *size).to(dtype)
    operations = [
        Convolve(['x'], 'a', 0, conv=first, activation='relu'),
        Convolve(['a'], 'b', 1, conv=second, activation='relu'),
        Convolve(['b'], 'c', conv=third),
    ]
    a = np.maximum(convolution(x.double().numpy(), *arrays(first), first), 0)
    a *= alike[0].double().numpy()[:, :, None, None]
    b = np.maximum(convolution(a, *arrays(second), second), 0) * alike[1].double().numpy()[:, :, None, None]
    assert close(run(operations, x, alike, 'b'), b, dtype)
    assert close(run(operations, x, alike, 'c'), convolution(b, *arrays(third), third), dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize(('batch', 'size'), [(1, (5, 4)), (3, (8, 7)), (2, (11, 30))])
@pytest.mark.parametrize('channels', [5, 16, 75])
@pytest.mark.parametrize(
    'geometry', [dict(kernel_size=7, padding=3), dict(stride=2), dict(padding=2, dilation=2), dict(bias=False)], ids=str
)
def test_depthwise_convolutions_and_layer_norms(
    geometry: dict[str, Any], channels: int, batch: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = random_conv(channels, channels, dtype, groups=channels, **geometry)
    norm, plain = nn.LayerNorm(channels, eps=1e-3, dtype=dtype), nn.LayerNorm(channels, elementwise_affine=False)
    for parameter in norm.parameters():
        parameter.normal_()
    x = torch.randn(batch, channels, *size).to(dtype)
    operations = [
        Depthwise(['x'], 'a', conv=conv),
        Depthwise(['x'], 'b', conv=conv, norm=norm),
        Depthwise(['a'], 'c', norm=plain),
    ]
    weight, bias = conv.weight.double().numpy(), 0.0 if conv.bias is None else conv.bias.double().numpy()
    a = depthwise(x.double().numpy(), weight, bias, conv)
    assert close(run(operations, x, [], 'a'), a, dtype)
    assert close(run(operations, x, [], 'b'), layer_norm(a, norm), dtype)
    assert close(run(operations, x, [], 'c'), layer_norm(a, plain), dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize(('batch', 'size'), [(1, (5, 4)), (3, (8, 7))])
@pytest.mark.parametrize('channels', [5, 75])
def test_response_norms_of_kept_channels(channels: int, batch: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = random_conv(3, channels, dtype), random_conv(channels, 7, dtype)
    norm = GatedResponseNorm(channels).to(dtype)
    norm.weight.normal_()
    norm.bias.normal_()
    gates = [gates_of(batch, channels, 0.4, 1)]
    gates[0][:, 0] = 1  # an image that keeps nothing has no mean
    x = torch.randn(batch, 3, *size).to(dtype)
    operations = [
        Convolve(['x'], 'a', 0, conv=first, activation='relu'),
        Norms(['a'], 'norms', 0),
        Respond(['a', 'norms'], 'b', 0, norm=norm),
        Convolve(['b'], 'c', conv=second),
    ]
    gate = gates[0].double().numpy()
    a = np.maximum(convolution(x.double().numpy(), *arrays(first), first), 0) * gate[:, :, None, None]
    b = response_norm(a, gate, norm)
    assert close(run(operations, x, gates, 'b'), b, dtype)
    assert close(run(operations, x, gates, 'c'), convolution(b, *arrays(second), second), dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize('window', [(3, 1, 2), (2, 0, 2), (1, 0, 2)])
def test_pooling_scaling_and_widening(window: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernel, padding, stride = window
    conv, gates = random_conv(5, 37, dtype), [gates_of(3, 37, 0.5, 1)]
    x = torch.randn(3, 5, 9, 12).to(dtype)
    pair = tuple((number, number) for number in (kernel, padding, stride, 1))
    operations = [
        Convolve(['x'], 'a', 0, conv=conv),
        Scale(['a'], 'b', 0),
        Pool(['b'], 'c', 0, window=pair),
        Pool(['x'], 'd', window=pair, extra_channels=4),
    ]
    given, gate = x.double().numpy(), gates[0].double().numpy()[:, :, None, None]
    a = convolution(given, *arrays(conv), conv)
    assert close(run(operations, x, gates, 'b'), a * gate, dtype)
    assert close(run(operations, x, gates, 'c'), pooling(a * gate, *window), dtype)
    d = np.pad(pooling(given, *window), ((0, 0), (0, 4), (0, 0), (0, 0)))
    assert close(run(operations, x, gates, 'd'), d, dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize(('batch', 'size'), [(1, (5, 4)), (3, (8, 7))])
@pytest.mark.parametrize('channels', [1, 5, 16, 75])
def test_averages_and_softmax(channels: int, batch: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, after = random_conv(3, channels, dtype), random_conv(channels, channels, dtype)
    x = torch.randn(batch, 3, *size).to(dtype)
    operations = [
        Convolve(['x'], 'a', conv=conv),
        Average(['a'], 'b'),
        Softmax(['a'], 'c'),
        Convolve(['b'], 'd', conv=after),
        Convolve(['c'], 'e', conv=after),
    ]
    a = convolution(x.double().numpy(), *arrays(conv), conv)
    b = a.mean((2, 3), keepdims=True)
    powers = np.exp(a)
    c = powers / powers.sum(1, keepdims=True)
    assert close(run(operations, x, [], 'b'), b, dtype)
    assert close(run(operations, x, [], 'c'), c, dtype)
    assert close(run(operations, x, [], 'd'), convolution(b, *arrays(after), after), dtype)
    assert close(run(operations, x, [], 'e'), convolution(c, *arrays(after), after), dtype)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
def test_softmax_of_large_numbers() -> None:
    conv = random_conv(3, 3, torch.float32, **GEOMETRIES['1x1'], bias=False)
    conv.weight.copy_(torch.eye(3)[:, :, None, None])
    x = torch.tensor([1000.0, 999.0, -1000.0])[None, :, None, None]
    assert close(
        run([Convolve(['x'], 'a', conv=conv), Softmax(['a'], 'b')], x, [], 'b'), x.softmax(1).numpy(), torch.float32
    )


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize(('batch', 'layers'), [(1, {}), (13, {}), (2, dict(block_args=dict(attn_layer='se')))])
def test_any_number_of_threads(batch: int, layers: dict[str, Any], threads: int) -> None:
    """Torch runs squeeze-and-excitation, so that native code is called several times for a batch."""
    model = network('bottleneck_a', **layers)
    with_gates(model, random_gates(model, batch, 0.4))
    torch.set_num_threads(threads)
    assert_exact(model, images(batch, 40))


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize(('batch', 'size'), [(1, (3, 5)), (1, (12, 11)), (2, (2, 3))])
def test_blocks_that_a_thread_gathers_by_itself(
    batch: int, size: tuple[int, int], threads: int, dtype: torch.dtype
) -> None:
    """Thirteen blocks of kept outputs: one is left over for two threads, and for three."""
    torch.manual_seed(0)
    widths, kept = (96, 1300, 1250, 820), (800, 790)
    convs = [random_conv(inputs, outputs, dtype, **GEOMETRIES['1x1']) for inputs, outputs in itertools.pairwise(widths)]
    gates = [torch.zeros(batch, width) for width in widths[1:3]]
    for gate, count in zip(gates, kept, strict=True):
        for image in gate:
            image[torch.randperm(len(image))[:count]] = torch.rand(count) + 0.5
    x = torch.randn(batch, widths[0], *size).to(dtype)
    operations = [
        Convolve(['x'], 'a', 0, conv=convs[0], activation='relu'),
        Convolve(['a'], 'b', 1, conv=convs[1], activation='relu'),
        Convolve(['b'], 'c', conv=convs[2]),
    ]
    expected = [x.double().numpy()]
    for conv, gate in zip(convs, gates, strict=False):
        y = np.maximum(convolution(expected[-1], *arrays(conv), conv), 0)
        expected.append(y * gate.double().numpy()[:, :, None, None])
    expected.append(convolution(expected[-1], *arrays(convs[2]), convs[2]))
    torch.set_num_threads(threads)
    for name, y in zip('abc', expected[1:], strict=True):
        assert close(run(operations, x, gates, name), y, dtype)


def test_fewer_threads_than_asked_for() -> None:
    """Threads wait for as many as there are, not for as many as were asked for."""
    code = (
        'import torch, timm, deepmoe_plugin; torch.set_num_threads(3); torch.set_grad_enabled(False);'
        'model = timm.create_model("wide_deepmoe_resnet20_cifar").eval(); x = torch.randn(2, 3, 32, 32);'
        'torch.testing.assert_close(deepmoe_plugin.sparsify(model)(x), model(x), rtol=1e-4, atol=1e-5)'
    )
    environment = {**os.environ, 'OMP_THREAD_LIMIT': '2'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_many_callers() -> None:
    """Each thread has memory of its own, also while shapes change."""
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)))
    inputs = [images(1, 40 + seed % 3, seed=seed) for seed in range(12)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(sparse, inputs * 4))
    for result, reference in zip(results, expected * 4, strict=True):
        assert relative_error(result, reference) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('strides', ['channels last', 'sliced', 'expanded'])
def test_images_in_any_memory(strides: str) -> None:
    model = network('cifar')
    with_gates(model, random_gates(model, 2, 0.4))
    x = {
        'channels last': images(2).contiguous(memory_format=torch.channels_last),
        'sliced': images(4, 40)[::2, :, 3:35, ::1],
        'expanded': images(1).expand(2, 3, 32, 32),
    }[strides]
    assert_exact(model, x)


@torch.no_grad()
def test_empty_batch() -> None:
    model = network('cifar')
    assert deepmoe_plugin.sparsify(model)(images(2)[:0]).shape == (0, 10)


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@dtypes
def test_nan_goes_through(dtype: torch.dtype) -> None:
    conv = random_conv(16, 70, dtype, **GEOMETRIES['1x1'])
    x = torch.randn(1, 16, 2, 2).to(dtype)
    x[0, 3, 0, 1] = torch.nan
    y = run([Convolve(['x'], 'y', conv=conv, activation='relu')], x, [], 'y')
    assert np.isnan(y).any(1).tolist() == [[[False, True], [False, False]]]
    assert np.isnan(y[0, :, 0, 1]).all()


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    conv = random_conv(64, 64, torch.bfloat16, **GEOMETRIES['1x1'])
    conv.weight.copy_(torch.eye(64)[:, :, None, None])
    x = torch.randn(1, 64, 20, 20).bfloat16()
    y = run([Convolve(['x'], 'y', conv=conv)], x, [], 'y')
    assert conv.bias is not None
    assert np.array_equal(y, (x.float() + conv.bias.float()[:, None, None]).bfloat16().double().numpy())


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match='3x3 kernel cannot run on 2x9 pixels'):
        run(
            [Convolve(['x'], 'y', conv=random_conv(16, 16, torch.float32, padding=0))],
            torch.randn(1, 16, 2, 9),
            [],
            'y',
        )


def test_records_have_the_size_that_native_code_reads() -> None:
    sizes = [build.library().deepmoe_size(i) for i in range(7)]
    assert sizes == [
        layout.VALUES.itemsize,
        layout.OPERATIONS.itemsize,
        layout.PARTS.itemsize,
        layout.GROUPS.itemsize,
        ctypes.sizeof(layout.Header),
        layout.KEPT_BYTES,
        layout.MOVE_BYTES,
    ]


def test_packed_weights_lie_as_native_code_reads_them() -> None:
    conv = random_conv(18, 70, torch.float32)
    packed = PackedWeight(Convolve(['a'], 'b', conv=conv)).blocks
    assert packed is not None
    packed = packed.view(2, 9, 18, 64)
    for output in (0, 63, 64, 69):
        expected = conv.weight[output].flatten(1).t()
        assert torch.equal(packed[output // 64, :, :, output % 64], expected)
    assert not packed[1, :, :, 6:].any()


@pytest.mark.parametrize(('command', 'reason'), [(None, 'no C++ compiler'), ('/bin/false', 'does not build it')])
def test_what_is_missing_is_said(
    command: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, 'compiler', lambda: command)
    monkeypatch.setattr(build, '_found', functools.cache(build._found.__wrapped__))
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
        assert reason in build.missing()
    assert caplog.text.count(reason) == 1


def test_more_flags_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setenv(build.MORE_FLAGS, '-O1 -fsanitize=address')
    monkeypatch.setattr(build, '_built', lambda command, flags: taken.extend(flags) or '/nothing')
    assert 'does not build it' in _found()[1]
    assert taken[-2:] == ['-O1', '-fsanitize=address']


def test_schedules_do_not_pile_up() -> None:
    model = network('cifar')
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)))
    for size in range(32, 52):
        sparse(images(1, size))
    assert len(sparse.executor.native()._schedules) == program.MAX_SCHEDULES


@torch.no_grad()
@levels
@pytest.mark.usefixtures('level')
@pytest.mark.parametrize('structure', ['cifar', 'bottleneck_a', 'convnext', 'convnextv2', 'vgg_cifar'])
def test_networks_on_other_processors(structure: str) -> None:
    model = network(structure)
    assert_exact(with_gates(model, random_gates(model, 3, 0.4)), images(3, 40))


@torch.no_grad()
def test_kernels_too_wide_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, 'MAX_INPUTS', 100)
    model = network('cifar')
    sparse: Any = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)))
    assert_exact(model, images(1), sparse)
    assert sparse.executor._program is None


@torch.no_grad()
def test_weights_of_all_experts_are_made_when_all_are_kept() -> None:
    """Else they would take the memory of the network twice."""
    model = network('cifar')
    gates = random_gates(model, 1, 0.4)
    sparse: Any = deepmoe_plugin.sparsify(with_gates(model, gates))
    assert_exact(model, images(1), sparse)
    gated = [weight for weight in sparse.executor.native().weights.values() if weight.rows is not None]
    assert len(gated) == len(gates)
    assert all(weight.blocks is None for weight in gated)
    gates[1][:] = 1
    assert_exact(model, images(1), sparse)
    assert sum(weight.blocks is not None for weight in gated) == 1
    gates[0][:, : int(0.9 * gates[0].shape[1])] = 1  # more than a group selects
    assert_exact(model, images(1), sparse)
    assert sum(weight.blocks is not None for weight in gated) == 2
