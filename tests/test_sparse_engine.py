"""What surrounds sparse execution: stale weights, modes, the cache, grouping."""

import gc
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from small_networks import images
from test_sparse import STRUCTURES, assert_exact, network, random_gates, relative_error, with_gates
from torch import Tensor, nn

import deepmoe_plugin
from deepmoe_plugin.sparse import SparseNetwork, build
from deepmoe_plugin.sparse.calibrate import FRACTIONS, _is_faster
from deepmoe_plugin.sparse.conv import WeightCache
from deepmoe_plugin.sparse.engine import InputSparseConv
from deepmoe_plugin.sparse.fold import fingerprint
from deepmoe_plugin.sparse.plan import Plan, Reader, Segment

pytestmark = pytest.mark.usefixtures('always_sparse')


@torch.no_grad()
def _train_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


@torch.no_grad()
def _norm_statistics(model: nn.Module) -> None:
    model.layer1[0].bn1.running_mean.add_(1)


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


@torch.no_grad()
def _gating_only(model: nn.Module) -> None:
    model.gating.gates.weight.mul_(2)


def _new_parameter(model: nn.Module) -> None:
    model.layer2[0].conv2.weight = nn.Parameter(model.layer2[0].conv2.weight.detach() * 2)


def _new_classifier(model: nn.Module) -> None:
    model.reset_classifier(3)


def _new_type(model: nn.Module) -> None:
    model.double()


@torch.no_grad()
def _through_data(model: nn.Module) -> None:
    model.layer1[0].conv1.weight.data.mul_(2)


def _other_memory_of_one_parameter(model: nn.Module) -> None:
    model.layer1[0].bn1.weight.data = model.layer1[0].bn1.weight * 2


EDITS = [
    _other_memory_of_one_parameter,
    _train_step,
    _norm_statistics,
    _load,
    _gating_only,
    _new_parameter,
    _new_classifier,
    _new_type,
]


@torch.no_grad()
@pytest.mark.parametrize('edit', EDITS)
def test_edited_model_is_folded_anew(edit: Any) -> None:
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2, 40)
    before = sparse(x)
    edit(model)
    x = x.to(next(model.parameters()).dtype)
    after = sparse(x)
    assert after.shape != before.shape or relative_error(after, before.to(after.dtype)) > 1e-4 or edit is _new_type
    assert relative_error(after, model(x)) < 1e-5
    assert after.dtype == x.dtype


@torch.no_grad()
def test_edit_through_data_needs_refresh() -> None:
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2, 40)
    sparse(x)
    _through_data(model)
    assert relative_error(sparse(x), model(x)) > 1e-4
    sparse.refresh()
    assert relative_error(sparse(x), model(x)) < 1e-5


@torch.no_grad()
def test_same_weights_are_not_folded_again() -> None:
    model = network('cifar')
    sparse = deepmoe_plugin.sparsify(model)
    view = sparse.view()
    sparse(images(2))
    model.train()
    model.eval()
    sparse(images(2))
    assert sparse.view() is view


@torch.no_grad()
@pytest.mark.parametrize('structure', STRUCTURES)
def test_model_in_training_mode_is_left_alone(structure: str) -> None:
    model = network(structure, drop_rate=0.5)
    x = images(2, 40)
    expected = model(x)
    model.train()
    model.gating.freeze()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sparse = deepmoe_plugin.sparsify(model)
    assert relative_error(sparse.eval()(x), expected) < 1e-5
    assert relative_error(sparse.train()(x), expected) < 1e-5
    assert not sparse.training
    assert all(m.training for name, m in model.named_modules() if not name.startswith('gating'))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_surface_of_the_network() -> None:
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model)
    assert sparse.num_classes == model.num_classes
    assert sparse.pretrained_cfg is model.pretrained_cfg
    assert sparse.get_classifier() is model.fc
    with pytest.raises(AttributeError):
        _ = sparse.no_such_thing
    sparse.requires_grad_(True)
    assert not sparse(images()).requires_grad


@torch.no_grad()
def test_deepcopy_has_weights_of_its_own() -> None:
    import copy

    model = network('cifar')
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2)
    expected = model(x)
    twin = copy.deepcopy(sparse)
    _train_step(model)
    assert relative_error(twin(x), expected) < 1e-5
    assert relative_error(sparse(x), model(x)) < 1e-5


