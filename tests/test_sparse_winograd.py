"""Convolutions with fewer products, beside plain NumPy; tests run native code with every address checked."""

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import images
from test_sparse import assert_exact, network, random_gates, with_gates
from test_sparse_native import arrays, close, convolution, gates_of, random_conv, run

import deepmoe_plugin
from deepmoe_plugin.sparse import build, plan, weights
from deepmoe_plugin.sparse.layout import CONVOLVE
from deepmoe_plugin.sparse.operations import Convolve
from deepmoe_plugin.sparse.plan import Reader, Segment
from deepmoe_plugin.sparse.winograd import tile_of

pytestmark = pytest.mark.skipif(build.library() is None, reason='needs a C++ compiler and the OpenMP library of GNU')
tiles = pytest.mark.parametrize('tile', [2, 4])
GEOMETRIES: dict[str, dict[str, Any]] = {
    'padded': {},
    'not padded': {'padding': 0},
    'padded wide': {'padding': 3},
    'dilated': {'padding': 2, 'dilation': 2},
    'dilated by more than a tile': {'padding': (6, 4), 'dilation': (6, 4)},
}


def run_in_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, 3x3 convolutions run in such tiles, however small their maps are and however few their channels."""

    def chosen(op: Convolve, positions: int, dtype: torch.dtype) -> int:
        return tile if op.geometry.kernel == (3, 3) and op.geometry.stride == (1, 1) else 0

    monkeypatch.setattr(weights, 'tile_of', chosen)


@torch.no_grad()
@tiles
@pytest.mark.parametrize(
    ('batch', 'size', 'threads'), [(1, (5, 7), 1), (3, (8, 8), 2), (2, (13, 22), 3), (1, (28, 33), 1)]
)
@pytest.mark.parametrize('channels', [(3, 20, 1), (34, 75, 40), (20, 130, 65)])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_convolutions(
    geometry: str,
    channels: tuple[int, int, int],
    batch: int,
    size: tuple[int, int],
    threads: int,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gated outputs, then gated inputs and outputs, then gated inputs and a residual sum."""
    run_in_tiles(tile, monkeypatch)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    inputs, inner, outputs = channels
    pairs = {'a': (inputs, inner), 'b': (inner, outputs), 'shortcut': (outputs, inner), 'c': (outputs, inner)}
    convs = {name: random_conv(*pair, torch.float32, **GEOMETRIES[geometry]) for name, pair in pairs.items()}
    gates = [gates_of(batch, inner, 0.4, 1), gates_of(batch, outputs, 0.6, 2)]
    x = torch.randn(batch, inputs, *size)
    operations = [
        Convolve(['x'], 'a', 0, conv=convs['a'], activation='relu'),
        Convolve(['a'], 'b', 1, conv=convs['b'], activation='relu'),
        Convolve(['b'], 'shortcut', conv=convs['shortcut']),
        Convolve(['b'], 'c', conv=convs['c'], residual='shortcut', activation='relu'),
    ]
    if geometry == 'not padded' and size == (5, 7):
        with pytest.raises(ValueError, match='cannot run'):
            run(operations, x, gates, 'c')
        return

    def convolved(name: str, given: np.ndarray) -> np.ndarray:
        return convolution(given, *arrays(convs[name]), convs[name])

    a = np.maximum(convolved('a', x.double().numpy()), 0) * gates[0].double().numpy()[:, :, None, None]
    b = np.maximum(convolved('b', a), 0) * gates[1].double().numpy()[:, :, None, None]
    c = np.maximum(convolved('c', b) + convolved('shortcut', b), 0)
    for name, expected in {'a': a, 'b': b, 'c': c}.items():
        assert close(run(operations, x, gates, name), expected, torch.float32)


