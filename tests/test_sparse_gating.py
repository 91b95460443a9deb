"""The gating network in native code: the gates and kept experts of the network, and torch wherever it must decide."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import images, small
from test_sparse import assert_exact, network, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize

import deepmoe_plugin
from deepmoe_plugin.sparse import build
from deepmoe_plugin.sparse.fold import eval_view
from deepmoe_plugin.sparse.gating import NativeGating, trace_of

pytestmark = [
    pytest.mark.skipif(build.library() is None, reason='needs a C++ compiler and the OpenMP library of GNU'),
    pytest.mark.usefixtures('always_sparse'),
]


def preactivations(model: nn.Module, x: Tensor) -> Tensor:
    """`W e` of each gate, (B, gates)."""
    gating = eval_view(model).gating
    return gating.embedding(x) @ gating.gates.weight.t().to(x.dtype)


def between(values: Tensor) -> float:
    """A threshold near the middle of some values that none of them is close to."""
    ordered = values.flatten().double().sort().values
    middle = ordered[len(ordered) // 3 : 2 * len(ordered) // 3]
    widest = int((middle[1:] - middle[:-1]).argmax())
    return float((middle[widest] + middle[widest + 1]) / 2)


@torch.no_grad()
def with_threshold(structure: str, x: Tensor, **kwargs: Any) -> nn.Module:
    """A network that closes about half of its experts for these images, each of them clearly."""
    model = network(structure, **kwargs)
    model.gating.gates.threshold.fill_(max(between(preactivations(model, x)), 0.01))
    return model


def native_gates(model: nn.Module, x: Tensor) -> Tensor | None:
    view: Any = eval_view(model)
    trace = trace_of(view.gating)
    assert trace is not None
    found = NativeGating(view.gating, trace)(x)
    return None if found is None else torch.from_numpy(found)


def runs_natively(sparse: Any) -> bool:
    return sparse.executor._gating is not None


@torch.no_grad()
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize(('batch', 'size'), [(1, 32), (3, 37)])
@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(embedding_channels=(5,), num_latent_experts=3),
        dict(embedding_channels=(7, 70, 20), num_latent_experts=17, in_chans=1),
        dict(embedding_channels=(16, 32, 64, 128, 256), num_latent_experts=1),
        dict(experts_per_gate=8, num_latent_experts=70),
    ],
    ids=str,
)
def test_gates_are_those_of_the_network(arguments: dict[str, Any], batch: int, size: int, threads: int) -> None:
    structure = 'grouped' if 'experts_per_gate' in arguments else 'cifar'
    x = images(batch, size, arguments.get('in_chans', 3))
    model = with_threshold(structure, x, **arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gates = native_gates(model, x)
    finally:
        torch.set_num_threads(before)
    assert gates is not None
    kept = model.gating.packed_gates(x) > 0
    expected = model.double().gating.packed_gates(x.double())
    assert torch.equal(gates > 0, kept)
    assert 0 < kept.double().mean() <= 1
    assert relative_error(gates.double(), expected) < 1e-5


@torch.no_grad()
def test_no_part_of_the_gating_network_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_threshold('cifar', images(2))
    expected = model(images(2))
    sparse = deepmoe_plugin.sparsify(model)

    def refuse(*args: Any) -> None:
        raise AssertionError('torch runs the gating network')

    monkeypatch.setattr(nn.Conv2d, 'forward', refuse)
    for part in (type(model.gating), type(model.gating.embedding), type(model.gating.gates)):
        monkeypatch.setattr(part, 'forward', refuse)
    assert relative_error(sparse(images(2)), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 4])
def test_close_calls_are_left_to_torch(batch: int) -> None:
    """An expert right at the threshold is kept or closed as the masked network has it."""
    x = images(batch)
    model = network('cifar')
    values = preactivations(model, x)[0]
    for value in values[values > 0][:20]:
        for threshold in (value, value.nextafter(torch.tensor(0.0)), value.nextafter(torch.tensor(9.0))):
            model.gating.gates.threshold.copy_(threshold)
            assert native_gates(model, x) is None
    assert_exact(model, x)


@torch.no_grad()
def test_many_gates_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4)
    model = with_threshold('cifar', x)
    num_gates = len(model.gating.gates.weight)
    for limit in (4 * num_gates, 4 * num_gates - 1):
        monkeypatch.setattr('deepmoe_plugin.sparse.gating.MAX_GATES', limit)
        assert (native_gates(model, x) is None) is (limit < 4 * num_gates)
        assert_exact(model, x)


@torch.no_grad()
def test_gates_without_weights_are_closed_for_sure() -> None:
    """Their `W e` is the threshold itself, which is no close call."""
    model = network('cifar')
    model.gating.gates.weight.abs_().add_(0.5)  # all others are kept, and no close call either
    model.gating.gates.weight[3].zero_()
    gates = native_gates(model, images(2))
    assert gates is not None
    assert not gates[:, 3].any()


@torch.no_grad()
def test_frozen_gating_runs_natively() -> None:
    x = images(2)
    model = with_threshold('cifar', x)
    model.gating.freeze()
    sparse = deepmoe_plugin.sparsify(model)
    assert_exact(model, x, sparse)
    assert runs_natively(sparse)


# ------------------------------------------------------------------------------------------------ changes


@torch.no_grad()
def _new_threshold(gating: Any) -> None:
    gating.gates.threshold.add_(0.2)


@torch.no_grad()
def _new_rows(gating: Any) -> None:
    gating.gates.weight.mul_(1.3)


@torch.no_grad()
def _new_mixture(gating: Any) -> None:
    gating.embedding.mixture.bias.add_(torch.linspace(0, 3, len(gating.embedding.mixture.bias)))


@torch.no_grad()
def _new_statistics(gating: Any) -> None:
    gating.embedding.layers[1].norm.running_mean.add_(1)


CHANGES = [_new_threshold, _new_rows, _new_mixture, _new_statistics]


@torch.no_grad()
@pytest.mark.parametrize('change', CHANGES)
def test_changes_in_place_are_noticed(change: Callable[[Any], None]) -> None:
    x = images(2)
    model = with_threshold('cifar', x)
    sparse = deepmoe_plugin.sparsify(model)
    before = sparse(x)
    change(model.gating)
    after = sparse(x)
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, model(x)) < 1e-5
    assert runs_natively(sparse)


@torch.no_grad()
def test_a_new_budget_is_noticed() -> None:
    x = images(6)
    model = with_threshold('cifar', x)
    sparse = deepmoe_plugin.sparsify(model)
    sparse(x)
    deepmoe_plugin.set_budget(model, x, kept=0.3)
    assert relative_error(sparse(x), model(x)) < 1e-5


# --------------------------------------------------------------------------------------- what torch must run


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _own_method(gating: Any) -> None:
    packed = gating.packed_gates
    gating.packed_gates = lambda x: packed(x) * 2


def _own_pool(gating: Any) -> None:
    gating.embedding.pool = lambda x, layers=gating.embedding.layers: layers(x).amax(dim=(2, 3))


class _OtherEmbedding(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x.flip(3) * 2)


def _new_embedding(gating: Any) -> None:
    gating.embedding = _OtherEmbedding(gating.embedding)


def _hook_of(*path: str) -> Callable[[Any], None]:
    def hook(gating: Any) -> None:
        gating.get_submodule('.'.join(path)).register_forward_hook(lambda module, args, out: out * 1.5)

    return hook


def _new_part(path: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda gating: gating.set_submodule(path, make())


def _parametrised(gating: Any) -> None:
    parametrize.register_parametrization(gating.embedding.mixture, 'weight', _Doubled())


FOREIGN: dict[str, Callable[[Any], None]] = {
    'hook of the heads': _hook_of('gates'),
    'hook of the embedding': _hook_of('embedding'),
    'hook of the layers': _hook_of('embedding', 'layers'),
    'hook of a layer': _hook_of('embedding', 'layers', '0'),
    'hook of an activation': _hook_of('embedding', 'layers', '1', 'act'),
    'method': _own_method,
    'pooling': _own_pool,
    'embedding': _new_embedding,
    'activation': _new_part('embedding.layers.0.act', nn.SiLU),
    'norm': _new_part('embedding.layers.0.norm', lambda: nn.GroupNorm(4, 16)),
    'norm without statistics': _new_part(
        'embedding.layers.0.norm', lambda: nn.BatchNorm2d(16, track_running_stats=False)
    ),
    'padding': _new_part('embedding.layers.0.conv', lambda: nn.Conv2d(3, 16, 3, padding=1, padding_mode='circular')),
    'parametrisation': _parametrised,
}


@torch.no_grad()
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('change', FOREIGN)
def test_torch_runs_what_a_user_changed(change: str, when: str) -> None:
    if when == 'after' and change in ('method', 'pooling'):
        pytest.skip('replaced methods are noticed when the network is read')
    torch.manual_seed(0)
    x = images(2)
    model = with_threshold('cifar', x)
    model.gating.gates.threshold.zero_()
    before = model(x)
    sparse = deepmoe_plugin.sparsify(model) if when == 'after' else None
    FOREIGN[change](model.gating)
    sparse = sparse or deepmoe_plugin.sparsify(model)
    after = model(x)
    assert relative_error(after, before) > 1e-4
    assert relative_error(sparse(x), after) < 1e-5
    assert not runs_natively(sparse)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_torch_runs_other_number_types(dtype: torch.dtype) -> None:
    model = network('cifar').to(dtype)
    sparse = deepmoe_plugin.sparsify(model)
    x = images(2, dtype=dtype)
    assert relative_error(sparse(x).double(), model(x).double()) < (0.05 if dtype == torch.bfloat16 else 1e-12)
    assert not runs_natively(sparse)


@torch.no_grad()
def test_torch_runs_under_autocast() -> None:
    model = network('cifar')
    sparse = deepmoe_plugin.sparsify(model)
    with torch.autocast('cpu', torch.bfloat16):
        sparse(images(2))
    assert not runs_natively(sparse)


@torch.no_grad()
def test_training_mode_of_the_network_does_not_matter() -> None:
    x = images(2)
    model = with_threshold('cifar', x)
    expected = model(x)
    sparse = deepmoe_plugin.sparsify(model.train())
    assert relative_error(sparse(x), expected) < 1e-5
    assert runs_natively(sparse)


# -------------------------------------------------------------------------------------------------- bad input


@torch.no_grad()
@pytest.mark.parametrize(
    'x',
    [
        images(2, 2),
        images(2, channels=4),
        images(2)[0],
        images(2).int(),
        images(2).index_fill(3, torch.tensor(5), torch.nan),
    ],
    ids=['size', 'channels', 'dimensions', 'type', 'nan'],
)
def test_bad_images_are_refused_alike(x: Tensor) -> None:
    model = small('cifar').eval()
    with pytest.raises(ValueError) as by_torch:  # noqa: PT011 (its text is what the other one is compared with)
        model(x)
    with pytest.raises(ValueError) as natively:  # noqa: PT011
        deepmoe_plugin.sparsify(model)(x)
    assert str(natively.value) == str(by_torch.value)


@torch.no_grad()
def test_damaged_gates_are_refused() -> None:
    model = small('cifar').eval()
    model.gating.gates.weight[5, 3] = torch.inf
    with pytest.raises(ValueError, match='weight is not finite'):
        deepmoe_plugin.sparsify(model)(images())


@torch.no_grad()
def test_a_gating_network_of_another_number_type_is_refused_alike() -> None:
    model = network('cifar').bfloat16()
    model.gating.float()
    x = images(dtype=torch.bfloat16)
    for run in (model, deepmoe_plugin.sparsify(model)):
        with pytest.raises(RuntimeError, match='type'):
            run(x)