@torch.no_grad()
def test_network_inside_another_module() -> None:
    class Segmentor(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.decode_head = nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode_head(self.backbone(x)[:, :, None, None])

    model = Segmentor(network('cifar'))
    sparse = deepmoe_plugin.sparsify(model)
    assert isinstance(sparse.backbone, SparseNetwork)
    assert not isinstance(model.backbone, SparseNetwork)
    assert_exact(model, images(2), sparse)


def test_what_cannot_run_sparsely_says_so() -> None:
    with pytest.raises(ValueError, match='DeepMoE'):
        deepmoe_plugin.sparsify(timm.create_model('resnet20_cifar'))
    with pytest.raises(ValueError, match='cache_mb'):
        deepmoe_plugin.sparsify(network('cifar'), cache_mb=-1)
    model = network('cifar')
    model.layer1[0].bn1 = nn.GroupNorm(2, model.layer1[0].conv1.out_channels)
    with pytest.raises(ValueError, match='GroupNorm'):
        deepmoe_plugin.sparsify(model)


@torch.no_grad()
@pytest.mark.parametrize('cache_mb', [0.2, 64])
def test_cache_serves_repeated_gates_and_stays_bounded(cache_mb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('deepmoe_plugin.sparse.program.available', lambda x: False)
    model = network('bottleneck_a')
    gates = random_gates(model, 1, 0.3)
    sparse = deepmoe_plugin.sparsify(with_gates(model, gates), cache_mb=cache_mb)
    cache = sparse.executor.cache
    x = images(1, 40)
    for _ in range(3):
        assert_exact(model, x, sparse)
    assert 0 < cache.size <= cache_mb * 2**20
    assert cache.size == sum(weight.nbytes for weight in cache._weights.values())
    for seed in range(20):
        model.gating.gates = random_gates(model, 1, 0.3, seed % 4, scale=1 + seed)
        assert_exact(model, x, sparse)
        assert cache.size <= cache_mb * 2**20


def test_cache_admits_at_the_second_request() -> None:
    cache = WeightCache(100)
    assert cache.get(('a',)) == (None, False)
    assert cache.get(('a',)) == (None, True)
    cache.put(('a',), torch.zeros(10))
    cache.put(('b',), torch.zeros(10))
    assert cache.get(('a',))[0] is not None
    cache.put(('c',), torch.zeros(10))
    assert cache.get(('b',))[0] is None
    cache.put(('d',), torch.zeros(1000))
    assert cache.size == 80


@torch.no_grad()
def test_calls_in_and_out_of_inference_mode() -> None:
    """What one call leaves for the next must serve it in any mode; a thread of its own starts without leftovers."""
    model = network('cifar', layers=(1, 1, 1), widen=4)
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)), cache_mb=0)
    x = images(1)

    def run(mode: Any) -> Tensor:
        with mode():
            return sparse(x)

    with ThreadPoolExecutor(1) as pool:
        modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode)
        first, *others = [pool.submit(run, mode).result() for mode in modes]
    for other in others:
        torch.testing.assert_close(other, first)


def test_memory_does_not_grow() -> None:
    model = network('cifar', layers=(1, 1, 1), widen=2)
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 1, 0.4)), cache_mb=0.1)
    x = images(1, 32)

    def run(count: int, seed: int) -> float:
        for i in range(count):
            model.gating.gates = random_gates(model, 1, 0.4, seed + i)
            sparse(x)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = run(200, 0)
    assert run(1000, 1000) - before < 8