@torch.no_grad()
@tiles
@pytest.mark.parametrize('kept', ['none', 'one', 'all', 'shared', 'some share'])
@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'dilated', 'cifar', 'vgg_cifar'])
def test_networks(structure: str, kept: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in groups of one and of several, whose kept experts are few, all, or anything between."""
    run_in_tiles(tile, monkeypatch)
    torch.set_num_threads(2)
    model = network(structure)
    gates = random_gates(model, 4, 0.4)
    for gate in gates:
        if kept in ('none', 'all'):
            gate[:] = 0.7 * (kept == 'all')
        elif kept == 'one':
            gate[:] = 0
            gate[:, 0] = 0.7
        else:
            gate[:3] = gate[0]
            if kept == 'shared':
                gate[:] = gate[0]
    assert_exact(with_gates(model, gates), images(4, 37))


@torch.no_grad()
@tiles
def test_rounding_errors(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 channels: about those of all products one by one; the usual points of Winograd's 4x4 tiles make it three
    times as much."""
    torch.manual_seed(0)
    conv = random_conv(256, 64, torch.float32)
    x = torch.randn(4, 256, 24, 24).relu()
    expected = convolution(x.double().numpy(), *arrays(conv), conv)
    errors = {}
    for number in (0, tile):
        run_in_tiles(number, monkeypatch)
        y = run([Convolve(['x'], 'y', conv=conv)], x, [], 'y')
        errors[number] = np.abs(y - expected).max() / np.abs(expected).max()
    print(f'largest error relative to the largest output: direct {errors[0]:.1e}, tiles of {tile} {errors[tile]:.1e}')
    assert 0 < errors[tile] < 3e-6


@torch.no_grad()
@tiles
def test_what_is_no_number_stays_in_its_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_tiles(tile, monkeypatch)
    conv = random_conv(16, 16, torch.float32)
    x = torch.randn(1, 16, 24, 24)
    x[0, 3, 12, 12] = torch.nan
    y = run([Convolve(['x'], 'y', conv=conv)], x, [], 'y')
    assert np.isnan(y[0, :, 11:14, 11:14]).all()
    reached = slice(12 - tile, 12 + tile)  # of tiles that begin at multiples of their side
    y[0, :, reached, reached] = 0
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ('size', 'geometry', 'channels', 'dtype', 'tile'),
    [
        (56, {}, (64, 64), torch.float32, 4),
        (16, {}, (32, 32), torch.float32, 4),
        (14, {}, (256, 256), torch.float32, 2),
        (8, {}, (64, 64), torch.float32, 2),
        (7, {}, (512, 512), torch.float32, 0),
        (56, {'dilation': 2}, (64, 64), torch.float32, 4),
        (56, {}, (3, 64), torch.float32, 0),
        (56, {}, (64, 3), torch.float32, 0),
        (56, {'stride': 2}, (64, 64), torch.float32, 0),
        (56, {'stride': (1, 2)}, (64, 64), torch.float32, 0),
        (56, {'kernel_size': 1}, (64, 64), torch.float32, 0),
        (56, {'kernel_size': 5}, (64, 64), torch.float32, 0),
        (56, {}, (64, 64), torch.bfloat16, 0),
    ],
)
def test_choice(size: int, geometry: dict[str, Any], channels: tuple[int, int], dtype: torch.dtype, tile: int) -> None:
    conv = random_conv(*channels, dtype, **geometry)
    assert tile_of(Convolve(['x'], 'y', conv=conv), size * size, dtype) == tile


def tiles_of(native: Any) -> set[int]:
    """The kinds of convolutions that a program has run."""
    return {int(tile) for schedule in native._schedules.values() for tile in schedule.operations['tile']}


@torch.no_grad()
@pytest.mark.parametrize('winograd', [True, False])
def test_groups_are_chosen_by_the_products_that_run(winograd: bool) -> None:
    model = network('cifar')
    sparse: Any = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 2, 0.4)))
    sparse.settings.winograd = winograd
    sparse.refresh()
    sparse(images(2, 40))
    (schedule,) = sparse.executor.native()._schedules.values()
    numbers = [number for number, op in enumerate(schedule.operations) if op['kind'] == CONVOLVE]
    executed = {schedule.values[schedule.operations[i]['output']]: int(schedule.operations[i]['tile']) for i in numbers}
    counted = {}
    for part, positions in zip(schedule.parts, schedule.grouping.positions, strict=True):
        convolutions = [op.output for op in part.operations if isinstance(op, Convolve)]
        if part.segment is not None:
            for name, reader in zip(convolutions, part.segment.readers, strict=True):
                counted[name] = reader.tile(round(positions * reader.positions))
    assert counted.items() <= executed.items()
    assert set(counted.values()) == ({0, 2, 4} if winograd else {0})