@torch.no_grad()
@pytest.mark.parametrize('is_faster', [True, False])
@pytest.mark.parametrize('structure', ['bottleneck_a', 'vgg'])
def test_calibration_chooses_what_is_faster(structure: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(candidate: Callable[[], object], current: Callable[[], object]) -> bool:
        candidate()
        current()
        return is_faster

    monkeypatch.setattr('deepmoe_plugin.sparse.calibrate._is_faster', timed)
    model = network(structure)
    sparse = deepmoe_plugin.sparsify(model, calibrate=images(1, 48))
    expected = FRACTIONS[-1] + 1e-6 if is_faster else 0
    assert sparse.settings.limits == pytest.approx(dict.fromkeys(range(len(model.expert_layers)), expected))
    assert sparse.settings.masked is not is_faster
    for _ in range(2):
        assert (sparse.executor is not None) is is_faster
        if is_faster:
            assert sparse.executor.native().most_kept.tolist() == [int(expected * w) for w in sparse.executor.widths]
            assert sparse.executor.by_torch().segments()[0].limits[0] == pytest.approx(expected)
        assert_exact(model, images(3, 48), sparse)
        _train_step(model)


@torch.no_grad()
def test_batches_of_small_convolutions_run_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('deepmoe_plugin.sparse.engine.SMALL_WORK', 8e6)
    monkeypatch.setattr('deepmoe_plugin.sparse.program.available', lambda x: False)
    model = network('bottleneck_a')
    sparse = deepmoe_plugin.sparsify(model)
    expected = {(1, 32): False, (2, 32): True, (2, 320): False}
    for (batch, size), is_masked in expected.items():
        x = images(batch, size)
        assert (sparse._view_for(x) is not sparse.view()) is is_masked
        assert_exact(model, x, sparse)
    sparse.settings.masked = False  # what calibration finds
    assert sparse._view_for(images(2, 32)) is sparse.view()


def test_calibration_needs_a_clear_win() -> None:
    def slow() -> None:
        time.sleep(0.004)

    def fast() -> None:
        time.sleep(0.001)

    assert _is_faster(fast, slow)
    assert not _is_faster(slow, fast)


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('limit', [0.0, 1.0])
@pytest.mark.parametrize('structure', STRUCTURES)
def test_any_choice_is_exact(structure: str, limit: float, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr('deepmoe_plugin.sparse.program.available', lambda x: False)
    model = network(structure)
    sparse = deepmoe_plugin.sparsify(with_gates(model, random_gates(model, 3, 0.4)))
    sparse.settings.limits = dict.fromkeys(range(len(model.expert_layers)), limit)
    sparse.executor.apply()
    assert_exact(model, images(3, 48), sparse)


def test_images_with_the_same_experts_share_a_group() -> None:
    segment = Segment(0, [64, 64], [Reader(64 * 64, 1, None, 0), Reader(64 * 64 * 9, 1, 0, 1)])
    gates = torch.zeros(5, 64)
    gates[[0, 2, 4], :16] = torch.rand(3, 16) + 0.1
    gates[[1, 3], 32:48] = 1
    groups = Plan([gates, gates]).groups(segment, 49)
    assert [group.images for group in groups] == [[0, 2, 4], [1, 3]]
    assert groups[0].kept[0] is not None
    assert groups[0].kept[0].rows.tolist() == list(range(16))
    assert torch.equal(groups[0].gates[1], gates[[0, 2, 4]])


def test_images_run_together_where_gathering_for_each_costs_more() -> None:
    """With one position, reading the weights of every image would take longer than computing all experts at once."""
    segment = Segment(0, [64], [Reader(64 * 64, 1, None, 0)])
    gates = [(torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) < 0.5).float()]
    assert [group.images for group in Plan(gates).groups(segment, 1)] == [list(range(32))]
    assert len(Plan(gates).groups(segment, 4096)) > 16


def test_layers_with_nearly_all_experts_run_dense() -> None:
    segment = Segment(0, [64, 64], [Reader(64 * 64, 1, None, 0), Reader(64 * 64 * 9, 1, 0, 1)])
    gates = torch.ones(1, 64)
    gates[:, :3] = 0
    few = torch.zeros(1, 64)
    (group,) = Plan([gates, few]).groups(segment, 49)
    assert group.kept[0] is None
    assert group.kept[1] is not None
    assert len(group.kept[1]) == 16
    assert not group.gates[1].any()


def test_moved_parameters_are_noticed() -> None:
    """Without buffers, which `.to` replaces, only the parameters' memory tells."""
    conv = nn.Conv2d(2, 2, 1)
    unchanged = fingerprint(conv)
    assert unchanged()
    conv.double()
    assert not unchanged()


@torch.no_grad()
@pytest.mark.parametrize('kept', [0.02, 0.9])
def test_convolution_over_its_whole_input(kept: float) -> None:
    """A few images with few inputs each read their own weights; many inputs are multiplied together."""
    conv = nn.Conv2d(6, 5, 3)
    x = torch.randn(4, 6, 3, 3) * (torch.rand(4, 6, 1, 1) < kept)
    x[0, 0] = 1
    assert relative_error(InputSparseConv(conv)(x), conv(x)) < 1e-5


@torch.no_grad()
def test_groups_change_from_batch_to_batch() -> None:
    """Images alone, all together, alone again, on one schedule, which keeps the groups and lists of the call before."""
    if build.library() is None:
        pytest.skip('needs a C++ compiler and the OpenMP library of GNU')
    model = network('cifar')
    gates = random_gates(model, 4, 0.5)
    sparse: Any = deepmoe_plugin.sparsify(with_gates(model, gates), cache_mb=0)
    x, found = images(4, 64), []
    for seed, kept in enumerate((0.5, 0.5, 1, 0.3, 1, 0.5)):
        for gate, drawn in zip(gates, random_gates(model, 4, kept, seed), strict=True):
            gate.copy_(drawn)
        assert_exact(model, x, sparse)
        (schedule,) = sparse.executor.native()._schedules.values()
        found.append([len(groups) for groups in schedule.grouping.last.chosen if groups])
    assert found[0] == found[1] == found[5]
    assert found[2] == found[4] != found[0]