@pytest.mark.parametrize(('tile', 'least', 'most'), [(0, 1, 1), (2, 4 / 9, 0.6), (4, 2.25 / 9, 0.4)])
def test_cost_of_products(tile: int, least: float, most: float) -> None:
    """What tiles save of 9 products, less some for transforms; weights cost more, once for a group."""
    direct, tiled = (
        Segment(0, [64], [Reader(64 * 64 * 9, 1, None, 0, lambda positions, side=side: side)])  # type: ignore[misc]
        for side in (0, tile)
    )
    kept = np.array([[32]])
    products = direct.cost(kept, 1, 400, gathers=False)[0]
    assert products == 32 * 64 * 9 * 400
    assert least * products <= tiled.cost(kept, 1, 400, gathers=False)[0] <= most * products
    gathering = [segment.cost(kept, 1, 0)[0] for segment in (direct, tiled)]
    assert gathering[1] > gathering[0] if tile else gathering[1] == gathering[0]


@torch.no_grad()
def test_it_can_be_left_out() -> None:
    model = network('cifar')
    sparse: Any = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)))
    x = images(1, 40)
    with_fewer = sparse(x)
    assert tiles_of(sparse.executor.native()) == {0, 2, 4}
    sparse.settings.winograd = False
    sparse.refresh()
    direct = sparse(x)
    assert tiles_of(sparse.executor.native()) == {0}
    assert torch.allclose(direct, with_fewer, rtol=0, atol=1e-5 * direct.abs().max().item())
    assert not torch.equal(direct, with_fewer)


@torch.no_grad()
def test_gates_are_found_without() -> None:
    """Else an expert near the threshold might open or close."""
    sparse: Any = deepmoe_plugin.sparsify(network('cifar'))
    sparse(images(1, 40))
    assert sparse.executor._gating is not None
    assert not sparse.executor._gating.program.winograd


def test_cost_of_groups_is_the_sum_over_convolutions() -> None:
    """By a loop over convolutions and groups; the tile of each is asked for once, and not at every batch."""
    asked: list[int] = []

    def tile_of_all(positions: int) -> int:
        asked.append(positions)
        return 2

    layers = [(None, 0, 1e6), (0, 1, 5e4), (1, None, 7e3), (None, None, 300)]
    readers = [Reader(int(size), 0.25, reads, writes, tile_of_all) for reads, writes, size in layers]
    segment = Segment(3, [64, 32], readers)
    counts, images = np.array([[16, 32], [60, 16], [64, 16]]), np.array([1, 2, 5])
    for gathers in (True, False, True):
        for group, found in enumerate(segment.cost(counts, images, 400, gathers)):
            kept = [1 if c > 0.8 * width else c / width for c, width in zip(counts[group], (64, 32), strict=True)]
            total = 0
            for reads, writes, size in layers:
                part = (1 if reads is None else kept[reads]) * (1 if writes is None else kept[writes])
                gather = plan.FAR_GATHER_COST if size > plan.NEAR_WEIGHTS else plan.GATHER_COST
                total += part * size * images[group] * 100 * plan.share(2)
                total += gathers * part * size * (gather * (part < 1) + plan.WEIGHT_COST[2])
            assert found == pytest.approx(total)
    assert asked == [100] * len(layers)


def test_images_are_compared_one_by_one_only_where_that_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    best_pair = plan._best_pair

    def counted(segment: Segment, *rest: Any) -> float:
        compared.append(segment.widths[0])
        return best_pair(segment, *rest)

    monkeypatch.setattr(plan, '_best_pair', counted)
    random = np.random.default_rng(0)
    for width in (64, 1024):
        segment = Segment(0, [width], [Reader(9 * width**2, 1, None, 0), Reader(9 * width**2, 1, 0, None)])
        kept = [random.permuted(np.tile(np.arange(width) < width // 4, (3, 1)), axis=1)]
        plan.partition(segment, kept, 16)
    assert compared == [1024]
